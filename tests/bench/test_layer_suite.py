"""Suite `layer` on the CPU with small shapes: both clocks, pieces, and what its targets refuse."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from nvml_double import Driver

from moesaic.bench import command, layer_misses, layer_windows, report
from moesaic.bench.layer_targets import MIXTRAL, layer_targets
from moesaic.bench.layers import Machine
from moesaic.bench.report import section
from moesaic.bench.results import Line, Recorder, Target, make_line
from moesaic.bench.suite import Cell, Context
from moesaic.bench.suites import layer
from moesaic.bench.timing import eager_sampler
from moesaic.bench.workloads import Inputs, Model, make_inputs
from moesaic.functional import route
from moesaic.hardware.meter import EnergyMeter, NvmlSource
from moesaic.types import RouterSpec

TINY = {name: Model(name, 8, 2, 64, 96) for name in ("tiny", "other")}
STAMP: Line = dict.fromkeys(("device", "torch", "triton", "commit", "date"), "x")
ROOT = Path(__file__).parents[2]


def context(tmp_path: Path, budget_s: float = 100.0, **more: Any) -> Context:
    recorder = Recorder(tmp_path, "cpu", "layer", layer.summarize)
    return Context(torch.device("cpu"), recorder, budget_s=budget_s, **more)


def test_both_clocks_run_whole_with_the_loop_only_where_announced(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    wanted = [
        Cell("tiny", 16),
        Cell("tiny", 4, "curve"),
        Cell("tiny", 4, "worst", clock="layer"),
        Cell("other", 1, "zipf1", clock="layer"),
    ]
    here = context(tmp_path)
    layer.run(wanted, here, impl="reference", models=TINY)
    lines = [x for x in here.recorder.lines if x["clock"] != "ceiling"]
    impls = {cell: set() for cell in wanted}
    for x in lines:
        impls[Cell(x["model"], x["tokens"], x["routing"], x["dtype"], x["clock"])].add(x["impl"])
        assert x.get("error") is None and x["ms"] > 0 and x["floor_ms"] > 0
        assert x["impl"] == "dense-twin" or (0 < x["err"] < 1.5e-2 and not x["wrong"])
        assert x.get("path") == ("reference" if x["impl"] == "moesaic" else None)
    fast = {"moesaic", "torch-grouped-mm", "dense-twin"}
    fast |= {"transformers-grouped_mm", "transformers-batched_mm"}
    assert impls == {cell: fast | ({layer.LOOP} if cell.tokens == 16 else set()) for cell in wanted}
    clocks = section(lines, [], [])
    assert (
        "#### Every cell, clock `experts`" in clocks and clocks.count("| tiny | 4 | worst |") == 1
    )


def test_logits_route_to_the_given_ids_and_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    model = TINY["tiny"]
    inputs = make_inputs(model, 64, "zipf1", dtype=torch.float32, generator=generator)
    hidden_TH, logits_TE = layer.as_logits(inputs, model.num_experts)
    assert hidden_TH is inputs.hidden_TH
    seen = {}
    for ours in (True, False):
        forward = layer.routed(lambda h, ids, w: Inputs(h, ids, w), model, ours)  # type: ignore[arg-type,return-value]
        _, ids_TK, weights_TK = forward(hidden_TH, logits_TE)  # type: ignore[call-arg]
        dense = torch.zeros(64, 8).scatter(1, ids_TK.long(), weights_TK)
        want = torch.zeros(64, 8).scatter(1, inputs.topk_ids_TK.long(), inputs.topk_weights_TK)
        torch.testing.assert_close(dense, want, rtol=1e-5, atol=1e-6)
        seen[ours] = ids_TK
    direct = route(logits_TE, RouterSpec(num_experts=8, top_k=2))
    assert torch.equal(seen[True], direct.topk_ids_TK)


def test_the_grid_is_the_announced_one_and_begins_with_what_matters_most() -> None:
    cells = layer.cells()
    assert len(cells) == len(set(cells)) == 6 * 10 * 4 * 2 + 7 + 18
    head = cells[: 6 * 5]
    assert {c.model for c in head} == set(layer.SHAPES)
    assert {(c.routing, c.clock) for c in head} == {("uniform", "experts")}
    assert {c.tokens for c in head} == {1, 16, 128, 1024, 8192}
    assert [c for c in cells if layer.has_loop(c)] == head
    clocks = [c.clock for c in cells[6 * 10 * 4 :]]
    assert clocks == ["host"] * 7 + ["energy"] * 18 + ["layer"] * 240
    assert all(m.kind == "swiglu" for m in layer.SHAPES.values())


def test_the_load_curve_is_what_the_training_log_gives() -> None:
    rows = (ROOT / "docs/model_training.jsonl").read_text().splitlines()
    (final,) = (x for x in map(json.loads, rows) if x["kind"] == "final")
    by_rank = zip(*(sorted(s, reverse=True) for s in final["expert_shares"]), strict=True)
    want = [sum(shares) / len(shares) for shares in by_rank]
    assert layer.load_curve() == pytest.approx(want, abs=1e-6)


def test_windows_give_joules_a_token_and_host_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_windows, "HOST_REPEATS", 1)
    driver = Driver(watts=500.0)

    def clock() -> float:
        driver.pass_time(0.03)
        return driver.clock()

    source = NvmlSource(driver.gpu())
    meter = EnergyMeter(source, tdp_w=700.0, clock=clock, sleep=driver.pass_time)
    machine = Machine(torch.device("cpu"), 1e10, 2**10)
    shelf = layer.Shelf(machine, TINY, "reference", 0, math.inf, meter)
    (energy,) = [x for x in layer.measure(Cell("tiny", 8, clock="energy"), shelf, STAMP, 0)
                 if x["impl"] == "moesaic"]  # fmt: skip
    assert energy["window_s"] >= 2.0 and energy["watts"] == pytest.approx(500, rel=0.05)
    assert energy["joules_per_token"] == pytest.approx(500 * energy["ms"] / 1e3 / 8, rel=0.05)
    assert not energy["wrong"] and layer.measured(energy) == Cell("tiny", 8, clock="energy")
    host = layer.measure(Cell("tiny", 1, clock="host"), shelf, STAMP, 0)
    assert {x["mode"] for x in host} == {"eager"} and all(x["ms"] > 0 for x in host if x["ms"])
    (mine,) = [x for x in host if x["impl"] == "moesaic"]
    assert mine["samples"] == 1000 and layer.measured(mine) == Cell("tiny", 1, clock="host")
    assert mine["burst"] == 50 and mine["row_ms"] > 0
    targets = layer.window_targets([energy, mine], layer.cells())
    assert [t.met for t in targets] == [False, False] and targets[1].value == 1.0
    text, _ = layer.SUITE.section([energy, *host], [], tmp_path, "x", "figures")
    mj, us = report.short(energy["joules_per_token"] * 1e3), report.short(mine["ms"] * 1e3)
    assert f"| tiny | 8 | moesaic | {mj} |" in text and f"| tiny | moesaic | {us} |" in text
    assert "505 of 505 cells" in text and "| experts | OLMoE | worst | 1, 4, 16" in text
    driver.gone = True
    (lost, *_) = layer.measure(Cell("tiny", 8, clock="energy"), shelf, STAMP, 0)
    assert lost["ms"] is None and "no energy" in lost["error"] and layer.measured(lost) is None


def test_host_time_is_free_of_the_queue_of_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two launches a call that cost the host 10 us and the device 100 us, in a queue of 1024."""
    now, waiting = 0.0, 0

    def call() -> None:
        nonlocal now, waiting
        waiting += 2
        full = waiting > 1024
        now += 110e-6 if full else 10e-6
        waiting -= 2 * full

    def caught_up(device: torch.device) -> None:
        nonlocal now, waiting
        now, waiting = now + waiting * 50e-6, 0

    monkeypatch.setattr(layer_windows.time, "perf_counter", lambda: now)
    monkeypatch.setattr(torch.cuda, "synchronize", caught_up)
    values = layer_windows.host_values([call], torch.device("cuda"))
    assert values["ms"] == pytest.approx(10e-3)
    assert values["row_ms"] == pytest.approx((512 * 10e-3 + 488 * 110e-3) / 1000)


