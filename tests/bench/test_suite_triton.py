"""The GPU suite end to end on the CPU with small shapes, and its pure summary."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.bench import layers
from moesaic.bench.layers import Candidate, Machine, candidates_of, load, measure_cell, ours
from moesaic.bench.results import Line, Recorder, make_line
from moesaic.bench.suite import Cell, Context
from moesaic.bench.suites import triton
from moesaic.bench.timing import Captured, GraphError
from moesaic.bench.workloads import Model

TINY = {
    m.name: m
    for m in (
        Model("tiny", 8, 2, 64, 96, family="mixtral"),
        Model("tiny-paper", 8, 2, 32, 64, kind="relu3", family="paper"),
    )
}
GRID = [Cell("tiny", 1), Cell("tiny", 16, "zipf1"), Cell("tiny-paper", 16)]
STAMP: Line = dict.fromkeys(("device", "torch", "triton", "commit", "date"), "x")
CPU = Machine(torch.device("cpu"), 1e10, 2**16)


def context(tmp_path: Path) -> Context:
    recorder = Recorder(
        tmp_path, "cpu", "triton", lambda lines: triton.summarize(lines, GRID, TINY)
    )
    return Context(torch.device("cpu"), recorder, budget_s=1.0, clock=lambda: 0.0)


def test_the_suite_runs_whole_and_every_line_is_right(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    here = context(tmp_path)
    triton.run(GRID, here, impl="reference", models=TINY)
    lines = [json.loads(row) for row in (tmp_path / "cpu/triton.jsonl").read_text().splitlines()]
    ceilings = {x["impl"] for x in lines if x["clock"] == "ceiling"}
    assert ceilings == {"copy", "read", "gemm"}
    layer = [x for x in lines if x["clock"] == "experts"]
    by_cell = {(x["model"], x["tokens"]): set() for x in layer}
    for x in layer:
        by_cell[x["model"], x["tokens"]].add(x["impl"])
        assert x.get("error") is None and x["samples"] >= 3
        assert x["ms_p20"] <= x["ms"] <= x["ms_p80"]
        assert x["of_floor"] == pytest.approx(x["floor_ms"] / x["ms"], rel=1e-4)
        assert x["impl"] == "dense-twin" or (0 < x["err"] < 1.5e-2 and not x["wrong"])
    transformers = {f"transformers-{n}" for n in ("eager", "grouped_mm", "batched_mm")}
    assert by_cell["tiny", 1] == transformers | {"moesaic", "torch-grouped-mm", "dense-twin"}
    assert by_cell["tiny-paper", 16] == {"moesaic", "torch-grouped-mm", "torch-loop", "dense-twin"}


def broken(out: Callable[[torch.Tensor], torch.Tensor], name: str = "moesaic") -> Candidate:
    return Candidate(name, lambda model, weights: lambda h, ids, w: out(h), lambda inputs: inputs)


def crash(_: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("it\nfell")


def measured(candidates: list[Candidate], machine: Machine = CPU) -> dict[tuple[str, str], Line]:
    model, cell = TINY["tiny"], Cell("tiny", 16)
    loaded = load(model, torch.bfloat16, candidates, machine, 0)
    lines = measure_cell(
        loaded, cell, candidates, machine, budget_s=0.01, seed=0, stamped=STAMP, suite="triton"
    )
    return {(x["impl"], x["mode"]): x for x in lines}


def test_wrong_failing_and_refusing_candidates_are_written_down_and_the_others_go_on() -> None:
    def unbuildable(*_: Any) -> Any:
        raise ImportError("no such package")

    lines = measured(
        [
            ours("reference", "right"),
            broken(torch.zeros_like, "zeros"),
            broken(lambda h: h * float("nan"), "nan"),
            broken(crash, "crash"),
            Candidate("absent", unbuildable),
            Candidate("huge", ours("reference").build, refuses=lambda *_: "needs 42 GiB"),
        ]
    )
    assert not lines["right", "eager"]["wrong"]
    assert lines["zeros", "eager"]["wrong"] and lines["zeros", "eager"]["err"] == 1.0
    assert lines["nan", "eager"]["wrong"] and lines["nan", "eager"]["err"] is None
    assert lines["crash", "eager"]["error"] == "RuntimeError: it fell"
    assert lines["crash", "eager"]["ms"] is None
    assert lines["absent", "eager"]["error"] == "skipped: ImportError: no such package"
    assert lines["huge", "eager"]["error"] == "skipped: needs 42 GiB"


class FakeGraph:
    """A graph that repeats its calls and writes the first one's output, or does not."""

    def __init__(self, call: Callable[[], torch.Tensor], out: torch.Tensor, writes: bool) -> None:
        self.call, self.out, self.writes = call, out, writes

    def replay(self) -> None:
        if self.writes:
            self.out.copy_(self.call())


