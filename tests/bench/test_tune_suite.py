"""Suite `tune` without a GPU: a whole run with invented times, targets that can fail, the table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from moesaic.bench.results import Line, Recorder
from moesaic.bench.suite import Cell, Context
from moesaic.bench.suites import tune
from moesaic.bench.timing import DeviceLost
from moesaic.bench.tuning import grid
from moesaic.bench.tuning.cell import Unfit
from moesaic.bench.tuning.command import Tools
from moesaic.bench.tuning.compiling import Request
from moesaic.bench.tuning.labs import HopperLab
from moesaic.kernels.hopper.fit import layer_problem
from moesaic.kernels.tune import load_table, shape_key

FACTS = ("NVIDIA H200", 90, 132)


class InventedLab:
    """The real lab's configurations with times that a rule invents; one tile has other bits."""

    def __init__(self, wanted: Request, tokens: int, slow: float) -> None:
        problem = grid.problem_for(wanted.model, tokens, "bfloat16", 90, "h200")
        real: Any = HopperLab(wanted.model, problem, None, 132)  # type: ignore[arg-type]
        self.combined, self.row, self.more = real.combined, real.row, real.more
        self.launches = real.launches
        self.heuristic, self.slow = real.heuristic, slow

    def part_s(self, part: str, group: Any, tile: Any, best: Any) -> dict[str, float]:
        if tile.kernel == "prefill" and part == "up":
            raise Unfit("its bits are not those of the first candidate")
        return {"uniform": 1e-5 * (1 + group[-1] / 128 + tile.stages / 16)}

    def layer_s(self, config: Any) -> dict[str, float]:
        ms = 2e-5 * (self.slow if config == self.heuristic() else 1.0)
        return {"uniform": ms, "worst": 2 * ms}

    def routing_s(self) -> dict[int, float]:
        return {1: 2e-6, 2: 1e-6}


def run(folder: Path, cells: list[Cell], slow: float = 1.05, lost: bool = False) -> list[Line]:
    def make_lab(wanted: Request, impl: str, tokens: int) -> Any:
        if lost:
            raise DeviceLost("gone")
        return InventedLab(wanted, tokens, slow)

    compiled: list[str] = []

    def compile_all(requests: Any, advance: Any, say: Any, done: Any, stop: Any) -> None:
        for number, request in enumerate(requests):
            compiled.append(request.model.name)
            done(number)

    tools = Tools(make_lab, compile_all)
    recorder = Recorder(folder, "h200", "tune", tune.summarize)
    context = Context(torch.device("cpu"), recorder, budget_s=60.0)
    tune.run(cells, context, tools=tools, facts=FACTS)
    assert compiled == [cell.model for cell in cells]
    return recorder.lines


def test_a_whole_run_makes_lines_targets_and_the_table(tmp_path: Path) -> None:
    lines = run(tmp_path, tune.cells())
    assert {tune.measured(x) for x in lines} == {*tune.cells(), None}
    values = {t.name: (t.value, t.met) for t in tune.summarize(lines)}
    assert values["highest untuned ÷ tuned, held-out models"] == (pytest.approx(1.05), True)
    assert values["cells within 10 %, the six models"] == (54.0, True)
    assert values["candidates with other bits"][1] is False
    probed = [x | {"by": "a probe"} for x in lines]
    told = {t.name: (t.value, t.met) for t in tune.summarize(probed)}
    assert told["highest untuned ÷ tuned, the six models"] == (None, False)
    assert told["cells within 10 %, the six models"] == (0.0, False)
    older = [x | {"judged_by": None} for x in lines]
    assert not any(t.met for t in tune.summarize(older) if "10 %" in t.name or "highest" in t.name)
    table = tune.table_of(lines, "h200")
    assert len(table) == 10 and all(
        layer_problem(row) is None for rows in table.values() for row in rows.values()
    )
    problem = grid.problem_for(tune.MODELS["OLMoE"], 16, "bfloat16", 90, "h200")
    assert table[shape_key(problem)].keys() >= {"1", "16", "8192"}
    assert not any("1" in rows for rows in tune.table_of(probed, "h200").values())
    text, _ = tune.section(lines, tune.summarize(lines), tmp_path, "h200", "figures")
    assert "| OLMoE | 16 | 28.3 | 29.7 | 1.05 | uniform 1.05, worst 1.05 |" in text
    assert "decode 16x" in text
    # Tuned on one routing alone a cell is missing still, and noise is no reason for other tiles.
    assert not any(tune.measured(x | {"judged_by": None}) for x in lines)
    level = [x | {"ms": 0.02 if x["impl"] == "moesaic" else 0.0201} for x in lines]
    own = {x["model"]: x["row"] for x in lines if x["impl"] == "heuristic" and x["tokens"] == 64}
    row = tune.table_of(level, "h200")[shape_key(problem)]["64"]
    assert row == json.loads(own["OLMoE"]) != table[shape_key(problem)]["64"]


def test_a_slow_choice_and_missing_cells_miss_their_targets(tmp_path: Path) -> None:
    lines = run(tmp_path, [c for c in tune.cells() if c.model == "OLMoE"], slow=1.2)
    met = {t.name: t.met for t in tune.summarize(lines)}
    assert not any(met[n] for n in met if "within" in n or "highest" in n)
    assert met["cells failed"]
    with pytest.raises(DeviceLost):
        run(tmp_path, tune.cells()[:1], lost=True)


def test_the_shipped_rows_are_those_of_the_committed_lines() -> None:
    root = Path(__file__).parents[2]
    path = root / "benchmarks/results/h200/tune.jsonl"
    if not path.exists():
        pytest.skip("no lines of suite tune are committed")
    lines = [json.loads(row) for row in path.read_text().splitlines()]
    for family in ("h200", "h100"):
        file = root / "src/moesaic/kernels/configs" / f"{family}.json"
        shipped = json.loads(file.read_text())
        assert shipped["hopper"] == tune.table_of(lines, family)
        assert load_table(family).hopper.keys() >= shipped["hopper"].keys()
        assert ("Not measured" in shipped.get("derived", "")) == (family == "h100")