def test_a_second_piece_takes_only_cells_without_a_graph_time_of_the_same_clock() -> None:
    cells = layer.cells()
    first, later = cells[0], cells[-1]
    lines = [line_of(first, "moesaic", 1.0), line_of(cells[1], "moesaic", 1.0, mode="eager")]
    lines += [line_of(cells[2], "moesaic", 1.0, wrong=True), line_of(cells[3], "other", 1.0)]
    assert command.selected(layer.SUITE, measured=lines) == cells[1:]
    done = [*lines, line_of(later, "moesaic", 1.0)]
    assert command.selected(layer.SUITE, measured=done) == cells[1:-1]


def test_cells_that_do_not_fit_are_left_out_and_cheaper_ones_still_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fake(cell: Cell, shelf: Any, stamped: Line, seed: int) -> list[Line]:
        if cell.routing == "worst":
            raise torch.OutOfMemoryError("out of memory")
        return [line_of(cell, "moesaic", 1.0)]

    monkeypatch.setattr(layer, "measure", fake)
    monkeypatch.setattr(layer, "estimate_s", lambda cell, model: float(cell.tokens))
    here = context(tmp_path, budget_s=500.0, clock=lambda: 0.0)
    wanted = [Cell("tiny", t) for t in (1, 512, 128)] + [Cell("tiny", 4, "worst", clock="layer")]
    layer.run(wanted, here, impl="reference", models=TINY)
    lines = [x for x in here.recorder.lines if x["clock"] != "ceiling"]
    assert [(x["tokens"], x["clock"], x["ms"]) for x in lines] == [
        (1, "experts", 1.0), (128, "experts", 1.0), (4, "layer", None)
    ]  # fmt: skip
    assert lines[-1]["error"] == "OutOfMemoryError: out of memory"
    assert "1 cells left out" in capsys.readouterr().err


