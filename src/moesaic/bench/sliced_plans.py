"""The GPU part of suite `policies`: time(SMs) curves of grouped products, and plans as they run.

    T tokens · E experts · K top-k · N groups

One layer of `scenes.WIDTHS` and a shared expert, which is expert E of the same launch, chosen by
every token: so a plan's groups (hot, cold, shared) are groups of experts, each on a green context
of its own, and not slicing is the ordinary layer. The routing of each step is made from the counts
that were recorded. Every answer is compared bit for bit with the unsliced layer's.

Clock `curve`: every group with its own rows alone on every size, which plans are made from; and two
kinds of work for replays elsewhere, hot experts with their rows (`gemm`: bound by products) and
cold experts with an eighth of theirs (`copy`: bound by reading weights). Clock `measured`: the mean
over the steps of the median of some rounds, under each policy's plan for that step. `streams` is no
policy: the groups on ordinary streams.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..hardware.green import GreenDevice, GreenError, GreenUnavailable
from ..runtime.plan import Curves, GroupProfile, MachineSlices, Plan
from ..runtime.policies import POLICIES
from ..runtime.policies.guard import Guard
from ..runtime.policies.replay import WINDOW, oracle, replay
from ..runtime.policies.sizing import plan_ms
from ..runtime.seats import Seat
from ..runtime.sliced import SlicedExperts, run_budgeted
from ..types import ExpertWeights
from .results import Line, make_line
from .scenes import FEEDBACK, TOP_K, WIDTHS, Scene, counts_of, curve, scene
from .stacks import time_ms
from .suite import Cell, Context
from .timing import reason, summary
from .workloads import make_weights

LAYER = 4
STEPS = 8
FED_BACK = 96
"""Consecutive steps of `fed_back`."""
ROUNDS = 5
MOST_PLANS = 16
SPEC = replace(WIDTHS, num_experts=WIDTHS.num_experts + 1)
SHARED = WIDTHS.num_experts
STREAMS = (0, 0, 0)
"""Instead of sizes: groups on ordinary streams, each free to use the whole GPU."""


def ids_from(counts_E: Sequence[int], *, shared: bool = True) -> Tensor:
    """Expert ids (T, K) int32 with these counts, K different ones a token, and the shared expert.

    Raises:
        ValueError: the counts do not sum to a multiple of K, or an expert has more than T.

    >>> ids_from([2, 1, 1], shared=False).tolist()
    [[0, 1], [0, 2]]
    """
    flat = torch.repeat_interleave(torch.arange(len(counts_E)), torch.tensor(list(counts_E)))
    tokens = len(flat) // TOP_K
    if len(flat) % TOP_K or max(counts_E) > tokens:
        raise ValueError(f"counts must sum to {TOP_K} T and be at most T, got {list(counts_E)}")
    ids_TK = flat.view(TOP_K, tokens).T
    if shared:
        ids_TK = torch.cat([ids_TK, torch.full((tokens, 1), SHARED)], dim=1)
    return ids_TK.to(torch.int32).contiguous()


@dataclass
class Layer:
    """The layer on a device: weights, an input for the longest step, the GPU's atoms."""

    weights: ExpertWeights
    hidden_TH: Tensor
    share_TK: Tensor
    gpu: GreenDevice

    @property
    def machine(self) -> MachineSlices:
        """The GPU as policies see it."""
        cut = self.gpu.cut
        return MachineSlices(
            total_sms=cut.total_sms, granularity=cut.atom_sms, min_sms=cut.atom_sms,
            slices=cut.atoms,
        )  # fmt: skip


@dataclass
class Replayable:
    """A captured call: its graph, static ids, output and stream.

    `keep` holds what the graph reads beside them, which must live as long as the graph.
    """

    graph: Any
    ids_TK: Tensor
    out_TH: Tensor
    stream: Any
    keep: tuple[Any, ...] = ()


def make_layer(tokens: int, device: torch.device, seed: int) -> Layer:
    """Weights and inputs; raises GreenUnavailable or GreenError where there are no slices."""
    generator = torch.Generator(device).manual_seed(seed)
    weights = make_weights(SPEC, dtype=torch.bfloat16, generator=generator)
    shape = (tokens, SPEC.hidden_size)
    hidden_TH = torch.randn(shape, generator=generator, device=device).to(torch.bfloat16)
    logits_TK = torch.randn(tokens, TOP_K + 1, generator=generator, device=device)
    return Layer(weights, hidden_TH, logits_TK.softmax(-1), GreenDevice(device.index or 0))


