"""Suite `ep`: expert parallelism on the GPUs of one host, exchange alone and whole layers.

`exchange`: every rank has so many rows and one expert, every row goes to one rank (K = 1). Clock
`dispatch` is from rows and ids to rows at their experts, `combine` the way back, each chained in
one CUDA graph and divided; the slowest rank counts. Routings: `even`, the same number to every
rank; `uniform`, drawn; `zipf1`, drawn with rank r wanted as 1 / r. `moesaic` uses all SMs,
`moesaic-32sm` at most 32. `nccl` is `all_to_all_single` with splits known beforehand and rows
sorted beforehand, in a graph: less work than a dispatch. `nccl-counts` exchanges its counts and
reads them first, as variable splits ask for; no graph can hold that.

`layer-epG`: routing given, from tokens to outputs, over G ranks, whose tokens together are
`tokens`; the same total over more ranks is strong scaling, the same number a rank weak scaling.
With more GPUs than G every group of G measures the same layer at the same time, and the slowest
counts. `moesaic` is the symmetric exchange in a graph, `moesaic-nccl` the one by collectives,
eager. Bits of both are compared with one GPU that has all the experts.

On the CPU the ranks are processes over gloo and the cells the same in small (`rows-448`, layers
with every width divided by 16): a rehearsal of what more GPUs will run, with its bits compared.

    T rows a rank · H width · E experts · K top-k · G ranks
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ...types import ExpertSpec
from ..ep_page import ep_section
from ..results import Line, Target, at_least, at_most, geomean
from ..suite import Cell, Context, Suite

NAME = "ep"
WIDTHS = {"rows-7168": 7168, "rows-2048": 2048}
ROWS = (4, 128, 512, 8192, 65536, 1, 32, 2048, 32768)
LARGE_BYTES = 50e6
RANKS = (1, 2, 4, 8)
PER_RANK = 8192
SMALL = 512
OURS, FEW, NCCL, COUNTED = "moesaic", "moesaic-32sm", "nccl", "nccl-counts"
OURS_NCCL = "moesaic-nccl"
# Microseconds at so many rows a peer on 4 GPUs, width 7168.
LATENCY_US = {1: 6.0, 32: 10.0, 128: 22.0}


@dataclass(frozen=True)
class Layer:
    """A layer to spread: its experts and K."""

    spec: ExpertSpec
    top_k: int


def _gated(experts: int, hidden: int, width: int, top_k: int) -> Layer:
    spec = ExpertSpec(num_experts=experts, hidden_size=hidden, intermediate_size=width)
    return Layer(spec, top_k)


def _deepseek(experts: int) -> Layer:
    return _gated(experts, 7168, 2048, 8)


def _wide(top_k: int) -> Layer:
    spec = ExpertSpec(
        num_experts=16, hidden_size=8192, intermediate_size=32768, gated=False, activation="gelu"
    )
    return Layer(spec, top_k)


LAYERS = {
    "deepseek-v3-256": _deepseek(256),
    "wide-16-k2": _wide(2),
    "deepseek-v3-16": _deepseek(16),
    "wide-16-k1": _wide(1),
    "deepseek-v3-64": _deepseek(64),
    # One expert on each of eight GPUs.
    "mixtral-8": _gated(8, 4096, 14336, 2),
    "deepseek-v3-8-k2": _gated(8, 7168, 2048, 2),
}
SHRINK, CPU_PER_RANK, CPU_ROWS = 16, 64, (4, 128, 1)


def shrunk(layer: Layer) -> Layer:
    """The same experts with every width divided by 16."""
    spec = layer.spec
    return Layer(
        replace(
            spec,
            hidden_size=spec.hidden_size // SHRINK,
            intermediate_size=spec.intermediate_size // SHRINK,
        ),
        layer.top_k,
    )


CPU_WIDTHS = {"rows-448": 448}
CPU_LAYERS = {f"{name}/{SHRINK}": shrunk(layer) for name, layer in LAYERS.items()}


def scalings(models: Iterable[str], each: int, small: int) -> list[Cell]:
    """Layers: strong scaling of `each` tokens, weak with as many a rank, strong of `small`."""
    strong = [(ranks, each) for ranks in RANKS]
    weak = [(ranks, ranks * each) for ranks in RANKS[1:]]
    few = [(ranks, small) for ranks in RANKS]
    return [
        Cell(model, total, "uniform", clock=f"layer-ep{ranks}")
        for scaling in (strong, weak, few)
        for model in models
        for ranks, total in scaling
    ]


def gpu_cells() -> list[Cell]:
    """Exchanges of width 7168 first, then layers by kind of scaling, then the other exchanges."""
    main = [Cell("rows-7168", t, "even", clock="exchange") for t in ROWS]
    rest = [
        Cell(width, t, routing, clock="exchange")
        for width in WIDTHS
        for routing in ("uniform", "zipf1", "even")
        for t in ROWS
        if (width, routing) != ("rows-7168", "even")
    ]
    return main + scalings(LAYERS, PER_RANK, SMALL) + rest


def cpu_cells() -> list[Cell]:
    """The same in small, for processes that share a CPU."""
    exchanges = [
        Cell(width, t, routing, clock="exchange")
        for width in CPU_WIDTHS
        for routing in ("even", "uniform", "zipf1")
        for t in CPU_ROWS
    ]
    return exchanges + scalings(CPU_LAYERS, CPU_PER_RANK, CPU_PER_RANK // 8)


def cells() -> list[Cell]:
    """Those of GPUs, then those of processes on a CPU."""
    return gpu_cells() + cpu_cells()


def runnable(ranks: int, cpu: bool = False) -> list[Cell]:
    """The cells that so many ranks can measure, on GPUs or on a CPU."""
    layers = tuple(f"layer-ep{r}" for r in RANKS if ranks % r == 0)
    clocks = layers if ranks == 1 else ("exchange", *layers)
    return [cell for cell in (cpu_cells() if cpu else gpu_cells()) if cell.clock in clocks]


def run(wanted: Sequence[Cell], context: Context) -> None:
    """Measure the cells that fit the device and the number of ranks, while time is left."""
    from ..exchanges import measure_all

    small = context.device.type == "cpu"
    widths, layers = (CPU_WIDTHS, CPU_LAYERS) if small else (WIDTHS, LAYERS)
    mine = [cell for cell in wanted if cell.model in widths or cell.model in layers]
    measure_all(mine, context, suite=NAME, widths=widths, layers=layers)


def on_cpu(line: Line) -> bool:
    """Whether a line is of a cell of `cpu_cells`."""
    return line["model"] in CPU_WIDTHS or line["model"] in CPU_LAYERS


def measured(line: Line) -> Cell | None:
    """The cell of a right time of moesaic, on a GPU under a graph."""
    mode = "eager" if on_cpu(line) else "graph"
    if line["impl"] != OURS or line["mode"] != mode or not line["ms"] or line.get("wrong"):
        return None
    clock = "exchange" if line["clock"] in ("dispatch", "combine") else line["clock"]
    return Cell(line["model"], line["tokens"], line["routing"], line["dtype"], clock)


def _speeds(lines: Sequence[Line], impl: str) -> list[float]:
    """GB/s of every large exchange, of any width and routing."""
    return [
        x["gbps"]
        for x in lines
        if x["impl"] == impl
        and x["clock"] in ("dispatch", "combine")
        and x["gbps"]
        and x["gbps"] * x["ms"] * 1e6 >= LARGE_BYTES
        and not x.get("wrong")
    ]


def _ratios(lines: Sequence[Line], rival: str) -> list[float]:
    """Time of a rival over that of moesaic wherever both have a right one, exchanges only."""
    ms = {
        (x["clock"], x["model"], x["tokens"], x["routing"], x["impl"]): x["ms"]
        for x in lines
        if x["clock"] in ("dispatch", "combine") and x["ms"] and not x.get("wrong")
    }
    return [
        ms[(*key, rival)] / value
        for (*key, impl), value in ms.items()
        if impl == OURS and (*key, rival) in ms
    ]


def weak_efficiencies(lines: Sequence[Line], ranks: int) -> dict[str, float]:
    """By model, the share of one GPU's speed that `ranks` keep at 8192 tokens each."""
    ms = {
        (x["model"], x["ranks"], x["tokens"]): x["ms"]
        for x in lines
        if x["clock"].startswith("layer-ep") and measured(x)
    }
    return {
        model: ms[model, 1, PER_RANK] / ms[model, ranks, ranks * PER_RANK]
        for model in LAYERS
        if (model, 1, PER_RANK) in ms and (model, ranks, ranks * PER_RANK) in ms
    }


