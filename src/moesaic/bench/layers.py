"""One cell of a layer benchmark: candidates built, checked, captured, timed in turn, written down.

    T tokens · H hidden width · E experts · K top-k · S = T*K routed rows

A model's weights are made once; every cell brings fresh inputs. A rotation has at least 8 calls and
as many as make their weights larger than four times the last-level cache (at most 64). The first
call of each candidate is compared with the fp64 reference on some of its tokens, before the timing
(mode eager) and after it (mode graph): a wrong answer is written down as wrong, however fast.
Whatever a candidate raises becomes the `error` of its lines, and the others go on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..cost import expert_flops, expert_weight_elements, floor_ms, layer_bytes
from ..functional import moe
from ..reference import moe_reference
from ..types import ExpertWeights, Measurement
from .baselines import Build, Forward, baselines_of, prepare
from .ceilings import dense_twin
from .results import Line, make_line
from .suite import Cell
from .timing import (
    Call,
    Captured,
    GraphError,
    Sampler,
    capture,
    check_device,
    cpu_sampler,
    eager_sampler,
    graph_sampler,
    interleave,
    reason,
)
from .workloads import Inputs, Model, make_inputs, make_weights, weight_bytes

TWIN = "dense-twin"
ERROR_BOUNDS = {"bfloat16": 1.5e-2, "float16": 3e-3, "float32": 1e-4}
Key = tuple[str, str]


@dataclass(frozen=True)
class Candidate:
    """Something that computes the layer: how it is built, the inputs it likes, what it refuses."""

    name: str
    build: Build
    prepare: Callable[[Inputs], tuple[Tensor, ...]] = prepare
    refuses: Callable[[Model, int, torch.dtype, int], str | None] = lambda *_: None


def ours(impl: str = "triton", name: str = "moesaic") -> Candidate:
    """moesaic itself, through the public function."""

    def build(model: Model, weights: ExpertWeights) -> Forward:
        spec = model.spec()
        return lambda h, ids, w: moe(h, ids, w, weights, spec, impl=impl)  # type: ignore[arg-type]

    return Candidate(name, build, prepare=lambda inputs: inputs)


def candidates_of(model: Model, impl: str = "triton") -> list[Candidate]:
    """moesaic and every baseline that knows the model's arithmetic."""
    theirs = [Candidate(b.name, b.build, prepare, b.refuses) for b in baselines_of(model)]
    return [ours(impl), *theirs]


@dataclass(frozen=True)
class Machine:
    """What a run knows of its device: rates for the floor, cache, memory that a copy may take."""

    device: torch.device
    read_bytes_per_s: float
    cache_bytes: int
    copy_limit_bytes: int = 24 * 2**30

    @property
    def modes(self) -> tuple[str, ...]:
        """The modes that can be timed here."""
        return ("graph", "eager") if self.device.type == "cuda" else ("eager",)


@dataclass
class Loaded:
    """A model on the device: enough weight sets to overflow the cache, candidates built on them."""

    model: Model
    dtype: torch.dtype
    sets: list[ExpertWeights]
    forwards: dict[str, list[Forward]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)


def load(
    model: Model, dtype: torch.dtype, candidates: Sequence[Candidate], machine: Machine, seed: int
) -> Loaded:
    """Fresh weights and every candidate built on each set; a candidate that fails is noted."""
    generator = torch.Generator(machine.device).manual_seed(seed)
    size = weight_bytes(model.spec(), dtype.itemsize)
    count = max(1, math.ceil(4 * machine.cache_bytes / size))
    sets = [make_weights(model.spec(), dtype=dtype, generator=generator) for _ in range(count)]
    loaded = Loaded(model, dtype, sets)
    for candidate in candidates:
        try:
            loaded.forwards[candidate.name] = [candidate.build(model, w) for w in sets]
        except Exception as error:
            loaded.errors[candidate.name] = reason(error)
    return loaded


def rotation_length(model: Model, tokens: int, itemsize: int, cache_bytes: int) -> int:
    """Calls of one rotation: at least 8, and weights of over four caches, but at most 64."""
    active = min(model.num_experts, tokens * model.top_k)
    touched = active * expert_weight_elements(model.spec()) * itemsize
    return max(8, min(64, math.ceil(4 * cache_bytes / touched)))


