"""The break-even map: what each component gains over E, K, batch and routing, and where it loses.

    E experts · K top-k

A component is a pair of executors that differ in it alone; its gain is the time without over the
time with it, so 1 is break-even and less is a loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..report import Sheet
from ..results import Line, geomean
from ..suite import Cell
from .configuration import (
    break_even_cells,
    break_even_model,
    break_even_name,
    claims,
    grid,
    layers,
    main_cells,
)
from .executor import GROUPED, LOOP, OURS, STATIC_TRITON
from .tables import ABSENT, Variant, mean_gain
from .targets import key_of

Gains = dict[Cell, float]
OVER_LOOP = "all, over the loop"
EVERYWHERE = ("break-even", "experts")


@dataclass(frozen=True)
class Component:
    """One component: what runs with it and what without."""

    name: str
    with_it: Variant
    without: Variant
    about: str


COMPONENTS = (
    Component(
        "Triton kernels", ("triton-experts", "eager"), (LOOP, "eager"),
        "a launch per expert and layer by moesaic's kernels, against the sequential loop",
    ),
    Component(
        "the fused three-layer kernel", ("fused-expert", "graph"), (STATIC_TRITON, "graph"),
        "all layers in one launch, against a launch a layer of the same kind of kernel",
    ),
    Component(
        "a graph per expert", ("expert-graphs", "eager"), ("triton-experts", "eager"),
        "the paper's graph manager, against the same kernels launched one by one",
    ),
    Component(
        "a graph of the layer", (OURS, "graph"), (OURS, "eager"),
        "one replay, against the static batch launched by the host",
    ),
    Component(
        "per-expert streams", ("expert-streams", "eager"), ("fastermoe-style", "eager"),
        "each expert on its stream, against the same products on one stream",
    ),
    Component(
        "the static batch", (STATIC_TRITON, "graph"), ("triton-experts", "graph"),
        "one launch for all experts, against one launch an expert, both under a graph",
    ),
    Component(
        "the Hopper kernels", (OURS, "graph"), (STATIC_TRITON, "graph"),
        "the static batch on the kernels made for Hopper, against those for any GPU",
    ),
    Component(
        "dynamic slicing", ("slices", "graph"), (OURS, "graph"),
        "a hot and a cold group on shares of the SMs by load, against all experts on all SMs",
    ),
    Component(
        "streams for slices", ("slices-streams", "graph"), ("slices", "graph"),
        "the groups side by side on streams of their slices, against one after the other",
    ),
    Component(
        "slices and streams", ("slices-streams", "graph"), (OURS, "graph"),
        "the groups side by side on slices of the GPU, against all experts on all SMs",
    ),
    Component(
        OVER_LOOP, (OURS, "graph"), (LOOP, "eager"),
        "the static batch under a graph, against the sequential loop",
    ),
    Component(
        "all, over grouped_mm", (OURS, "graph"), (GROUPED, "graph"),
        "the static batch, against torch's grouped_mm layer, both under a graph",
    ),
)  # fmt: skip


def gains(
    lines: Sequence[Line], component: Component, clocks: Sequence[str] = ("break-even",)
) -> Gains:
    """Gain by cell of these clocks, where both executors gave a right answer, side by side: times
    of different runs of the suite are not compared."""
    timed = {
        (key_of(x), x["impl"], x["mode"]): x
        for x in lines
        if x["clock"] in clocks and x["ms"] and not x.get("wrong")
    }
    found: Gains = {}
    for (cell, impl, mode), mine in timed.items():
        other = timed.get((cell, *component.without))
        if (impl, mode) == component.with_it and other and run_of(other) == run_of(mine):
            found[cell] = other["ms"] / mine["ms"]
    return found


def run_of(line: Line) -> tuple[str | None, str | None]:
    """Which run of the suite a line is from."""
    return line.get("commit"), line.get("date")


def on_map(found: Gains) -> Gains:
    """The gains over E and K, at the map's batch and uniform routing."""
    batch = grid()["break_even"]["batch"]
    return {c: g for c, g in found.items() if c.tokens == batch and c.routing == "uniform"}


def of_cells(found: Gains, cells: Sequence[Cell]) -> list[float]:
    """The gains of these cells that were measured."""
    wanted = {Cell(c.model, c.tokens, c.routing, c.dtype) for c in cells}
    return [gain for cell, gain in found.items() if cell in wanted]


def shown(found: Gains, model: str, tokens: int, routing: str = "uniform") -> str:
    """One gain; `-` where there is none."""
    gain = found.get(Cell(model, tokens, routing))
    return "-" if gain is None else f"{gain:.2f}"


def overview(lines: Sequence[Line]) -> Sheet:
    """Per component, over the map and the paper's layers: in how many cells it pays, its mean, its
    extremes and where they are."""
    heads = ["component", "pays in", "mean gain", "lowest", "at", "highest", "at "]
    rows = []
    for component in COMPONENTS:
        found = gains(lines, component, EVERYWHERE)
        if not found:
            rows.append([component.name, ABSENT, *["-"] * 5])
            continue
        low, high = min(found, key=found.__getitem__), max(found, key=found.__getitem__)
        paying = sum(gain > 1 for gain in found.values())
        rows.append(
            [component.name, f"{paying} of {len(found)}", mean_gain(list(found.values())),
             f"{found[low]:.2f}×", place(low), f"{found[high]:.2f}×", place(high)]
        )  # fmt: skip
    return Sheet(heads, rows)


