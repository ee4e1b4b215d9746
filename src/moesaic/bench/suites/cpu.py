"""Suite `cpu`: the CPU path against transformers' three experts implementations, fp32 and bf16.

Mixtral-8x7B, Qwen3-30B-A3B and DeepSeek-V3 with their own numbers of experts and choices; hidden
and intermediate widths are divided by 4, 4 and 8, so that their ratio stays and the weights fit.
Every cell compares with the fastest of `eager`, `grouped_mm` and `batched_mm`, timed in turn in the
same process with as many threads as torch takes by itself. `batched_mm`, which copies an expert's
weights for every routed row, is left out where that would take more than a quarter of a GiB.

`moesaic` has its weights packed once before the timing, as inference would (`packing.pack`); its
lines hold the bytes that takes beside the plain weights. `moesaic-unpacked` has the plain ones.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from ...functional import moe
from ...packing import PackedWeights, pack
from ...types import ExpertWeights
from ..baselines import BASELINES, prepare
from ..ceilings import measure_ceilings
from ..layers import Candidate, Loaded, Machine, load, measure_cell, ours
from ..results import Line, Target, at_least, at_most, geomean, make_line, stamp
from ..suite import Cell, Context, Suite
from ..timing import reason
from ..workloads import Model
from .triton import ceiling_lines

MODELS: dict[str, Model] = {
    m.name: m
    for m in (
        Model("Mixtral-8x7B/4", 8, 2, 1024, 3584, family="mixtral"),
        Model("Qwen3-30B-A3B/4", 128, 8, 512, 192, family="qwen3_moe"),
        Model("DeepSeek-V3/8", 256, 8, 896, 256, family="deepseek_v3"),
    )
}
UNPACKED = "moesaic-unpacked"
RIVALS = ("transformers-eager", "transformers-grouped_mm", "transformers-batched_mm")
TOKENS = (1, 4, 16, 64, 256, 1024, 2048)
DTYPES = ("float32", "bfloat16")
CACHE_BYTES = 32 * 2**20
COPY_LIMIT_BYTES = 2**28
GOAL, LOWEST = 1.2, 0.95


@dataclass(frozen=True)
class PackedLayer:
    """moesaic through the public function, on weights that were packed when it was built."""

    packed: PackedWeights

    def __call__(self, hidden_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        return moe(hidden_TH, ids_TK, weights_TK, self.packed, self.packed.spec, impl="cpu")


def build_packed(model: Model, weights: ExpertWeights) -> PackedLayer:
    """The layer of a model with its weights packed."""
    return PackedLayer(pack(weights, model.spec()))


def with_memory(lines: Sequence[Line], loaded: Loaded) -> list[Line]:
    """The lines, those of `moesaic` with the bytes of the plain weights and of the packed copy."""
    found = loaded.forwards.get("moesaic", [None])[0]
    if not isinstance(found, PackedLayer):
        return list(lines)
    plain = sum(t.nbytes for t in found.packed.plain.named().values())
    memory = {"plain_bytes": plain, "packed_bytes": found.packed.num_bytes}
    return [x | memory if x["impl"] == "moesaic" else x for x in lines]


def cells() -> list[Cell]:
    """Every model at every number of tokens in both dtypes, uniform routing."""
    return [
        Cell(model, tokens, "uniform", dtype)
        for dtype in DTYPES
        for model in MODELS
        for tokens in TOKENS
    ]


def best(lines: Sequence[Line]) -> dict[Cell, tuple[float, str, float]]:
    """Per cell: moesaic's ms, the fastest right baseline and its ms."""
    ms: dict[Cell, dict[str, float]] = {}
    for x in lines:
        if x["clock"] == "experts" and x["mode"] == "eager" and x["ms"] and not x.get("wrong"):
            cell = Cell(x["model"], x["tokens"], x["routing"], x["dtype"])
            ms.setdefault(cell, {})[x["impl"]] = x["ms"]
    found: dict[Cell, tuple[float, str, float]] = {}
    for cell, by_impl in ms.items():
        theirs = {name: by_impl[name] for name in RIVALS if name in by_impl}
        if theirs and "moesaic" in by_impl:
            name = min(theirs, key=theirs.__getitem__)
            found[cell] = (by_impl["moesaic"], name, theirs[name])
    return found


