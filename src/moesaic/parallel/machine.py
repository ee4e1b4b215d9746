"""What one node looks like, from NVML, from `nvidia-smi topo -m`, or from NCCL's topology XML.

    P GPUs · R NICs

All three give a `Machine`; `Machine.topology` makes the links of any number of such nodes from it.
"""

from __future__ import annotations

import importlib
import re
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from typing import Any

from .topology import Topology

MOST_NVLINKS = 18
# How far apart, from the same switch to another socket: the legend of `nvidia-smi topo -m`.
DISTANCES = ("X", "PIX", "PXB", "PHB", "NODE", "SYS")
# One NVLink of generation 3 or 4 carries 25 GB/s each way, one of generation 5 50 GB/s.
NVLINK_BYTES_PER_S = {8: 25e9, 9: 25e9, 10: 50e9, 12: 50e9}
PCIE_LANE_BYTES_PER_S = {"2.5": 0.25e9, "5": 0.5e9, "8": 0.985e9, "16": 1.969e9, "32": 3.938e9}
# NVML's levels of common ancestors, in its order.
NVML_LEVELS = {0: "PIX", 10: "PIX", 20: "PXB", 30: "PHB", 40: "NODE", 50: "SYS"}

Chain = tuple[ET.Element, ...]
"""The elements of NCCL's XML above a device, below the root."""
XmlGpu = tuple[Chain, ET.Element, ET.Element]
"""That chain, the PCI element, the GPU."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One node.

    Args:
        nvlinks: (P, P) NVLinks between two GPUs; through a switch, all of a GPU's links.
        distances: (P, P) the PCIe distance of two GPUs, one of `DISTANCES`.
        nic_distances: (P, R) that of a GPU and a NIC.
        nic_names: R names.
        nic_bytes_per_s: R rates, None where the source does not tell.
        nvlink_bytes_per_s: one link, one direction.
        pcie_bytes_per_s: a GPU's slot, one direction.
        source: where this was read.

    Raises:
        ValueError: tables of the wrong form, or a distance that is no code.
    """

    nvlinks: tuple[tuple[int, ...], ...]
    distances: tuple[tuple[str, ...], ...]
    nic_distances: tuple[tuple[str, ...], ...] = ()
    nic_names: tuple[str, ...] = ()
    nic_bytes_per_s: tuple[float | None, ...] = ()
    nvlink_bytes_per_s: float = 25e9
    pcie_bytes_per_s: float = 50e9
    source: str = "given"

    def __post_init__(self) -> None:
        gpus, nics = len(self.nvlinks), len(self.nic_names)
        square = all(len(row) == gpus for row in (*self.nvlinks, *self.distances))
        if not gpus or not square or len(self.distances) != gpus:
            raise ValueError(f"{self.source}: tables must be of {gpus} x {gpus} GPUs")
        if nics and (
            len(self.nic_distances) != gpus or any(len(row) != nics for row in self.nic_distances)
        ):
            raise ValueError(f"{self.source}: NIC distances must be of {gpus} x {nics}")
        for a in range(gpus):
            for b in range(gpus):
                if self.nvlinks[a][b] != self.nvlinks[b][a]:
                    raise ValueError(
                        f"{self.source}: GPU{a} has {self.nvlinks[a][b]} links to GPU{b}, "
                        f"which has {self.nvlinks[b][a]} back"
                    )

    @property
    def gpus(self) -> int:
        """P."""
        return len(self.nvlinks)

    def nic_of_gpu(self) -> tuple[int, ...]:
        """The nearest NIC of each GPU; among equally near ones, the one used least so far."""
        used = [0] * len(self.nic_names)
        chosen = []
        for row in self.nic_distances:
            nic = min(range(len(row)), key=lambda i: (DISTANCES.index(row[i]), used[i], i))
            used[nic] += 1
            chosen.append(nic)
        return tuple(chosen)

    def gpu_bytes_per_s(self) -> float:
        """What the worst-connected GPU sends to the others: over NVLink, else over PCIe."""
        if self.gpus == 1:
            return self.pcie_bytes_per_s
        meshed = all(
            self.nvlinks[a][b] for a in range(self.gpus) for b in range(self.gpus) if a != b
        )
        if not meshed:
            return self.pcie_bytes_per_s
        # Behind a switch every peer shows all links of the GPU, and no GPU has more than 18.
        through_switch = any(sum(row) > MOST_NVLINKS for row in self.nvlinks)
        total = [max(row) if through_switch else sum(row) for row in self.nvlinks]
        return min(total) * self.nvlink_bytes_per_s

    def topology(self, nodes: int = 1, *, nic_bytes_per_s: float | None = None) -> Topology:
        """The links of `nodes` nodes like this one.

        Args:
            nodes: N.
            nic_bytes_per_s: the rate of one NIC, for sources that do not tell it.

        Raises:
            ValueError: several nodes without NICs or without their rate.
        """
        known = [rate for rate in self.nic_bytes_per_s if rate]
        rate = nic_bytes_per_s or (min(known) if known else None)
        if nodes > 1 and (not self.nic_names or rate is None):
            raise ValueError(
                f"{self.source}: {len(self.nic_names)} NICs of rate {rate} cannot join {nodes} "
                "nodes; give nic_bytes_per_s or a cluster file"
            )
        mapping = self.nic_of_gpu() if self.nic_names else ()
        used = sorted(set(mapping))
        return Topology(
            nodes=nodes,
            gpus_per_node=self.gpus,
            gpu_bytes_per_s=self.gpu_bytes_per_s(),
            nics_per_node=len(used),
            nic_bytes_per_s=rate if used else None,
            nic_of_gpu=tuple(used.index(nic) for nic in mapping) if used else None,
        )