def measured_of_map(lines: Sequence[Line]) -> str:
    """How much of the map has lines."""
    cells = {Cell(c.model, c.tokens, c.routing, c.dtype) for c in break_even_cells()}
    there = {key_of(x) for x in lines if x["clock"] == "break-even" and x["ms"]} & cells
    return f"{len(there)} of the map's {len(cells)} cells are measured."


def by_layer(lines: Sequence[Line]) -> Sheet:
    """Every component over the batches of the paper's three layers (clock `experts`)."""
    found = [(c, gains(lines, c, ("experts",))) for c in COMPONENTS]
    rows = []
    for layer in layers().values():
        name = layer.model.name
        for tokens in sorted({c.tokens for _, g in found for c in g if c.model == name}):
            cells = [shown(g, name, tokens) for _, g in found]
            rows.append([layer.title, str(tokens), *cells])
    return Sheet(["layer", "tokens", *(c.name for c, _ in found)], rows)


def place(cell: Cell) -> str:
    """A cell in words.

    >>> place(Cell("e16-k2", 256)), place(Cell("paper-small", 8))
    ('E 16, K 2, 256 tokens', 'Small, 8 tokens')
    """
    routing = "" if cell.routing == "uniform" else f", {cell.routing}"
    titles = {layer.model.name: layer.title for layer in layers().values()}
    if cell.model in titles:
        return f"{titles[cell.model]}, {cell.tokens} tokens{routing}"
    experts, top_k = (part[1:] for part in cell.model.split("-"))
    return f"E {experts}, K {top_k}, {cell.tokens} tokens{routing}"


def expert_map(lines: Sequence[Line], component: Component) -> Sheet:
    """One component over E (rows) and K (columns), uniform routing, the map's batch."""
    b, found = grid()["break_even"], gains(lines, component)
    rows = [
        [str(e), *(shown(found, break_even_name(e, k), b["batch"]) for k in b["top_k"])]
        for e in b["num_experts"]
    ]
    return Sheet(["E \\ K", *map(str, b["top_k"])], rows)


def along(lines: Sequence[Line]) -> Sheet:
    """Every component over batches and routings of one layer."""
    b = grid()["break_even"]
    name = break_even_name(**b["along"])
    batches = sorted({*b["batches"], b["batch"]})
    skews = [r for r in b["routings"] if r != "uniform"]
    heads = ["component", *(f"{t} tokens" for t in batches), *(f"{r}, {b['batch']}" for r in skews)]
    rows = []
    for component in COMPONENTS:
        found = gains(lines, component)
        cells = [shown(found, name, tokens) for tokens in batches]
        cells += [shown(found, name, b["batch"], routing) for routing in skews]
        rows.append([component.name, *cells])
    return Sheet(heads, rows)


@dataclass(frozen=True)
class Statement:
    """What the paper says of a part of the map, and of the rest."""

    claim: str
    inside: list[Cell]
    other: str
    outside: list[Cell]


def statements() -> list[Statement]:
    """The paper's "when it excels" as parts of the map."""
    said, b, cells = claims()["excels"], grid()["break_even"], break_even_cells()
    square = [c for c in cells if c.tokens == b["batch"] and c.routing == "uniform"]
    line = [c for c in cells if c.model == break_even_name(**b["along"])]
    batches = [c for c in line if c.routing == "uniform"]
    batches += [*main_cells("paper"), *main_cells("wide")]
    many, (low, high), over = said["num_experts"], said["top_k"], said["not_top_k_over"]
    large, small = said["batch"], said["not_batch_under"]
    experts = {c: break_even_model(c.model).num_experts for c in square}
    top_k = {c: break_even_model(c.model).top_k for c in square}
    return [
        Statement(
            f"best from {many} experts", [c for c in square if experts[c] >= many],
            "fewer", [c for c in square if experts[c] < many],
        ),
        Statement(
            f"best at top-k {low} to {high}", [c for c in square if low <= top_k[c] <= high],
            f"over {over}", [c for c in square if top_k[c] > over],
        ),
        Statement(
            f"best from batch {large}", [c for c in batches if c.tokens >= large],
            f"under {small}", [c for c in batches if c.tokens < small],
        ),
        Statement(
            "best with imbalanced experts", [c for c in line if c.routing != "uniform"],
            "uniform", [c for c in line if c.routing == "uniform" and c.tokens == b["batch"]],
        ),
    ]  # fmt: skip


def excels(lines: Sequence[Line]) -> Sheet:
    """The paper's statements on when its approach pays, and the mean gain over the loop there: of
    E and K over the map, of batch over the paper's layers too."""
    whole = next(c for c in COMPONENTS if c.name == OVER_LOOP)
    found = gains(lines, whole, EVERYWHERE)
    rows = []
    for s in statements():
        there, elsewhere = (geomean(of_cells(found, part)) for part in (s.inside, s.outside))
        holds = "-"
        if there is not None and elsewhere is not None:
            holds = "yes" if there > elsewhere else "no"
        shown_gains = [ABSENT if gain is None else f"{gain:.1f}×" for gain in (there, elsewhere)]
        rows.append([s.claim, shown_gains[0], s.other, shown_gains[1], holds])
    return Sheet(["claim", "gain there", "elsewhere", "gain elsewhere", "holds here"], rows)