@dataclass(frozen=True)
class Work:
    """The calls of one cell: inputs, the experts they touch, what the first should give."""

    inputs: list[Inputs]
    active: float
    rows_R: Tensor
    want_RH: Tensor

    def relative_error(self, out_TH: Tensor) -> float:
        """The error of the first call's output, ``|out - want| / |want|`` over the rows checked."""
        got_RH = out_TH[self.rows_R].double()
        return float((got_RH - self.want_RH).norm() / self.want_RH.norm())


def make_work(
    loaded: Loaded,
    cell: Cell,
    machine: Machine,
    seed: int,
    *,
    curve: Sequence[float] | None = None,
    checked: int = 32,
) -> Work:
    """Fresh inputs of a cell and the fp64 reference on `checked` of the first call's tokens.

    `curve`: the recorded loads that routing `curve` resamples.
    """
    model = loaded.model
    generator = torch.Generator(machine.device).manual_seed(seed)
    length = rotation_length(model, cell.tokens, loaded.dtype.itemsize, machine.cache_bytes)
    inputs = [
        make_inputs(
            model,
            cell.tokens,
            cell.routing,
            dtype=loaded.dtype,
            generator=generator,
            curve=curve,
        )
        for _ in range(length)
    ]
    active = sum(int((one.topk_ids_TK.flatten().bincount() > 0).sum()) for one in inputs) / length
    steps = torch.linspace(0, cell.tokens - 1, min(checked, cell.tokens)).long()
    rows_R = steps.to(machine.device)
    hidden_RH, ids_RK, weights_RK = (tensor[rows_R] for tensor in inputs[0])
    want_RH = moe_reference(
        hidden_RH, ids_RK, weights_RK, loaded.sets[0], model.spec(), dtype=torch.float64
    )
    return Work(inputs, active, rows_R, want_RH)


def calls_of(loaded: Loaded, candidate: Candidate, inputs: Sequence[Inputs]) -> list[Call]:
    """A candidate's calls on these inputs, weight sets in turn."""
    forwards = loaded.forwards[candidate.name]
    return [
        partial(forwards[i % len(forwards)], *candidate.prepare(one))
        for i, one in enumerate(inputs)
    ]


@dataclass
class Bench:
    """The state of one cell while it is measured."""

    work: Work
    samplers: dict[Key, Sampler] = field(default_factory=dict)
    errors: dict[Key, str] = field(default_factory=dict)
    accuracy: dict[Key, float] = field(default_factory=dict)
    captured: dict[str, Captured] = field(default_factory=dict)
    eager: Callable[[Sequence[Call]], Sampler] | None = None


def _attempt(bench: Bench, keys: Iterable[Key], step: Callable[[], None]) -> bool:
    """Run a step; what it raises becomes the error of `keys`, unless the device is gone."""
    try:
        step()
    except Exception as error:
        text = f"no graph: {error}" if isinstance(error, GraphError) else reason(error)
        bench.errors.update(dict.fromkeys(keys, text))
        check_device(text)
        return False
    return True


def _prepare_calls(bench: Bench, name: str, calls: Sequence[Call], modes: Sequence[str]) -> None:
    """The samplers of one candidate's calls in each mode that works."""

    def eager() -> None:
        if "graph" in modes:
            bench.samplers[name, "eager"] = (bench.eager or eager_sampler)(calls)
        else:
            bench.samplers[name, "eager"] = cpu_sampler(calls, min_ms=1.0)

    def graph() -> None:
        bench.captured[name] = capture(calls, alike=True)
        bench.samplers[name, "graph"] = graph_sampler(bench.captured[name])

    if name != TWIN:
        _attempt(bench, [(name, "eager")], eager)
    if "graph" in modes:
        _attempt(bench, [(name, "graph")], graph)
    elif name == TWIN:
        _attempt(bench, [(name, "eager")], eager)


