"""Suite `ragged`: static batching beyond experts, many LoRA adapters in one batch.

Every row of a batch names its adapter; ``out += scale * (x A^T) B^T`` with the row's own A and B.
Baselines: the loop over adapters at its best (sizes and order known to the host for free, one
gather and one scatter in all, two products an adapter) and torch's `grouped_mm` (sort, two grouped
products, the scale folded into B beforehand). The floor is the larger of the bytes that must move
and the same products with one adapter for all rows.

    T rows · H input width · O output width · N adapters · R rank
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ...cost import floor_ms
from ..layers import ERROR_BOUNDS, TWIN, Key, Machine
from ..results import Line, Target, at_least, at_most, geomean, make_line, stamp
from ..suite import Cell, Context, Suite
from ..timing import (
    Call,
    Captured,
    DeviceLost,
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
from ..workloads import popularity
from .triton import machine_of

OURS, LOOP, GROUPED = "moesaic", "torch-loop", "torch-grouped-mm"


@dataclass(frozen=True)
class Bank:
    """A set of adapters of one linear layer."""

    name: str
    adapters: int
    rank: int
    hidden: int = 4096
    width: int = 4096

    def num_bytes(self, tokens: int, active: float, itemsize: int) -> int:
        """Bytes that must move: active adapters and input read, output read and written."""
        weights = active * self.rank * (self.hidden + self.width)
        return round(itemsize * (weights + tokens * (self.hidden + 2 * self.width)))

    def flops(self, tokens: int) -> int:
        """Flops of the two products."""
        return 2 * tokens * self.rank * (self.hidden + self.width)


BANKS = {
    bank.name: bank
    for bank in (
        Bank("lora-8-r16", 8, 16),
        Bank("lora-64-r16", 64, 16),
        Bank("lora-64-r64", 64, 64),
        Bank("lora-256-r16", 256, 16),
    )
}
TOKENS = (16, 128, 1024, 8192)


def cells() -> list[Cell]:
    """Every bank at every number of rows, with equal and with Zipf(1) shares of the adapters."""
    return [
        Cell(bank, tokens, routing)
        for bank in BANKS
        for routing in ("uniform", "zipf1")
        for tokens in TOKENS
    ]


@dataclass(frozen=True)
class Batch:
    """One call's tensors; `out_TO` starts as `base_TO` and grows with every call."""

    base_TO: Tensor
    out_TO: Tensor
    x_TH: Tensor
    adapters_T: Tensor
    a_NRH: Tensor
    b_NOR: Tensor
    scale_N: Tensor

    def want(self, row_R: Tensor) -> Tensor:
        """What some rows should be after one call, in fp64."""
        middle_RK = torch.einsum(
            "th,tkh->tk",
            self.x_TH[row_R].double(),
            self.a_NRH[self.adapters_T[row_R]].double(),
        )
        delta_RO = torch.einsum(
            "tk,tok->to", middle_RK, self.b_NOR[self.adapters_T[row_R]].double()
        )
        scale_R1 = self.scale_N[self.adapters_T[row_R], None].double()
        return self.base_TO[row_R].double() + scale_R1 * delta_RO


def make_batch(bank: Bank, cell: Cell, generator: torch.Generator) -> Batch:
    """Fresh adapters, rows and shares; deltas as large as what they are added to."""
    device, dtype = generator.device, getattr(torch, cell.dtype)
    numbers = partial(torch.randn, device=device, dtype=dtype, generator=generator)
    shares_N = popularity(cell.routing, bank.adapters).to(device)
    ids_T = torch.multinomial(shares_N, cell.tokens, True, generator=generator)
    base_TO = numbers(cell.tokens, bank.width)
    return Batch(
        base_TO,
        base_TO.clone(),
        numbers(cell.tokens, bank.hidden),
        ids_T.to(torch.int32),
        numbers(bank.adapters, bank.rank, bank.hidden) * bank.hidden**-0.5,
        numbers(bank.adapters, bank.width, bank.rank) * bank.rank**-0.5,
        torch.rand(bank.adapters, device=device, generator=generator) + 0.5,
    )


def ours(batch: Batch) -> Call:
    """moesaic: sort, map and one launch over the tiles."""
    from ...kernels.ragged_lora import add_lora_

    b = batch
    return lambda: add_lora_(b.out_TO, b.x_TH, b.adapters_T, b.a_NRH, b.b_NOR, b.scale_N)


def loop(batch: Batch) -> Call:
    """Two products an adapter that has rows; the host knows order and sizes beforehand."""
    b = batch
    order_T = b.adapters_T.argsort(stable=True)
    sizes = torch.bincount(b.adapters_T, minlength=len(b.a_NRH)).cpu()
    ends, scales = sizes.cumsum(0).tolist(), b.scale_N.tolist()
    parts = [
        (slice(end - size, end), b.a_NRH[n].T, b.b_NOR[n].T, scales[n])
        for n, (end, size) in enumerate(zip(ends, sizes.tolist(), strict=True))
        if size
    ]

    def call() -> Tensor:
        x_SH, out_SO = b.x_TH[order_T], b.out_TO[order_T]
        for rows, a_HR, b_RO, scale in parts:
            out_SO[rows].addmm_(x_SH[rows] @ a_HR, b_RO, alpha=scale)
        return b.out_TO.index_copy_(0, order_T, out_SO)

    return call


