"""Suite `triton`: the Triton path against transformers' experts and torch's grouped_mm on one GPU.

Mixtral-8x7B, Qwen3-30B-A3B and DeepSeek-V3 in bf16, and the expert-slicing paper's three-layer
Small, Medium and Large, at 1 to 8192 tokens; uniform routing everywhere, Zipf(1) for some. Both
modes: under a CUDA graph and eager. The baseline of the targets is transformers' `grouped_mm`, and
torch's three `grouped_mm` for the paper's models, which transformers does not have.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from itertools import groupby

import torch

from ..ceilings import Ceilings, measure_ceilings, read_rate
from ..layers import Machine, candidates_of, load, measure_cell
from ..results import Line, Target, at_least, at_most, geomean, make_line, stamp
from ..suite import Cell, Context, Suite
from ..timing import DeviceLost, reason
from ..workloads import MODELS, Model

FIELD = ("Mixtral-8x7B", "Qwen3-30B-A3B", "DeepSeek-V3")
PAPER = ("paper-small", "paper-medium", "paper-large")
TOKENS = (1, 4, 16, 64, 128, 512, 1024, 4096, 8192)
ZIPF_TOKENS = (16, 128, 1024, 8192)


def cells() -> list[Cell]:
    """Every cell: uniform over the whole grid, Zipf(1) on the field's models at four sizes."""
    grid: list[Cell] = []
    for model in (*PAPER, *FIELD):
        grid += [Cell(model, tokens) for tokens in TOKENS]
        if model in FIELD:
            grid += [Cell(model, tokens, "zipf1") for tokens in ZIPF_TOKENS]
    return grid


def rival(family: str) -> str:
    """The baseline that the targets compare with."""
    return "torch-grouped-mm" if family == "paper" else "transformers-grouped_mm"


def ceiling_lines(ceilings: Ceilings, stamped: Line, suite: str) -> list[Line]:
    """The ceilings of this process as lines of clock `ceiling`."""
    rates = {
        "copy": {"gbps": ceilings.copy_gbps},
        "read": {"gbps": ceilings.read_gbps},
        "gemm": {"tflops": ceilings.gemm_tflops, "size": ceilings.gemm_size},
    }
    fixed = stamped | {
        "suite": suite,
        "clock": "ceiling",
        "model": "-",
        "tokens": 0,
        "routing": "-",
        "mode": "eager",
        "dtype": "bfloat16",
    }
    return [
        make_line(
            fixed, impl=name, ms=m.median, ms_p20=m.p20, ms_p80=m.p80, samples=m.samples,
            **rates[name],
        )
        for name, m in ceilings.timings.items()
    ]  # fmt: skip


def machine_of(context: Context, stamped: Line, suite: str) -> Machine:
    """The rates and the cache of the context's device, its ceilings recorded."""
    if context.device.type == "cuda":
        ceilings = measure_ceilings(context.device)
        cache = torch.cuda.get_device_properties(context.device).L2_cache_size
    else:
        ceilings = measure_ceilings(
            context.device, dtype=torch.float32, num_bytes=2**24, gemm_size=256, budget_s=0.2
        )
        cache = 2**20
    context.record(ceiling_lines(ceilings, stamped, suite))
    context.say(
        f"copy {ceilings.copy_gbps:.0f} GB/s, read {ceilings.read_gbps:.0f} GB/s, "
        f"GEMM {ceilings.gemm_tflops:.3g} TFLOP/s"
    )
    rate = read_rate(str(stamped["device"]), ceilings)
    return Machine(context.device, rate, cache)


def told(lines: Sequence[Line], rival_name: str) -> str:
    """One cell's result for the person who waits."""
    first = lines[0]
    text = f"{first['model']} T={first['tokens']} {first['routing']}:"
    for mode in ("graph", "eager"):
        ms = {x["impl"]: x["ms"] for x in lines if x["mode"] == mode and x["ms"] is not None}
        if "moesaic" in ms:
            text += f" {mode} {ms['moesaic']:.4f} ms"
            if rival_name in ms:
                text += f" ({ms[rival_name] / ms['moesaic']:.2f}x)"
    failed = [f"{x['impl']}/{x['mode']}" for x in lines if x.get("error")]
    wrong = [f"{x['impl']}/{x['mode']}" for x in lines if x.get("wrong")]
    return text + (f" errors {failed}" if failed else "") + (f" WRONG {wrong}" if wrong else "")


