"""The main job under torchrun: experts over two ranks, one report, the bits of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2] / "src"


def run(folder: Path, *before: str) -> dict:
    command = [sys.executable, *before, "-m", "moesaic", "run", "--bytes", "1500"]
    done = subprocess.run(
        [*command, "--device", "cpu", "--out", str(folder)],
        env=os.environ | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_two_ranks_score_like_one(tmp_path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    two = run(tmp_path / "two", *torchrun)
    one = run(tmp_path / "one")
    assert two["ranks"] == 2 and "ranks" not in one
    assert two["ok"] and two["status"] == one["status"] == "complete"
    bits = [doc["moesaic"]["bits_per_byte"] for doc in (one, two)]
    assert bits[0] == bits[1]
    assert two["max_logit_difference"] == one["max_logit_difference"]
    assert two["layers"] == one["layers"]
    assert len(list((tmp_path / "two").iterdir())) == 1, "rank 0 alone reports"