def capture(layer: Layer, ids_TK: Tensor, call: Any, stream: Any) -> Replayable:
    """A graph of `call(hidden, ids, weights)`, captured on a stream after two plain calls."""
    ids_TK = ids_TK.to(layer.hidden_TH.device).clone()
    tokens, top_k = ids_TK.shape
    args = (layer.hidden_TH[:tokens], ids_TK, layer.share_TK[:tokens, :top_k].contiguous())
    for _ in range(2):
        call(*args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        graph.capture_begin()
        try:
            out_TH = call(*args)
        finally:
            graph.capture_end()
    return Replayable(graph, ids_TK, out_TH, stream, keep=(call, args))


def alone_ms(layer: Layer, ids_TK: Tensor, sms: int) -> float:
    """Milliseconds of these rows alone on a part of so many SMs; the whole GPU for all of them."""
    whole = sms == layer.machine.total_sms
    if whole:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    else:
        stream = layer.gpu.slice(range(sms // layer.machine.granularity)).stream

    def call(hidden_TH: Tensor, ids_TK: Tensor, share_TK: Tensor) -> Tensor:
        return run_budgeted(
            hidden_TH, ids_TK, share_TK, layer.weights, SPEC, num_sms=None if whole else sms
        )

    made = capture(layer, ids_TK, call, stream)
    return time_ms([made.graph], stream, repeats=5)


def curve_rows(view: Scene) -> dict[str, list[int]]:
    """Rows per expert of both works: hot ones with the warm-up's mean, cold with an eighth."""
    mean_E = np.mean([step.counts_E for step in view.steps[:WINDOW]], axis=0)
    rows: dict[str, list[int]] = {}
    for work, group, part in (("gemm", 0, 1.0), ("copy", 1, 0.125)):
        counts = [0] * SPEC.num_experts
        for expert in view.groups[group].experts:
            counts[expert] = 2 * max(1, round(part * mean_E[expert] / 2))
        rows[work] = counts
    return rows


def own_ids(view: Scene) -> dict[str, Tensor]:
    """Ids (T, K') of each group's own rows in a mean step of the warm-up, by group."""
    mean_E = np.mean([step.counts_E for step in view.steps[:WINDOW]], axis=0)
    found = {}
    for group in view.groups:
        counts = [0] * SPEC.num_experts
        for expert in group.experts:
            counts[expert] = 2 * max(1, round(mean_E[expert] / 2))
        tokens = round(float(mean_E.sum())) // TOP_K
        shared = torch.full((tokens, 1), SHARED, dtype=torch.int32)
        found[group.name] = ids_from(counts, shared=False) if group.experts else shared
    return found


def measure_curves(layer: Layer, view: Scene) -> tuple[Curves, list[Line]]:
    """Each group's curve over every size, by its name, and bare lines of all points."""
    machine = layer.machine
    sizes = [*machine.sizes, machine.total_sms]
    kinds = {group.name: group.curve for group in view.groups}
    wanted = {work: ids_from(rows, shared=False) for work, rows in curve_rows(view).items()}
    found, lines = {}, []
    for work, ids_TK in (wanted | own_ids(view)).items():
        ms = [alone_ms(layer, ids_TK, sms) for sms in sizes]
        if work in kinds:
            found[work] = curve(kinds[work], sizes, ms)
        lines += [
            {"clock": "curve", "impl": f"{work}@{sms}", "work": work, "sms": sms, "ms": t,
             "rows": ids_TK.numel(), "slowdown": t / ms[-1]}
            for sms, t in zip(sizes, ms, strict=True)
        ]  # fmt: skip
    return found, lines


def by_own_curves(view: Scene) -> Scene:
    """The same groups, each with the curve of its own name."""
    groups = tuple(replace(group, curve=group.name) for group in view.groups)
    return replace(view, groups=groups)


def plans_of(view: Scene, curves: Curves, machine: MachineSlices) -> dict[str, list[Plan]]:
    """The plans of every policy, and of the oracle, for the steps to be measured."""
    chosen = np.linspace(0, len(view.steps) - WINDOW - 1, STEPS).astype(int)
    found = {
        name: replay(policy, view.groups, view.steps, curves, machine)
        for name, policy in POLICIES.items()
    }
    found["oracle"] = oracle(view.groups, view.steps, curves, machine)
    return {name: [done.plans[i] for i in chosen] for name, done in found.items()}


def sizes_of(plan: Plan, view: Scene) -> tuple[int, ...]:
    """SMs of each group in order, () for the whole GPU."""
    return tuple(plan.sizes[group.name] for group in view.groups) if plan.sliced else ()


def members(view: Scene) -> list[tuple[int, ...]]:
    """Experts of each group; the shared expert is a group of its own."""
    return [group.experts or (SHARED,) for group in view.groups]


def capture_plan(layer: Layer, view: Scene, sizes: tuple[int, ...], ids_TK: Tensor) -> Replayable:
    """The layer under sizes: groups on parts of their own; () is one launch over the whole GPU."""
    if not sizes:

        def whole(hidden_TH: Tensor, ids_TK: Tensor, share_TK: Tensor) -> Tensor:
            return run_budgeted(hidden_TH, ids_TK, share_TK, layer.weights, SPEC)

        return capture(layer, ids_TK, whole, torch.cuda.Stream())  # type: ignore[no-untyped-call]
    if sizes == STREAMS:
        seats = [Seat(0, torch.cuda.Stream()) for _ in sizes]  # type: ignore[no-untyped-call]
    else:
        seats = [Seat(part.sms, part.stream) for part in layer.gpu.carve(sizes)]
    sliced = SlicedExperts(layer.weights, SPEC, members(view), seats)
    return capture(layer, ids_TK, sliced, torch.cuda.Stream())  # type: ignore[no-untyped-call]


def sample(made: Replayable, ids_TK: Tensor) -> float:
    """Median milliseconds of three replays with these ids, after one that takes over the SMs."""
    with torch.cuda.stream(made.stream):
        made.ids_TK.copy_(ids_TK)
    return time_ms([made.graph], made.stream, repeats=3)


def fed_back(
    layer: Layer, view: Scene, curves: Curves, made: dict[tuple[int, ...], Replayable]
) -> Line:
    """Consecutive steps under `adaptive`, each step's measured time handed back to it.

    Every step is also measured unsliced (`whole_ms`), where it was not so already.
    """
    guard = Guard(POLICIES["adaptive"], curves, layer.machine)
    took, ms, whole_ms, used = None, list[float](), list[float](), list[tuple[int, ...]]()
    for number in range(WINDOW, min(len(view.steps), WINDOW + FED_BACK)):
        past, step = view.steps[number - WINDOW : number], view.steps[number]
        plan = guard(
            GroupProfile(
                step=number - 1, groups=view.groups, counts_WE=tuple(s.counts_E for s in past),
                loads_WN=tuple(s.loads_N for s in past),
                context_VC=tuple(s.context_C for s in (*past, step)), took_ms=took,
            )
        )  # fmt: skip
        sizes, ids_TK = sizes_of(plan, view), ids_from(step.counts_E)
        if sizes not in made:
            made[sizes] = capture_plan(layer, view, sizes, ids_TK)
        ids_TK = ids_TK.to(layer.hidden_TH.device)
        took = sample(made[sizes], ids_TK)
        ms.append(took)
        whole_ms.append(sample(made[()], ids_TK) if sizes else took)
        used.append(sizes)
    return {
        "impl": FEEDBACK, "ms": float(np.mean(ms)), "samples": len(ms),
        "whole_ms": float(np.mean(whole_ms)), "sliced": sum(map(bool, used)) / len(used),
        "plans": [list(sizes) for sizes in used], "faults": sum(guard.faults.values()),
    }  # fmt: skip


def measure_steps(
    layer: Layer,
    view: Scene,
    plans: dict[str, list[Plan]],
    made: dict[tuple[int, ...], Replayable],
    context: Context,
) -> tuple[dict[str, list[float]], int]:
    """Median milliseconds of each policy's steps, interleaved, and how many answers differed.

    `made`: filled with the plans captured.
    """
    chosen = np.linspace(WINDOW, len(view.steps) - 1, STEPS).astype(int)
    ids = [ids_from(view.steps[i].counts_E) for i in chosen]
    wanted = list(dict.fromkeys(sizes_of(p, view) for row in plans.values() for p in row))
    wanted = [(), STREAMS, *(sizes for sizes in wanted if sizes)][:MOST_PLANS]
    made |= {sizes: capture_plan(layer, view, sizes, ids[0]) for sizes in wanted}
    context.say(f"{len(made)} plans captured: {wanted}")
    different, found = 0, dict[str, list[float]]()
    for at, ids_TK in enumerate(ids):
        ids_TK = ids_TK.to(layer.hidden_TH.device)
        mine = {name: sizes_of(row[at], view) for name, row in plans.items()}
        mine["streams"] = STREAMS
        needed = [sizes for sizes in dict.fromkeys([(), *mine.values()]) if sizes in made]
        times: dict[tuple[int, ...], list[float]] = {sizes: [] for sizes in needed}
        for _ in range(ROUNDS):
            for sizes in needed:
                times[sizes].append(sample(made[sizes], ids_TK))
        different += sum(
            not torch.equal(made[sizes].out_TH, made[()].out_TH) for sizes in needed if sizes
        )
        for name, sizes in mine.items():
            if sizes in times:
                found.setdefault(name, []).append(summary(times[sizes]).median)
    return found, different


def measure(cells: Sequence[Cell], context: Context, stamped: Line, suite: str) -> None:
    """Curves and measured plans of each cell; what fails becomes the error of its lines."""
    for cell in cells:
        fixed = stamped | {
            "suite": suite, "model": cell.model, "tokens": cell.tokens, "routing": cell.routing,
            "dtype": cell.dtype, "mode": "graph",
        }  # fmt: skip
        try:
            with torch.no_grad():
                measure_cell(cell, fixed, context)
        except (GreenUnavailable, GreenError, RuntimeError) as error:
            context.say(reason(error))
            failed = make_line(fixed, clock="measured", impl="adaptive", error=reason(error))
            context.record([failed])


def measure_cell(cell: Cell, fixed: Line, context: Context) -> None:
    """One trace: curves, plans from them, times of the plans beside what was predicted."""
    times = cell.tokens // (int(counts_of(cell.model)[0, 0].sum()) // TOP_K)
    view = scene(cell.model, LAYER, cell.routing, times=times)
    layer = make_layer(cell.tokens, context.device, context.seed)
    context.say(f"layer made; {layer.gpu.cut}")
    warm = run_budgeted(
        layer.hidden_TH, ids_from(view.steps[0].counts_E).to(context.device), layer.share_TK,
        layer.weights, SPEC,
    )  # fmt: skip
    context.say(f"compiled, answers {tuple(warm.shape)}")
    curves, points = measure_curves(layer, view)
    context.record([make_line(fixed, **point) for point in points])
    context.say("curves: " + str({w: [round(t, 2) for t in c.ms] for w, c in curves.items()}))
    view = by_own_curves(view)
    plans = plans_of(view, curves, layer.machine)
    made = dict[tuple[int, ...], Replayable]()
    found, different = measure_steps(layer, view, plans, made, context)
    learned = fed_back(layer, view, curves, made)
    chosen = np.linspace(WINDOW, len(view.steps) - 1, STEPS).astype(int)
    profile = GroupProfile(step=0, groups=view.groups)
    wrong = f"{different} answers differ" if different else None
    lines = [make_line(fixed, clock="measured", wrong=wrong, **learned)]
    for name, ms in sorted(found.items(), key=lambda pair: pair[0] == "adaptive"):
        expected = [
            plan_ms(profile, view.steps[i].loads_N, plan, curves, layer.machine)
            for i, plan in zip(chosen, plans.get(name, ()), strict=False)
        ]
        spread = summary(ms)
        lines.append(
            make_line(
                fixed, clock="measured", impl=name, ms=float(np.mean(ms)), ms_p20=spread.p20,
                ms_p80=spread.p80, samples=len(ms),
                predicted_ms=float(np.mean(expected)) if expected else None,
                plans=[list(sizes_of(plan, view)) for plan in plans.get(name, ())],
                wrong=wrong,
            )
        )  # fmt: skip
    context.record(lines)
    told = (f"{x['impl']} {x['ms']} ({x.get('predicted_ms')} predicted)" for x in lines)
    context.say("; ".join(told))
    layer.gpu.close()
