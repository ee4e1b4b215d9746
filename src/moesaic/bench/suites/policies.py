"""Suite `policies`: who foresees loads best, and what slices chosen by each policy would cost.

On a CPU, replayed offline over recorded traces (`benchmarks/traces`) and made-up walks:

- clock `error`: the error of each predictor of rows per expert in the next step (`wape`: sum of
  absolute errors over sum of rows, all layers, after the warm-up). `ewmaA` are exponential means;
  `known` says what a predictor with context saw: all layers of the step before, or also the earlier
  layers of the same step.
- clock `work`: the same error for the work of the groups, by the ways of the adaptive policy.
- clock `replay`: mean predicted milliseconds of a step under each policy's plans, `floor_ms` the
  oracle's that knows the step, `regret` their ratio less one; `replans`, `flaps`, `sliced`.

Predicted means by time(SMs) curves measured alone, whose source each line names (`curves`).

On a GPU, clock `curve` measures such curves and clock `measured` the plans themselves; see
`bench.sliced_plans`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from ...runtime import predictors
from ...runtime.plan import Curves, GroupProfile, MachineSlices, Policy
from ...runtime.policies import POLICIES
from ...runtime.policies.adaptive import WAYS, by
from ...runtime.policies.forecast import Way, expect, learn, start
from ...runtime.policies.replay import WINDOW, Replay, oracle, replay
from ...runtime.predictors import Array, Predictor
from ..policy_pages import section
from ..results import Line, Target, at_least, at_most, make_line, stamp
from ..scenes import FEEDBACK, Scene, committed_curves, context_of, counts_of, names, scene
from ..suite import Cell, Context, Suite

SPEEDS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7)
"""Exponential means; the best of them in hindsight is what the learned predictor must beat."""
PLAN_SPEEDS = (0.1, 0.3, 0.5)
LAYER = 4
"""The layer of the recorded model that is replayed under policies (of a walk: the last)."""
MACHINE = MachineSlices(total_sms=132, slices=15)
"""An H200, as its driver splits it."""
STEP, EARLIER = "step before", "step before, earlier layers"
LEARNED = "learned"


def cells() -> list[Cell]:
    """Errors of every trace; scenes of each beside a tenant, and of those that are not decode at
    their tokens and twice as many; one cell for a GPU.
    """
    found = []
    for name in names():
        tokens = tokens_of(name)
        found.append(Cell(name, tokens, routing="counts", clock="error"))
        scenes = [("tenant", 1)]
        if not name.startswith("decode-"):
            scenes += [("layer", 1), ("layer", 2)]
        found += [
            Cell(name, times * tokens, routing=kind, clock="replay") for kind, times in scenes
        ]
    return [*found, Cell("prefill-docs", 2048, routing="layer", clock="measured")]


def tokens_of(name: str) -> int:
    """Tokens of a step of a trace or walk."""
    return int(counts_of(name)[0, 0].sum()) // 2


def measured(line: Line) -> Cell | None:
    """The cell of the last line that a cell writes."""
    last = {"error": f"{LEARNED}, {EARLIER}", "replay": "oracle", "measured": "adaptive"}
    if line["impl"] != last.get(line["clock"]):
        return None
    return Cell(line["model"], line["tokens"], line["routing"], line["dtype"], line["clock"])


def guesses(predictor: Predictor, rows_nE: Array, context_nC: Array) -> Array:
    """What a predictor expects of each step (n, E) from those before."""
    state, found = predictor.start(rows_nE.shape[1], context_nC.shape[1]), []
    for rows_E, context_C in zip(rows_nE, context_nC, strict=True):
        found.append(predictor.predict(state, context_C))
        state = predictor.update(state, rows_E, context_C)
    return np.stack(found)


def wape(guess: Array, truth: Array) -> float:
    """Sum of absolute errors over the sum of what came, after the warm-up."""
    return float(np.abs(guess - truth)[WINDOW:].sum() / truth[WINDOW:].sum())


def error_lines(cell: Cell, fixed: Line) -> list[Line]:
    """The errors of every predictor on a trace."""
    counts_nLE = counts_of(cell.model)
    layers = range(counts_nLE.shape[1])
    plain = [predictors.last(), *(predictors.ewma(a) for a in SPEEDS), predictors.trend()]
    tried: list[tuple[str, Predictor, str | None]] = [(p.name, p, None) for p in plain]
    tried.append((f"{LEARNED}, no context", predictors.learned(), None))
    tried += [(f"{LEARNED}, {known}", predictors.learned(), known) for known in (STEP, EARLIER)]
    lines = []
    for impl, predictor, known in tried:
        found = []
        for layer in layers:
            context_nC = context_of(counts_nLE, layer, layers_before=known == EARLIER)
            context_nC = context_nC if known else context_nC[:, :0]
            found.append(guesses(predictor, counts_nLE[:, layer].astype(float), context_nC))
        error = wape(np.stack(found, axis=1), counts_nLE.astype(float))
        lines.append(
            make_line(
                fixed, clock="error", impl=impl, mode="replay", wape=error, known=known,
                samples=len(counts_nLE) - WINDOW, layers=len(layers),
            )
        )  # fmt: skip
    return lines


def foreseen(way: Way, view: Scene) -> Array:
    """The work (n, N) that a way expects of each step from those before."""
    steps, found = view.steps, [view.steps[0].loads_N]
    state = None
    for step, after in pairwise(steps):
        profile = GroupProfile(
            step=0, groups=view.groups, counts_WE=(step.counts_E,), loads_WN=(step.loads_N,),
            context_VC=(step.context_C, after.context_C),
        )  # fmt: skip
        state = start(way, profile) if state is None else state
        state = expect(way, learn(way, state, profile, 0), profile, 1)
        found.append(tuple(() if state.expected_N is None else state.expected_N.tolist()))
    return np.array(found)


def tried_policies() -> dict[str, Policy]:
    """The named policies, and the adaptive one bound to a single way or without hysteresis."""
    single = [Way(f"ewma{a:g}", predictors.ewma(a)) for a in PLAN_SPEEDS]
    single += [WAYS[2], *WAYS[:2]]
    bound = {f"adaptive by {way.name}": by((way,), name=f"by {way.name}") for way in single}
    others = {k: v for k, v in POLICIES.items() if k != "adaptive"}
    hasty = by(WAYS[:1], margin=0.0, name="by learned, no hysteresis")
    bound["adaptive by learned, no hysteresis"] = hasty
    return {**others, **bound, "adaptive": POLICIES["adaptive"]}


def replay_lines(cell: Cell, fixed: Line, curves: Curves, source: str) -> list[Line]:
    """Every policy on a scene; the oracle last."""
    times = cell.tokens // tokens_of(cell.model)
    layer = min(LAYER, counts_of(cell.model).shape[1] - 1)
    view = scene(cell.model, layer, cell.routing, times=times)
    best = oracle(view.groups, view.steps, curves, MACHINE)
    more = {"mode": "replay", "curves": source, "layer": layer}
    truth, lines = np.array([step.loads_N for step in view.steps]), []
    for way in {way.name: way for way in (Way("ewma0.3", predictors.ewma(0.3)), *WAYS)}.values():
        error = wape(foreseen(way, view), truth)
        lines.append(make_line(fixed, clock="work", impl=way.name, wape=error, **more))
    for name, policy in tried_policies().items():
        done = replay(policy, view.groups, view.steps, curves, MACHINE)
        lines.append(scored(fixed, name, done, best, more))
    return [*lines, scored(fixed, "oracle", best, best, more)]


def scored(fixed: Line, impl: str, done: Replay, best: Replay, more: dict[str, Any]) -> Line:
    """The line of a policy on a scene."""
    ms = np.array(done.ms)
    floor = best.total_ms / len(ms)
    return make_line(
        fixed, clock="replay", impl=impl, ms=float(ms.mean()),
        ms_p20=float(np.quantile(ms, 0.2)), ms_p80=float(np.quantile(ms, 0.8)),
        samples=len(ms), floor_ms=floor, of_floor=floor / float(ms.mean()),
        regret=round(done.regret(best), 9) + 0.0, replans=done.replans, flaps=done.flaps,
        sliced=done.sliced, faults=done.faults, **more,
    )  # fmt: skip


def run(wanted: Sequence[Cell], context: Context) -> None:
    """Replay on a CPU, measure on a GPU: each device its clocks."""
    stamped = stamp(context.device)
    if context.device.type == "cuda":
        from ..sliced_plans import measure

        measure([cell for cell in wanted if cell.clock == "measured"], context, stamped, SUITE.name)
        return
    curves, source = committed_curves()
    for cell in wanted:
        fixed = stamped | {
            "suite": SUITE.name, "model": cell.model, "tokens": cell.tokens,
            "routing": cell.routing, "dtype": cell.dtype,
        }  # fmt: skip
        if cell.clock == "error":
            context.record(error_lines(cell, fixed))
        elif cell.clock == "replay":
            context.record(replay_lines(cell, fixed, curves, source))
        else:
            continue
        context.say(f"{cell.model}, {cell.tokens} tokens, {cell.routing}")


def by_impl(lines: Sequence[Line], clock: str, key: str) -> dict[tuple[Any, ...], dict[str, float]]:
    """One number of every line of a clock, by cell, then by implementation."""
    found: dict[tuple[Any, ...], dict[str, float]] = {}
    for x in lines:
        if x["clock"] == clock and x.get(key) is not None:
            found.setdefault((x["model"], x["tokens"], x["routing"]), {})[x["impl"]] = x[key]
    return found


def is_recorded(cell: tuple[Any, ...]) -> bool:
    """Whether a cell is of a recorded trace."""
    return not str(cell[0]).startswith("synthetic-")


def best_ewma(row: dict[str, float]) -> float:
    """The least value among the exponential means, in hindsight."""
    return min(v for k, v in row.items() if k.removeprefix("adaptive by ").startswith("ewma"))


def part(right: Sequence[bool]) -> float | None:
    """The share of true ones, or None of nothing."""
    return sum(right) / len(right) if right else None


def error_targets(lines: Sequence[Line]) -> list[Target]:
    """Learned against the best exponential mean in hindsight, on recorded traces."""
    rows = {k: v for k, v in by_impl(lines, "error", "wape").items() if is_recorded(k)}
    if not rows:
        return []
    impl = f"{LEARNED}, {STEP}"
    ratios = [row[impl] / best_ewma(row) for row in rows.values()]
    return [
        at_least("recorded traces", float(len(rows)), 10),
        at_most(
            "error of learned over the best ewma in hindsight, mean of traces",
            float(np.mean(ratios)), 1.0,
        ),
        at_least(
            "part of the recorded traces on which learned errs less than the best ewma",
            part([ratio < 1 for ratio in ratios]), 1.0,
        ),
    ]  # fmt: skip


def regret_targets(lines: Sequence[Line]) -> list[Target]:
    """The adaptive policy against itself bound to exponential means, and against the others."""
    rows = {k: v for k, v in by_impl(lines, "replay", "regret").items() if is_recorded(k)}
    if not rows:
        return []
    mine = {k: row["adaptive"] for k, row in rows.items()}
    ewma = {k: best_ewma(row) for k, row in rows.items()}
    bound = sum(row[f"adaptive by {LEARNED}"] for row in rows.values())
    speeds = [name for name in next(iter(rows.values())) if name.startswith("adaptive by ewma")]
    single = min(sum(row[name] for row in rows.values()) for name in speeds)
    others = sum(min(row[n] for n in POLICIES if n != "adaptive") for row in rows.values())
    targets = []
    for kind in dict.fromkeys(scene_kind for _, _, scene_kind in rows):
        ours, theirs = (sum(v for k, v in some.items() if k[2] == kind) for some in (mine, ewma))
        targets.append(
            at_most(
                f"regret of adaptive over the best ewma's in hindsight, sums, scene {kind}",
                over(ours, theirs), 1.0,
            )
        )  # fmt: skip
    return [
        *targets,
        at_most(
            "regret of adaptive over the best ewma's in hindsight, sums over recorded scenes",
            over(sum(mine.values()), sum(ewma.values())), 1.0,
        ),
        at_most(
            "regret by learned alone over the best ewma's in hindsight, sums",
            over(bound, sum(ewma.values())), 1.0,
        ),
        at_most(
            "regret of adaptive over the best single ewma's, sums",
            over(sum(mine.values()), single), 1.0,
        ),
        at_most(
            "regret by learned alone over the best single ewma's, sums", over(bound, single), 1.0
        ),
        at_least(
            "part of the recorded scenes in which adaptive regrets no more than the best ewma",
            part([mine[k] <= ewma[k] for k in rows]), 1.0,
        ),
        at_most(
            "regret of adaptive over the best other policy's, sums",
            over(sum(mine.values()), others), 1.0,
        ),
        at_most("largest regret of the oracle", max(r["oracle"] for r in rows.values()), 0.0),
    ]  # fmt: skip


def over(ours: float, theirs: float) -> float | None:
    """One regret over another: 1 where there is none at all, None where only ours is."""
    if theirs == 0:
        return 1.0 if ours == 0 else None
    return ours / theirs


def measured_targets(lines: Sequence[Line]) -> list[Target]:
    """What the chosen plans took on the GPU; unmet where only curves were measured there."""
    here = [x for x in lines if x["clock"] in ("curve", "measured")]
    if not here:
        return []
    rows = {x["impl"]: x["ms"] for x in here if x["clock"] == "measured" and x["ms"]}
    ours, whole = rows.get("adaptive"), rows.get("none")
    fed = [x for x in here if x["impl"] == FEEDBACK and x["ms"]]
    best = min((ms for impl, ms in rows.items() if impl not in ("oracle", FEEDBACK)), default=None)
    wrong = float(sum(bool(x.get("wrong")) for x in here))
    return [
        at_most(
            "measured: adaptive's time over that of not slicing",
            ours / whole if ours and whole else None, 1.0,
        ),
        at_most(
            "measured: adaptive's time over the fastest plan's",
            ours / best if ours and best else None, 1.1,
        ),
        at_most(
            "measured: adaptive with its measured times fed back over not slicing, same steps",
            fed[0]["ms"] / fed[0]["whole_ms"] if fed else None, 1.02,
        ),
        at_most("measured: policies whose answers differ", wrong if rows else None, 0.0),
    ]  # fmt: skip


def summarize(lines: Sequence[Line]) -> list[Target]:
    """Errors, regrets and measured plans, whichever the lines hold."""
    failed = [x for x in lines if x.get("error") or x.get("faults")]
    return [
        *error_targets(lines),
        *regret_targets(lines),
        *measured_targets(lines),
        at_least("lines", float(len(lines)), 1.0),
        at_most("lines failed or with faults", float(len(failed)), 0.0),
    ]


SUITE = Suite(
    name="policies",
    about="predictors and slice policies, replayed over recorded routing; chosen plans on a GPU",
    cells=cells,
    run=run,
    summarize=summarize,
    devices=("cpu", "cuda"),
    budget_s=60.0,
    measured=measured,
    section=section,
)
