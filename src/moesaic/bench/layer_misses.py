"""Cells of suite `layer` over the limit of their regime: by how much, and what binds them.

All of it is computed: the time, the limit, which of the floor's two parts binds, and what the time
over the floor is the product of (`bounds`), from what suite `launches` counted of the cell.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..cost import H200_READ_BYTES_PER_S
from .bounds import (
    NAMES,
    Factors,
    binding_factors,
    counted,
    memory_factors,
    product_factors,
    told,
)
from .layer_targets import LAUNCHES_MS, REGIMES, Regime
from .report import Sheet, markdown, short
from .results import Line, read_lines
from .suites.launches import OURS, TWIN

KINDS: Mapping[str, str] = {
    "uniform": "even",
    "curve": "even",
    "zipf1": "skewed",
    "worst": "worst case",
}


def regime_of(tokens: int) -> Regime | None:
    """The regime that judges so many tokens."""
    return next((r for r in REGIMES if tokens in r.tokens), None)


def limit_ms(line: Line) -> float | None:
    """The most that a cell may take; None where there is no floor or no regime."""
    regime = regime_of(line["tokens"])
    if regime is None or not line["floor_ms"]:
        return None
    return float(line["floor_ms"]) / regime.every + LAUNCHES_MS


def over_limit(lines: Sequence[Line]) -> list[Line]:
    """moesaic's right lines of clock `experts`, under a graph, that take longer than they may."""
    found = []
    for x in lines:
        ours = (x["clock"], x["impl"], x["mode"]) == ("experts", "moesaic", "graph")
        if ours and x["ms"] and not x.get("wrong"):
            limit = limit_ms(x)
            if limit is not None and x["ms"] > limit:
                found.append(x)
    return sorted(found, key=lambda x: (x["tokens"], KINDS.get(x["routing"], ""), x["model"]))


def binding(line: Line) -> str:
    """Which part of the floor binds: `memory`, or `products` where cuBLAS on the twin is longer."""
    bytes_ms = line["gbps"] * 1e9 * line["ms"] / H200_READ_BYTES_PER_S
    return "products" if line["floor_ms"] > 1.001 * bytes_ms else "memory"


def factors_of(
    line: Line, launches: Mapping[tuple[str, int, str], dict[str, list[Line]]]
) -> Factors | None:
    """What binds a cell, if its launches and, where it is the floor, the twin's were counted."""
    found = launches.get((line["model"], line["tokens"], line["routing"]), {})
    floor = binding(line)
    ours, twin = found.get(OURS, []), found.get(TWIN, [])
    if not ours or (floor == "products" and not twin):
        return None
    mine = counted(ours, floor)
    if floor == "memory":
        return memory_factors(line, mine)
    return product_factors(line, mine, counted(twin, floor))


def by_cell(lines: Sequence[Line]) -> dict[tuple[str, int, str], dict[str, list[Line]]]:
    """Right launches of suite `launches`, by cell and implementation; none of a broken case."""
    found: dict[tuple[str, int, str], dict[str, list[Line]]] = {}
    broken = set()
    for x in lines:
        cell, impl = (x["model"], x["tokens"], x["routing"]), x["impl"].split(" ")[0]
        found.setdefault(cell, {}).setdefault(impl, []).append(x)
        if not x["ms"] or x.get("wrong") or x.get("error"):
            broken.add((cell, impl))
    return {
        cell: {i: some for i, some in impls.items() if (cell, i) not in broken}
        for cell, impls in found.items()
    }


def misses_sheet(missed: Sequence[tuple[Line, Factors | None]]) -> Sheet:
    """A row per cell over its limit: what its time over the floor is the product of."""
    heads = ["tokens", "model", "routing", "ms", "limit", "ms ÷ limit", "floor is of",
             "ms ÷ floor", "is", "binds"]  # fmt: skip
    rows = []
    for x, factors in missed:
        limit = limit_ms(x) or 0.0
        over = [short(x["ms"]), short(limit), f"{x['ms'] / limit:.2f}", binding(x)]
        text = told(factors) if factors else "not counted"
        names = ", ".join(NAMES[name] for name in binding_factors(factors)) if factors else "-"
        rows.append([str(x["tokens"]), x["model"], x["routing"], *over,
                     f"{x['ms'] / x['floor_ms']:.2f}", text, names])  # fmt: skip
    return Sheet(heads, rows)


def causes_text(missed: Sequence[tuple[Line, Factors | None]]) -> str:
    """A list: regimes and kinds of routing with a cell over its limit, and what binds how many."""
    groups: dict[tuple[str, str], list[Factors | None]] = {}
    for x, factors in missed:
        regime = regime_of(x["tokens"])
        key = (regime.name if regime else "", KINDS.get(x["routing"], "other"))
        groups.setdefault(key, []).append(factors)
    texts = []
    for (regime_name, kind), some in groups.items():
        first = Counter(binding_factors(f)[0] for f in some if f and binding_factors(f))
        parts = [f"{NAMES[name]} in {count}" for name, count in first.most_common()]
        parts[:1] = [f"largest: {part}" for part in parts[:1]]
        if uncounted := sum(f is None for f in some):
            parts.append(f"not counted: {uncounted}")
        cells = "1 cell" if len(some) == 1 else f"{len(some)} cells"
        texts.append(f"- **{regime_name}, {kind}** ({cells}): {', '.join(parts)}.")
    return "\n".join(texts)


def misses_part(lines: Sequence[Line], folder: Path) -> str:
    """The page's part; `folder`: where the device's lines of suite `launches` are, if any."""
    path = folder / "launches.jsonl"
    launches = by_cell(read_lines(path)) if path.exists() else {}
    missed = [(x, factors_of(x, launches)) for x in over_limit(lines)]
    if not missed:
        return "Every measured cell is within its limit."
    commits = {x["commit"] for some in launches.values() for xs in some.values() for x in xs}
    said = f"Counters of commit {', '.join(sorted(commits))}:\n\n" if commits else ""
    return f"{said}{causes_text(missed)}\n\n{markdown(misses_sheet(missed))}"
