"""A transformers model whose experts are spread over processes has the bits of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

WORKER = Path(__file__).parent / "spread_worker.py"
SOURCE = Path(__file__).resolve().parents[2] / "src"


def test_a_model_over_two_ranks(tmp_path) -> None:
    environment = os.environ | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(WORKER)]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), "2", str(tmp_path / "store")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outs = [rank.communicate(timeout=600) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for process, (out, errors) in zip(ranks, outs, strict=True):
        assert process.returncode == 0, errors[-3000:]
        told = json.loads(out.splitlines()[-1])
        faults = [(k, n) for k, v in told.items() for n, ok in v.items() if ok is False]
        assert faults == []
        assert told["mesh"]["held"] == [4, 4, 4]
        assert sum(told["scattered"]["held"]) in (12, 15)
        assert told["mesh"]["exchanges"] == told["symmetric"]["exchanges"] == 1
        assert told["refused"] == {"tokens": True}