def summarize(lines: Sequence[Line]) -> list[Target]:
    """Bandwidth of large exchanges, latency of small ones on 4 GPUs, wrong lines, speed-ups, weak
    scaling on 8."""
    ranks = max((x.get("ranks") or 1 for x in lines), default=1)
    cpu = any(on_cpu(x) for x in lines)
    wrong = [x for x in lines if x["impl"].startswith(OURS) and (x.get("wrong") or x.get("error"))]
    wanted = runnable(ranks, cpu)
    done = {measured(x) for x in lines} & set(wanted)
    targets = [
        at_most("moesaic lines wrong or failed", float(len(wrong)), 0.0),
        at_least("cells with a right time", float(len(done)), float(len(wanted))),
    ]
    if ranks == 1 or cpu:
        return targets
    for impl, goal in ((OURS, 340.0), (FEW, 300.0)):
        slowest = min(_speeds(lines, impl), default=None)
        name = f"slowest GB/s of {impl}, {LARGE_BYTES / 1e6:g} MB and more"
        targets.append(at_least(name, slowest, goal))
    if ranks == 4:
        for peer, goal in LATENCY_US.items():
            for clock in ("dispatch", "combine"):
                us = [
                    1e3 * x["ms"]
                    for x in lines
                    if (x["clock"], x["impl"], x["model"]) == (clock, OURS, "rows-7168")
                    and (x["routing"], x["tokens"]) == ("even", peer * ranks)
                    and x["ms"]
                ]
                targets.append(
                    at_most(f"us of {clock}, {peer} rows a peer", min(us, default=None), goal)
                )
    if ranks == 8:
        kept = min(weak_efficiencies(lines, ranks).values(), default=None)
        targets.append(at_least("weak-scaling efficiency at 8, lowest of the layers", kept, 0.90))
    for rival in (NCCL, COUNTED):
        targets.append(
            at_least(f"geomean speed-up over {rival}", geomean(_ratios(lines, rival)), 1.0)
        )
    return targets


SUITE = Suite(
    name=NAME,
    about="expert parallelism: exchange alone against NCCL, whole layers, scaling (--gpus N)",
    cells=cells,
    run=run,
    summarize=summarize,
    devices=("cuda", "cpu"),
    budget_s=140.0,
    measured=measured,
    section=ep_section,
)
