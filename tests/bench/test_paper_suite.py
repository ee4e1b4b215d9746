"""Suite paper on the CPU with small layers; its targets, tables and map as functions of lines."""

from __future__ import annotations

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moesaic.bench import report
from moesaic.bench.paper import (
    break_even,
    configuration,
    figures,
    misses,
    page,
    tables,
    targets,
    windows,
)
from moesaic.bench.paper.executor import LADDER, LOOP, OURS, registry
from moesaic.bench.results import Line, Recorder, make_line
from moesaic.bench.suite import Cell, Context
from moesaic.bench.suites import paper
from moesaic.bench.workloads import MODELS, Model
from moesaic.hardware.energy import Energy
from moesaic.hardware.meter import Sustained
from moesaic.hardware.nvml import Utilisation

ROOT = Path(__file__).parents[2]
TINY = Model("paper-small", 4, 2, 16, 24, kind="relu3", family="paper")
STAMP: Line = dict.fromkeys(("torch", "triton", "commit", "date"), "x") | {"device": "NVIDIA X"}


def line(cell: Cell, impl: str, mode: str, **values: object) -> Line:
    place = {"model": cell.model, "tokens": cell.tokens, "routing": cell.routing}
    fixed = STAMP | place | {"suite": "paper", "clock": cell.clock, "dtype": cell.dtype}
    timed = {"ms_p20": values.get("ms"), "ms_p80": values.get("ms")}
    return make_line(fixed, impl=impl, mode=mode, **(timed | values))


def whole(loop: float = 2.0, ours: float = 0.1, joules: float = 0.2, bits: int = 0) -> list[Line]:
    """Lines of every clock, as a GPU would give them: the loop of 2 ms, a floor of 0.1 ms."""
    found: list[Line] = []
    for cell in paper.every_cell():
        if cell.clock in ("experts", "break-even"):
            for name in registry():
                ms = {LOOP: loop, OURS: ours}.get(name, 0.5)
                facts = {"floor_ms": 0.1, "elements": 64, "bits_differ_ours": 0}
                facts |= {"bits_differ": bits if name == "triton-experts" else 0}
                found += [line(cell, name, m, ms=ms, **facts) for m in ("eager", "graph")]
        elif cell.clock == "energy":
            series = [[0.1, 0.5, 0.1, 0.2], [0.2, 0.6, 0.1, 0.2]]
            for name, mode, j in ((LOOP, "eager", 1.0), (OURS, "graph", joules)):
                found.append(
                    line(cell, name, mode, ms=1.0, j_per_1000_tokens=j, watts=300.0, series=series)
                )
        elif cell.clock == "stage":
            found += [
                line(cell, f"{who}-{stage}", "graph", ms=0.1, bytes=100_000_000)
                for who in ("torch", "moesaic")
                for stage in ("routing", "experts", "aggregation")
            ]
        else:
            found += [line(cell, "launch", mode, ms=0.005) for mode in ("eager", "graph")]
    return found


def test_the_yaml_files_say_what_the_paper_says_and_parameters_are_counted() -> None:
    every = configuration.layers()
    for layer in every.values():
        assert layer.model == MODELS[layer.model.name]
    assert [x.counted_parameters for x in every.values()] == [16777216, 134217728, 1073741824]
    assert [x.claimed_parameters for x in every.values()] == [45e6, 180e6, 720e6]
    assert configuration.grid()["batches"]["paper"] == [32, 64, 128, 256, 512]
    rates = configuration.claims()["throughput"]
    assert 2.26 < rates[64]["ours"] / rates[64]["loop"] < 2.27


@pytest.mark.parametrize("change", [{"top_k": None}, {"depth": 3}])
def test_a_configuration_with_other_keys_is_refused(change: dict[str, int | None]) -> None:
    values = configuration.read_yaml("small") | change
    values = {k: v for k, v in values.items() if v is not None}
    with pytest.raises(ValueError, match=next(iter(change))):
        configuration.layer_from(values)