@pytest.mark.parametrize("writes", [True, False])
def test_a_graph_is_checked_after_its_output_was_poisoned(
    monkeypatch: pytest.MonkeyPatch, writes: bool
) -> None:
    def capture(calls: Any, *, alike: bool) -> Captured:
        out = calls[0]()
        if out.shape[0] == 32:  # the dense twin's rows
            return Captured(FakeGraph(calls[0], out, True), len(calls), out)
        return Captured(FakeGraph(calls[0], out, writes), len(calls), out)

    monkeypatch.setattr(Machine, "modes", ("graph", "eager"))
    monkeypatch.setattr(layers, "capture", capture)
    monkeypatch.setattr(layers, "graph_sampler", lambda captured: lambda: 2.0)
    monkeypatch.setattr(layers, "eager_sampler", lambda calls: lambda: 3.0)
    lines = measured([ours("reference")])
    assert lines["moesaic", "graph"]["wrong"] is not writes
    assert lines["moesaic", "eager"]["wrong"] is False
    assert lines["moesaic", "graph"]["ms"] == 2.0 and lines["moesaic", "eager"]["ms"] == 3.0
    assert lines["dense-twin", "graph"]["ms"] == 2.0


def test_what_cannot_be_captured_says_why_and_keeps_its_eager_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def capture(calls: Any, *, alike: bool) -> Captured:
        raise GraphError("waits for the device: nonzero")

    monkeypatch.setattr(Machine, "modes", ("graph", "eager"))
    monkeypatch.setattr(layers, "capture", capture)
    monkeypatch.setattr(layers, "eager_sampler", lambda calls: lambda: 3.0)
    lines = measured([ours("reference")])
    assert lines["moesaic", "graph"]["error"] == "no graph: waits for the device: nonzero"
    assert lines["moesaic", "eager"]["ms"] == 3.0
    assert lines["moesaic", "eager"]["floor_ms"] is None


def test_a_rotation_overflows_the_cache_four_times_or_has_64_calls() -> None:
    small, mib = TINY["tiny"], 2**20
    per_expert = 3 * 64 * 96 * 2
    calls = layers.rotation_length(small, 1, 2, 2 * mib)
    assert calls == 64 and layers.rotation_length(small, 512, 2, 1) == 8
    calls = layers.rotation_length(small, 1, 2, 10 * per_expert)
    assert calls == 20 and calls * 2 * per_expert >= 4 * 10 * per_expert
    sets = load(small, torch.bfloat16, [], Machine(torch.device("cpu"), 1.0, mib), 0).sets
    assert len(sets) * 8 * per_expert >= 4 * mib


def test_a_cell_that_cannot_be_set_up_is_recorded_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = triton.measure_cell

    def flaky(loaded: Any, cell: Cell, *rest: Any, **named: Any) -> list[Line]:
        if cell.tokens == 1:
            raise torch.OutOfMemoryError("out of memory")
        return real(loaded, cell, *rest, **named)

    monkeypatch.setattr(triton, "measure_cell", flaky)
    here = context(tmp_path)
    triton.run(GRID[:2], here, impl="reference", models=TINY)
    failed, good = (
        [x for x in here.recorder.lines if x["impl"] == "moesaic" and x["tokens"] == t]
        for t in (1, 16)
    )
    assert failed[0]["error"] == "OutOfMemoryError: out of memory" and failed[0]["ms"] is None
    assert good[0]["ms"] > 0


def test_out_of_time_the_cells_left_out_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ticks = iter(range(0, 1000, 100))
    here = context(tmp_path)
    late = Context(here.device, here.recorder, budget_s=1.0, clock=lambda: next(ticks))
    triton.run(GRID[:1], late, impl="reference", models=TINY)
    assert "not measured: Cell(model='tiny', tokens=1" in capsys.readouterr().err
    assert {x["clock"] for x in here.recorder.lines} == {"ceiling"}


def made(cell: Cell, impl: str, ms: float | None, **more: Any) -> Line:
    return make_line(
        STAMP, suite="triton", clock="experts", model=cell.model, tokens=cell.tokens,
        routing=cell.routing, dtype=cell.dtype, impl=impl, mode="graph", ms=ms, **more,
    )  # fmt: skip


def good_lines() -> list[Line]:
    lines = []
    for cell, ratio in zip(GRID, (1.0, 2.0, 4.0), strict=True):
        rival = triton.rival(TINY[cell.model].family)
        lines += [made(cell, "moesaic", 1.0), made(cell, rival, ratio)]
    return lines


def values(lines: list[Line]) -> tuple[list[float | None], list[bool]]:
    targets = triton.summarize(lines, GRID, TINY)
    return [t.value for t in targets], [t.met for t in targets]


def test_summary_of_a_whole_right_run_meets_every_target() -> None:
    assert values(good_lines()) == ([2.0, 1.0, 3.0, 0.0], [True] * 4)


def test_summary_cannot_be_passed_by_wrong_missing_or_slow_cells() -> None:
    wrong = good_lines()
    wrong[4] |= {"wrong": True}
    assert values(wrong)[1] == [False, True, False, False]
    assert values(good_lines()[:4])[1] == [False, True, False, True]
    assert values([])[1] == [False, False, False, True]
    slow = good_lines()
    slow[0]["ms"] = 1.01
    assert values(slow)[1][1] is False
    failed = [
        *good_lines(),
        made(GRID[0], "moesaic", None, error="no graph: x") | {"mode": "eager"},
    ]
    assert values(failed)[1] == [True, True, True, False]


def test_the_real_grid_is_the_announced_one() -> None:
    cells = triton.cells()
    assert len(cells) == len(set(cells)) == 6 * 9 + 3 * 4
    assert {c.model for c in cells} == {*triton.FIELD, *triton.PAPER}
    assert all(candidates_of(triton.MODELS[c.model])[0].name == "moesaic" for c in cells)
