"""Suite `colocation`: decode steps of one model beside prefill of another on the same GPU.

A decode step is the experts of a few MoE layers of one model on a few tokens, a prefill those of
another on many; prefill is always queued. Loop `closed`: steps back to back. Loop `open`: a step
arrives every two alone-times (half of the time is free), and waiting counts. Measured are: no
control, stream priorities, SM budgets of the persistent launches alone, every split into two green
contexts, in the open loop also splits whose decode part is lent while it is idle (`lend@`), and
what each policy chooses (prefill gets all that decode does not); `moesaic` is the policy that keeps
the promise (`runtime.tenants.protect`). All policies get the same curves, those of the sweep with
both tenants at work, for what curves measured alone cannot show (caches, memory bandwidth and power
stay shared); what they choose is measured anew.

Clock `demand` says what a tenant reads and writes at least, over its time alone, and what share of
the bandwidth that leaves to prefill beside decode at its promise. Clock `counters-closed` (or
`-open`): SM clock, power, shares of DRAM bandwidth and of tensor cores used, by NVML during a trial
of its own. Clock `bits-closed`: answers compared.

Keys of a line besides the usual: `p95_ms`, `p99_ms`, `max_ms`, `steps`, `complete`, `other_share`
(of the other's alone throughput), `slowdown_p99` (over the alone p99 of the same loop), `sms` and
`other_sms`, `split` (SMs asked for), `policy`, `reason`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ...hardware.green import GreenError, GreenUnavailable
from ...runtime.plan import Curve, Plan
from ..colocate import (
    BUDGET,
    GREEN,
    PLAIN,
    PRIORITY,
    Clockwork,
    Loop,
    Pair,
    Work,
    alone_per_s,
    curve_of,
    make_pair,
    measure_curves,
    prepare_budgets,
    prepare_lending,
    prepare_split,
    prepare_whole,
    prepared_size,
    seats_of,
    split_sizes,
    trial,
    whole,
)
from ..colocation_counters import counters_during, demand_lines
from ..colocation_page import section
from ..colocation_settings import DUTY, LENDING, SETTINGS, Setting, plans_of
from ..colocation_targets import (
    ALONE,
    BUDGETS,
    LENT,
    LOOPS,
    NO_CONTROL,
    OURS,
    SPLIT,
    STEPS,
    STREAMS,
    summarize,
)
from ..lending import LEND
from ..results import Line, make_line, stamp
from ..suite import Cell, Context, Suite
from ..tenants import Trial, pooled
from ..timing import reason

LENT_SIZES = range(56, 81, 4)
"""Decode parts that are lent in the sweep of the open loop."""
NEAR = {"closed": (0.84, 1.06), "open": (0.9, 1.06)}
"""Where a short trial's p99, over the promise, cannot tell whether the promise is kept: the tail of
a longer one is up to a fifth longer, as clocks and power settle."""
SHORT_S, LONG_S, COUNTED_S, WARM_S = 0.45, 1.5, 0.8, 0.7
ROUNDS = 2
FEW_SMS, FEW_PART = 8, 0.06
"""Decode parts that ways without slices must lie inside of: each is measured for as many steps as
these, or this part of the budget; short trials flatter prefill."""
SLOW = {PLAIN: 0.66, PRIORITY: 0.3, BUDGET: 0.04}
"""Parts of the budget left for the ways whose steps are long, which come last."""


def cells() -> list[Cell]:
    """Both loops of every setting."""
    return [Cell(name, tokens, clock=loop) for name, tokens in SETTINGS for loop in LOOPS]


def measured(line: Line) -> Cell | None:
    """The cell of a line of stream priorities, which are measured after every slice."""
    if line["impl"] != STREAMS or line["ms"] is None or line.get("wrong"):
        return None
    return Cell(line["model"], line["tokens"], line["routing"], line["dtype"], line["clock"])


@dataclass
class Bench:
    """One setting while it is measured."""

    pair: Pair
    clockwork: Clockwork
    fixed: Line
    curves: dict[str, Curve]
    other_per_s: float
    step_ms: float
    alone: dict[str, Trial] = field(default_factory=dict)

    def interval(self, loop: str) -> float | None:
        """Milliseconds between arrivals: an alone-time (a median of steps) over the duty."""
        return self.step_ms / DUTY if loop == "open" else None

    def run(self, loop: str, seats: tuple[Work, Work | None], steps: int, limit_s: float) -> Trial:
        """One trial; one that is not short begins with `WARM_S` that do not count."""
        return trial(
            self.clockwork, Loop(loop, self.interval(loop)), *seats, steps=steps, limit_s=limit_s,
            warm_s=WARM_S if limit_s > SHORT_S else 0.0,
        )  # fmt: skip

    def line(self, loop: str, impl: str, found: Trial, **more: Any) -> Line:
        """A line of what a trial gave."""
        alone = self.alone[loop].at(0.99)
        p99 = found.at(0.99)
        rate = found.other_per_s
        values: Line = {
            "clock": loop, "impl": impl, "mode": "graph",
            "ms": found.at(0.5), "ms_p20": found.at(0.2), "ms_p80": found.at(0.8),
            "samples": len(found.latencies_ms), "p95_ms": found.at(0.95), "p99_ms": p99,
            "max_ms": max(found.latencies_ms),
            "steps": len(found.latencies_ms), "complete": found.complete,
            "slowdown_p99": p99 / alone,
            "other_per_s": rate, "other_share": None if rate is None else rate / self.other_per_s,
        }  # fmt: skip
        return make_line(self.fixed, **values, **more)


def curve_lines(fixed: Line, curves: dict[str, Curve]) -> list[Line]:
    """A line for each point of the curves measured alone."""
    return [
        make_line(
            fixed, clock="curve", impl=f"{work}@{sms}", mode="graph",
            ms=ms, sms=sms, work=work, slowdown=curve.slowdown(sms),
        )
        for work, curve in curves.items()
        for sms, ms in zip(curve.sms, curve.ms, strict=True)
    ]  # fmt: skip


def curves_from(lines: Sequence[Line]) -> dict[str, Curve]:
    """The curves that `curve_lines` wrote, by kind of work; of the last setting, if several."""
    points: dict[str, dict[int, float]] = {}
    for line in lines:
        if line["clock"] == "curve" and line["ms"]:
            points.setdefault(line["work"], {})[int(line["sms"])] = float(line["ms"])
    curves = {}
    for work, found in points.items():
        sms = tuple(sorted(found))
        curves[work] = Curve(
            work=work, sms=sms, ms=tuple(found[n] for n in sms), load=found[sms[-1]]
        )
    return curves


def begin(setting: Setting, cell: Cell, context: Context, stamped: Line) -> Bench:
    """Weights, graphs of every split, curves; recorded as they come.

    Raises:
        GreenUnavailable, GreenError: the GPU cannot be split.
    """
    fixed = stamped | {
        "suite": SUITE.name, "model": setting.name, "tokens": cell.tokens,
        "routing": cell.routing, "dtype": cell.dtype,
    }  # fmt: skip
    dtype = getattr(torch, cell.dtype)
    pair = make_pair(setting.decode, setting.prefill, context.device, dtype, context.seed)
    context.say(f"compiled; {pair.gpu.cut}")
    prepare_whole(pair)
    for size in split_sizes(pair):
        prepare_split(pair, size)
    context.say(f"{len(pair.splits)} splits captured, {pair.differing} answers differ")
    curves = measure_curves(pair)
    clockwork = Clockwork.on(context.device)
    per_s = alone_per_s(clockwork, whole(pair.other), seconds=LONG_S, warm_s=WARM_S)
    quiet = trial(clockwork, Loop("closed"), whole(pair.step), None, steps=500, limit_s=2.0)
    bench = Bench(pair, clockwork, fixed, curves, per_s, quiet.at(0.5))
    context.record(curve_lines(fixed, curves) + demand_lines(fixed, pair, quiet.at(0.5), per_s))
    slow = {n: [round(c.slowdown(s), 2) for s in c.sms] for n, c in curves.items()}
    context.say(f"step {quiet.at(0.5):.4f} ms, prefill {per_s:.1f} a second; alone {slow}")
    return bench


def sweep(bench: Bench, loop: str, alone: Trial, context: Context) -> dict[tuple[str, int], Trial]:
    """A trial of every split, a longer one near decode's promise; each is recorded as it ends.

    In the open loop also of splits that are lent; a part that is never idle is not worth lending.
    """
    pair, swept = bench.pair, dict[tuple[str, int], Trial]()
    points = [(GREEN, size) for size in sorted(pair.splits)]
    if bench.interval(loop):
        points += [(LEND, size) for size in LENT_SIZES if size in pair.splits]
    for way, size in points:
        if way == LEND:
            prepare_lending(pair, size)
        on = seats_of(pair, way, size)
        first_s = SHORT_S if size > FEW_SMS else max(SHORT_S, FEW_PART * context.budget_s)
        swept[way, size] = bench.run(loop, on, STEPS, first_s)
        low, high = NEAR[loop]
        if low <= swept[way, size].at(0.99) / alone.at(0.99) / LOOPS[loop][0] <= high:
            swept[way, size] = bench.run(loop, on, STEPS, LONG_S)
        context.record(swept_lines(bench, loop, {(way, size): swept[way, size]}))
    return swept


def curves_of(
    bench: Bench, loop: str, alone: Trial, swept: dict[tuple[str, int], Trial]
) -> dict[str, Curve]:
    """Both tenants' curves while both are at work: p99 of decode, mean time of prefill."""
    total, curves = bench.pair.gpu.cut.total_sms, dict[str, Curve]()
    for way in dict.fromkeys(way for way, _ in swept):
        decode, prefill = {total: alone.at(0.99)}, {total: 1e3 / bench.other_per_s}
        for size, found in ((size, t) for (of, size), t in swept.items() if of == way):
            step_sms, other_sms = bench.pair.splits[size]
            decode[step_sms] = found.at(0.99)
            if found.other_per_s:
                prefill[other_sms] = 1e3 / found.other_per_s
        for work, points in (("decode", decode), ("prefill", prefill)):
            name = f"{work}-{loop}{LENDING if way == LEND else ''}"
            curves[name] = curve_of(name, points)
    return curves


