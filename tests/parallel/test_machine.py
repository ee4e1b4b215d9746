"""Reading a node: the text of `nvidia-smi topo -m`, NCCL's XML, and an NVML that answers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from moesaic.parallel.machine import Machine, from_nccl, from_nvml, from_smi


def smi(gpus: int, link: str, nics: int, near: str = "PIX") -> str:
    """A matrix in the tool's form: tabs, padded X, affinities, NIC rows and legends."""
    names = [f"GPU{i}" for i in range(gpus)] + [f"NIC{i}" for i in range(nics)]
    rows = ["\t" + "\t".join(names) + "\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID"]
    for i in range(gpus):
        cells = [" X " if i == j else link for j in range(gpus)]
        cells += [near if i * nics // gpus == j else "SYS" for j in range(nics)]
        rows.append(f"GPU{i}\t" + "\t".join(cells) + "\t0-47,96-143\t0\t\tN/A")
    for i in range(nics):
        rows.append(f"NIC{i}\t" + "\t".join(["SYS"] * (gpus + nics)))
    rows += ["", "Legend:", "  X    = Self", "  NV#  = Connection over bonded NVLinks", ""]
    rows += ["NIC Legend:", ""] + [f"  NIC{i}: mlx5_{i + 3}" for i in range(nics)]
    return "\n".join(rows)


def test_eight_gpus_behind_switches() -> None:
    machine = from_smi(smi(8, "NV18", 8))
    assert machine.gpus == 8 and machine.nvlinks[0] == (0, *[18] * 7)
    assert machine.nic_names[0] == "mlx5_3" and machine.nic_of_gpu() == tuple(range(8))
    topology = machine.topology(4, nic_bytes_per_s=50e9)
    assert topology.ranks == 32 and topology.gpu_bytes_per_s == 450e9
    assert topology.nics == tuple(range(8))


def test_four_gpus_wired_to_each_other_add_their_links() -> None:
    assert from_smi(smi(4, "NV6", 0)).gpu_bytes_per_s() == 450e9
    assert from_smi(smi(4, "NV18", 0)).gpu_bytes_per_s() == 450e9
    assert from_smi(smi(2, "NV4", 0)).gpu_bytes_per_s() == 100e9


def test_without_nvlink_pcie_carries_and_shared_nics_are_shared() -> None:
    machine = from_smi("\x1b[4m" + smi(4, "NODE", 2, near="PHB") + "\x1b[0m")
    assert machine.gpu_bytes_per_s() == machine.pcie_bytes_per_s
    assert machine.nic_of_gpu() == (0, 0, 1, 1)
    topology = machine.topology(2, nic_bytes_per_s=25e9)
    assert (topology.nics_per_node, topology.nics) == (2, (0, 0, 1, 1))


def test_a_far_nic_is_left_out() -> None:
    text = smi(2, "NV18", 2).replace("GPU1\tNV18\t X \tSYS\tPIX", "GPU1\tNV18\t X \tPIX\tSYS")
    machine = from_smi(text)
    assert machine.nic_of_gpu() == (0, 0) and machine.topology().nics_per_node == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no line with GPU0"),
        (smi(2, "NV18", 0).replace("NV18", "NVX"), "topo.txt:2: 'NVX' is neither NV# nor"),
        ("\tGPU0\tGPU1\nGPU0\t X", "topo.txt:2: 1 cells, expected 2"),
        ("\tGPU0\tGPU1\nGPU0\t X \tNV4", "1 rows of GPUs under 2 columns"),
        ("\tGPU0\tGPU1\nGPU0\t X \tNV4\nGPU1\tNV2\t X", "4 links to GPU1, which has 2 back"),
    ],
)
def test_broken_text_is_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        from_smi(text, source="topo.txt")


def test_nodes_need_nics_and_their_rate() -> None:
    with pytest.raises(ValueError, match="0 NICs"):
        from_smi(smi(2, "NV18", 0)).topology(2, nic_bytes_per_s=50e9)
    with pytest.raises(ValueError, match="rate None"):
        from_smi(smi(2, "NV18", 2)).topology(2)


GPU = """
    <pci busid="0000:{bus}0:00.0" class="0x060400" link_speed="32.0 GT/s PCIe" link_width="16">
      <pci busid="0000:{bus}1:00.0" class="0x030200" link_speed="32.0 GT/s PCIe" link_width="16">
        <gpu dev="{dev}" sm="90" rank="{dev}" gdr="1">{links}</gpu>
      </pci>
      <pci busid="0000:{bus}2:00.0" class="0x020700" link_speed="32.0 GT/s PCIe" link_width="16">
        <nic><net name="mlx5_{dev}" dev="{dev}" speed="400000" port="1" gdr="1"/></nic>
      </pci>
    </pci>"""