def test_cells_are_distinct_and_those_of_the_targets_come_first() -> None:
    cells = paper.every_cell()
    assert len(cells) == len(set(cells))
    assert {(c.clock, c.tokens) for c in cells[:15]} == {
        ("experts", t) for t in (32, 64, 128, 256, 512)
    }
    square = {c.model for c in cells if c.clock == "break-even" and c.tokens == 256}
    assert {"e4-k1", "e4-k4", "e64-k16"} <= square and "e4-k8" not in square
    assert configuration.break_even_model("e64-k16").num_experts == 64


def test_the_suite_runs_on_a_cpu_and_says_what_it_cannot_measure(tmp_path: Path) -> None:
    clocks = ("experts", "energy", "stage")
    cells = [Cell(TINY.name, 32, dtype="float32", clock=clock) for clock in clocks]
    cells += [Cell("launch", 1, "-", clock="launch"), Cell("e4-k2", 32, clock="break-even")]
    recorder = Recorder(tmp_path, "cpu", "paper", paper.summarize)
    models = {"e4-k2": replace(TINY, name="e4-k2")}
    here = Context(torch.device("cpu"), recorder, 60.0)
    paper.run(cells, here, models=lambda name: models.get(name, TINY))
    lines = recorder.lines
    timed = {x["impl"]: x for x in lines if x["clock"] == "experts"}
    for name, executor in registry().items():
        if executor.needs:
            assert "needs a cuda device" in timed[name]["error"]
        else:
            assert timed[name]["ms"] > 0 and timed[name]["wrong"] is False
    assert timed["expert-streams"]["bits_differ"] == 0
    assert timed[OURS]["bits_differ"] == 0
    windows_ = [x for x in lines if x["clock"] == "energy"]
    assert windows_ and all(x["error"].startswith("not available: NVML") for x in windows_)
    assert all(x["ms"] is None and "joules" not in x for x in windows_)
    stages = {x["impl"]: x for x in lines if x["clock"] == "stage"}
    assert stages["torch-experts"]["gbps"] > 0 and "moesaic-experts" not in stages
    assert any(x["clock"] == "break-even" and x["impl"] == OURS and x["ms"] for x in lines)
    assert not any(t.met for t in recorder.targets()[:4])


def test_a_cell_that_does_not_fit_is_left_out_and_a_second_run_takes_it(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, "cpu", "paper", paper.summarize)
    here = Context(torch.device("cpu"), recorder, budget_s=0.0)
    paper.run([Cell(TINY.name, 8, dtype="float32")], here, models=lambda name: TINY)
    assert all(x["clock"] == "ceiling" for x in recorder.lines)
    lines = whole()
    assert {paper.measured(x) for x in lines} - {None} == set(paper.every_cell())
    ours = [x for x in lines if x["impl"] == OURS and x["mode"] == "graph"]
    assert all(paper.measured(x | {"wrong": True}) is None for x in ours)
    assert all(paper.measured(x | {"ms": None}) is None for x in ours)


def test_the_cell_table_says_which_rule_a_cell_keeps() -> None:
    rows = {(r[0], r[1]): r for r in tables.cell_by_cell(whole(ours=0.12)).rows}
    assert len(rows) == 30
    assert rows["Small", "32"][3:] == ["0.12", "20", "16.7", "20 %", "0.115", "no"]
    assert rows["Small", "512"][7:] == ["0.14", "yes"]


def verdicts(lines: list[Line]) -> dict[str, bool]:
    names = ("faster", "energy", "rule", "grouped", "bits", "wrong")
    return dict(zip(names, (t.met for t in targets.summarize(lines)), strict=True))


def test_targets_are_met_by_what_meets_them() -> None:
    assert all(verdicts(whole()).values())


