"""Cells of suite `paper` over the cell rule: by how much, and what their time is the product of.

The factors are those of `bench.bounds`, from what suite `launches` counted of the cell's launches
and of its dense twin's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..bounds import NAMES, Factors, binding_factors, told
from ..layer_misses import binding, by_cell, factors_of
from ..layer_targets import LAUNCHES_MS
from ..report import Sheet, markdown, short
from ..results import Line, read_lines
from .configuration import layers
from .executor import OURS
from .targets import judged_by_rule, key_of, over_rule, rows_of, share_of_floor


def over_lines(lines: Sequence[Line]) -> list[Line]:
    """moesaic's lines under a graph of the cells that the rule judges and that are over it."""
    rows = rows_of(lines)
    over = {cell for cell in judged_by_rule(rows) if cell in rows and over_rule(cell, rows[cell])}
    return [
        x for x in lines
        if (x["clock"], x["impl"], x["mode"]) == ("experts", OURS, "graph") and key_of(x) in over
    ]  # fmt: skip


def sheet(missed: Sequence[tuple[Line, Factors | None]]) -> Sheet:
    """A row per cell over the rule."""
    heads = ["layer", "tokens", "ms", "limit", "ms ÷ limit", "floor is of", "ms ÷ floor", "is",
             "binds"]  # fmt: skip
    titles = {layer.model.name: layer.title for layer in layers().values()}
    rows = []
    for x, factors in missed:
        limit = x["floor_ms"] / share_of_floor(x["tokens"]) + LAUNCHES_MS
        rows.append(
            [titles[x["model"]], str(x["tokens"]), short(x["ms"]), short(limit),
             f"{x['ms'] / limit:.2f}", binding(x), f"{x['ms'] / x['floor_ms']:.2f}",
             told(factors) if factors else "not counted",
             ", ".join(NAMES[n] for n in binding_factors(factors)) if factors else "-"]
        )  # fmt: skip
    return Sheet(heads, rows)


def part(lines: Sequence[Line], folder: Path) -> str:
    """The page's part; `folder`: where the device's lines of suite `launches` are, if any."""
    path = folder / "launches.jsonl"
    launches = by_cell(read_lines(path)) if path.exists() else {}
    missed = [(x, factors_of(x, launches)) for x in over_lines(lines)]
    if not missed:
        return "Every measured cell that the rule judges is within it."
    counted = {x["commit"] for some in launches.values() for xs in some.values() for x in xs}
    said = "Over the rule, and what their time over the floor is the product of"
    if counted:
        times = {x["commit"] for x, _ in missed}
        said += f"; counters of commit {listed(counted)}, times of {listed(times)}"
    return f"{said}:\n\n{markdown(sheet(missed))}"


def listed(names: set[str]) -> str:
    """Names in order, with commas."""
    return ", ".join(sorted(names))
