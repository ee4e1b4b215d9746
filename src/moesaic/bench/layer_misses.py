"""Cells of suite `layer` over the limit of their regime: by how much, and what binds them.

What is computed: the time, the limit, which of the floor's two parts binds, the share of it that is
reached, and what suite `launches` counted of the cell's launches. What is kept by hand: `CAUSES`, a
sentence or two for each regime and kind of routing, of which each says where it was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..cost import H200_READ_BYTES_PER_S
from .layer_targets import LAUNCHES_MS, REGIMES, Regime
from .report import Sheet, markdown, short
from .results import Line, read_lines

KINDS: Mapping[str, str] = {
    "uniform": "even",
    "curve": "even",
    "zipf1": "skewed",
    "worst": "worst case",
}
CAUSES: Mapping[tuple[str, str], str] = {
    ("1 token", kind): (
        "The floor is 17 to 157 µs of reading. Tried (log, *Launches without the launcher*): one "
        "launch or two, rings of 5 to 12 stages, one to four programs an SM, 64 or 128 weight rows "
        "a tile. Mixtral was measured as one launch; it is two again, which a probe timed at "
        "165 µs (log, *Few tokens in one launch*), no line yet. Counters were not read."
    )
    for kind in ("even", "skewed", "worst case")
} | {
    ("4–128 tokens", "worst case"): (
        "All rows go to K experts: the floor is the weights of K experts, each with every token, "
        "and the tiles, chosen before the routing is known, are those that lose at most 2 % under "
        "even routing. Tiles as tall as their rows, or of 64 rows in one launch, brought 1 to 8 % "
        "at 64 tokens and 1 to 41 % at 128 (log, *Tiles for any routing*). Counters were not "
        "read."
    ),
    ("4–128 tokens", "skewed"): (
        "An expert of many rows has several tiles, which multiply its weights again. Counters "
        "were not read."
    ),
    ("512–1024 tokens", "even"): (
        "The two parts of the floor are within a factor of two of each other, and the last tile of "
        "most experts is not full. Of 128 and 256 rows a tile and of tiles as tall as their rows "
        "the best is chosen. Counters were not read."
    ),
    ("512–1024 tokens", "skewed"): (
        "As for even loads; tiles of one choice serve experts of 2 and of 500 rows. Largest "
        "experts first brought Mixtral 7 and 17 %. Counters were not read."
    ),
    ("512–1024 tokens", "worst case"): (
        "Lines of before tiles were chosen for any routing: the cells of that kind measured since "
        "are within their limit."
    ),
    (">= 4096 tokens", "even"): (
        "Power: held for 0.25 s cuBLAS and our kernels draw 660 to 697 W and run at 1.28 to "
        "1.55 GHz of 1.98 (log, *Prefill runs into the power limit*); more than half of the gap to "
        "the dense twin closes where all experts have the same number of rows. Tried and dropped: "
        "row steps of 32, rows copied by spare warps, tiles looked up four ahead."
    ),
    (">= 4096 tokens", "skewed"): (
        "As for even loads, with more tiles that are not full: experts of two rows stand beside "
        "experts of thousands."
    ),
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


def counted(lines: Sequence[Line]) -> dict[tuple[str, int, str], str]:
    """What suite `launches` counted of moesaic's launches over 5 µs, by cell."""
    found: dict[tuple[str, int, str], list[str]] = {}
    for x in lines:
        if x["impl"].startswith("moesaic") and x["ms"] and x["ms"] > 5e-3:
            kernel = x["impl"].split(": ")[-1].removesuffix("_kernel")
            tensor, l2, busy = (f"{100 * x[k]:.0f} %" for k in ("tensor", "l2", "sms_active"))
            text = f"{kernel} {short(x['ms'] * 1e3)} µs: DRAM {x['gbps'] / 1e3:.1f} TB/s, "
            text += f"tensor pipes {tensor}, L2 {l2}, SMs busy {busy}"
            found.setdefault((x["model"], x["tokens"], x["routing"]), []).append(text)
    return {cell: "; ".join(texts) for cell, texts in found.items()}


def misses_sheet(lines: Sequence[Line], counters: Mapping[tuple[str, int, str], str]) -> Sheet:
    """A row per cell over its limit."""
    heads = ["tokens", "model", "routing", "ms", "limit", "ms ÷ limit", "floor is of",
             "of floor", "launches, by counters"]  # fmt: skip
    rows = []
    for x in over_limit(lines):
        limit = limit_ms(x) or 0.0
        cell = (x["model"], x["tokens"], x["routing"])
        rows.append([str(x["tokens"]), x["model"], x["routing"], short(x["ms"]), short(limit),
                     f"{x['ms'] / limit:.2f}", binding(x), short(x["floor_ms"] / x["ms"]),
                     counters.get(cell, "-")])  # fmt: skip
    return Sheet(heads, rows)


def causes_text(lines: Sequence[Line]) -> str:
    """A list: each regime and kind of routing with a cell over its limit, and what binds there."""
    groups: dict[tuple[str, str], int] = {}
    for x in over_limit(lines):
        regime = regime_of(x["tokens"])
        key = (regime.name if regime else "", KINDS.get(x["routing"], "other"))
        groups[key] = groups.get(key, 0) + 1
    return "\n".join(
        f"- **{regime}, {kind}** ({count} cells). {CAUSES.get((regime, kind), 'Not known.')}"
        for (regime, kind), count in groups.items()
    )


def misses_part(lines: Sequence[Line], folder: Path) -> str:
    """The page's part; `folder`: where the device's lines of suite `launches` are, if any."""
    path = folder / "launches.jsonl"
    counters = counted(read_lines(path)) if path.exists() else {}
    sheet = misses_sheet(lines, counters)
    if not sheet.rows:
        return "Every measured cell is within its limit."
    return f"{causes_text(lines)}\n\n{markdown(sheet)}"
