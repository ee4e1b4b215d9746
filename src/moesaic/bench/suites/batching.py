"""Suite `batching`: from top-k ids to sorted rows and task map, against torch's sort.

`moesaic` is `kernels.batching.batch_rows`: order, positions, offsets and task map. `torch-sort` is
the leanest sequence of torch calls for order, positions and offsets (a stable sort, a scatter, a
search), without the map. Both are compared with the torch twin, bit for bit.

    T tokens · K = 8 choices · S = T*K slots · E experts
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from ...cost import floor_ms
from ..layers import Key, Machine
from ..results import Line, Target, at_least, at_most, geomean, make_line, stamp
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
)
from ..workloads import popularity
from .triton import machine_of

TOP_K = 8
EXPERTS = {"experts-8": 8, "experts-128": 128, "experts-256": 256, "experts-1024": 1024}
TOKENS = (1, 16, 256, 512, 1024, 8192, 32768)
ORDER: Final = "mixed"
OURS, SORT = "moesaic", "torch-sort"
Tables = Sequence[Tensor]


def cells() -> list[Cell]:
    """Every number of experts at every number of tokens; Zipf(1) for 256 experts."""
    grid = [Cell(name, tokens, "uniform", "int32") for name in EXPERTS for tokens in TOKENS]
    return grid + [Cell("experts-256", tokens, "zipf1", "int32") for tokens in TOKENS]


def ours(ids_TK: Tensor, experts: int) -> Callable[[], Tables]:
    """The sort and the map."""
    from ...kernels.batching import batch_rows

    def call() -> Tables:
        rows, task_map = batch_rows(ids_TK, experts, order=ORDER)
        return (*rows, *task_map)

    return call


def torch_sort(ids_TK: Tensor, experts: int) -> Callable[[], Tables]:
    """The sort alone, in torch calls that do not wait for the device."""
    experts_E1 = torch.arange(experts + 1, device=ids_TK.device, dtype=ids_TK.dtype)
    places_S = torch.arange(ids_TK.numel(), device=ids_TK.device)

    def call() -> Tables:
        sorted_S, order_S = ids_TK.view(-1).sort(stable=True)
        position_S = torch.empty_like(order_S).scatter_(0, order_S, places_S)
        return order_S, position_S, torch.searchsorted(sorted_S, experts_E1, out_int32=True)

    return call


CANDIDATES = {OURS: ours, SORT: torch_sort}


def draw(experts: int, cell: Cell, generator: torch.Generator) -> Tensor:
    """Distinct ids (T, K) int32 a token, with the shares of the cell's routing."""
    shares_E = popularity(cell.routing, experts).to(generator.device)
    ids_TK = torch.multinomial(
        shares_E.expand(cell.tokens, -1), min(TOP_K, experts), generator=generator
    )
    return ids_TK.to(torch.int32)


def same(got: Tables, want: Tables) -> bool:
    """Whether the tables that `got` has are those of the twin."""
    return all(torch.equal(a.int(), b) for a, b in zip(got, want, strict=False))


