"""Suite `gemm`: one launch of the grouped GEMM alone against cuBLAS on the dense product.

    S routed rows, sorted · E experts · N output columns · K depth

Rows come sorted and nothing is gathered: the Hopper kernel with tall and with prefill tiles, the
Triton kernel, torch's grouped_mm, and cuBLAS on one dense (S, K) @ (K, N) of as many flops, all in
turn. `balanced` gives every expert as many rows; `one_expert` gives one all of them; `skewed` gives
every expert but one a single tile, full, and that one the rest: all three have as many full tiles,
so time compares per tile of work. Clock `random` and `zero` say what the operands hold (zeros let a
GPU clock higher). Clock `imbalance` takes the three splits in turn on the same operands, for a GPU
slows as it warms. Clock `bits` reports for which shapes each expert's rows equal `torch.matmul`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from ..gemm_page import section
from ..layers import ERROR_BOUNDS
from ..report import short
from ..results import Line, Target, at_least, at_most, make_line, stamp
from ..suite import Cell, Context, Suite
from ..timing import (
    DeviceLost,
    Sampler,
    capture,
    check_device,
    cpu_sampler,
    graph_sampler,
    interleave,
    reason,
)

NAME = "gemm"
DATASHEET_TFLOPS = 989.0
TILE_ROWS = 256
CALLS = 2
ROUTINGS = ("balanced", "one_expert", "skewed")
Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Shape:
    """A grouped product: E experts of `rows` rows each, K deep, N wide."""

    experts: int
    rows: int
    width: int
    depth: int

    @property
    def slots(self) -> int:
        """S."""
        return self.experts * self.rows

    @property
    def flops(self) -> int:
        """Of the product."""
        return 2 * self.slots * self.width * self.depth


SHAPES = {
    "8x4096x28672x4096": Shape(8, 4096, 28672, 4096),
    "256x512x4096x7168": Shape(256, 512, 4096, 7168),
}
BITS_ROWS = (1, 16, 64, 512, 4096)
BITS_SHAPES = {
    f"bits {width}x{depth}": Shape(4, 0, width, depth)
    for width, depth in ((1536, 2048), (2048, 768), (28672, 4096), (4096, 14336), (4096, 7168),
                         (7168, 2048), (2880, 2880))
}  # fmt: skip


def cells(shapes: dict[str, Shape] = SHAPES, bits: dict[str, Shape] = BITS_SHAPES) -> list[Cell]:
    """Random data in all three splits and zeros, balanced; the splits in turn; then the bits."""
    found = [Cell(n, s.slots, r, clock="random") for n, s in shapes.items() for r in ROUTINGS]
    found += [Cell(name, s.slots, "balanced", clock="imbalance") for name, s in shapes.items()]
    found += [Cell(name, s.slots, "balanced", clock="zero") for name, s in shapes.items()]
    return found + [Cell(name, rows, "balanced", clock="bits")
                    for name in bits for rows in BITS_ROWS]  # fmt: skip


def split(routing: str, experts: int, slots: int, tile_rows: int = TILE_ROWS) -> list[int]:
    """Rows of each expert.

    >>> split("skewed", 4, 4096), split("one_expert", 2, 512), split("balanced", 2, 512)
    ([3328, 256, 256, 256], [512, 0], [256, 256])

    Raises:
        ValueError: there are too few rows for a tile each, or no such routing.
    """
    if routing == "balanced":
        return [slots // experts] * experts
    if routing == "one_expert":
        return [slots, *[0] * (experts - 1)]
    rest = slots - (experts - 1) * tile_rows
    if routing != "skewed" or rest < tile_rows:
        raise ValueError(f"routing {routing!r} with {slots} rows for {experts} experts")
    return [rest, *[tile_rows] * (experts - 1)]


@dataclass(frozen=True)
class Work:
    """Operands of a cell: rows (S, K), weights (E, N, K), first rows (E + 1), the output (S, N)."""

    x_SK: Tensor
    weight_ENK: Tensor
    offsets_E1: Tensor
    out_SN: Tensor

    @property
    def num_experts(self) -> int:
        """E."""
        return self.weight_ENK.shape[0]


def make_work(
    shape: Shape, routing: str, *, zero: bool, device: torch.device, seed: int,
    tile_rows: int = TILE_ROWS,
) -> Work:  # fmt: skip
    """Fresh operands in bf16: random, or all zeros."""
    generator = torch.Generator(device).manual_seed(seed)

    def operand(*size: int, std: float) -> Tensor:
        empty = torch.empty(size, dtype=torch.bfloat16, device=device)
        return empty.zero_() if zero else empty.normal_(0.0, std, generator=generator)

    rows = split(routing, shape.experts, shape.slots, tile_rows)
    offsets = torch.tensor([0, *rows]).cumsum(0).to(device=device, dtype=torch.int32)
    return Work(
        operand(shape.slots, shape.depth, std=1.0),
        operand(shape.experts, shape.width, shape.depth, std=shape.depth**-0.5),
        offsets,
        torch.empty(shape.slots, shape.width, dtype=torch.bfloat16, device=device),
    )


def cublas(work: Work) -> Call:
    """The dense product of equal flops: every row times the first expert's weights."""
    return lambda: torch.mm(work.x_SK, work.weight_ENK[0].T, out=work.out_SN)


