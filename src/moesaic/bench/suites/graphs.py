"""Suite `graphs`: what graphs and streams cost and give, beside what the expert-slicing paper says.

    T tokens · E experts · K top-k

One clock a question:

- `layer`: the whole layer, eager, behind the graph cache (inputs and output copied), and replayed
  in place. `stack`: eight layers, a graph each and one graph for all.
- `experts`: experts one by one, in order, a stream each, a graph each (exact and padded rows), with
  a routing that changes at each call and with a fixed one, the best that can happen to them.
- `launch`: what launching an expert costs the host (paper: 5 us a kernel, 1 us under a graph).
- `warm-up`: the first calls of a new shape (paper: 3 to 5 warm-ups).
- `memory`: captures and evictions in a row, and the bytes that do not come back.
- `streams`: a shared expert aside, and size classes side by side, under one graph each.

Every variant must have the bits of the first one of its arithmetic; one that has not is `wrong`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..graph_cells import (
    Setting,
    Way,
    expert_variants,
    launch_values,
    layer_variants,
    make_setting,
    measure_variants,
    memory_values,
    stack_variants,
    stream_variants,
    warmup_values,
)
from ..results import Line, Target, at_least, at_most, geomean, make_line, stamp
from ..runtime_pages import graphs_section
from ..suite import Cell, Context, Suite
from ..timing import DeviceLost, check_device, reason
from ..workloads import MODELS, Model

NAME = "graphs"
QWEN, SMALL, MEDIUM = "Qwen3-30B-A3B", "paper-small", "paper-medium"
VARIANTS: dict[str, Callable[[Setting], Any]] = {
    "layer": layer_variants,
    "stack": stack_variants,
    "experts": expert_variants,
    "streams": stream_variants,
}
CAPTURES = 10_000
PAPER_LAUNCH_US, PAPER_WARMUPS, PAPER_SHARE = 1.0, 5.0, 0.10


def cells() -> list[Cell]:
    """Every cell, those whose first calls must be fresh first."""
    grid = [Cell(SMALL, tokens, clock="warm-up") for tokens in (33, 160)]
    grid += [Cell(SMALL, 32, clock="launch"), Cell(MEDIUM, 128, clock="launch")]
    grid += [Cell(SMALL, tokens, clock="layer") for tokens in (1, 32, 128, 512)]
    grid += [
        Cell(model, tokens, routing, clock="experts")
        for model, tokens in ((SMALL, 128), (SMALL, 512), (MEDIUM, 512))
        for routing in ("uniform", "fixed")
    ]
    grid += [Cell(SMALL, 32, clock="memory")]
    grid += [Cell(SMALL, tokens, clock="stack") for tokens in (1, 128)]
    grid += [Cell(QWEN, tokens, clock="layer") for tokens in (1, 32, 512)]
    return grid + [Cell(QWEN, tokens, "zipf1", clock="streams") for tokens in (1, 32, 256, 2048)]


def measure(cell: Cell, setting: Setting, budget_s: float, seed: int) -> dict[Way, Line]:
    """Values of every way's line of one cell.

    Raises:
        DeviceLost: the GPU answers no more.
    """
    if cell.clock in VARIANTS:
        variants = VARIANTS[cell.clock](setting)
        return measure_variants(variants, setting.device, budget_s=budget_s, seed=seed).values
    if cell.clock == "launch":
        return launch_values(setting, rows=cell.tokens)
    if cell.clock == "warm-up":
        return warmup_values(setting)
    return memory_values(setting, CAPTURES)


def told(cell: Cell, lines: Sequence[Line]) -> str:
    """One cell's result for the person who waits."""
    parts = []
    for x in lines:
        text = f"{x['impl']}/{x['mode']}"
        text += f" {x['ms']:.4f} ms" if x["ms"] is not None else f" {x.get('error', '-')}"
        text += f" host {x['host_us']:.1f} us" if x.get("host_us") else ""
        parts.append(text + (" WRONG" if x.get("wrong") else ""))
    return f"{cell.clock} {cell.model} T={cell.tokens} {cell.routing}: " + "; ".join(parts)