def run(
    wanted: Sequence[Cell],
    context: Context,
    *,
    suite: str = "triton",
    impl: str = "triton",
    models: dict[str, Model] = MODELS,
) -> None:
    """Measure the cells model by model, recording each at once, within the budget of the context.

    A cell that fails is recorded with its error. When the budget is overrun by a tenth, the cells
    not begun are named and left out.

    Raises:
        DeviceLost: the GPU answers no more.
    """
    stamped = stamp(context.device)
    machine = machine_of(context, stamped, suite)
    left = len(wanted)
    for name, group in groupby(wanted, key=lambda cell: (cell.model, cell.dtype)):
        model, dtype = models[name[0]], getattr(torch, name[1])
        candidates = candidates_of(model, impl)
        loaded = None
        for cell in group:
            if context.elapsed_s() > 1.1 * context.budget_s:
                context.say(f"out of time, not measured: {cell}")
                continue
            try:
                loaded = loaded or load(model, dtype, candidates, machine, context.seed)
                lines = measure_cell(
                    loaded, cell, candidates, machine,
                    budget_s=0.6 * context.share_s(left), seed=context.seed + left,
                    stamped=stamped, suite=suite,
                )  # fmt: skip
            except DeviceLost:
                raise
            except Exception as error:
                lines = [failed_line(stamped, suite, cell, reason(error))]
            context.record(lines)
            context.say(told(lines, rival(model.family)))
            left -= 1
            gc.collect()
        del loaded
        gc.collect()
        if context.device.type == "cuda":
            torch.cuda.empty_cache()


def failed_line(stamped: Line, suite: str, cell: Cell, text: str) -> Line:
    """The line of a cell that could not be set up at all."""
    return make_line(
        stamped, suite=suite, clock="experts", model=cell.model, tokens=cell.tokens,
        routing=cell.routing, dtype=cell.dtype, impl="moesaic", mode="graph", error=text,
    )  # fmt: skip


def ratios(
    lines: Sequence[Line],
    grid: Sequence[Cell],
    mode: str = "graph",
    models: dict[str, Model] = MODELS,
) -> dict[Cell, float]:
    """Rival's time over moesaic's per cell, where both gave a right answer."""
    ms = {
        (x["model"], x["tokens"], x["routing"], x["dtype"], x["impl"]): x["ms"]
        for x in lines
        if x["clock"] == "experts" and x["mode"] == mode and x["ms"] and not x.get("wrong")
    }
    found: dict[Cell, float] = {}
    for cell in grid:
        key = (cell.model, cell.tokens, cell.routing, cell.dtype)
        mine = ms.get((*key, "moesaic"))
        theirs = ms.get((*key, rival(models[cell.model].family)))
        if mine and theirs:
            found[cell] = theirs / mine
    return found


def summarize(
    lines: Sequence[Line], grid: Sequence[Cell] | None = None, models: dict[str, Model] = MODELS
) -> list[Target]:
    """Speed-ups over the rival under a graph, how many cells were compared, how many were wrong."""
    wanted = cells() if grid is None else grid
    found = ratios(lines, wanted, models=models)
    bad = [
        x for x in lines
        if x["clock"] == "experts" and x["impl"] == "moesaic" and (x.get("wrong") or x.get("error"))
    ]  # fmt: skip
    lowest = min(found.values(), default=None)
    return [
        at_least("geomean speed-up over grouped_mm, graph", geomean(found.values()), 1.5),
        at_least("lowest speed-up over grouped_mm, graph", lowest, 1.0),
        at_least("cells compared", float(len(found)), float(len(wanted))),
        at_most("moesaic lines wrong or failed", float(len(bad)), 0.0),
    ]


SUITE = Suite(
    name="triton",
    about="the Triton path against transformers' experts and torch grouped_mm, on one GPU",
    cells=cells,
    run=run,
    summarize=summarize,
)