def _links(code: str, where: str) -> int:
    """The number in NV#; 0 for a PCIe code."""
    if match := re.fullmatch(r"NV(\d+)", code):
        return int(match.group(1))
    if code not in DISTANCES:
        raise ValueError(f"{where}: {code!r} is neither NV# nor one of {', '.join(DISTANCES)}")
    return 0


def from_smi(text: str, *, source: str = "nvidia-smi topo -m") -> Machine:
    """Read what `nvidia-smi topo -m` prints.

    Args:
        text: the output, with or without colours and legends.
        source: how messages call it.

    Raises:
        ValueError: no matrix, a row cut short or an unknown code; names the line.
    """
    lines = re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()
    heads = [(n, line.split()) for n, line in enumerate(lines, 1) if "GPU0" in line.split()]
    if not heads:
        raise ValueError(f"{source}: no line with GPU0; give the output of nvidia-smi topo -m")
    first, words = heads[0]
    names = [w for w in words if re.fullmatch(r"(GPU|NIC)\d+|mlx\S+", w)]
    gpus = sum(name.startswith("GPU") for name in names)
    nics = [name for name in names if not name.startswith("GPU")]
    rows: list[list[str]] = []
    for number, line in enumerate(lines[first:], first + 1):
        cells = line.split()
        if not cells or not re.fullmatch(r"GPU\d+", cells[0]):
            continue
        codes = cells[1 : 1 + len(names)]
        if len(codes) < len(names):
            raise ValueError(f"{source}:{number}: {len(codes)} cells, expected {len(names)}")
        for code in codes:
            _links(code, f"{source}:{number}")
        rows.append(codes)
    if len(rows) != gpus:
        raise ValueError(f"{source}: {len(rows)} rows of GPUs under {gpus} columns")
    legend = dict(re.findall(r"^\s*(NIC\d+):\s*(\S+)", "\n".join(lines), re.MULTILINE))
    return Machine(
        nvlinks=tuple(tuple(_links(c, source) for c in row[:gpus]) for row in rows),
        distances=tuple(
            tuple("SYS" if c.startswith("NV") else c for c in row[:gpus]) for row in rows
        ),
        nic_distances=tuple(tuple(row[gpus:]) for row in rows) if nics else (),
        nic_names=tuple(legend.get(name, name) for name in nics),
        nic_bytes_per_s=(None,) * len(nics),
        source=source,
    )


def _distance(one: Chain, other: Chain) -> str:
    """The code of two devices, from their chains of elements below the root."""
    common = sum(a is b for a, b in zip(one, other, strict=False))
    if common == 0:
        return "SYS"
    if one[common - 1].tag == "cpu":
        return "PHB"
    return "PIX" if min(len(one), len(other)) - common <= 2 else "PXB"


def _lane_rate(pci: ET.Element) -> float:
    speed = pci.get("link_speed", "").split(" ")[0].removesuffix(".0")
    return PCIE_LANE_BYTES_PER_S.get(speed, 0.0) * int(pci.get("link_width", "0") or 0)


def _devices(root: ET.Element) -> tuple[list[XmlGpu], list[tuple[Chain, ET.Element]]]:
    """GPUs by their numbers, and NICs, each with the elements above it."""
    gpus: list[XmlGpu] = []
    nets: list[tuple[Chain, ET.Element]] = []

    def walk(element: ET.Element, chain: Chain) -> None:
        for child in element:
            if child.tag == "gpu":
                gpus.append((chain, element, child))
            elif child.tag == "net":
                nets.append((chain[:-1] if element.tag == "nic" else chain, child))
            else:
                walk(child, (*chain, child))

    walk(root, ())
    return sorted(gpus, key=lambda item: int(item[2].get("dev", "0"))), nets