def _prepare(
    bench: Bench, loaded: Loaded, cell: Cell, candidate: Candidate, machine: Machine
) -> None:
    """Check one candidate on the first call and set up its samplers, or note why not."""
    name, keys = candidate.name, [(candidate.name, mode) for mode in machine.modes]
    refusal = loaded.errors.get(name) or candidate.refuses(
        loaded.model, cell.tokens, loaded.dtype, machine.copy_limit_bytes
    )
    if refusal:
        bench.errors.update(dict.fromkeys(keys, f"skipped: {refusal}"))
        return
    calls = calls_of(loaded, candidate, bench.work.inputs)

    def first() -> None:
        bench.accuracy[name, "eager"] = bench.work.relative_error(calls[0]())

    if _attempt(bench, keys, first):
        _prepare_calls(bench, name, calls, machine.modes)


def _twin(bench: Bench, loaded: Loaded, cell: Cell, machine: Machine) -> None:
    rows = cell.tokens * loaded.model.top_k

    def build() -> None:
        call = dense_twin(loaded.model.spec(), rows, dtype=loaded.dtype, device=machine.device)
        _prepare_calls(bench, TWIN, [call] * 8, machine.modes)

    _attempt(bench, [(TWIN, machine.modes[0])], build)


def measure_cell(
    loaded: Loaded,
    cell: Cell,
    candidates: Sequence[Candidate],
    machine: Machine,
    *,
    budget_s: float,
    seed: int,
    stamped: Line,
    suite: str,
    curve: Sequence[float] | None = None,
    eager: Callable[[Sequence[Call]], Sampler] | None = None,
) -> list[Line]:
    """The lines of one cell, one per candidate and mode, and one of the dense twin.

    `eager`: instead of `timing.eager_sampler` on CUDA devices.

    Raises:
        DeviceLost: the GPU answers no more; nothing later in this process can be measured.
    """
    with torch.no_grad():
        bench = Bench(make_work(loaded, cell, machine, seed, curve=curve), eager=eager)
        for candidate in candidates:
            _prepare(bench, loaded, cell, candidate, machine)
        _twin(bench, loaded, cell, machine)
        timed = interleave(bench.samplers, budget_s=budget_s, min_samples=3, seed=seed)
        bench.errors |= timed.errors
        for name, captured in bench.captured.items():
            if name != TWIN and (name, "graph") in timed.measured:
                captured.first_output.fill_(float("nan"))
                captured.graph.replay()
                error = bench.work.relative_error(captured.first_output)
                bench.accuracy[name, "graph"] = error
    fixed = stamped | {
        "suite": suite,
        "clock": cell.clock,
        "model": cell.model,
        "tokens": cell.tokens,
        "routing": cell.routing,
        "dtype": cell.dtype,
    }
    return lines_of(bench, timed.measured, loaded, cell, machine, fixed)


def lines_of(
    bench: Bench,
    measured: dict[Key, Measurement],
    loaded: Loaded,
    cell: Cell,
    machine: Machine,
    fixed: Line,
) -> list[Line]:
    """The lines of what was measured or failed, with the floor and the rates they reach."""
    spec, rows = loaded.model.spec(), cell.tokens * loaded.model.top_k
    num_bytes = layer_bytes(spec, cell.tokens, 1, loaded.dtype.itemsize) + round(
        (bench.work.active - 1) * expert_weight_elements(spec) * loaded.dtype.itemsize
    )
    twin = measured.get((TWIN, machine.modes[0]))
    floor = floor_ms(num_bytes, twin.median, machine.read_bytes_per_s) if twin else None
    flops = expert_flops(spec, rows)
    bound = ERROR_BOUNDS[cell.dtype]
    lines = []
    for impl, mode in dict.fromkeys([*measured, *bench.errors]):
        values: dict[str, Any] = {"impl": impl, "mode": mode, "floor_ms": floor}
        if found := measured.get((impl, mode)):
            ms = found.median
            values |= {"ms": ms, "ms_p20": found.p20, "ms_p80": found.p80}
            values |= {"samples": found.samples, "of_floor": floor / ms if floor else None}
            values |= {"tflops": flops / ms / 1e9, "gbps": num_bytes / ms / 1e6}
        if text := bench.errors.get((impl, mode)):
            values["error"] = text
        if impl != TWIN and (impl, mode) in bench.accuracy:
            error = bench.accuracy[impl, mode]
            values |= {"err": error, "wrong": not error <= bound}
        lines.append(make_line(fixed, **values))
    return sorted(lines, key=lambda line: (line["mode"], line["impl"]))
