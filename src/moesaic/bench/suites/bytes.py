"""Suite `bytes`: DRAM bytes of fused kernels against the unfused PyTorch sequence, counted by ncu.

    T tokens · H hidden width · I intermediate width · E experts · K top-k

`routing`: softmax, top-k and counts of logits (T, E) in one launch against `softmax`, `topk` and a
count. `expert-mlp`: the three-layer ReLU expert layer against sort, gather, loop over experts and
scatter, each step a launch. `benchmarks/ncu_counters.py --suite bytes` runs both under ncu and
records; the numbers of the expert-slicing paper stand beside: 3 times and 40 % fewer bytes.

The profiled program separates its cases by launches of torch's spin kernel, at which
`ncu.split` cuts. Caches are left alone (`--cache-control none`), as they are in use.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..ncu import BYTES
from ..results import Line, Target, at_least, at_most, geomean
from ..suite import Cell, Context, Suite

METRICS = {"dram__bytes_read.sum": BYTES, "dram__bytes_write.sum": BYTES}
PAPER = {"routing": 3.0, "expert-mlp": 1 / 0.6}
FUSED, UNFUSED = "moesaic", "torch-unfused"

ROUTERS = {"routing-8-top2": (8, 2), "routing-64-top8": (64, 8), "routing-256-top8": (256, 8)}
EXPERTS = {f"expert-mlp-{size}": f"paper-{size}" for size in ("small", "medium", "large")}


def cells() -> list[Cell]:
    """What `benchmarks/ncu_counters.py` profiles: routers by (E, K), the paper's expert sizes."""
    routers = [Cell(name, 262144) for name in ROUTERS]
    return routers + [Cell(name, tokens) for name in EXPERTS for tokens in (64, 1024, 16384)]


def run(wanted: Sequence[Cell], context: Context) -> None:
    """Counters need the profiler around the process, so this only says what to start.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(
        "suite bytes runs under ncu; start: python benchmarks/ncu_counters.py --suite bytes"
    )


def ratios(lines: Sequence[Line], kind: str) -> list[float]:
    """Unfused over fused bytes of every cell of a kind where both were counted and are right."""
    total = {
        (x["model"], x["tokens"], x["impl"]): x["bytes_read"] + x["bytes_written"]
        for x in lines
        if x.get("bytes_read") is not None and not x.get("wrong")
    }
    return [
        total[model, tokens, UNFUSED] / fused
        for (model, tokens, impl), fused in total.items()
        if impl == FUSED and model.startswith(kind) and (model, tokens, UNFUSED) in total
    ]


def summarize(lines: Sequence[Line]) -> list[Target]:
    """The mean ratio of each kind against the paper's, cells counted, lines wrong or failed."""
    targets = [
        at_least(
            f"geomean of unfused / fused DRAM bytes, {kind} (the paper's claim)",
            geomean(ratios(lines, kind)),
            goal,
        )
        for kind, goal in PAPER.items()
    ]
    counted = sum(len(ratios(lines, kind)) for kind in PAPER)
    bad = [x for x in lines if x.get("wrong") or x.get("error")]
    return [
        *targets,
        at_least("cells compared", float(counted), float(len(cells()))),
        at_most("lines wrong or failed", float(len(bad)), 0.0),
    ]


SUITE = Suite(
    name="bytes",
    about="DRAM bytes of fused routing and three-layer experts against PyTorch, by ncu",
    cells=cells,
    run=run,
    summarize=summarize,
)