def _xml_links(gpus: list[XmlGpu], source: str) -> list[list[int]]:
    """NVLinks of every pair; a switch joins a GPU to all others."""
    bus = {pci.get("busid", ""): i for i, (_, pci, _) in enumerate(gpus)}
    links = [[0] * len(gpus) for _ in gpus]
    for i, (_, _, gpu) in enumerate(gpus):
        for link in gpu.findall("nvlink"):
            count, target = int(link.get("count", "0")), link.get("target", "")
            if link.get("tclass") == "0x068000":
                links[i] = [x + count for x in links[i]]
            elif target in bus:
                links[i][bus[target]] += count
            elif (link.get("tclass") or "").startswith("0x03"):
                raise ValueError(f"{source}: GPU {i} has an nvlink to {target}, which is no GPU")
    for i in range(len(gpus)):
        links[i][i] = 0
    return links


def from_nccl(text: str, *, source: str = "NCCL topology") -> Machine:
    """Read the XML that NCCL writes where NCCL_TOPO_DUMP_FILE says.

    Raises:
        ValueError: not XML, no GPU in it, or an NVLink to a GPU that is not in it.
    """
    try:
        root = ET.fromstring(text)
    except ET.ParseError as error:
        raise ValueError(f"{source}: not XML ({error})") from error
    gpus, nets = _devices(root)
    if not gpus:
        raise ValueError(f"{source}: no <gpu> element; dump it with NCCL_TOPO_DUMP_FILE")
    links = _xml_links(gpus, source)
    chains = [chain for chain, _, _ in gpus]
    sm = int(gpus[0][2].get("sm", "90")) // 10
    lanes = [_lane_rate(pci) for _, pci, _ in gpus]
    speeds = [float(net.get("speed", "0") or 0) * 1e6 / 8 for _, net in nets]
    return Machine(
        nvlinks=tuple(map(tuple, links)),
        distances=tuple(tuple("X" if a is b else _distance(a, b) for b in chains) for a in chains),
        nic_distances=tuple(tuple(_distance(a, b) for b, _ in nets) for a in chains),
        nic_names=tuple(net.get("name", "") for _, net in nets),
        nic_bytes_per_s=tuple(speed or None for speed in speeds),
        nvlink_bytes_per_s=NVLINK_BYTES_PER_S.get(sm, 25e9),
        pcie_bytes_per_s=min(lanes) or 50e9,
        source=source,
    )


def from_nvml(nvml: Any = None) -> Machine:
    """Ask NVML about this machine's GPUs; NICs are not in it.

    Args:
        nvml: a module with NVML's functions; None imports pynvml.

    Raises:
        RuntimeError: NVML cannot be started or there is no GPU.
    """
    if nvml is None:
        nvml = importlib.import_module("pynvml")
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        raise RuntimeError(
            f"NVML does not start ({error}); use a machine with an NVIDIA driver or a cluster file"
        ) from error
    try:
        return _ask(nvml)
    finally:
        nvml.nvmlShutdown()


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _ask(nvml: Any) -> Machine:
    handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    if not handles:
        raise RuntimeError("NVML shows no GPU; use a machine with one or a cluster file")
    bus = {_text(nvml.nvmlDeviceGetPciInfo(h).busId).lower(): i for i, h in enumerate(handles)}
    links = [[0] * len(handles) for _ in handles]
    switched = [0] * len(handles)
    for i, handle in enumerate(handles):
        for link in range(nvml.NVML_NVLINK_MAX_LINKS):
            try:
                if not nvml.nvmlDeviceGetNvLinkState(handle, link):
                    continue
                remote = nvml.nvmlDeviceGetNvLinkRemotePciInfo(handle, link)
            except nvml.NVMLError:
                continue
            peer = bus.get(_text(remote.busId).lower())
            if peer is None:
                switched[i] += 1
            else:
                links[i][peer] += 1
    for a in range(len(handles)):
        for b in range(len(handles)):
            if a != b:
                links[a][b] += min(switched[a], switched[b])
    levels = [
        [
            "X" if a is b else NVML_LEVELS[nvml.nvmlDeviceGetTopologyCommonAncestor(a, b)]
            for b in handles
        ]
        for a in handles
    ]
    major = nvml.nvmlDeviceGetCudaComputeCapability(handles[0])[0]
    generation = nvml.nvmlDeviceGetMaxPcieLinkGeneration(handles[0])
    lane = list(PCIE_LANE_BYTES_PER_S.values())[max(0, min(generation, 5) - 1)]
    return Machine(
        nvlinks=tuple(map(tuple, links)),
        distances=tuple(map(tuple, levels)),
        nvlink_bytes_per_s=NVLINK_BYTES_PER_S.get(major, 25e9),
        pcie_bytes_per_s=lane * nvml.nvmlDeviceGetMaxPcieLinkWidth(handles[0]),
        source="NVML",
    )
