"""Suite `profiler`: what watching costs a layer, routing and experts together.

A *step* runs L layers (router and experts, each with inputs of its own). `unwatched` has no
counters, `counted` has them and never publishes, `moesaic` does what `moesaic.profile` does: counts
in every layer and ends every step, a publication being shared by 16 layers (every step of 16 layers
publishes, every sixteenth of one layer). `captured` ends its steps inside the graph, where each
publishes. All compute the same; bits and counts are checked, the counts as they arrive through the
ring. `ms` is the time of a step. Under a graph the steps that share a publication are one graph,
and steps end between the graphs.

    L layers of a step · T tokens · E experts · K top-k

The promise is at most 1 % or 0.5 us a layer, whichever is more. `captured` steps of one layer pay a
whole publication each, and are measured to show what that takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...functional import moe, route
from ...runtime.profiler import LayerInfo, Profiler
from ...types import ExpertSpec, ExpertWeights, Measurement, RouterSpec
from ..results import Line, Target, at_least, at_most, make_line, stamp
from ..runtime_pages import Columns, tables
from ..suite import Cell, Context, Suite
from ..timing import (
    Call,
    Captured,
    DeviceLost,
    Sampler,
    capture,
    check_device,
    cpu_sampler,
    eager_sampler,
    graph_sampler,
    interleave,
    reason,
    summary,
)
from ..workloads import MODELS, Model, make_weights

PLAIN, COUNTED, OURS, CAPTURED = "unwatched", "counted", "moesaic", "captured"
IMPLS = (PLAIN, COUNTED, OURS, CAPTURED)
STEPS = {"step-16": 16, "step-1": 1}
SHARED = 16
"""Layers that share a publication."""
TOKENS = {
    "Qwen3-30B-A3B": (1, 64, 512, 8192),
    "Mixtral-8x7B": (1, 64),
    "DeepSeek-V3": (1, 256),
}
ALLOWED_SHARE, ALLOWED_US = 0.01, 0.5
Run = Callable[[], Tensor]


def cells() -> list[Cell]:
    """Decode to prefill of a model of many small experts, few large ones and very many."""
    return [
        Cell(model, tokens, clock=clock)
        for model, every in TOKENS.items()
        for tokens in every
        for clock in STEPS
        if clock == "step-16" or tokens <= 64
    ]


def router_of(model: Model) -> RouterSpec:
    """The model's router: sigmoid over groups for DeepSeek, else softmax."""
    if model.family == "deepseek_v3":
        return RouterSpec(
            num_experts=model.num_experts, top_k=model.top_k, scoring="sigmoid",
            n_group=8, topk_group=4,
        )  # fmt: skip
    return RouterSpec(num_experts=model.num_experts, top_k=model.top_k)


@dataclass(frozen=True)
class Steps:
    """Several steps of L layers each, all on one set of weights; `run` gives their calls."""

    spec: ExpertSpec
    router: RouterSpec
    weights: ExpertWeights
    hidden: tuple[tuple[Tensor, ...], ...]
    logits: tuple[tuple[Tensor, ...], ...]

    def run(self, profiler: Profiler | None, *, publish: bool) -> list[Run]:
        """A call for each step, watched by `profiler` if there is one."""
        none = (None,) * len(self.hidden[0])
        counters = none if profiler is None else profiler.counters

        def step(number: int) -> Tensor:
            for hidden, logits, seen in zip(
                self.hidden[number], self.logits[number], counters, strict=True
            ):
                ids, share, _ = route(logits, self.router, counters=seen)
                out = moe(hidden, ids, share, self.weights, self.spec, counters=seen)
            if publish and profiler is not None:
                profiler.step()
            return out

        return [partial(step, number) for number in range(len(self.hidden))]

    def rows(self) -> list[Tensor]:
        """The rows of each expert of each layer, all steps together."""
        every: list[Tensor] = []
        for layer in range(len(self.hidden[0])):
            counts = [route(step[layer], self.router).counts_E for step in self.logits]
            every.append(torch.stack(counts).sum(0).cpu())
        return every


