"""Suite `ragged`: every candidate computes the same batch; a wrong one is written down as wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moesaic.bench.layers import Machine
from moesaic.bench.results import Recorder
from moesaic.bench.suite import Cell, Context
from moesaic.bench.suites import ragged
from moesaic.bench.suites.ragged import CANDIDATES, OURS, TWIN, Bank, Bench, make_batch

BANK = Bank("tiny", 6, 8, hidden=40, width=24)
CELL = Cell("tiny", 30, "zipf1", "float32")


def made() -> Bench:
    batch = make_batch(BANK, CELL, torch.Generator().manual_seed(0))
    row_R = torch.arange(CELL.tokens)
    return Bench([batch], row_R, batch.want(row_R))


@pytest.mark.usefixtures("kernel_device")
@pytest.mark.parametrize("name", [name for name in CANDIDATES if name != TWIN])
def test_a_candidate_computes_the_batch(name: str) -> None:
    if torch.cuda.is_available() and name == OURS:
        pytest.skip("kernels run on the GPU here")
    bench = made()
    call = CANDIDATES[name](bench.batches[0])
    for _ in range(2):
        bench.check(name, "eager", call)
        assert bench.accuracy[name, "eager"] < 1e-5


def test_another_adapter_is_noticed() -> None:
    bench = made()
    bench.check(TWIN, "eager", CANDIDATES[TWIN](bench.batches[0]))
    assert bench.accuracy[TWIN, "eager"] > 0.1


@pytest.mark.usefixtures("kernel_device")
def test_a_run_records_lines_that_give_the_targets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cpu")
    broken = {**CANDIDATES, ragged.LOOP: lambda batch: lambda: batch.out_TO.add_(1)}
    if torch.cuda.is_available():
        broken[OURS] = CANDIDATES[ragged.GROUPED]
    monkeypatch.setattr(ragged, "CANDIDATES", broken)
    monkeypatch.setattr(ragged, "machine_of", lambda *_: Machine(device, 1e12, cache_bytes=1))
    recorder = Recorder(tmp_path, "cpu", "ragged", ragged.summarize)
    ragged.run([CELL], Context(device, recorder, budget_s=1.0), banks={"tiny": BANK})
    lines = {x["impl"]: x for x in recorder.lines if x["clock"] == "adapters"}
    assert set(lines) == set(CANDIDATES)
    assert not lines[OURS]["wrong"] and lines[OURS]["ms"] > 0
    assert lines[ragged.LOOP]["wrong"]
    assert lines[OURS]["floor_ms"] >= lines[TWIN]["ms"]
    assert ragged.speedups(recorder.lines, ragged.GROUPED, "eager")
    assert not ragged.speedups(recorder.lines, ragged.LOOP, "eager")
    missing = {target.name: target.met for target in recorder.targets()}
    assert not missing[f"cells compared with {ragged.LOOP}"]