SWITCH = '<nvlink target="0000:c{n}:00.0" count="{count}" tclass="0x068000"/>'


def nccl(links: list[str]) -> str:
    """A system of two sockets with two GPUs and two NICs each."""
    gpus = [GPU.format(bus=d + 1, dev=d, links=link) for d, link in enumerate(links)]
    half = len(gpus) // 2
    cpus = ["".join(gpus[:half]), "".join(gpus[half:])]
    body = "".join(f'<cpu numaid="{i}" arch="x86_64">{c}</cpu>' for i, c in enumerate(cpus))
    return f'<system version="1">{body}</system>'


def test_nccl_xml_gives_links_nics_and_rates() -> None:
    switches = "".join(SWITCH.format(n=n, count=c) for n, c in enumerate((5, 4, 4, 5)))
    machine = from_nccl(nccl([switches] * 4))
    assert machine.nvlinks == tuple(tuple(0 if a == b else 18 for b in range(4)) for a in range(4))
    assert machine.nic_of_gpu() == (0, 1, 2, 3) and machine.nic_distances[0][:3] == (
        "PIX",
        "PHB",
        "SYS",
    )
    topology = machine.topology(2)
    assert (topology.gpu_bytes_per_s, topology.nic_bytes_per_s) == (450e9, 50e9)
    assert machine.pcie_bytes_per_s == pytest.approx(63e9, rel=0.01)


def test_nccl_xml_with_links_from_gpu_to_gpu() -> None:
    bus = [f"0000:{d + 1}1:00.0" for d in range(4)]
    links = [
        "".join(
            f'<nvlink target="{bus[b]}" count="4" tclass="0x030200"/>' for b in range(4) if b != a
        )
        for a in range(4)
    ]
    assert from_nccl(nccl(links)).gpu_bytes_per_s() == 300e9
    with pytest.raises(ValueError, match=r"GPU 3 has an nvlink to 0000:ff:00\.0"):
        from_nccl(nccl([*links[:3], links[3].replace(bus[0], "0000:ff:00.0")]))


@pytest.mark.parametrize(
    ("text", "words"), [("<system>", "not XML"), ("<system/>", "no <gpu> element")]
)
def test_broken_xml_is_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        from_nccl(text, source="topo.xml")


class Refused(Exception):
    """NVML's error."""


def nvml(switched: bool, gpus: int = 4) -> Any:
    """An NVML of GPUs with 12 links each, to switches or in a full mesh of 4 a pair."""
    bus = [f"00000000:{i}A:00.0".encode() for i in range(gpus)]

    def remote(handle: int, link: int) -> Any:
        if link >= 12:
            raise Refused
        peers = [b for i, b in enumerate(bus) if i != handle]
        return SimpleNamespace(busId=b"00000000:C0:00.0" if switched else peers[link // 4])

    def state(handle: int, link: int) -> int:
        if link >= 12:
            raise Refused
        return 1

    return SimpleNamespace(
        NVMLError=Refused,
        NVML_NVLINK_MAX_LINKS=18,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: gpus,
        nvmlDeviceGetHandleByIndex=lambda i: i,
        nvmlDeviceGetPciInfo=lambda h: SimpleNamespace(busId=bus[h]),
        nvmlDeviceGetNvLinkState=state,
        nvmlDeviceGetNvLinkRemotePciInfo=remote,
        nvmlDeviceGetTopologyCommonAncestor=lambda a, b: 50 if a // 2 != b // 2 else 20,
        nvmlDeviceGetCudaComputeCapability=lambda h: (8, 0),
        nvmlDeviceGetMaxPcieLinkGeneration=lambda h: 4,
        nvmlDeviceGetMaxPcieLinkWidth=lambda h: 16,
    )


@pytest.mark.parametrize("switched", [True, False])
def test_nvml_counts_links_to_switches_and_to_gpus(switched: bool) -> None:
    machine = from_nvml(nvml(switched))
    assert machine.nvlinks[0][1] == (12 if switched else 4)
    assert machine.gpu_bytes_per_s() == 300e9
    assert machine.distances[0] == ("X", "PXB", "SYS", "SYS")
    assert machine.pcie_bytes_per_s == pytest.approx(31.5e9, rel=0.01)


def test_no_nvml_and_no_gpu_are_said() -> None:
    def fails() -> None:
        raise Refused("no driver")

    with pytest.raises(RuntimeError, match="NVML does not start"):
        from_nvml(SimpleNamespace(NVMLError=Refused, nvmlInit=fails))
    with pytest.raises(RuntimeError, match="no GPU"):
        from_nvml(nvml(True, gpus=0))


def test_tables_of_the_wrong_form_are_refused() -> None:
    with pytest.raises(ValueError, match="2 x 2 GPUs"):
        Machine(nvlinks=((0, 1), (1,)), distances=(("X", "SYS"), ("SYS", "X")))