Way = tuple[str, int | None]


def ways_of(
    plans: dict[str, Plan], sizes: Sequence[int], lent_sizes: Sequence[int] = ()
) -> dict[str, Way]:
    """How every named way is carried out; not to slice is no control.

    Sizes that were not captured are rounded up, to the benefit of decode.
    """
    ours = plans[OURS]
    ways: dict[str, Way] = {NO_CONTROL: (PLAIN, None), STREAMS: (PRIORITY, None)}
    if ours.sliced:
        ways[BUDGETS] = (BUDGET, prepared_size(sizes, ours.sizes["decode"]))
    for name, plan in plans.items():
        impl = name if name == OURS else f"policy:{name}"
        lent = any(share.borrows for share in plan.shares)
        known = lent_sizes if lent else sizes
        size = prepared_size(known, plan.sizes["decode"]) if plan.sliced else None
        ways[impl] = ((LEND if lent else GREEN) if plan.sliced else PLAIN, size)
    return ways


def measure(bench: Bench, cell: Cell, context: Context, budget_s: float) -> None:
    """One loop: alone, the sweep, what the policies make of it, alone again, and the ways without
    slices, whose steps are long, until `budget_s` is used up; recorded trial by trial."""
    loop, pair = cell.clock, bench.pair
    limit_s, ends_s = 0.1 * budget_s, context.elapsed_s() + budget_s
    seats = (whole(pair.step), None)
    alone = [bench.run(loop, seats, STEPS // ROUNDS, limit_s)]
    bench.alone[loop] = alone[0]
    swept = sweep(bench, loop, alone[0], context)
    bench.curves |= curves_of(bench, loop, alone[0], swept)
    context.record(curve_lines(bench.fixed, bench.curves))
    plans = plans_of(loop, bench.curves, pair.machine)
    ways = ways_of(plans, list(pair.splits), list(pair.lent))
    trials: dict[Way, list[Trial]] = {}

    def tried(way: str, size: int | None, steps: int, limit_s: float) -> None:
        found = bench.run(loop, seats_of(pair, way, size), steps, limit_s)
        trials.setdefault((way, size), []).append(found)
        context.record(named_lines(bench, loop, plans, ways, trials))

    distinct = list(dict.fromkeys(ways.values()))
    for way, size in ROUNDS * [way for way in distinct if way[0] not in SLOW]:
        tried(way, size, STEPS // ROUNDS, limit_s / ROUNDS)
    alone.append(bench.run(loop, seats, STEPS // ROUNDS, limit_s))
    bench.alone[loop] = pooled(alone)
    lines = named_lines(bench, loop, plans, ways, trials) + swept_lines(bench, loop, swept)
    context.record(lines + counted(bench, loop, ways[OURS]))
    context.say(f"{loop} loop: " + told_of(lines))
    left_s = max(8.0, ends_s - context.elapsed_s())
    for way, size in (way for way in distinct if way[0] in SLOW):
        if way == BUDGET:
            prepare_budgets(pair, size or 0)
        tried(way, size, STEPS, SLOW[way] * left_s)
    context.say(f"{loop} loop: " + told_of(named_lines(bench, loop, plans, ways, trials)))


def named_lines(
    bench: Bench, loop: str, plans: dict[str, Plan], ways: dict[str, Way],
    trials: dict[Way, list[Trial]],
) -> list[Line]:  # fmt: skip
    """The lines of decode alone and of every named way that was measured."""
    total = bench.pair.gpu.cut.total_sms
    lines = [bench.line(loop, ALONE, bench.alone[loop], sms=total)]
    for impl, (way, size) in ways.items():
        if (way, size) not in trials:
            continue
        plan = plans.get(impl.removeprefix("policy:"))
        told = {} if plan is None else {"policy": plan.policy, "reason": plan.reason}
        found, sizes = pooled(trials[way, size]), sizes_of(bench.pair, size)
        lines.append(bench.line(loop, impl, found, **told, **sizes))
    return lines


def swept_lines(bench: Bench, loop: str, swept: dict[tuple[str, int], Trial]) -> list[Line]:
    """The lines of the sweep."""
    lines = []
    for (way, size), found in swept.items():
        more = sizes_of(bench.pair, size) | {"probed": list(bench.pair.ran_on[size])}
        lines.append(bench.line(loop, f"{LENT if way == LEND else SPLIT}{size}", found, **more))
    return lines


def counted(bench: Bench, loop: str, ours: Way) -> list[Line]:
    """Counters of each alone, of both without control and under our way, each in its own trial."""
    pair, found = bench.pair, []
    work: dict[str, Callable[[], Any]] = {
        ALONE: partial(_some, bench, loop, (whole(pair.step), None)),
        "prefill alone": partial(
            alone_per_s, bench.clockwork, whole(pair.other), seconds=COUNTED_S, warm_s=WARM_S
        ),
        NO_CONTROL: partial(_some, bench, loop, seats_of(pair, PLAIN, None)),
        OURS: partial(_some, bench, loop, seats_of(pair, *ours)),
    }
    for impl, some in work.items():
        read = counters_during(pair.step.weights[0].up.device, some)
        found.append(make_line(bench.fixed, clock=f"counters-{loop}", impl=impl, **read))
    return found


def _some(bench: Bench, loop: str, seats: tuple[Work, Work | None]) -> Trial:
    return bench.run(loop, seats, 10**9, COUNTED_S)


def sizes_of(pair: Pair, size: int | None) -> Line:
    """What a line says of a split."""
    if size is None:
        return {}
    step_sms, other_sms = pair.splits[size]
    return {"split": size, "sms": step_sms, "other_sms": other_sms}


def run(wanted: Sequence[Cell], context: Context) -> None:
    """Measure the loops asked for, setting by setting; what fails becomes the error of our line."""
    stamped = stamp(context.device)
    for key in dict.fromkeys((cell.model, cell.tokens) for cell in wanted):
        mine = [cell for cell in wanted if (cell.model, cell.tokens) == key]
        try:
            with torch.no_grad():
                bench = begin(SETTINGS[key], mine[0], context, stamped)
                for cell in mine:
                    left = len(wanted) - wanted.index(cell)
                    measure(bench, cell, context, context.share_s(left))
                    context.record([bits_line(bench, cell.clock)])
                bench.pair.gpu.close()
                del bench  # its graphs hold tens of gigabytes
                torch.cuda.empty_cache()
        except (GreenUnavailable, GreenError) as error:
            context.record([_failed(cell, stamped, reason(error)) for cell in mine])
            context.say(reason(error))


def bits_line(bench: Bench, loop: str) -> Line:
    """Answers compared with the whole GPU's since the last such line."""
    pair = bench.pair
    found = {"differing": pair.differing, "compared": pair.compared}
    pair.differing = pair.compared = 0
    return make_line(bench.fixed, clock=f"bits-{loop}", impl=OURS, mode="graph", **found)


def told_of(lines: Sequence[Line]) -> str:
    """One loop's result for the person who waits."""
    parts = [
        f"{x['impl']} {x['slowdown_p99']:.2f}x"
        + ("" if x.get("other_share") is None else f" / {x['other_share']:.2f}")
        for x in lines
    ]
    return ", ".join(parts)


def _failed(cell: Cell, stamped: Line, text: str) -> Line:
    fixed = stamped | {"suite": SUITE.name, "model": cell.model, "tokens": cell.tokens}
    return make_line(
        fixed, clock=cell.clock, routing=cell.routing, dtype=cell.dtype,
        impl=OURS, mode="graph", error=text,
    )  # fmt: skip


SUITE = Suite(
    name="colocation",
    about="decode of one model beside prefill of another: no control, priorities, slices",
    cells=cells,
    run=run,
    summarize=lambda lines: summarize(lines, cells()),
    budget_s=110.0,
    measured=measured,
    section=section,
)
