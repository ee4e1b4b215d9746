"""Suite colocation: what the lines must show, computed from lines; policies choose from curves."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "hardware"))
from green_double import Code, FakeDriver

from moesaic.bench import colocate, colocation_targets
from moesaic.bench.colocate import GREEN, PLAIN
from moesaic.bench.colocation_counters import left_for_prefill
from moesaic.bench.colocation_settings import MEASURED_MARGIN, plans_of
from moesaic.bench.colocation_targets import ALONE, LOOPS, NO_CONTROL, OURS, STREAMS
from moesaic.bench.lending import LEND
from moesaic.bench.report import by_clock, overview, sheet
from moesaic.bench.results import make_line, read_lines
from moesaic.bench.suite import Context
from moesaic.bench.suites import colocation
from moesaic.bench.suites.colocation import (
    SUITE,
    Bench,
    cells,
    curve_lines,
    curves_from,
)
from moesaic.bench.tenants import Trial
from moesaic.hardware.green import GreenDevice
from moesaic.runtime.plan import Curve, MachineSlices, Plan, Share

RESULTS = Path(__file__).parents[2] / "benchmarks/results/h200/colocation.jsonl"
FIRST = f"{cells()[0].model}, {cells()[0].tokens} tokens"
STAMPED = dict.fromkeys(("device", "torch", "triton", "commit", "date"), "x")
SIZES = (8, 16, 32, 48, 64, 96, 128, 132)
CURVES = {
    "decode": Curve(
        work="decode", sms=SIZES, ms=(1.6, 0.8, 0.45, 0.33, 0.28, 0.26, 0.25, 0.25), load=0.25
    ),
    "prefill": Curve(work="prefill", sms=SIZES, ms=(60, 30, 15, 10, 7.6, 5.2, 4.0, 3.9), load=3.9),
    "copy": Curve(work="copy", sms=SIZES, ms=(6, 3, 1.9, 1.4, 1.2, 1.1, 1.0, 1.0)),
}


class FakeContext(Context):
    def __init__(self) -> None:
        self.kept: dict[Any, Any] = {}
        self.recorder = SimpleNamespace(lines=[])
        self.budget_s, self.clock, self.started = 60.0, lambda: 0.0, 0.0

    def record(self, lines: Any) -> None:
        for line in lines:
            self.kept[line["clock"], line["impl"]] = line
        self.recorder.lines = list(self.kept.values())

    def say(self, text: str) -> None:
        assert text


def simulated(
    monkeypatch: pytest.MonkeyPatch,
    interference: float = 1.05,
    context: FakeContext | None = None,
) -> list[Any]:
    """The lines of a run whose trials follow the curves; without control steps wait ten times."""
    splits = {n: (n, 132 - n) for n in range(8, 120, 8)}
    work = SimpleNamespace(sizes=((132, PLAIN),), use=lambda sms, label: (sms, label))
    pair: Any = SimpleNamespace(
        splits=splits,
        ran_on=splits,
        lent={n: ((n, LEND), (132 - n, LEND)) for n in splits},
        differing=0,
        machine=MachineSlices(slices=15, total_sms=132),
        step=SimpleNamespace(work=work),
        other=SimpleNamespace(work=work),
        gpu=SimpleNamespace(cut=SimpleNamespace(total_sms=132)),
    )

    def trial(clockwork, loop, step, other, *, steps, limit_s, warm_s):
        if other is None:
            return Trial((0.25,) * steps, None, True)
        if step[1] not in (GREEN, LEND):
            return Trial((2.5,) * steps, 250.0, True)
        slow = CURVES["decode"].slowdown(step[0]) * interference
        rate = 256 / CURVES["prefill"].slowdown(other[0])
        if step[1] == LEND:
            rate = 0.6 * rate + 0.4 * 256
        return Trial((0.25 * slow,) * steps, rate, True)

    monkeypatch.setattr(colocation, "trial", trial)
    fixed = STAMPED | {
        "suite": "colocation",
        "model": cells()[0].model,
        "tokens": cells()[0].tokens,
        "routing": "uniform",
        "dtype": "bfloat16",
    }
    monkeypatch.setattr(colocation, "prepare_budgets", lambda pair, size: None)
    monkeypatch.setattr(colocation, "prepare_lending", lambda pair, size: None)
    monkeypatch.setattr(colocation, "counted", lambda bench, loop, ours: [])
    bench = Bench(pair, None, fixed, dict(CURVES), 256.0, 0.25)  # type: ignore[arg-type]
    context = context or FakeContext()
    context.record(curve_lines(fixed, CURVES))
    for cell in cells()[:2]:
        colocation.measure(bench, cell, context, 60.0)
    context.record([make_line(fixed, clock="bits-closed", impl=OURS, mode="graph", differing=0)])
    return context.recorder.lines


def test_a_run_that_is_cut_keeps_every_trial_that_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut in the sweep and among the named ways; the loop still counts as missing."""
    for ended in (5, 20):
        kept, left = FakeContext(), [ended]
        run = Bench.run

        def cut(self, *args, run=run, left=left, **named):
            if not left[0]:
                raise TimeoutError
            left[0] -= 1
            return run(self, *args, **named)

        with monkeypatch.context() as patch, pytest.raises(TimeoutError):
            patch.setattr(Bench, "run", cut)
            simulated(patch, context=kept)
        impls = {impl for clock, impl in kept.kept if clock == "closed"}
        assert sum(impl.startswith("split@") for impl in impls) == min(ended - 1, 14)
        assert (OURS in impls) == (ended == 20)
        assert not any(map(colocation.measured, kept.recorder.lines))
    assert {colocation.measured(x) for x in simulated(monkeypatch)} == {*cells()[:2], None}


