"""On GPUs: one answer for 1, 2 and 4 ranks, every exchange and every placement; lost peers show."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA devices"),
]
WORKER = Path(__file__).parent / "ep_gpu_worker.py"
SOURCE = Path(__file__).resolve().parents[2] / "src"


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_bits_are_those_of_one_gpu(ranks) -> None:
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    # A multicast object can take a host's GPUs out of service, and nothing here needs one.
    environment = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, f"--nproc-per-node={ranks}", str(WORKER)],
        env=os.environ | environment | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "4"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert len(told) == ranks and len(told[0]) >= (12 if ranks == 1 else 48)
    faults = [(r, what, f) for r, found in enumerate(told) for what, f in found.items() if f]
    assert faults == []
