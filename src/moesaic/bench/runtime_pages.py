"""The generated parts of docs/graphs.md and docs/energy.md: one table a clock, from the lines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .report import Sheet, markdown, provenance, short, targets_sheet
from .results import Line, Target

# Title and columns of each clock's table: the key of the line, and its head.
Columns = Sequence[tuple[str, str]]
PLACE: Columns = (("model", "model"), ("tokens", "tokens"), ("routing", "routing"))
WAY: Columns = (("impl", "impl"), ("mode", "state"))
GRAPH_TABLES: dict[str, tuple[str, Columns]] = {
    "layer": (
        "The whole layer",
        (("ms", "ms"), ("host_us", "host µs"), ("held_bytes", "graph bytes")),
    ),
    "stack": (
        "Eight layers in a row",
        (("ms", "ms"), ("host_us", "host µs"), ("graphs", "graphs"), ("held_bytes", "bytes")),
    ),
    "experts": (
        "Experts one by one",
        (
            ("ms", "ms"), ("host_us", "host µs"), ("captured", "captured"),
            ("replayed", "replayed"), ("eager", "eager calls"), ("held_share", "held / weights"),
        ),
    ),
    "launch": (
        "Launching one expert from the host",
        (("kernels", "kernels"), ("host_us", "host µs"), ("host_us_per_kernel", "µs a kernel")),
    ),
    "warm-up": ("First calls of a shape", (("ms", "steady ms"), ("warmups", "calls before"))),
    "memory": (
        "Captures and evictions",
        (
            ("ms", "ms a capture"), ("captured", "captures"), ("evicted", "evictions"),
            ("held_bytes", "held bytes"), ("lost_bytes", "lost bytes"),
        ),
    ),
    "streams": (
        "Streams, each under one graph",
        (("ms", "ms"), ("ms_p20", "p20"), ("ms_p80", "p80")),
    ),
}  # fmt: skip
ENERGY_TABLES: dict[str, tuple[str, Columns]] = {
    "energy": (
        "The layer",
        (
            ("ms", "ms"), ("watts", "W"), ("share_of_tdp", "of TDP"),
            ("joules_per_token", "mJ a token"), ("net_joules_per_token", "above idle"),
            ("tokens_per_joule", "tokens a J"), ("spread", "spread of five"),
            ("sm_activity", "SM"), ("tensor_activity", "tensor"), ("dram_activity", "DRAM"),
        ),
    ),
    "idle": ("Idle", (("watts", "W"), ("spread", "spread"), ("sm_activity", "SM"))),
    "ceiling": (
        "Ceilings",
        (
            ("watts", "W"), ("share_of_tdp", "of TDP"), ("tflops", "TFLOP/s"), ("gbps", "GB/s"),
            ("net_joules_per_call", "J a call above idle"), ("spread", "spread"),
            ("sm_activity", "SM"), ("tensor_activity", "tensor"), ("dram_activity", "DRAM"),
        ),
    ),
    "model": (
        "The model of attribution beside what was measured",
        (
            ("net_joules_per_call", "J measured"), ("modelled_joules_per_call", "J modelled"),
            ("modelled_over_measured", "ratio"), ("attributed_most", "most of an expert"),
            ("attributed_least", "least"), ("label", "target"),
        ),
    ),
    "meters": (
        "One window by every meter",
        (
            ("zeus_watts", "zeus W"), ("nvml_watts", "NVML counter W"),
            ("nvml_steps_watts", "between its steps W"), ("shown_watts", "power shown W"),
        ),
    ),
}  # fmt: skip


def entry(line: Line, key: str) -> str:
    """One value as text: a word for a wrong or failed line."""
    if key == "ms" and line.get("wrong"):
        return "wrong"
    value = line.get(key)
    if value is not None and key.endswith("joules_per_token"):
        value *= 1e3
    if key == "ms" and value is None and line.get("error"):
        return str(line["error"]).split(":")[0]
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return short(value)


def tables(
    lines: Sequence[Line], targets: Sequence[Target], wanted: dict[str, tuple[str, Columns]]
) -> str:
    """Where the lines come from, the targets, and a table for every clock that has lines."""
    parts = [provenance(lines), markdown(targets_sheet(targets))]
    for clock, (title, columns) in wanted.items():
        rows = [x for x in lines if x["clock"] == clock]
        if not rows:
            continue
        some = (*PLACE, *WAY, *columns)
        table = Sheet(
            [head for _, head in some], [[entry(x, key) for key, _ in some] for x in rows]
        )
        parts += [f"#### {title}", markdown(table)]
    return "\n\n".join(parts) + "\n"


def graphs_section(
    lines: Sequence[Line], targets: Sequence[Target], root: Path, device: str, folder: str
) -> tuple[str, dict[str, str]]:
    """The tables of suite `graphs`."""
    return tables(lines, targets, GRAPH_TABLES), {}


def energy_section(
    lines: Sequence[Line], targets: Sequence[Target], root: Path, device: str, folder: str
) -> tuple[str, dict[str, str]]:
    """The tables of suite `energy`."""
    return tables(lines, targets, ENERGY_TABLES), {}