def test_what_was_measured_is_written_when_a_run_breaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fake(cell: Cell, shelf: Any, stamped: Line, seed: int) -> list[Line]:
        if cell.tokens == 4:
            raise KeyboardInterrupt
        return [line_of(cell, "moesaic", 1.0)]

    monkeypatch.setattr(layer, "measure", fake)
    here = context(tmp_path, clock=lambda: 0.0)
    with pytest.raises(KeyboardInterrupt):
        layer.run([Cell("tiny", 1), Cell("tiny", 4)], here, impl="reference", models=TINY)
    text = (tmp_path / "cpu/layer.jsonl").read_text()
    assert [x["tokens"] for x in map(json.loads, text.splitlines())] == [0, 0, 0, 1]


def test_models_stay_until_memory_is_short() -> None:
    machine = Machine(torch.device("cpu"), 1e10, 2**10)
    size = layer.weight_bytes(TINY["tiny"].spec(), 2)
    scratch = layer.scratch_bytes(TINY["tiny"], 1)

    def shelf(memory_bytes: float) -> layer.Shelf:
        return layer.Shelf(machine, TINY, "reference", 0, memory_bytes)

    roomy = shelf(math.inf)
    kept = [roomy.take(Cell(name, 1)) for name in ("tiny", "other", "tiny")]
    assert kept[0] is kept[2] and kept[0].loaded["layer"].sets is kept[0].loaded["experts"].sets
    tight = shelf(scratch + 2 * size - 1)
    kept = [tight.take(Cell(name, 1)) for name in ("tiny", "other", "tiny")]
    assert kept[0] is not kept[2] and list(tight.entries) == [("tiny", "bfloat16")]


def test_an_eager_sample_need_not_be_a_whole_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    from moesaic.bench import timing

    def timed(work: Any, *, head_start: bool) -> float:
        before = len(ran)
        work()
        return 2.0 * (len(ran) - before)

    ran: list[int] = []
    monkeypatch.setattr(timing, "_events_ms", timed)
    calls = [lambda i=i: ran.append(i) for i in range(8)]
    sample = eager_sampler(calls, target_ms=5.0, whole=False)
    assert ran == [0, 0]
    assert [sample(), sample()] == [2.0, 2.0] and ran[2:] == [0, 1, 2, 3, 4, 5]
    ran.clear()
    eager_sampler(calls)()
    assert len(ran) == 2 + 8 + 8 + 8


