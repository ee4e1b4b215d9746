"""Suite `profiler`: right counts are told from wrong ones, and its promise from a broken one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.bench.results import Recorder
from moesaic.bench.suite import Cell, Context
from moesaic.bench.suites import profiler as suite
from moesaic.bench.suites.profiler import COUNTED, OURS, PLAIN
from moesaic.bench.workloads import Model
from moesaic.runtime.counters import ROWS

TINY = {"tiny": Model("tiny", 6, 2, 16, 8)}
CELL = Cell("tiny", 5, dtype="float32", clock="step-16")


@pytest.mark.parametrize("broken", ["", "bits", "counts"])
def test_a_run_checks_bits_and_counts(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    real = suite.moe

    def other(*args: Any, counters: Any) -> torch.Tensor:
        out = real(*args, counters=counters)
        if counters is not None and broken == "bits":
            return out + 1
        if counters is not None and broken == "counts":
            counters[ROWS, 0] += 1
        return out

    monkeypatch.setattr(suite, "moe", other)
    recorder = Recorder(tmp_path, "here", "profiler", suite.summarize)
    suite.run([CELL], Context(device, recorder, budget_s=0.1), models=TINY)
    lines = recorder.lines
    assert {x["impl"] for x in lines} == {PLAIN, COUNTED, OURS}
    assert not any(x.get("error") for x in lines) and all(x["ms"] > 0 for x in lines)
    assert {x["wrong"] for x in lines if x["impl"] == OURS} == {bool(broken)}
    assert suite.measured(lines[-1]) in (None, CELL)
    assert recorder.targets()[-1].value == sum(x["wrong"] for x in lines)


def line(impl: str, ms: float, clock: str = "step-16", **more: Any) -> dict[str, Any]:
    fixed = {"model": "m", "tokens": 1, "dtype": "bfloat16", "mode": "graph", "clock": clock}
    return fixed | {"impl": impl, "ms": ms} | more


def test_the_allowance_is_one_percent_or_half_a_microsecond_a_layer() -> None:
    cheap = [line(PLAIN, 0.16), line(OURS, 0.164)]  # 4 us of 16 * 0.5
    assert suite.excess(cheap, "step-16", "graph", OURS) == [pytest.approx(0.5)]
    large = [line(PLAIN, 16.0), line(OURS, 16.32)]  # 2 % of 16 ms
    assert suite.excess(large, "step-16", "graph", OURS) == [pytest.approx(2.0)]
    targets = {t.name: t for t in suite.summarize(large)}
    missed = [t for name, t in targets.items() if "watching" in name and "16, graph" in name]
    assert [t.met for t in missed] == [False]
    assert suite.excess([line(OURS, 1.0)], "step-16", "graph", OURS) == []
    alone = [line(PLAIN, 0.02, "step-1"), line(COUNTED, 0.0201, "step-1", wrong=True)]
    assert suite.excess(alone, "step-1", "graph", COUNTED) == []