def run(
    wanted: Sequence[Cell], context: Context, *, models: dict[str, Model] | None = None
) -> None:
    """Measure the cells, recording each at once; one that fails is recorded with its error.

    Raises:
        DeviceLost: the GPU answers no more.
    """
    known = MODELS if models is None else models
    stamped = stamp(context.device)
    for done, cell in enumerate(wanted):
        if context.elapsed_s() > 1.1 * context.budget_s:
            context.say(f"out of time, not measured: {cell}")
            continue
        fixed = stamped | {"suite": NAME, "clock": cell.clock, "model": cell.model}
        fixed |= {"tokens": cell.tokens, "routing": cell.routing, "dtype": cell.dtype}
        budget_s = min(1.5, 0.4 * context.share_s(len(wanted) - done))
        try:
            setting = make_setting(known[cell.model], cell, context.device, context.seed + done)
            values = measure(cell, setting, budget_s, context.seed + done)
        except DeviceLost:
            raise
        except Exception as error:
            check_device(reason(error))
            values = {("moesaic", "cache"): {"error": reason(error)}}
        lines = [make_line(fixed, impl=i, mode=m, **v) for (i, m), v in values.items()]
        context.record(lines)
        context.say(told(cell, lines))
        setting = None  # type: ignore[assignment]
        gc.collect()
        if context.device.type == "cuda":
            torch.cuda.empty_cache()


def measured(line: Line) -> Cell | None:
    """The cell that a line shows to be measured."""
    if line["ms"] is None or line.get("wrong"):
        return None
    return Cell(line["model"], line["tokens"], line["routing"], line["dtype"], line["clock"])


def ratios(lines: Sequence[Line], clock: str, slow: Way, fast: Way) -> list[float]:
    """The time of one way over that of another, per cell that has both right."""
    found: dict[tuple[Any, ...], dict[Way, float]] = {}
    for x in lines:
        if x["clock"] == clock and x["ms"] and not x.get("wrong"):
            cell = (x["model"], x["tokens"], x["routing"])
            found.setdefault(cell, {})[x["impl"], x["mode"]] = x["ms"]
    return [ms[slow] / ms[fast] for ms in found.values() if slow in ms and fast in ms]


def largest(lines: Sequence[Line], clock: str, mode: str, key: str) -> float | None:
    """The largest value of `key` among a clock's lines of a mode."""
    values = [x[key] for x in lines if x["clock"] == clock and x["mode"] == mode and x.get(key)]
    return max(values, default=None)


def summarize(lines: Sequence[Line]) -> list[Target]:
    """Bits and bytes that must hold, then the paper's claims beside what was measured."""
    mine = [x for x in lines if x["clock"] != "ceiling"]
    bad = [x for x in mine if x.get("wrong") or x.get("error")]
    done = {measured(x) for x in mine} - {None}
    captures = [x for x in mine if x.get("lost_bytes") is not None and x["samples"] >= CAPTURES]
    lost = [x["lost_bytes"] for x in captures]
    cached, eager = ("moesaic", "cache"), ("moesaic", "eager")
    graphs, order = ("per-expert-graphs", "padded"), ("sequential", "eager")
    warm = [x["warmups"] for x in mine if x.get("warmups") is not None]
    share = largest(lines, "experts", "padded", "held_share")
    launch = largest(lines, "launch", "replay", "host_us_per_kernel")
    turn, aside = ("moesaic+shared", "replay"), ("moesaic+shared-aside", "replay")
    whole, classes = ("moesaic", "replay"), ("moesaic-size-classes", "replay")
    compared = (
        ("layer: eager over cached", "layer", eager, cached),
        ("stack: eager over one graph", "stack", eager, cached),
        ("paper: sequential over per-expert graphs", "experts", order, graphs),
        ("shared expert: in turn over aside", "streams", turn, aside),
        ("size classes: one launch over classes", "streams", whole, classes),
    )
    return [
        at_most("lines with other bits, or failed", float(len(bad)), 0.0),
        at_most(f"bytes lost over {CAPTURES} captures", max(lost, default=None), 2.0**21),
        *(
            at_least(f"{name}, geomean", geomean(ratios(lines, clock, slow, fast)), 1.0)
            for name, clock, slow, fast in compared
        ),
        at_most("paper: 1 us a kernel under a graph (host)", launch, PAPER_LAUNCH_US),
        at_most("paper: 3 to 5 warm-ups", max(warm, default=None), PAPER_WARMUPS),
        at_most("paper: 10 % of memory for graphs (of weights)", share, PAPER_SHARE),
        at_least("cells measured", float(len(done)), float(len(cells()))),
    ]


SUITE = Suite(
    name=NAME,
    about="graphs and streams: replay, capture, launch, memory and warm-up, whole layer to expert",
    cells=cells,
    run=run,
    summarize=summarize,
    budget_s=90.0,
    measured=measured,
    section=graphs_section,
)