def draw(
    cell: Cell, layers: int, weights: ExpertWeights, generator: torch.Generator, model: Model
) -> Steps:
    """Fresh inputs for so many steps that about 32 layers run in a rotation."""
    dtype, device = getattr(torch, cell.dtype), generator.device

    def normal(width: int) -> tuple[tuple[Tensor, ...], ...]:
        def one() -> Tensor:
            return torch.randn(cell.tokens, width, generator=generator, device=device).to(dtype)

        return tuple(tuple(one() for _ in range(layers)) for _ in range(max(2, 32 // layers)))

    spec = model.spec()
    return Steps(
        spec, router_of(model), weights, normal(spec.hidden_size), normal(spec.num_experts)
    )


def counts_arrived(profiler: Profiler, steps: Steps, times: int) -> bool:
    """Whether the ring brought what `times` rotations over the steps must have counted."""
    profile = profiler.poll()
    want = steps.rows()
    # What the routing above counted is in no counters: it was not given any.
    return profile is not None and all(
        layer.counts_E == layer.routed_E == tuple((times * rows_E).tolist())
        for layer, rows_E in zip(profile.layers, want, strict=True)
    )


def sync(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Replays:
    """Graphs replayed in turn; after each, its steps are ended outside of it."""

    graphs: tuple[Any, ...]
    steps: int
    end: Callable[[], None] | None

    def replay(self) -> None:
        """Every graph once."""
        for graph in self.graphs:
            graph.replay()
            if self.end is not None:
                for _ in range(self.steps):
                    self.end()


def capture_steps(calls: Sequence[Call], together: int, end: Callable[[], None] | None) -> Captured:
    """Calls captured so many `together`, each ended by `end` after the graph that holds it."""
    groups = [calls[i : i + together] for i in range(0, len(calls), together)]
    graphs = tuple(capture(group).graph for group in groups)
    return Captured(Replays(graphs, together, end), len(calls), None, tuple(calls))


def check(calls: dict[str, list[Run]], profiler: Profiler, steps: Steps) -> bool:
    """Whether bits and counts are right, eagerly; leaves nothing unread in the ring."""
    device = profiler.counters[0].device
    want = [run() for run in calls[PLAIN]]
    same = all(
        torch.equal(run(), out)
        for name in (COUNTED, OURS)
        for run, out in zip(calls[name], want, strict=True)
    )
    profiler.flush()
    sync(device)
    return same and counts_arrived(profiler, steps, 1)


def measure_cell(
    cell: Cell,
    model: Model,
    weights: ExpertWeights,
    device: torch.device,
    *,
    layers: int,
    budget_s: float,
    seed: int,
    fixed: Line,
) -> list[Line]:
    """The lines of one cell: every way, eagerly and, on a GPU, as a graph."""
    generator = torch.Generator(device).manual_seed(seed)
    steps = draw(cell, layers, weights, generator, model)
    infos = [LayerInfo(f"layer{n}", model.num_experts, model.top_k) for n in range(layers)]
    every = {OURS: -(-SHARED // layers)}
    profilers = {n: Profiler(infos, device, every=every.get(n, 1)) for n in IMPLS if n != PLAIN}
    calls = {
        name: steps.run(profilers.get(name), publish=name in (OURS, CAPTURED)) for name in IMPLS
    }
    wrong = {(OURS, "eager"): not check(calls, profilers[OURS], steps)}
    modes = ("graph", "eager") if device.type == "cuda" else ("eager",)
    silent = steps.run(profilers[OURS], publish=False)
    samplers: dict[tuple[str, str], Sampler] = {}
    errors: dict[tuple[str, str], str] = {}
    captured: dict[str, Captured] = {}
    for name in IMPLS:
        for mode in modes if name != CAPTURED else modes[:-1]:
            try:
                some: Sequence[Call] = calls[name]
                if mode == "graph":
                    end = profilers[OURS].step if name == OURS else None
                    some = silent if name == OURS else some
                    captured[name] = capture_steps(some, every[OURS], end)
                    samplers[name, mode] = graph_sampler(captured[name], min_ms=3.0)
                elif device.type == "cuda":
                    samplers[name, mode] = eager_sampler(some)
                else:
                    samplers[name, mode] = cpu_sampler(some)
            except Exception as error:
                errors[name, mode] = reason(error)
                check_device(errors[name, mode])
    rounds: dict[tuple[str, str], list[float]] = {way: [] for way in samplers}
    timed = interleave(
        {way: kept(sampler, rounds[way]) for way, sampler in samplers.items()},
        budget_s=budget_s, min_samples=21, max_samples=400, seed=seed,
    )  # fmt: skip
    errors |= timed.errors
    for name in {OURS, CAPTURED} & set(captured):
        profilers[name].flush()
        sync(device)
        profilers[name].poll()
        captured[name].graph.replay()
        sync(device)
        wrong[name, "graph"] = not counts_arrived(profilers[name], steps, 1)
    lines = []
    for impl, mode in dict.fromkeys([*timed.measured, *errors]):
        values: dict[str, Any] = {"impl": impl, "mode": mode, "layers": layers}
        values["wrong"] = wrong.get((impl, mode), False)
        if found := timed.measured.get((impl, mode)):
            values |= {"ms": found.median, "ms_p20": found.p20, "ms_p80": found.p80}
            values["samples"] = found.samples
            if (PLAIN, mode) in timed.measured and impl != PLAIN:
                over = difference(rounds[impl, mode], rounds[PLAIN, mode])
                values["over_us_a_layer"] = over.median / layers * 1e3
                values["over_us_p20"] = over.p20 / layers * 1e3
                values["over_us_p80"] = over.p80 / layers * 1e3
        if text := errors.get((impl, mode)):
            values["error"] = text
        lines.append(make_line(fixed, **values))
    return sorted(lines, key=lambda line: (line["mode"], line["impl"]))


def kept(sampler: Sampler, taken: list[float]) -> Sampler:
    """A sampler whose samples are also put into a list."""

    def sample() -> float:
        taken.append(sampler())
        return taken[-1]

    return sample


def difference(watched: Sequence[float], plain: Sequence[float]) -> Measurement:
    """What watching adds, from the samples of the same rounds: machines drift between rounds.

    >>> difference([5.0, 7.0, 12.0], [4.0, 6.0, 9.0, 1.0]).median
    1.0
    """
    return summary([a - b for a, b in zip(watched, plain, strict=False)])


def allowed_ms(plain_ms: float, layers: int) -> float:
    """What watching a step of so many layers may cost."""
    return max(ALLOWED_SHARE * plain_ms, ALLOWED_US * 1e-3 * layers)


def run(wanted: Sequence[Cell], context: Context, *, models: dict[str, Model] = MODELS) -> None:
    """Measure the cells, recording each at once; one that fails is recorded with its error.

    Raises:
        DeviceLost: the GPU answers no more.
    """
    stamped = stamp(context.device)
    weights: dict[str, ExpertWeights] = {}
    for done, cell in enumerate(wanted):
        if context.elapsed_s() > 1.1 * context.budget_s:
            context.say(f"out of time, not measured: {cell}")
            continue
        fixed = stamped | {"suite": SUITE.name, "clock": cell.clock, "model": cell.model}
        fixed |= {"tokens": cell.tokens, "routing": cell.routing, "dtype": cell.dtype}
        model = models[cell.model]
        try:
            if cell.model not in weights:
                weights.clear()
                generator = torch.Generator(context.device).manual_seed(context.seed)
                weights[cell.model] = make_weights(
                    model.spec(), dtype=getattr(torch, cell.dtype), generator=generator
                )
            with torch.no_grad():
                lines = measure_cell(
                    cell, model, weights[cell.model], context.device,
                    layers=STEPS[cell.clock], seed=context.seed + done, fixed=fixed,
                    budget_s=0.6 * context.share_s(len(wanted) - done),
                )  # fmt: skip
        except DeviceLost:
            raise
        except Exception as error:
            lines = [make_line(fixed, impl=OURS, mode="eager", error=reason(error))]
        context.record(lines)
        over = {
            f"{x['impl']}/{x['mode']}": round(x["over_us_a_layer"], 3)
            for x in lines
            if x.get("over_us_a_layer") is not None
        }
        context.say(f"{cell.clock} {cell.model} T={cell.tokens}: us a layer {over}")


def measured(line: Line) -> Cell | None:
    """The cell that a line of ours shows to be measured, or None."""
    if line["impl"] != OURS or line["ms"] is None or line.get("wrong"):
        return None
    return Cell(line["model"], line["tokens"], line["routing"], line["dtype"], line["clock"])


def excess(lines: Sequence[Line], clock: str, mode: str, impl: str) -> list[float]:
    """What watching costs over what it may cost, for each cell of a clock and mode.

    The cost is the median over rounds; lines of before rounds were compared have that of medians.
    """
    ms = {
        (x["model"], x["tokens"], x["dtype"], x["impl"]): x["ms"]
        for x in lines
        if x["clock"] == clock and x["mode"] == mode and x["ms"] and not x.get("wrong")
    }
    found = []
    for x in lines:
        plain = ms.get((x["model"], x["tokens"], x["dtype"], PLAIN))
        this = (x["clock"], x["mode"], x["impl"]) == (clock, mode, impl) and x["ms"]
        if this and not x.get("wrong") and plain is not None:
            layers = STEPS[clock]
            over_ms = x.get("over_us_a_layer", (x["ms"] - plain) / layers * 1e3) * layers / 1e3
            found.append(over_ms / allowed_ms(plain, layers))
    return found


def summarize(lines: Sequence[Line]) -> list[Target]:
    """The largest cost of watching over the allowance, by mode and step; wrong lines; coverage."""
    on_gpu = any(x["mode"] == "graph" for x in lines)
    targets = [
        at_most(
            f"cost of {what} over the allowance (1 % or 0.5 us a layer), "
            f"steps of {STEPS[clock]}, {mode}, worst",
            max(excess(lines, clock, mode, impl), default=None),
            1.0,
        )
        for clock in STEPS
        for mode in (("graph", "eager") if on_gpu else ("eager",))
        for what, impl in (("watching", OURS), ("counting", COUNTED))
    ]
    bad = [x for x in lines if x.get("wrong") or x.get("error")]
    compared = sum(len(excess(lines, clock, "eager", OURS)) for clock in STEPS)
    return [
        *targets,
        at_least("cells compared, eager", float(compared), float(len(cells()))),
        at_most("lines wrong or failed", float(len(bad)), 0.0),
    ]


COLUMNS = (
    ("ms", "ms a step"), ("ms_p20", "p20"), ("ms_p80", "p80"),
    ("over_us_a_layer", "us a layer over unwatched"), ("over_us_p20", "its p20"),
    ("over_us_p80", "its p80"), ("allowed", "allowed"),
)  # fmt: skip
TABLES: dict[str, tuple[str, Columns]] = {
    "step-16": ("Steps of 16 layers", COLUMNS),
    "step-1": ("Steps of one layer", COLUMNS),
}


def section(
    lines: Sequence[Line], targets: Sequence[Target], root: Path, device: str, folder: str
) -> tuple[str, dict[str, str]]:
    """The tables of this suite's part of a page."""
    plain = {cell_of(x): x["ms"] for x in lines if x["impl"] == PLAIN and x["ms"]}
    shown = []
    for line in lines:
        ms = plain.get(cell_of(line))
        allowed = None if ms is None else allowed_ms(ms, line["layers"]) / line["layers"] * 1e3
        shown.append(line if line["impl"] == PLAIN else {**line, "allowed": allowed})
    return tables(shown, targets, TABLES), {}


def cell_of(line: Line) -> tuple[object, ...]:
    """What lines of the same layers have in common, apart from whether they are watched."""
    return tuple(line[key] for key in ("clock", "model", "tokens", "dtype", "mode"))


SUITE = Suite(
    name="profiler",
    about="what counting and publishing cost a layer, against the same layer unwatched",
    cells=cells,
    run=run,
    summarize=summarize,
    budget_s=60.0,
    measured=measured,
    section=section,
)
