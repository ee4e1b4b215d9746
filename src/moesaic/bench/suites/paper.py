"""Suite `paper`: the evaluation of the expert-slicing paper, every table and figure of it.

    T tokens · E experts · K top-k

Five clocks: `experts` (time from ids and weights to the output, every executor interleaved),
`energy` (windows of a second: joules, watts, activity of SMs, tensor cores and DRAM), `stage`
(routing, experts, aggregation one by one), `launch` (of one kernel), `break-even` (the executors
over E, K, batch and routing). What is measured stands in the YAML files of `bench/paper/configs`.

Cells come in the order of the targets; one whose estimate does not fit into the time left is left
out, so that a run can be made in pieces with ``--missing``.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ...cost import expert_flops
from ..layers import Candidate, Loaded, Machine, load, make_work, measure_cell
from ..paper.bits import compare_bits
from ..paper.configuration import every_cell, grid, model_of
from ..paper.executor import LADDER, LOOP, OURS, Executor, registry
from ..paper.page import section
from ..paper.stages import measure_launches, measure_stages, stages_of
from ..paper.targets import LAYERS, summarize
from ..paper.warm import compile_beside
from ..paper.windows import Watch, work_of
from ..results import Line, make_line, stamp
from ..suite import Cell, Context, Suite
from ..timing import Call, DeviceLost, Sampler, check_device, eager_sampler, reason
from ..workloads import MODELS, Inputs, Model
from .triton import machine_of, told

NAME = "paper"
# Seconds of one cell on an H200, kernels compiled: set-up of every executor, samples, windows.
ESTIMATE_S = {"experts": 1.7, "break-even": 1.0, "stage": 0.7, "launch": 0.5}
WINDOW_OVERHEAD_S = 0.2
CPU_FLOPS_PER_S = 5e10
SAMPLING_S = {"experts": 0.6, "break-even": 0.3}


def executors_of(cell: Cell) -> list[tuple[Executor, str]]:
    """Who gets an energy window, in which mode: the loop and the static batch, and at the batch of
    the ablation everyone, in the better mode (two of them in both)."""
    everyone = registry()
    if cell.tokens != grid()["energy"]["every_executor_at"]:
        return [(everyone[LOOP], "eager"), (everyone[OURS], "graph")]
    both = {"triton-experts", OURS}
    chosen = [(x, "eager") for x in everyone.values() if x.host_counts or x.name in both]
    return chosen + [(x, "graph") for x in everyone.values() if not x.host_counts]


def estimate_s(cell: Cell, gpu: bool = True, models: Callable[[str], Model] = model_of) -> float:
    """Seconds that a cell takes."""
    if not gpu and cell.clock != "launch":
        model = models(cell.model)
        flops = expert_flops(model.spec(), cell.tokens * model.top_k)
        return 0.5 + 8 * len(registry()) * flops / CPU_FLOPS_PER_S
    if cell.clock != "energy":
        return ESTIMATE_S[cell.clock]
    return len(executors_of(cell)) * (float(grid()["energy"]["window_s"]) + WINDOW_OVERHEAD_S)


@dataclass
class Bench:
    """What the cells of one run share: the machine, its meters, the layers on the device."""

    context: Context
    machine: Machine
    watch: Watch
    stamped: Line
    executors: list[Executor]
    models: Callable[[str], Model]
    loaded: dict[str, Loaded] = field(default_factory=dict)

    @property
    def candidates(self) -> list[Candidate]:
        """The executors, as layers are measured with."""
        return [executor.candidate() for executor in self.executors]

    def take(self, cell: Cell) -> Loaded:
        """The layer of a cell; of the break-even map only the one used last is kept."""
        if cell.model in self.loaded:
            return self.loaded[cell.model]
        for name in [n for n in self.loaded if n not in MODELS]:
            del self.loaded[name]
            gc.collect()
        model, dtype = self.models(cell.model), getattr(torch, cell.dtype)
        made = load(model, dtype, self.candidates, self.machine, self.context.seed)
        self.loaded[cell.model] = made
        return made

    def fixed(self, cell: Cell) -> Line:
        """What every line of a cell begins with."""
        place = {"model": cell.model, "tokens": cell.tokens, "routing": cell.routing}
        return self.stamped | place | {"suite": NAME, "clock": cell.clock, "dtype": cell.dtype}


def warm_up(calls: Sequence[Call]) -> None:
    """As many rotations of the calls as `warm_rotations` of their function asks."""
    first = calls[0]
    asked = getattr(first.func, "warm_rotations", 0) if isinstance(first, partial) else 0
    for call in list(calls) * asked:
        call()


def warmed_sampler(calls: Sequence[Call]) -> Sampler:
    """A sampler of few calls, after the warm-up."""
    warm_up(calls)
    return eager_sampler(calls, target_ms=3.0, whole=False)


def states(bench: Bench, loaded: Loaded) -> dict[str, dict[str, Any]]:
    """What executors say of themselves, summed over the weight sets."""
    found: dict[str, dict[str, Any]] = {}
    for executor in bench.executors:
        for forward in loaded.forwards.get(executor.name, []) if executor.state else []:
            for key, value in executor.state(forward).items() if executor.state else ():
                values = found.setdefault(executor.name, {})
                values[key] = values.get(key, 0) + value
    return found


def since(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """What happened between two states; sizes are those of now."""
    sizes = ("graphs", "held_bytes", "buffer_bytes", "weight_bytes")
    return {key: now[key] - (0 if key in sizes else before.get(key, 0)) for key in now}


def layer_lines(bench: Bench, cell: Cell, seed: int) -> list[Line]:
    """Times of every executor, how their bits compare, and what they say of themselves."""
    loaded = bench.take(cell)
    before = states(bench, loaded)
    lines = measure_cell(
        loaded, cell, bench.candidates, bench.machine, budget_s=SAMPLING_S[cell.clock], seed=seed,
        stamped=bench.stamped, suite=NAME, eager=warmed_sampler,
    )  # fmt: skip
    facts = {name: since(before.get(name, {}), now) for name, now in states(bench, loaded).items()}
    if cell.clock == "experts":
        with torch.no_grad():
            for name, values in compare_bits(loaded, cell, bench.executors, seed).items():
                facts[name] = facts.get(name, {}) | values
    return [line | facts.get(line["impl"], {}) for line in lines]


def energy_lines(bench: Bench, cell: Cell, seed: int) -> list[Line]:
    """A window of each executor that gets one."""
    loaded = bench.take(cell)
    lines = []
    with torch.no_grad():
        inputs = make_work(loaded, cell, bench.machine, seed, checked=1).inputs
        for executor, mode in executors_of(cell):
            if mode in bench.machine.modes:
                before = states(bench, loaded).get(executor.name, {})
                values = window(bench, loaded, cell, executor, mode, inputs)
                values |= since(before, states(bench, loaded).get(executor.name, {}))
                lines.append(make_line(bench.fixed(cell), **values))
    return lines


def window(
    bench: Bench,
    loaded: Loaded,
    cell: Cell,
    executor: Executor,
    mode: str,
    inputs: Sequence[Inputs],
) -> dict[str, Any]:
    """The values of one window, or its error."""
    values: dict[str, Any] = {"impl": executor.name, "mode": mode}
    try:
        if executor.name in loaded.errors:
            raise RuntimeError(loaded.errors[executor.name])
        forwards = loaded.forwards[executor.name]
        calls: list[Call] = [
            partial(forwards[i % len(forwards)], *executor.inputs(one))
            for i, one in enumerate(inputs)
        ]
        warm_up(calls)
        seconds = float(grid()["energy"]["window_s"])
        values |= bench.watch.measure(work_of(calls, cell.tokens, mode), seconds)
    except Exception as error:
        values["error"] = reason(error)
        check_device(values["error"])
    if "tokens_per_s" in values:
        values["ms"] = 1e3 * cell.tokens / values["tokens_per_s"]
    return values


def stage_lines(bench: Bench, cell: Cell, seed: int) -> list[Line]:
    """Every stage in every mode."""
    with torch.no_grad():
        stages = stages_of(bench.take(cell), cell, bench.machine, seed)
        found = measure_stages(stages, bench.machine, 0.3, seed)
    return [
        make_line(bench.fixed(cell), impl=impl, mode=mode, **values)
        for (impl, mode), values in found.items()
    ]


def launch_lines(bench: Bench, cell: Cell, seed: int) -> list[Line]:
    """What one launch costs."""
    return [
        make_line(bench.fixed(cell), impl=impl, mode=mode, **values)
        for (impl, mode), values in measure_launches(bench.machine.device).items()
    ]


MEASURES = {
    "experts": layer_lines,
    "break-even": layer_lines,
    "energy": energy_lines,
    "stage": stage_lines,
    "launch": launch_lines,
}


def open_bench(context: Context, wanted: Sequence[Cell], models: Callable[[str], Model]) -> Bench:
    """The machine's ceilings recorded, its idle power measured where windows are wanted."""
    stamped = stamp(context.device)
    machine = machine_of(context, stamped, NAME)
    watch = Watch.open(context.device)
    if any(cell.clock == "energy" for cell in wanted):
        context.say(f"idle: {watch.meter.idle(1.2)}; GPM: {watch.why or 'yes'}")
    absent = [name for name, _ in LADDER if name not in registry()]
    if absent:
        context.say(f"no executor yet, not measured: {', '.join(absent)}")
    return Bench(context, machine, watch, stamped, list(registry().values()), models)