def test_the_targets_come_from_the_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = simulated(monkeypatch)
    targets = {t.name: t for t in SUITE.summarize(lines)}
    assert len(targets) == 7 * len(cells()) + 1
    assert targets[f"{FIRST}, closed loop: decode p99 over alone"].met
    assert targets[f"{FIRST}, closed loop: chosen plan over the sweep's best"].value >= 0.9
    assert (
        targets[f"{FIRST}, closed loop: no-control inside the front"].met is False
    )  # 0.98 of the other
    assert targets[f"{FIRST}, closed loop: fewest steps of a way"].value == 2000
    lent = next(x for x in lines if x["clock"] == "open" and x["impl"] == OURS)
    assert "borrowing" in lent["reason"] and lent["other_share"] > 0.6
    impls = {x["impl"] for x in lines if x["clock"] == "open"}
    assert {ALONE, OURS, NO_CONTROL, STREAMS, "policy:adaptive", "split@40", "lend@64"} <= impls
    for some in by_clock(lines).values():
        sheet(some), overview(some)


def test_a_wrong_bit_a_broken_promise_and_missing_lines_show(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert not any(t.met for t in SUITE.summarize([]))
    lines = simulated(monkeypatch, interference=1.8)
    bits = next(x for x in lines if x["clock"] == "bits-closed")
    bits["differing"] = 1
    targets = {t.name: t for t in SUITE.summarize(lines)}
    assert not targets["answers whose bits differ from the whole GPU's"].met
    assert not targets[f"{FIRST}, open loop: decode p99 over alone"].met
    wasteful = [x for x in lines if x["impl"] != OURS or x["clock"] != "closed"]
    worse = next(x for x in lines if x["impl"] == "split@8" and x["clock"] == "closed")
    wasteful.append(worse | {"impl": OURS})
    found = {t.name: t.value for t in SUITE.summarize(wasteful)}
    assert found[f"{FIRST}, closed loop: chosen plan over the sweep's best"] < 0.9


def test_points_of_short_trials_prove_no_front(monkeypatch: pytest.MonkeyPatch) -> None:
    """A point beats another only where it was measured for long, without steps that pile up."""
    cell = cells()[1]
    fixed = STAMPED | {"model": cell.model, "tokens": cell.tokens, "clock": "open"}

    def inside(**more: Any) -> float | None:
        ways = {
            ALONE: {"ms": 1.0, "slowdown_p99": 1.0},
            NO_CONTROL: {"ms": 9e3, "slowdown_p99": 1e4, "other_share": 0.98},
            "split@2": {"ms": 1.5, "slowdown_p99": 2.0, "other_share": 0.99, "complete": False}
            | more,
        }
        full = {"steps": 2000, "complete": True}
        lines = [make_line(fixed, **{"impl": i, **full, **values}) for i, values in ways.items()]
        return colocation_targets.dominated(lines, cell, NO_CONTROL)

    assert inside(complete=True, steps=9) == 1 and inside(steps=600) == 1
    assert inside(steps=178) is None and inside(steps=600, ms=200.0) is None
    assert inside(steps=600, other_share=0.97) == 0


def test_bandwidth_bounds_what_is_left_for_prefill() -> None:
    # Decode at 4 TB/s slowed down by 1.6 leaves 2 of 4.5; prefill alone takes 4.
    assert left_for_prefill(4e12, 4e12, 1.6, 1.0) == pytest.approx(0.5)
    assert left_for_prefill(4e12, 4e12, 1.6, 0.5) == pytest.approx(0.8 * 0.5 + 0.2)
    assert left_for_prefill(9e12, 4e12, 1.0, 1.0) == 0.0


def test_sizes_that_were_not_captured_are_rounded_up() -> None:
    lent = (Share("decode", 60), Share("prefill", 72, borrows=True))
    plans = {
        OURS: Plan(policy="protect", reason="", shares=lent),
        "static": Plan(policy="static", reason="", shares=(Share("decode", 60),)),
        "none": Plan(policy="none", reason=""),
    }
    ways = colocation.ways_of(plans, (48, 60, 64), (56, 64))
    assert ways[OURS] == (LEND, 64) and ways["policy:static"] == (GREEN, 60)
    assert ways["policy:none"] == ways[NO_CONTROL] == (PLAIN, None)
    assert ways["sm-budgets"] == (colocate.BUDGET, 60)


def test_curves_survive_their_lines() -> None:
    fixed = STAMPED | {"suite": "colocation", "model": "m", "tokens": 8}
    again = curves_from(curve_lines(fixed, CURVES))
    assert again["decode"] == CURVES["decode"] and again["prefill"] == CURVES["prefill"]


@pytest.mark.parametrize("loop", LOOPS)
def test_every_policy_gives_a_plan_that_fits(loop: str) -> None:
    curves = {f"{name}-{loop}": CURVES[name] for name in ("decode", "prefill")}
    plans = plans_of(loop, curves, MachineSlices())
    assert {OURS, "none", "static", "dynamic", "proportional", "adaptive"} <= set(plans)
    assert not plans["none"].sliced
    ours = plans[OURS]
    assert CURVES["decode"].slowdown(ours.sizes["decode"]) <= LOOPS[loop][0]
    assert sum(ours.sizes.values()) == 128


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("loop", LOOPS)
def test_half_of_the_sweep_is_enough_to_choose_well(loop: str, half: int) -> None:
    """Planned from every second size that was measured on an H200, judged by all of them."""
    lines = [x for x in read_lines(RESULTS) if x["model"] == cells()[0].model]
    points = colocation_targets.points(lines, replace(cells()[0], clock=loop))
    measured = {n: c for n, c in curves_from(lines).items() if n.split("-")[1:2] == [loop]}
    known, slo = {}, LOOPS[loop][0]
    for name, curve in measured.items():
        order = curve.sms[:-1] if name.startswith("decode") else curve.sms[-2::-1]
        kept = {*order[half::2], curve.sms[-1]}
        some = [(n, ms) for n, ms in zip(curve.sms, curve.ms, strict=True) if n in kept]
        known[name] = Curve(work=name, sms=tuple(n for n, _ in some), ms=tuple(t for _, t in some))
    assert all(len(known[n].sms) < 0.7 * len(c.sms) for n, c in measured.items())

    def judged(margin: float) -> tuple[tuple[float, float], float]:
        """The sweep's point of what is chosen with a margin, and that over its best."""
        machine = MachineSlices(granularity=4, min_sms=4)
        plan = plans_of(loop, known, machine, margin=margin)[OURS]
        way = "lend@" if any(share.borrows for share in plan.shares) else "split@"
        sizes = [int(impl.removeprefix(way)) for impl in points if impl.startswith(way)]
        chosen = points[f"{way}{colocate.prepared_size(sizes, plan.sizes['decode'])}"]
        over = colocation_targets.of_best(points | {OURS: chosen}, slo)
        assert over is not None
        return chosen, over

    chosen, over = judged(MEASURED_MARGIN)
    assert chosen[0] <= slo and chosen[1] >= LOOPS[loop][1] and over >= 0.98
    # The check can fail: with this margin far too much goes to decode.
    assert judged(0.75)[1] < 0.9


def test_the_page_shows_every_way_its_reason_and_the_front(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lines = simulated(monkeypatch)
    assert SUITE.section is not None
    text, figures = SUITE.section(lines, SUITE.summarize(lines), tmp_path, "h200", "figures")
    for word in (
        "no-control",
        "split@40",
        "policy:adaptive",
        "x alone",
        f"decode, {cells()[0].tokens} tokens",
        "lend@64",
        "open loop",
    ):
        assert word in text
    (figure,) = figures.values()
    assert figure.count("<svg") == 1 and "every split" in figure


def test_pairs_of_sms_where_the_driver_gives_them_else_whole_atoms(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Coarse(FakeDriver):
        def cuDevSmResourceSplitByCount(self, groups, resource, flags, least):
            if flags:
                return (Code.CUDA_ERROR_NOT_SUPPORTED,)
            return super().cuDevSmResourceSplitByCount(groups, resource, flags, least)

    found = []
    for driver in (FakeDriver(), Coarse(124)):
        monkeypatch.setattr(colocate, "GreenDevice", partial(GreenDevice, driver=driver))
        gpu = colocate.open_gpu(0)
        pair: Any = SimpleNamespace(gpu=gpu)
        machine = colocate.Pair.machine.fget(pair)  # type: ignore[attr-defined]
        found.append((gpu.cut.atom_sms, machine.sizes[-1], colocate.split_sizes(pair)[:3]))
    assert found == [(2, 132, [2, 4, 8]), (8, 120, [8, 16, 24])]