def line_of(cell: Cell, impl: str, ms: float | None, mode: str = "graph", **more: Any) -> Line:
    return make_line(
        STAMP, suite="layer", clock=cell.clock, model=cell.model, tokens=cell.tokens,
        routing=cell.routing, dtype=cell.dtype, impl=impl, mode=mode, ms=ms, **more,
    )  # fmt: skip


GRID = [
    Cell(model, tokens, routing)
    for model in (MIXTRAL, "tiny")
    for tokens in (1, 16, 1024, 8192)
    for routing in ("uniform", "worst")
]
LOOPS = [c for c in GRID if c.routing == "uniform"]


def good_lines() -> list[Line]:
    """Every cell at 0.97 of its floor, grouped_mm at 2.5 times, the eager loop at 12 times."""
    lines = []
    for cell in GRID:
        lines.append(line_of(cell, "moesaic", 1.0, floor_ms=0.97))
        lines.append(line_of(cell, "dense-twin", 0.5))
        lines.append(line_of(cell, "transformers-grouped_mm", 2.5))
        lines.append(line_of(cell, "transformers-grouped_mm", 2.6, mode="eager"))
        if cell in LOOPS:
            lines.append(line_of(cell, layer.LOOP, 12.0, mode="eager"))
    return lines


def judged(lines: list[Line]) -> dict[str, Target]:
    return {t.name.split(" (")[0]: t for t in layer_targets(lines, GRID, LOOPS)}


def unmet(lines: list[Line]) -> set[str]:
    return {name for name, target in judged(lines).items() if not target.met}


def test_a_whole_good_run_meets_every_target() -> None:
    found = judged(good_lines())
    assert len(found) == 14 and all(t.met for t in found.values())
    assert found["geomean speed-up over transformers-grouped_mm"].value == 2.5
    assert found["geomean speed-up over transformers-eager"].value == 12.0
    assert found["highest ms ÷ best baseline's"].value == 0.4
    names = [t.name for t in layer_targets(good_lines(), GRID, LOOPS)]
    assert "1 token: cells over floor ÷ 0.95 + 7 µs (4 of 4 cells)" in names


def change(cells: list[Cell], impl: str = "moesaic", **values: Any) -> list[Line]:
    lines = good_lines()
    places = {(c.model, c.tokens, c.routing) for c in cells}
    for x in lines:
        if (x["model"], x["tokens"], x["routing"]) in places and x["impl"] == impl:
            x |= values
    return lines


GROUPED = "transformers-grouped_mm"
HIGHEST, FASTER = "highest ms ÷ best baseline's", "share of cells faster than the best baseline"
OVER_1, OVER_4 = (
    f"{n}: cells over floor ÷ {s} + 7 µs" for n, s in (("1 token", 0.95), ("4–128 tokens", 0.93))
)
MEAN_512, MEAN_4096 = (
    f"{n} tokens: geomean floor ÷ ms, worst case left out" for n in ("512–1024", ">= 4096")
)


@pytest.mark.parametrize(
    ("cells", "impl", "values", "broken"),
    [
        ([Cell("tiny", 16)], "moesaic", {"floor_ms": 0.9}, OVER_4),
        ([Cell("tiny", 1, "worst")], "moesaic", {"floor_ms": 0.1}, OVER_1),
        ([Cell(m, 1024) for m in (MIXTRAL, "tiny")], "moesaic", {"floor_ms": 0.8}, MEAN_512),
        ([Cell(MIXTRAL, 8192)], "moesaic", {"floor_ms": 0.95}, f"{MEAN_4096}, Mixtral"),
        ([Cell("tiny", 8192)], "moesaic", {"floor_ms": 0.85}, f"{MEAN_4096}, without Mixtral"),
        ([Cell("tiny", 1024)], GROUPED, {"ms": 0.95}, HIGHEST),
        ([Cell("tiny", 1024), Cell("tiny", 1)], GROUPED, {"ms": 0.995}, FASTER),
        (GRID, GROUPED, {"ms": 2.1}, f"geomean speed-up over {GROUPED}"),
        (LOOPS, layer.LOOP, {"ms": 9.0}, f"geomean speed-up over {layer.LOOP}"),
    ],
)  # fmt: skip
def test_each_rule_is_broken_by_its_own_fault(
    cells: list[Cell], impl: str, values: Any, broken: str
) -> None:
    assert unmet(change(cells, impl, **values)) == {broken}