def measure_cell(
    cell: Cell, experts: int, machine: Machine, *, budget_s: float, seed: int, fixed: Line
) -> list[Line]:
    """The lines of one cell, one per candidate and mode.

    Raises:
        DeviceLost: the GPU answers no more.
    """
    from ...kernels.batching import batch_rows_ref

    generator = torch.Generator(machine.device).manual_seed(seed)
    inputs = [draw(experts, cell, generator) for _ in range(8)]
    rows, task_map = batch_rows_ref(inputs[0], experts, order=ORDER)
    want = (*rows, *task_map)
    samplers: dict[Key, Sampler] = {}
    captured: dict[str, Captured] = {}
    errors: dict[Key, str] = {}
    wrong: dict[Key, bool] = {}

    def prepare(name: str, mode: str) -> None:
        calls: list[Call] = [CANDIDATES[name](ids_TK, experts) for ids_TK in inputs]
        if mode == "graph":
            captured[name] = capture(calls)
            samplers[name, mode] = graph_sampler(captured[name])
            return
        wrong[name, mode] = not same(calls[0](), want)
        on_gpu = machine.device.type == "cuda"
        samplers[name, mode] = eager_sampler(calls) if on_gpu else cpu_sampler(calls, min_ms=1.0)

    for name in CANDIDATES:
        for mode in reversed(machine.modes):
            try:
                prepare(name, mode)
            except Exception as error:
                errors[name, mode] = reason(error)
                check_device(errors[name, mode])
    timed = interleave(samplers, budget_s=budget_s, min_samples=3, seed=seed)
    for name, one in captured.items():
        for table in one.first_output:
            table.fill_(-1)
        one.graph.replay()
        wrong[name, "graph"] = not same(one.first_output, want)
    errors |= timed.errors
    num_bytes = 3 * 4 * inputs[0].numel()
    lines = []
    for impl, mode in dict.fromkeys([*timed.measured, *errors]):
        values: dict[str, Any] = {"impl": impl, "mode": mode}
        values |= {"floor_ms": floor_ms(num_bytes, 0.0, machine.read_bytes_per_s)}
        values |= {"wrong": wrong.get((impl, mode), False), "slots": inputs[0].numel()}
        if found := timed.measured.get((impl, mode)):
            values |= {"ms": found.median, "ms_p20": found.p20, "ms_p80": found.p80}
            values |= {"samples": found.samples, "gbps": num_bytes / found.median / 1e6}
            values |= {"of_floor": values["floor_ms"] / found.median}
        if text := errors.get((impl, mode)):
            values["error"] = text
        lines.append(make_line(fixed, **values))
    return sorted(lines, key=lambda line: (line["mode"], line["impl"]))


def run(wanted: Sequence[Cell], context: Context, *, experts: dict[str, int] = EXPERTS) -> None:
    """Measure the cells, recording each at once; one that fails is recorded with its error.

    Raises:
        DeviceLost: the GPU answers no more.
    """
    stamped = stamp(context.device)
    machine = machine_of(context, stamped, SUITE.name)
    for done, cell in enumerate(wanted):
        if context.elapsed_s() > 1.1 * context.budget_s:
            context.say(f"out of time, not measured: {cell}")
            continue
        fixed = stamped | {"suite": SUITE.name, "clock": "batching", "model": cell.model}
        fixed |= {"tokens": cell.tokens, "routing": cell.routing, "dtype": cell.dtype}
        budget_s = 0.5 * context.share_s(len(wanted) - done)
        try:
            lines = measure_cell(
                cell, experts[cell.model], machine,
                budget_s=budget_s, seed=context.seed + done, fixed=fixed,
            )  # fmt: skip
        except DeviceLost:
            raise
        except Exception as error:
            text = reason(error)
            lines = [make_line(fixed, impl=OURS, mode=machine.modes[0], error=text)]
        context.record(lines)
        ms = {f"{x['impl']}/{x['mode']}": x["ms"] for x in lines if x["ms"] is not None}
        context.say(f"{cell.model} T={cell.tokens} {cell.routing}: {ms}")


def summarize(lines: Sequence[Line]) -> list[Target]:
    """Times under a graph at the sizes that matter, the speed-up over torch's sort, wrong lines."""
    right = {
        (x["model"], x["tokens"], x["routing"], x["impl"]): x["ms"]
        for x in lines
        if x["clock"] == "batching" and x["mode"] == "graph" and x["ms"] and not x.get("wrong")
    }
    speedups = [
        right[*cell, SORT] / ms
        for (*cell, impl), ms in right.items()
        if impl == OURS and (*cell, SORT) in right
    ]
    small = [
        ms for (model, tokens, _, impl), ms in right.items()
        if impl == OURS and EXPERTS.get(model, 0) in (128, 256) and tokens * TOP_K <= 2048
    ]  # fmt: skip
    bad = [x for x in lines if x["impl"] == OURS and (x.get("wrong") or x.get("error"))]
    return [
        at_most("slowest ms to 2048 slots, 128 and 256 experts", max(small, default=None), 0.005),
        at_most(
            "ms at 65,536 slots, 256 experts",
            right.get(("experts-256", 8192, "uniform", OURS)),
            0.02,
        ),
        at_least(f"geomean speed-up over {SORT}, graph", geomean(speedups), 1.0),
        at_least("cells compared", float(len(speedups)), float(len(cells()))),
        at_most("moesaic lines wrong or failed", float(len(bad)), 0.0),
    ]


SUITE = Suite(
    name="batching",
    about="sorted rows and task map from top-k ids, against torch's sort",
    cells=cells,
    run=run,
    summarize=summarize,
    budget_s=60.0,
)
