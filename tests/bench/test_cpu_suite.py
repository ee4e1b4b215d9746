"""The cpu suite: its cells, a small run end to end, and what its summary makes of lines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moesaic.bench.results import Line, Recorder, check_results, make_line
from moesaic.bench.suite import Cell, Context
from moesaic.bench.suites import cpu
from moesaic.bench.workloads import Model


def line(impl: str, ms: float, cell: Cell, **more: object) -> Line:
    return make_line(
        {}, suite="cpu", clock="experts", model=cell.model, tokens=cell.tokens,
        routing=cell.routing, dtype=cell.dtype, impl=impl, mode="eager", ms=ms, **more,
    )  # fmt: skip


def full(ours_ms: float) -> list[Line]:
    lines = []
    for cell in cpu.cells():
        lines.append(line("moesaic", ours_ms, cell))
        lines += [line(name, 3.0 + i, cell) for i, name in enumerate(cpu.RIVALS)]
    return lines


def test_cells_cover_both_dtypes_of_every_model() -> None:
    cells = cpu.cells()
    assert len(cells) == len(set(cells)) == 2 * len(cpu.MODELS) * len(cpu.TOKENS)
    assert {c.model for c in cells} == set(cpu.MODELS)


def test_summary_compares_with_the_fastest_baseline() -> None:
    targets = {t.name: t for t in cpu.summarize(full(2.0))}
    assert all(t.met for t in targets.values())
    assert targets["lowest speed-up of a cell"].value == 1.5
    slow = full(2.0)
    slow[0] = line("moesaic", 4.0, cpu.cells()[0])
    assert not {t.name: t for t in cpu.summarize(slow)}["lowest speed-up of a cell"].met


def test_wrong_lines_count_against_us_and_not_for_us() -> None:
    lines = full(2.0)
    lines[0] = line("moesaic", 0.1, cpu.cells()[0], wrong=True)
    targets = {t.name: t for t in cpu.summarize(lines)}
    assert not targets["moesaic lines wrong or failed"].met
    assert not targets["cells compared"].met
    lines = [*full(2.0), line(cpu.UNPACKED, 9.0, cpu.cells()[0], wrong=True)]
    targets = {t.name: t for t in cpu.summarize(lines)}
    assert not targets["moesaic lines wrong or failed"].met
    assert targets["lowest speed-up of a cell"].value == 1.5
    lines = full(2.0)
    lines[1] = line(cpu.RIVALS[0], 0.1, cpu.cells()[0], wrong=True)
    assert cpu.best(lines)[cpu.cells()[0]] == (2.0, cpu.RIVALS[1], 4.0)


def test_small_run(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    recorder = Recorder(tmp_path, "cpu", "cpu", cpu.summarize)
    context = Context(torch.device("cpu"), recorder, budget_s=2.0, clock=lambda: 0.0)
    models = {"tiny": Model("tiny", 8, 2, 64, 32, family="qwen3_moe")}
    wanted = [Cell("tiny", 5, "uniform", dtype) for dtype in cpu.DTYPES]
    cpu.run(wanted, context, models=models)
    found = cpu.best(recorder.lines)
    assert set(found) == set(wanted)
    assert all(mine > 0 and theirs > 0 for mine, _, theirs in found.values())
    errors = [x["err"] for x in recorder.lines if x["impl"] == "moesaic"]
    assert len(errors) == 2 and all(0 < e < 1.5e-2 for e in errors)
    plain = [x for x in recorder.lines if x["impl"] == cpu.UNPACKED]
    assert [x["err"] for x in plain] == errors and "packed_bytes" not in plain[0]
    weights = 8 * 3 * 64 * 32
    for x in recorder.lines:
        if x["impl"] == "moesaic":
            size = weights * getattr(torch, x["dtype"]).itemsize
            assert x["plain_bytes"] == size <= x["packed_bytes"]
    assert check_results(tmp_path, {"cpu": cpu.summarize}) == []