def test_cells_over_their_limit_are_listed_with_what_counters_say(tmp_path: Path) -> None:
    def one(tokens: int, routing: str, ms: float, floor: float, gbps: float) -> Line:
        cell = Cell("tiny", tokens, routing, clock="experts")
        return line_of(cell, "moesaic", ms, floor_ms=floor, gbps=gbps, tflops=300.0)

    read_floor, twin_floor = 1.0, 2.0  # at 4.5 TB/s, and twice of what bytes need
    good = one(128, "uniform", 1.08, read_floor, 4500 / 1.08)
    slow = one(128, "worst", 1.2, read_floor, 4500 / 1.2)
    heavy = one(8192, "zipf1", 4.0, twin_floor, 4500 / 4.0)
    wrong = one(1, "uniform", 9.0, 1.0, 500.0) | {"wrong": True}

    def launch(impl: str, ms: float, tensor: float, active: float, read: float) -> Line:
        return line_of(Cell("tiny", 128 if read else 8192, "worst" if read else "zipf1"), impl, ms,
                       clock_ghz=1.5, tensor=tensor, sms_active=active, dram_read_bytes=read,
                       dram_written_bytes=0.0)  # fmt: skip

    counters = [
        launch("moesaic 1: sort", 0.1, 0.0, 0.01, 1e6),
        launch("moesaic 2: up", 0.9, 0.0, 0.5, 4.5e9),
        launch("moesaic 1: up", 3.0, 0.5, 0.75, 0),
        launch("dense-twin 1: a", 2.0, 0.75, 0.9, 0),
    ]
    lines = [good, slow, heavy, wrong]
    assert layer_misses.over_limit(lines) == [slow, heavy]
    assert [layer_misses.binding(x) for x in (slow, heavy)] == ["memory", "products"]
    (tmp_path / "launches.jsonl").write_text("".join(json.dumps(x) + "\n" for x in counters))
    text = layer_misses.misses_part(lines, tmp_path)
    assert "**4–128 tokens, worst case** (1 cell): largest: SMs without a block in 1." in text
    assert "| 128 | tiny | worst | 1.2 | 1.08 | 1.11 | memory | 1.20 | tail 2.00 × " in text
    assert (
        "busy 1.20 × others 1.11 × bytes 1.00 × rate 0.45; tensor 0 % | SMs without a block |"
        in text
    )
    assert "tail 1.20" in text and "rows 1.00 × " in text and "waits 1.25" in text
    for x in (slow, heavy):
        factors = layer_misses.factors_of(x, layer_misses.by_cell(counters))
        assert factors and factors.product == pytest.approx(x["ms"] / x["floor_ms"])
    broken = [counters[0] | {"wrong": True}, *counters[1:3]]
    assert [layer_misses.factors_of(x, layer_misses.by_cell(broken)) for x in (slow, heavy)] == [
        None, None
    ]  # fmt: skip
    assert "not counted: 1" in layer_misses.misses_part(lines, tmp_path / "none")
    assert layer_misses.misses_part([good], tmp_path / "none").startswith("Every measured cell")


def test_missing_wrong_and_failed_cells_leave_targets_unmet() -> None:
    assert all(not t.met for name, t in judged([]).items() if not name.startswith("moesaic lines"))
    gone = Cell("tiny", 1, "worst")
    rest = [x for x in good_lines() if (x["tokens"], x["routing"]) != (1, "worst")]
    several = {HIGHEST, FASTER, f"geomean speed-up over {GROUPED}", OVER_1}
    assert unmet(rest) == several
    failing = "moesaic lines wrong or failed"
    assert unmet(change([gone], wrong=True)) == several | {failing}
    failed = line_of(Cell("tiny", 1, clock="layer"), "moesaic", None, error="no graph: x")
    assert unmet([*good_lines(), failed]) == {failing}