@pytest.mark.parametrize(
    ("broken", "missed"),
    [
        (whole(ours=0.21), {"faster", "rule"}),
        (whole(joules=0.26), {"energy"}),
        (whole(bits=3), {"bits"}),
        (whole(ours=0.14), {"rule"}),
        (whole(loop=1.19, ours=0.14), {"faster", "energy", "rule"}),
        ([x for x in whole() if x["clock"] != "energy"], {"energy"}),
        ([x for x in whole() if x["impl"] != "torch-grouped-mm"], {"grouped"}),
        ([x | {"wrong": x["impl"] == OURS} for x in whole()],
         {"faster", "energy", "rule", "grouped", "wrong"}),
    ],
)  # fmt: skip
def test_targets_are_missed_by_what_misses_them(broken: list[Line], missed: set[str]) -> None:
    met = verdicts(broken)
    assert {name for name, good in met.items() if not good} == missed


def test_a_small_gap_to_the_floor_moves_a_cell_from_the_loop_to_the_cell_rule() -> None:
    much = targets.summarize(whole(loop=1.3))
    little = targets.summarize(whole(loop=1.1))
    assert "(15 of 15 cells)" in much[0].name and "(9 of 9 cells)" in much[2].name
    assert "(0 of 0 cells)" in little[0].name and "(24 of 24 cells)" in little[2].name


def test_cells_over_the_rule_are_listed_with_what_their_launches_counted(tmp_path: Path) -> None:
    lines = [x | {"gbps": 450.0, "tflops": 400.0} for x in whole()]
    assert misses.over_lines(lines) == []
    assert misses.part(lines, tmp_path).startswith("Every measured cell that the rule judges")
    cell = Cell("paper-medium", 4096, clock="experts")
    wanted = (cell.model, cell.tokens, OURS)
    lines = [
        x | {"ms": 0.3} if (x["model"], x["tokens"], x["impl"]) == wanted else x for x in lines
    ]
    (over,) = {(x["model"], x["tokens"]) for x in misses.over_lines(lines)}
    assert over == ("paper-medium", 4096)
    assert "not counted" in misses.part(lines, tmp_path)
    counted = {"clock_ghz": 1.5, "dram_read_bytes": 0.0, "dram_written_bytes": 0.0}
    launches = [
        line(cell, "moesaic 1: chain", "eager", ms=0.2, tensor=0.4, sms_active=0.8, **counted),
        line(cell, "dense-twin 1: mm", "eager", ms=0.1, tensor=0.8, sms_active=0.8, **counted),
    ]
    (tmp_path / "launches.jsonl").write_text("".join(json.dumps(x) + "\n" for x in launches))
    text = misses.part(lines, tmp_path)
    assert "| Medium | 4096 | 0.3 | 0.132 | 2.27 | products | 3.00 | waits 2.00 × busy 1.50" in text
    assert text.rstrip().endswith("tensor pipes idle in a block |")


def test_gains_are_without_over_with_and_a_loss_is_shown() -> None:
    lines = [x for x in whole(loop=2.0, ours=0.1) if not x["impl"].startswith("slices")]
    named = {c.name: break_even.gains(lines, c) for c in break_even.COMPONENTS}
    assert set(named[break_even.OVER_LOOP].values()) == {20.0}
    assert set(named["a graph of the layer"].values()) == {1.0}
    assert not named["dynamic slicing"]
    by_name = {row[0]: row for row in break_even.overview(lines).rows}
    assert by_name["a graph of the layer"][1].startswith("0 of ")
    assert by_name["dynamic slicing"][1] == "not measured"
    assert break_even.measured_of_map(lines) == "32 of the map's 32 cells are measured."
    few = [x for x in lines if x["model"] in ("e16-k2", "paper-small")]
    assert break_even.measured_of_map(few).startswith("11 of") and not figures.break_even(few)
    assert {row[0] for row in break_even.by_layer(few).rows} == {"Small"}
    assert "0.05" in figures.break_even(whole(ours=40.0))
    slower = [
        x | {"ms": 0.3} if x["impl"] == OURS and x["model"].startswith("e4-") else x for x in lines
    ]
    holds = {row[0]: row[4] for row in break_even.excels(slower).rows}
    assert holds["best from 16 experts"] == "yes" and holds["best from batch 128"] == "no"


