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


# A multicast object can take a host's GPUs out of service, and nothing here needs one.
ENVIRONMENT = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}


def run(ranks: int, *arguments: str, shared: dict[str, str] | None = None) -> str:
    """The last line that torchrun's ranks print; `shared`: what lets several ranks use one GPU."""
    if torch.cuda.device_count() < ranks and shared is None:
        pytest.skip(f"needs {ranks} GPUs")
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [sys.executable, *torchrun, *arguments],
        env=os.environ
        | ENVIRONMENT
        | (shared or {})
        | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "4"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_bits_are_those_of_one_gpu(ranks) -> None:
    told = json.loads(run(ranks, str(WORKER)))
    assert len(told) == ranks and len(told[0]) >= (12 if ranks == 1 else 56)
    faults = [(r, what, f) for r, found in enumerate(told) for what, f in found.items() if f]
    assert faults == []


@pytest.mark.parametrize("ranks", [4, 8])
def test_more_ranks_than_gpus_have_the_bits_of_one(ranks) -> None:
    more = {"TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1"}
    told = json.loads(run(ranks, str(WORKER.with_name("ep_shared_gpu_worker.py")), shared=more))
    assert len(told) == ranks and len(told[0]) == 8
    faults = [(r, what, f) for r, found in enumerate(told) for what, f in found.items() if f]
    assert faults == []


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_an_attached_model_has_the_bits_of_one_gpu(ranks) -> None:
    pytest.importorskip("transformers")
    told = json.loads(run(ranks, str(WORKER.with_name("attach_gpu_worker.py"))))
    assert len(told) == ranks and set(told[0]) == {"auto", "scattered", "rounds", "nccl", "after"}
    faults = [(r, k, n) for r, of in enumerate(told) for k, v in of.items() for n in v if not v[n]]
    assert faults == []


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_the_main_job_scores_like_one_gpu(ranks, tmp_path) -> None:
    job = ("-m", "moesaic", "run", "--bytes", "20000", "--device", "cuda", "--out")
    many = json.loads(run(ranks, *job, str(tmp_path / "many")))
    one = json.loads(run(1, *job, str(tmp_path / "one")))
    assert many["ranks"] == ranks and many["ok"] and one["ok"]
    assert many["moesaic"]["bits_per_byte"] == one["moesaic"]["bits_per_byte"]
    assert many["layers"] == one["layers"]