def torch_grouped(work: Work) -> Call:
    """torch's grouped_mm, which makes its own output."""
    weight_EKN, ends_E = work.weight_ENK.transpose(1, 2), work.offsets_E1[1:]
    return lambda: F.grouped_mm(work.x_SK, weight_EKN, offs=ends_E)


def hopper(work: Work, kernel: str, bm: int, bn: int, stages: int) -> Call:
    """The Hopper kernel with tiles of one kind."""
    from ...kernels.batching import build_task_map
    from ...kernels.device import sm_count
    from ...kernels.hopper.launch import HopperConfig, grouped_mm_hopper

    tasks = build_task_map(work.offsets_E1, heights=(bm,))
    config = HopperConfig(kernel, bm, bn, stages)  # type: ignore[arg-type]
    return partial(
        grouped_mm_hopper, work.x_SK, work.weight_ENK, tasks, work.out_SN, config=config,
        num_sms=sm_count(work.x_SK.device), ticket=0,
    )  # fmt: skip


def triton(work: Work) -> Call:
    """The Triton kernel with the cut that its heuristic takes for tall tiles."""
    from ...kernels.batching import RowSort, build_task_map
    from ...kernels.grouped_mm import grouped_mm
    from ...kernels.tune import GemmConfig

    slots = torch.arange(len(work.x_SK), dtype=torch.int32, device=work.x_SK.device)
    sort, heights = RowSort(slots, slots, work.offsets_E1), (128,)
    tasks = build_task_map(work.offsets_E1, heights=heights)
    return partial(
        grouped_mm, work.x_SK, work.weight_ENK, sort, tasks, top_k=0, heights=heights,
        config=GemmConfig(256, 64, 8, 3), out=work.out_SN,
    )  # fmt: skip


BUILDERS: dict[str, Callable[[Work], Call]] = {
    "moesaic": lambda work: hopper(work, "tall", 256, 128, 4),
    "moesaic-prefill": lambda work: hopper(work, "prefill", 128, 256, 4),
    "moesaic-triton": triton,
    "cublas": cublas,
    "torch-grouped-mm": torch_grouped,
}


def error_of(work: Work, out_SN: Tensor, dense: bool, checked: int = 24) -> float:
    """|out - want| / |want| in fp64 over some rows; |out| where all is zero."""
    rows_R = torch.linspace(0, len(out_SN) - 1, min(checked, len(out_SN))).long()
    ends = work.offsets_E1[1:].cpu().long()
    experts_R = torch.searchsorted(ends, rows_R, right=True)
    wrong, whole = 0.0, 0.0
    for row, expert in zip(rows_R.tolist(), experts_R.tolist(), strict=True):
        weight_NK = work.weight_ENK[0 if dense else expert]
        want_N = weight_NK.float().double() @ work.x_SK[row].double()
        wrong += float((out_SN[row].double() - want_N).square().sum())
        whole += float(want_N.square().sum())
    return float((wrong / (whole or 1.0)) ** 0.5)


def sampler_of(call: Call, device: torch.device) -> Sampler:
    """Under a CUDA graph of `CALLS` calls, or plain on a CPU."""
    if device.type != "cuda":
        return cpu_sampler([call], min_ms=0.1)
    return graph_sampler(capture([call] * CALLS))


