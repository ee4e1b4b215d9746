"""The generated part of docs/paper.md: every table and figure, from the lines of one device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ..report import Sheet, markdown, provenance, short, targets_sheet
from ..results import Line, Target, read_lines
from . import break_even, misses, tables
from .configuration import claims, grid, layers
from .executor import registry
from .figures import figures


def shown(table: Sheet) -> str:
    """A sheet as Markdown, or that nothing was measured."""
    return markdown(table) if table.rows else "Not measured yet."


def executors_list() -> str:
    """What each executor is."""
    return "\n".join(f"- {x.label}: {x.about}." for x in registry().values())


def other_claims(lines: Sequence[Line], root: Path, device: str) -> Sheet:
    """Claims that need no table of their own, each beside what was measured."""
    from ..suites import bytes as counted

    said = claims()
    launches = {x["mode"]: 1e3 * x["ms"] for x in lines if x["clock"] == "launch" and x["ms"]}
    path = root / device / "bytes.jsonl"
    rows: list[list[str]] = []
    ratios = {
        kind: counted.ratios(read_lines(path), kind) if path.exists() else []
        for kind in counted.PAPER
    }
    saved = [1 - 1 / ratio for ratio in ratios["expert-mlp"]]
    rows.append(
        ["fused routing, DRAM bytes of PyTorch ÷ fused", f"{said['routing_bytes_ratio']:g}",
         spread(ratios["routing"])]
    )  # fmt: skip
    rows.append(
        ["fused three-layer expert, DRAM bytes saved", f"{said['expert_bytes_saved']:.0%}",
         spread([100 * s for s in saved], " %")]
    )  # fmt: skip
    for mode, name in (("eager", "a launch by the host"), ("graph", "a launch in a graph")):
        measured = f"{launches[mode]:.2f} µs" if mode in launches else tables.ABSENT
        rows.append([name, f"{said['launch_us'][mode]:g} µs", measured])
    held = [
        x["held_bytes"] / x["weight_bytes"]
        for x in tables.pick(lines, "experts", impl="expert-graphs")
        if x.get("weight_bytes") and x.get("held_bytes")
    ]
    rows.append(
        ["memory of per-expert graphs, of the weights", f"~{said['graph_buffers']:.0%}",
         spread([100 * share for share in held], " %")]
    )  # fmt: skip
    low, high = said["warm_up_calls"]
    rows.append(["calls before a capture", f"{low}–{high}", warm_up()])
    return Sheet(["claim", "claimed", "measured"], rows)


def warm_up() -> str:
    """The heuristics of the graph manager that was measured."""
    from ...runtime.graph_rules import GraphConfig

    rules = GraphConfig()
    return f"{rules.min_calls} calls, {rules.warmups} of them on the capturing stream (its rule)"


def spread(values: Sequence[float], unit: str = "") -> str:
    """The extremes of some values."""
    if not values:
        return tables.ABSENT
    low, high = (f"{short(f(values))}" for f in (min, max))
    return f"{low}{unit}" if low == high else f"{low} to {high}{unit}"


def lines_by_device(root: Path) -> dict[str, Sequence[Line]]:
    """The lines of every device that has any."""
    return {path.parent.name: read_lines(path) for path in sorted(root.glob("*/paper.jsonl"))}


Parts = list[str]


def speed(lines: Sequence[Line], figure: Callable[[str], Parts]) -> Parts:
    """Configurations, throughput, latency."""
    each = list(layers().values())
    parts = ["### Executors", executors_list()]
    parts += ["### Configurations", shown(tables.parameters(each))]
    parts += ["### Throughput (the paper's table 1)", *figure("throughput")]
    parts += ["Claimed, on an A100:", shown(tables.claimed_throughput())]
    for layer in each:
        rates = tables.by_batch(lines, layer.model.name, tables.tokens_per_s)
        parts += [f"{layer.title}, tokens per second:", shown(rates)]
    parts.append("### Latency")
    for layer in each:
        times = tables.by_batch(lines, layer.model.name, tables.latency)
        parts += [f"{layer.title}, milliseconds (20th–80th percentile):", shown(times)]
    return parts


def power(lines: Sequence[Line], figure: Callable[[str], Parts]) -> Parts:
    """Activity, energy, bandwidth, ablation."""
    tokens, each = grid()["energy"]["every_executor_at"], list(layers().values())
    parts = ["### SM activity (figure 1)", *figure("activity")]
    for layer in each:
        parts += [f"{layer.title}, {tokens} tokens:"]
        parts += [shown(tables.activity(lines, layer.model.name))]
    parts += ["### Energy (table 2)", *figure("energy"), shown(tables.energy(lines))]
    parts += ["### Memory bandwidth by stage (table 3)", shown(tables.bandwidth(lines))]
    parts += ["### Ablation (table 4)", *figure("ablation")]
    for layer in each:
        parts += [f"{layer.title}, {tokens} tokens:"]
        parts += [shown(tables.ablation(lines, layer.model.name))]
    return [
        *parts,
        "Calls of experts under the graph manager:",
        shown(tables.graph_manager(lines)),
    ]


def map_of(lines: Sequence[Line], figure: Callable[[str], Parts]) -> Parts:
    """The break-even map."""
    batch = grid()["break_even"]["batch"]
    parts = ["### Break-even", break_even.measured_of_map(lines), *figure("break-even")]
    parts += ["Each component over the map and the paper's layers:"]
    parts += [shown(break_even.overview(lines)), "Gains on the paper's layers:"]
    parts.append(shown(break_even.by_layer(lines)))
    parts += ["When the paper's approach excels, by its own words:"]
    parts += [shown(break_even.excels(lines)), "Gains over batch and routing:"]
    parts.append(shown(break_even.along(lines)))
    for component in break_even.COMPONENTS:
        if len(break_even.on_map(break_even.gains(lines, component))) > 1:
            parts += [f"{component.name}, {batch} tokens: {component.about}."]
            parts += [shown(break_even.expert_map(lines, component))]
    return parts


def section(
    lines: Sequence[Line], targets: Sequence[Target], root: Path, device: str, folder: str
) -> tuple[str, dict[str, str]]:
    """The Markdown between the marks, and the figures by file name, shown from `folder`."""
    drawn = figures(lines, f"paper-{device}")

    def figure(name: str) -> Parts:
        file = f"paper-{device}-{name}.svg"
        return [f"![{name}]({folder}/{file})"] if file in drawn else []

    tokens = grid()["energy"]["every_executor_at"]
    parts = [provenance(lines), markdown(targets_sheet(targets))]
    parts += ["Cell by cell:", shown(tables.cell_by_cell(lines)), misses.part(lines, root / device)]
    parts += speed(lines, figure)
    parts += power(lines, figure)
    parts += ["### Across GPUs (table 5)", f"At {tokens} tokens."]
    parts += [shown(tables.devices(lines_by_device(root)))]
    parts += ["### Other claims", shown(other_claims(lines, root, device))]
    parts += ["### Bits", shown(tables.bits(lines)), *map_of(lines, figure)]
    return "\n\n".join(parts) + "\n", drawn