def test_a_rung_without_an_executor_is_not_measured_and_one_with_lines_is() -> None:
    lines = [x for x in whole() if not x["impl"].startswith("slices")]
    rows = {row[0]: row for row in tables.ablation(lines, "paper-small").rows}
    titles = dict(LADDER)
    for name in ("slices", "slices-streams"):
        assert rows[titles[name]][1] == "not measured" and rows[titles[name]][6] != "-"
    filled = [*lines, line(Cell("paper-small", 256), "slices", "eager", ms=0.25)]
    row = {r[0]: r for r in tables.ablation(filled, "paper-small").rows}[titles["slices"]]
    assert row[2] == "8.00×"


def test_the_page_has_every_table_and_figure_and_a_figure_is_the_same_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "results/x"
    folder.mkdir(parents=True)
    (folder / "paper.jsonl").write_text("\n".join(map(json.dumps, whole())) + "\n")
    doc = tmp_path / "docs/paper.md"
    doc.parent.mkdir()
    doc.write_text("A\n<!-- results: paper on x -->\n<!-- end -->\nB\n")
    monkeypatch.setattr(report, "PAGES", (doc,))
    assert report.main(root=tmp_path / "results") == 0
    text = doc.read_text()
    for table in ("1", "2", "3", "4", "5"):
        assert f"table {table})" in text
    drawn = {f.name for f in (doc.parent / "figures").iterdir()}
    parts = ("throughput", "activity", "energy", "ablation", "break-even")
    assert drawn == {f"paper-x-{part}.svg" for part in parts}
    assert all(f"(figures/{name})" in text for name in drawn)
    assert "| 32 | " in text and "245,670" in text and "2.40×" in text
    assert "| H100, claimed | not said | 287,450 | 78 % | 0.85 |" in text
    svg = (doc.parent / "figures/paper-x-energy.svg").read_text()
    assert figures.energy(whole()) == svg


def test_every_generated_table_stands_without_lines() -> None:
    text, drawn = page.section([line(Cell("-", 0, clock="ceiling"), "read", "eager")], [],
                               Path("absent"), "x", "figures")  # fmt: skip
    assert not drawn and "Not measured yet." in text and "not measured" in text


def test_activity_leaves_the_edges_out_and_keeps_the_series() -> None:
    points = [
        Utilisation(seconds=0.1, ended=0.1 * n, sm=sm, occupancy=0.2, tensor=0.3, dram=0.4)
        for n, sm in enumerate((0.0, 0.5, 0.6, 0.7, 0.0), 1)
    ]
    values = windows.activity(points)
    assert values["sm_activity"] == pytest.approx(0.6)
    assert len(values["series"]) == 5 and values["series"][0] == [0.1, 0.0, 0.3, 0.4]


def test_a_window_gives_joules_by_tokens_and_says_why_there_is_no_activity() -> None:
    class Meter:
        def sustain(self, call, *, seconds):
            call()
            reading = Energy(joules=50.0, seconds=2.0, tdp_w=700.0, meter="fake", idle_w=10.0)
            return Sustained(reading, 5)

    calls = []
    watch = windows.Watch(Meter(), None, "GPM: none here")  # type: ignore[arg-type]
    values = watch.measure(windows.Work(lambda: calls.append(1), tokens=100), 2.0)
    assert calls and values["j_per_1000_tokens"] == pytest.approx(100.0)
    assert values["net_j_per_1000_tokens"] == pytest.approx(60.0)
    assert values["tokens_per_s"] == 250 and values["gpm"] == "not available: GPM: none here"


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    arguments = ["--device", "cpu", "--tokens", "4", "--seconds", "20", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["run_benchmark.py", *arguments])
    runpy.run_path(str(ROOT / "examples/run_benchmark.py"), run_name="__main__")
    assert "Small, tokens/s" in capsys.readouterr().out
    assert (tmp_path / "cpu/paper.jsonl").exists()