def measure(
    cell: Cell, shape: Shape, builders: dict[str, Callable[[Work], Call]], stamped: Line,
    device: torch.device, *, budget_s: float, seed: int, tile_rows: int = TILE_ROWS,
) -> list[Line]:  # fmt: skip
    """The lines of one cell: every candidate checked, then all sampled in turn."""
    if cell.clock == "imbalance":
        return measure_imbalance(
            cell, shape, builders["moesaic"], stamped, device, budget_s=budget_s, seed=seed,
            tile_rows=tile_rows,
        )  # fmt: skip
    work = make_work(
        shape, cell.routing, zero=cell.clock == "zero", device=device, seed=seed,
        tile_rows=tile_rows,
    )  # fmt: skip
    samplers: dict[str, Sampler] = {}
    errors: dict[str, str] = {}
    found: dict[str, float] = {}
    for name, build in builders.items():
        try:
            call = build(work)
            work.out_SN.fill_(float("nan"))
            found[name] = error_of(work, call(), name == "cublas")
            samplers[name] = sampler_of(call, device)
        except Exception as error:
            errors[name] = reason(error)
            check_device(errors[name])
    timed = interleave(samplers, budget_s=budget_s, min_samples=5, seed=seed)
    errors |= timed.errors
    dense = timed.measured.get("cublas")
    lines = []
    for name in builders:
        values: Line = {"impl": name, "mode": "graph" if device.type == "cuda" else "eager"}
        if name in timed.measured:
            m = timed.measured[name]
            rate = shape.flops / m.median / 1e9
            values |= {"ms": m.median, "ms_p20": m.p20, "ms_p80": m.p80, "samples": m.samples}
            values |= {"tflops": rate, "of_datasheet": rate / DATASHEET_TFLOPS}
            if dense is not None:
                values |= {"floor_ms": dense.median, "of_floor": dense.median / m.median}
        if name in found:
            values |= {"err": found[name], "wrong": not found[name] <= ERROR_BOUNDS["bfloat16"]}
        if name in errors:
            values["error"] = errors[name]
        lines.append(line_of(cell, stamped, values))
    return lines


def measure_imbalance(
    cell: Cell, shape: Shape, build: Callable[[Work], Call], stamped: Line, device: torch.device,
    *, budget_s: float, seed: int, tile_rows: int = TILE_ROWS,
) -> list[Line]:  # fmt: skip
    """moesaic's time of each split of the same rows, in turn; the dense product beside them."""
    balanced = make_work(shape, "balanced", zero=False, device=device, seed=seed)
    works = {"balanced": balanced}
    for routing in ROUTINGS[1:]:
        rows = split(routing, shape.experts, shape.slots, tile_rows)
        offsets = torch.tensor([0, *rows]).cumsum(0).to(device=device, dtype=torch.int32)
        works[routing] = replace(balanced, offsets_E1=offsets)
    samplers: dict[str, Sampler] = {"cublas": sampler_of(cublas(balanced), device)}
    errors: dict[str, float] = {}
    for routing, work in works.items():
        call = build(work)
        work.out_SN.fill_(float("nan"))
        errors[routing] = error_of(work, call(), False)
        samplers[routing] = sampler_of(call, device)
    timed = interleave(samplers, budget_s=budget_s, min_samples=15, seed=seed)
    dense = timed.measured["cublas"].median
    lines = []
    for routing in ROUTINGS:
        m = timed.measured[routing]
        rate = shape.flops / m.median / 1e9
        values: Line = {"impl": "moesaic", "mode": "graph" if device.type == "cuda" else "eager"}
        values |= {"ms": m.median, "ms_p20": m.p20, "ms_p80": m.p80, "samples": m.samples}
        values |= {"tflops": rate, "of_datasheet": rate / DATASHEET_TFLOPS, "floor_ms": dense}
        values |= {"of_floor": dense / m.median, "err": errors[routing]}
        values["wrong"] = not errors[routing] <= ERROR_BOUNDS["bfloat16"]
        lines.append(line_of(replace(cell, routing=routing), stamped, values))
    return lines


def line_of(cell: Cell, stamped: Line, values: Line) -> Line:
    """A line of a cell."""
    return make_line(
        stamped, suite=NAME, clock=cell.clock, model=cell.model, tokens=cell.tokens,
        routing=cell.routing, dtype=cell.dtype, **values,
    )  # fmt: skip


def few_rows(work: Work) -> Call:
    """The Hopper kernel with the tile that `choose` takes for these rows."""
    from ...kernels.device import sm_count
    from ...kernels.hopper.experts import choose

    sms = sm_count(work.x_SK.device)
    rows = max(2, len(work.x_SK))
    tile = choose(rows, 1, work.num_experts, work.weight_ENK.shape[1], sms).down
    kernel = "decode" if tile.kernel == "pair" else tile.kernel
    return hopper(work, kernel, tile.bm, tile.bn, tile.stages)