def run(
    wanted: Sequence[Cell], context: Context, *, models: Callable[[str], Model] = model_of
) -> None:
    """Measure cells in their order while their estimates fit into the budget of the context.

    A cell that fails is recorded with its error; one that does not fit is named and left out.

    Raises:
        DeviceLost: the GPU answers no more.
    """
    bench = open_bench(context, wanted, models)
    compiled = [cell for cell in wanted if cell.clock in LAYERS]
    if context.device.type == "cuda" and compiled:
        problems = compile_beside(compiled)
        context.say(f"kernels compiled; {len(problems)} problems {problems[:3]}")
    left_out: list[Cell] = []
    gpu = context.device.type == "cuda"
    for number, cell in enumerate(wanted):
        if context.elapsed_s() + estimate_s(cell, gpu, models) > context.budget_s:
            left_out.append(cell)
            continue
        try:
            lines = MEASURES[cell.clock](bench, cell, context.seed + number)
        except DeviceLost:
            raise
        except Exception as error:
            mode = bench.machine.modes[0]
            lines = [make_line(bench.fixed(cell), impl=OURS, mode=mode, error=reason(error))]
            check_device(reason(error))
        context.record(lines)
        context.say(f"{cell.clock} {told(lines, LOOP)}")
    if left_out:
        clocks = {clock: sum(c.clock == clock for c in left_out) for clock in MEASURES}
        context.say(f"out of time, cells left out: {clocks}; run again with --missing")


def measured(line: Line) -> Cell | None:
    """The cell that a line shows to be measured: by moesaic's main mode, or of a stage its last."""
    if not line["ms"] or line.get("wrong"):
        return None
    main_mode = "graph" if "NVIDIA" in line["device"] else "eager"
    ours = line["impl"] == OURS and line["mode"] == main_mode
    if not (ours or line["impl"] in ("moesaic-aggregation", "launch")):
        return None
    return Cell(line["model"], line["tokens"], line["routing"], line["dtype"], line["clock"])


SUITE = Suite(
    name=NAME,
    about="the expert-slicing paper's evaluation: executors, energy, stages, break-even",
    cells=every_cell,
    run=run,
    summarize=summarize,
    devices=("cuda", "cpu"),
    budget_s=200.0,
    measured=measured,
    section=section,
)