def told(cell: Cell, lines: Sequence[Line]) -> str:
    """One cell's result for the person who waits."""
    text = f"{cell.model} T={cell.tokens} {cell.dtype}:"
    for mine, name, theirs in best(lines).values():
        text += f" {mine:.2f} ms, {name} {theirs:.2f} ms ({theirs / mine:.2f}x)"
    failed = [x["impl"] for x in lines if x.get("error") and not x["error"].startswith("skipped")]
    wrong = [x["impl"] for x in lines if x.get("wrong")]
    return text + (f" errors {failed}" if failed else "") + (f" WRONG {wrong}" if wrong else "")


def run(
    wanted: Sequence[Cell], context: Context, *, models: dict[str, Model] | None = None
) -> None:
    """Measure the cells model by model, recording each at once; a failure becomes a line."""
    known = MODELS if models is None else models
    stamped = stamp(context.device) | {"threads": torch.get_num_threads()}
    ceilings = measure_ceilings(
        context.device, dtype=torch.float32, num_bytes=2**26, gemm_size=512, budget_s=0.5
    )
    context.record(ceiling_lines(ceilings, stamped, SUITE.name))
    rate = ceilings.read_gbps * 1e9
    machine = Machine(context.device, rate, CACHE_BYTES, COPY_LIMIT_BYTES)
    rivals = [Candidate(n, BASELINES[n].build, prepare, BASELINES[n].refuses) for n in RIVALS]
    mine = Candidate("moesaic", build_packed, lambda inputs: inputs)
    candidates = [mine, ours("cpu", UNPACKED), *rivals]
    left = len(wanted)
    for (name, dtype), group in groupby(wanted, key=lambda cell: (cell.model, cell.dtype)):
        loaded = None
        for cell in group:
            if context.elapsed_s() > 1.1 * context.budget_s:
                context.say(f"out of time, not measured: {cell}")
                continue
            try:
                model, kind = known[name], getattr(torch, dtype)
                loaded = loaded or load(model, kind, candidates, machine, context.seed)
                lines = measure_cell(
                    loaded, cell, candidates, machine,
                    budget_s=0.6 * context.share_s(left), seed=context.seed + left,
                    stamped=stamped, suite=SUITE.name,
                )  # fmt: skip
                lines = with_memory(lines, loaded)
            except Exception as error:
                lines = [failed_line(stamped, cell, reason(error))]
            context.record(lines)
            context.say(told(cell, lines))
            left -= 1
        del loaded
        gc.collect()


def failed_line(stamped: Line, cell: Cell, text: str) -> Line:
    """The line of a cell that could not be set up at all."""
    return make_line(
        stamped, suite=SUITE.name, clock="experts", model=cell.model, tokens=cell.tokens,
        routing=cell.routing, dtype=cell.dtype, impl="moesaic", mode="eager", error=text,
    )  # fmt: skip


def summarize(lines: Sequence[Line]) -> list[Target]:
    """Speed-ups over the fastest baseline of each cell, by dtype; cells compared; wrong lines."""
    ratios = {cell: theirs / mine for cell, (mine, _, theirs) in best(lines).items()}
    bad = [
        x for x in lines
        if x["clock"] == "experts"
        and x["impl"] in ("moesaic", UNPACKED)
        and (x.get("wrong") or x.get("error"))
    ]  # fmt: skip
    means = [
        at_least(
            f"geomean speed-up over the best of transformers, {dtype}",
            geomean(ratio for cell, ratio in ratios.items() if cell.dtype == dtype),
            GOAL,
        )
        for dtype in DTYPES
    ]
    return [
        *means,
        at_least("lowest speed-up of a cell", min(ratios.values(), default=None), LOWEST),
        at_least("cells compared", float(len(ratios)), float(len(cells()))),
        at_most("moesaic lines wrong or failed", float(len(bad)), 0.0),
    ]


SUITE = Suite(
    name="cpu",
    about="the CPU path against the best of transformers' experts, fp32 and bf16",
    cells=cells,
    run=run,
    summarize=summarize,
    devices=("cpu",),
    budget_s=480.0,
)