def grouped(batch: Batch) -> Call:
    """Sort, gather, two grouped products, indexed add; B holds the scale already."""
    b = batch
    scaled_NRO = (b.b_NOR * b.scale_N[:, None, None]).to(b.b_NOR.dtype).mT
    adapters_N = torch.arange(len(b.a_NRH), device=b.a_NRH.device, dtype=torch.int32)

    def call() -> Tensor:
        ids_S, order_S = b.adapters_T.sort()
        offsets_N = torch.searchsorted(ids_S, adapters_N, right=True, out_int32=True)
        middle_SR = F.grouped_mm(b.x_TH[order_S], b.a_NRH.mT, offs=offsets_N)
        delta_SO = F.grouped_mm(middle_SR, scaled_NRO, offs=offsets_N)
        return b.out_TO.index_add_(0, order_S, delta_SO)

    return call


def dense(batch: Batch) -> Call:
    """The same products with the first adapter for every row."""
    b, scale = batch, float(batch.scale_N[0])
    a_HR, b_RO = b.a_NRH[0].T, b.b_NOR[0].T
    return lambda: b.out_TO.addmm_(b.x_TH @ a_HR, b_RO, alpha=scale)


CANDIDATES: dict[str, Callable[[Batch], Call]] = {
    OURS: ours,
    LOOP: loop,
    GROUPED: grouped,
    TWIN: dense,
}


@dataclass
class Bench:
    """The state of one cell while it is measured."""

    batches: list[Batch]
    row_R: Tensor
    want_RO: Tensor
    samplers: dict[Key, Sampler] = field(default_factory=dict)
    captured: dict[str, Captured] = field(default_factory=dict)
    errors: dict[Key, str] = field(default_factory=dict)
    accuracy: dict[Key, float] = field(default_factory=dict)

    def check(self, name: str, mode: str, work: Callable[[], object]) -> None:
        """Note the relative error of the first batch after one run of `work`."""
        first = self.batches[0]
        first.out_TO.copy_(first.base_TO)
        work()
        got_RO = first.out_TO[self.row_R].double()
        self.accuracy[name, mode] = float((got_RO - self.want_RO).norm() / self.want_RO.norm())

    def attempt(self, name: str, mode: str, step: Callable[[], None]) -> None:
        """Run a step; what it raises is the error of the line, unless the device is gone."""
        try:
            step()
        except Exception as error:
            known = isinstance(error, GraphError)
            self.errors[name, mode] = f"no graph: {error}" if known else reason(error)
            check_device(self.errors[name, mode])


def make_bench(bank: Bank, cell: Cell, machine: Machine, seed: int) -> Bench:
    """Batches that together overflow four caches, at least 8 and at most 64."""
    generator = torch.Generator(machine.device).manual_seed(seed)
    touched = bank.num_bytes(
        cell.tokens, min(cell.tokens, bank.adapters), getattr(torch, cell.dtype).itemsize
    )
    count = max(8, min(64, math.ceil(4 * machine.cache_bytes / touched)))
    batches = [make_batch(bank, cell, generator) for _ in range(count)]
    steps = torch.linspace(0, cell.tokens - 1, min(32, cell.tokens)).long()
    row_R = steps.to(machine.device)
    return Bench(batches, row_R, batches[0].want(row_R))


def prepare(bench: Bench, name: str, modes: Sequence[str]) -> None:
    """Check a candidate on the first batch and set up its samplers."""

    def eager() -> None:
        calls = [CANDIDATES[name](batch) for batch in bench.batches]
        bench.check(name, "eager", calls[0])
        on_gpu = "graph" in modes
        sampler = eager_sampler(calls) if on_gpu else cpu_sampler(calls, min_ms=1.0)
        bench.samplers[name, "eager"] = sampler

    def graph() -> None:
        bench.captured[name] = capture([CANDIDATES[name](batch) for batch in bench.batches])
        bench.samplers[name, "graph"] = graph_sampler(bench.captured[name])

    bench.attempt(name, "eager", eager)
    if "graph" in modes:
        bench.attempt(name, "graph", graph)


