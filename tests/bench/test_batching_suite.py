"""Suite `batching`: both candidates give the twin's tables; another sort is told to be wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moesaic.bench.layers import Machine
from moesaic.bench.results import Recorder
from moesaic.bench.suite import Cell, Context
from moesaic.bench.suites import batching
from moesaic.bench.suites.batching import OURS, SORT

CELL = Cell("tiny", 3, "zipf1", "int32")


@pytest.mark.usefixtures("kernel_device")
@pytest.mark.parametrize("broken", [False, True])
def test_a_run_checks_every_table(
    broken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(batching, "machine_of", lambda *_: Machine(device, 1e12, cache_bytes=1))
    if broken:
        unstable = dict(batching.CANDIDATES)
        for name, build in batching.CANDIDATES.items():
            unstable[name] = lambda ids_TK, experts, build=build: build(ids_TK.flip(0), experts)
        monkeypatch.setattr(batching, "CANDIDATES", unstable)
    recorder = Recorder(tmp_path, "here", "batching", batching.summarize)
    batching.run([CELL], Context(device, recorder, budget_s=0.1), experts={"tiny": 9})
    lines = recorder.lines
    assert {x["impl"] for x in lines} == {OURS, SORT} and not any(x.get("error") for x in lines)
    assert {x["wrong"] for x in lines} == {broken}
    bad = recorder.targets()[-1]
    assert bad.value == broken * sum(x["impl"] == OURS for x in lines)
    assert all(x["ms"] > 0 for x in lines)