def compare_bits(
    cell: Cell, shape: Shape, build: Callable[[Work], Call], stamped: Line, device: torch.device,
    seed: int,
) -> Line:  # fmt: skip
    """How many experts' rows are `torch.matmul`'s, bit for bit."""
    whole = Shape(shape.experts, cell.tokens, shape.width, shape.depth)
    work = make_work(whole, "balanced", zero=False, device=device, seed=seed)
    values: Line = {"impl": "moesaic", "mode": "eager", "experts": shape.experts}
    try:
        out_SN = build(work)()
        equal = 0
        for e in range(shape.experts):
            rows = slice(e * cell.tokens, (e + 1) * cell.tokens)
            equal += torch.equal(out_SN[rows], work.x_SK[rows] @ work.weight_ENK[e].T)
        error = error_of(work, out_SN, False)
        values |= {"equal_experts": equal, "err": error}
        values["wrong"] = not error <= ERROR_BOUNDS["bfloat16"]
    except Exception as error:
        values["error"] = reason(error)
        check_device(values["error"])
    return line_of(cell, stamped, values)


def run(
    wanted: Sequence[Cell],
    context: Context,
    *,
    shapes: dict[str, Shape] | None = None,
    builders: dict[str, Callable[[Work], Call]] | None = None,
    bits: Callable[[Work], Call] = few_rows,
    tile_rows: int = TILE_ROWS,
) -> None:
    """Measure cells in their order within the budget; one not begun by then is named and left out.

    Raises:
        DeviceLost: the GPU answers no more.
    """
    stamped, known = stamp(context.device), shapes or SHAPES | BITS_SHAPES
    for number, cell in enumerate(wanted):
        if context.elapsed_s() > context.budget_s:
            context.say(f"out of time, not measured: {cell}")
            continue
        shape, seed = known[cell.model], context.seed + number
        try:
            with torch.no_grad():
                if cell.clock == "bits":
                    lines = [compare_bits(cell, shape, bits, stamped, context.device, seed)]
                else:
                    left = sum(one.clock != "bits" for one in wanted[number:])
                    lines = measure(
                        cell, shape, builders or BUILDERS, stamped, context.device,
                        budget_s=0.6 * min(4.0, context.share_s(left)), seed=seed,
                        tile_rows=tile_rows,
                    )  # fmt: skip
        except DeviceLost:
            raise
        except Exception as error:
            values = {"impl": "moesaic", "mode": "graph", "error": reason(error)}
            lines = [line_of(cell, stamped, values)]
        context.record(lines)
        told = ", ".join(f"{x['impl']} {short(x['tflops'])}" for x in lines if x["tflops"])
        context.say(f"{cell.clock} {cell.model} {cell.routing} T={cell.tokens}: {told} TFLOP/s")


def measured(line: Line) -> Cell | None:
    """The cell of a right answer of moesaic: timed, or compared in bits."""
    done = line["ms"] is not None or line.get("equal_experts") is not None
    if line["impl"] != "moesaic" or not done or line.get("wrong"):
        return None
    return Cell(line["model"], line["tokens"], line["routing"], line["dtype"], line["clock"])


def times(lines: Sequence[Line], clock: str, model: str) -> dict[tuple[str, str], float]:
    """Right times by routing and implementation."""
    return {
        (x["routing"], x["impl"]): x["ms"]
        for x in lines
        if x["clock"] == clock and x["model"] == model and x["ms"] and not x.get("wrong")
    }


def summarize(lines: Sequence[Line], shapes: Sequence[str] = tuple(SHAPES)) -> list[Target]:
    """Against cuBLAS, balanced on random data; the cost of imbalance per tile; what was wrong."""
    targets = []
    for name in shapes:
        ms = times(lines, "random", name)
        mine, dense = ms.get(("balanced", "moesaic")), ms.get(("balanced", "cublas"))
        gain = dense / mine if mine and dense else None
        targets.append(at_least(f"{name}: × cuBLAS on the dense product, balanced", gain, 1.0))
        ms = times(lines, "imbalance", name)
        mine = ms.get(("balanced", "moesaic"))
        for routing in ROUTINGS[1:]:
            other = ms.get((routing, "moesaic"))
            apart = abs(other / mine - 1) if mine and other else None
            text = f"{name}: {routing}, time per tile apart from balanced"
            targets.append(at_most(text, apart, 0.05))
    bad = sum(bool(x.get("wrong") or x.get("error")) for x in lines if x["impl"] == "moesaic")
    return [*targets, at_most("moesaic lines wrong or failed", float(bad), 0.0)]


SUITE = Suite(
    name=NAME,
    about="one launch of the grouped GEMM against cuBLAS on the dense product; imbalance; bits",
    cells=cells,
    run=run,
    summarize=summarize,
    budget_s=60.0,
    measured=measured,
    section=section,
)
