"""On GPUs: NVML, `nvidia-smi topo -m` and NCCL's dump tell of the same machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch

from moesaic.parallel.machine import Machine, from_nccl, from_nvml, from_smi

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA devices"),
]
ONE_SUM = """
import os, torch, torch.distributed as dist
device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
torch.cuda.set_device(device)
dist.init_process_group("nccl", device_id=device)
dist.all_reduce(torch.ones(1, device=device))
torch.cuda.synchronize()
dist.destroy_process_group()
"""


def assert_whole(machine: Machine) -> None:
    """As many GPUs as torch sees, and a rate that a GPU of today has."""
    assert machine.gpus == torch.cuda.device_count()
    assert 10e9 < machine.gpu_bytes_per_s() < 2e12
    assert machine.topology().ranks == machine.gpus


@pytest.fixture(autouse=True)
def whole_machine() -> None:
    if os.environ.get("CUDA_VISIBLE_DEVICES"):
        pytest.skip("some GPUs are hidden from torch, not from NVML")


def test_nvml_and_nvidia_smi_agree() -> None:
    pytest.importorskip("pynvml")
    asked = from_nvml()
    assert_whole(asked)
    command = shutil.which("nvidia-smi")
    if command is None:
        pytest.skip("no nvidia-smi")
    done = subprocess.run([command, "topo", "-m"], capture_output=True, text=True, timeout=60)
    if done.returncode:
        pytest.skip(f"nvidia-smi topo -m: {done.stdout[-200:]}{done.stderr[-200:]}")
    printed = from_smi(done.stdout)
    assert_whole(printed)
    assert printed.nvlinks == asked.nvlinks, done.stdout


def test_nccl_and_nvml_agree(tmp_path) -> None:
    ranks = torch.cuda.device_count()
    if ranks < 2:
        pytest.skip("needs 2 GPUs")
    (tmp_path / "sum.py").write_text(ONE_SUM)
    environment = {"NCCL_NVLS_ENABLE": "0", "NCCL_TOPO_DUMP_FILE": str(tmp_path / "topo.xml")}
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [sys.executable, *torchrun, str(tmp_path / "sum.py")],
        env=os.environ | environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    text = (tmp_path / "topo.xml").read_text()
    dumped = from_nccl(text)
    assert_whole(dumped)
    assert dumped.nvlinks == from_nvml().nvlinks, text