def measure_cell(
    bank: Bank, cell: Cell, machine: Machine, *, budget_s: float, seed: int, fixed: Line
) -> list[Line]:
    """The lines of one cell, one per candidate and mode.

    Raises:
        DeviceLost: the GPU answers no more.
    """
    with torch.no_grad():
        bench = make_bench(bank, cell, machine, seed)
        for name in CANDIDATES:
            prepare(bench, name, machine.modes)
        timed = interleave(bench.samplers, budget_s=budget_s, min_samples=3, seed=seed)
        bench.errors |= timed.errors
        for name, captured in bench.captured.items():
            if (name, "graph") in timed.measured:
                bench.check(name, "graph", captured.graph.replay)
    active = sum(len(set(b.adapters_T.tolist())) for b in bench.batches) / len(bench.batches)
    num_bytes = bank.num_bytes(cell.tokens, active, getattr(torch, cell.dtype).itemsize)
    twin = timed.measured.get((TWIN, machine.modes[0]))
    floor = floor_ms(num_bytes, twin.median, machine.read_bytes_per_s) if twin else None
    lines = []
    for impl, mode in dict.fromkeys([*timed.measured, *bench.errors]):
        values: Line = {"impl": impl, "mode": mode, "floor_ms": floor}
        if found := timed.measured.get((impl, mode)):
            values |= {"ms": found.median, "ms_p20": found.p20, "ms_p80": found.p80}
            values |= {"of_floor": floor / found.median if floor else None}
            values |= {"tflops": bank.flops(cell.tokens) / found.median / 1e9}
            values |= {"gbps": num_bytes / found.median / 1e6, "samples": found.samples}
        if text := bench.errors.get((impl, mode)):
            values["error"] = text
        if impl != TWIN and (error := bench.accuracy.get((impl, mode))) is not None:
            values |= {"err": error, "wrong": not error <= ERROR_BOUNDS[cell.dtype]}
        lines.append(make_line(fixed, **values))
    return sorted(lines, key=lambda line: (line["mode"], line["impl"]))


def told(lines: Sequence[Line]) -> str:
    """One cell's result for the person who waits."""
    first = lines[0]
    ms = {(x["impl"], x["mode"]): x["ms"] for x in lines if x["ms"] is not None}
    text = ", ".join(f"{impl}/{mode} {value:.4f}" for (impl, mode), value in ms.items())
    bad = [f"{x['impl']}/{x['mode']}" for x in lines if x.get("error") or x.get("wrong")]
    text += f" ms; WRONG OR FAILED {bad}" if bad else " ms"
    return f"{first['model']} T={first['tokens']} {first['routing']}: {text}"


def run(wanted: Sequence[Cell], context: Context, *, banks: dict[str, Bank] = BANKS) -> None:
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
        fixed = stamped | {"suite": SUITE.name, "clock": "adapters", "model": cell.model}
        fixed |= {"tokens": cell.tokens, "routing": cell.routing, "dtype": cell.dtype}
        budget_s = 0.6 * context.share_s(len(wanted) - done)
        try:
            lines = measure_cell(
                banks[cell.model], cell, machine,
                budget_s=budget_s, seed=context.seed + done, fixed=fixed,
            )  # fmt: skip
        except DeviceLost:
            raise
        except Exception as error:
            text = reason(error)
            lines = [make_line(fixed, impl=OURS, mode=machine.modes[0], error=text)]
        context.record(lines)
        context.say(told(lines))
        gc.collect()
        if context.device.type == "cuda":
            torch.cuda.empty_cache()


def speedups(lines: Sequence[Line], rival: str, mode: str = "graph") -> dict[Cell, float]:
    """A rival's time over moesaic's per cell, where both gave a right answer."""
    ms = {
        (Cell(x["model"], x["tokens"], x["routing"], x["dtype"]), x["impl"]): x["ms"]
        for x in lines
        if x["clock"] == "adapters" and x["mode"] == mode and x["ms"] and not x.get("wrong")
    }
    return {
        cell: ms[cell, rival] / mine
        for (cell, impl), mine in ms.items()
        if impl == OURS and (cell, rival) in ms
    }


def summarize(lines: Sequence[Line]) -> list[Target]:
    """Speed-ups under a graph over the loop and `grouped_mm`, cells compared, wrong lines."""
    targets = []
    for rival, goal in ((LOOP, 1.5), (GROUPED, 1.0)):
        found = speedups(lines, rival)
        lowest = min(found.values(), default=None)
        compared = sum(cell in found for cell in cells())
        targets += [
            at_least(f"geomean speed-up over {rival}, graph", geomean(found.values()), goal),
            at_least(f"lowest speed-up over {rival}, graph", lowest, 1.0),
            at_least(f"cells compared with {rival}", float(compared), float(len(cells()))),
        ]
    bad = [x for x in lines if x["impl"] == OURS and (x.get("wrong") or x.get("error"))]
    return [*targets, at_most("moesaic lines wrong or failed", float(len(bad)), 0.0)]


SUITE = Suite(
    name="ragged",
    about="many LoRA adapters in one batch against the loop over adapters and torch grouped_mm",
    cells=cells,
    run=run,
    summarize=summarize,
    budget_s=180.0,
)
