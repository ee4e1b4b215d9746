"""The page's part of suite `layer`: targets and times, joules, host time, and what is missing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from .layer_misses import misses_part
from .report import Sheet, by_clock, markdown, section, short
from .results import Line, Target
from .suite import Cell

WINDOWS = ("energy", "host")


def energy_sheet(lines: Sequence[Line]) -> Sheet:
    """Millijoules a token and watts, a row per cell and implementation."""
    rows = []
    for x in lines:
        if x["clock"] != "energy":
            continue
        joules = x.get("joules_per_token")
        told = "wrong" if x.get("wrong") else str(x.get("error", "right"))
        numbers = (None if joules is None else joules * 1e3, x.get("watts"), x.get("window_s"))
        rows.append([x["model"], str(x["tokens"]), x["impl"], *map(short, numbers), told])
    heads = ["model", "tokens", "impl", "mJ per token", "W", "window s", "state"]
    return Sheet(heads, rows)


def host_sheet(lines: Sequence[Line]) -> Sheet:
    """Host microseconds of an eager call of one token, in bursts, then with all calls in a row."""
    rows = []
    keys = ("ms", "ms_p20", "ms_p80", "row_ms")
    for x in lines:
        if x["clock"] == "host":
            times = (x[key] * 1e3 if x.get(key) is not None else None for key in keys)
            told = "wrong" if x.get("wrong") else str(x.get("error", "right"))
            rows.append([x["model"], x["impl"], *map(short, times), told])
    heads = ["model", "impl", "µs a call", "p20", "p80", "µs, 1000 in a row", "state"]
    return Sheet(heads, rows)


def missing_text(
    lines: Sequence[Line], cells: Sequence[Cell], measured: Callable[[Line], Cell | None]
) -> str:
    """Which cells of the grid have no right time of moesaic, by clock, model and routing."""
    done = {measured(x) for x in lines}
    left: dict[tuple[str, str, str], list[int]] = {}
    for cell in cells:
        if cell not in done:
            left.setdefault((cell.clock, cell.model, cell.routing), []).append(cell.tokens)
    count = sum(map(len, left.values()))
    if not count:
        return f"All {len(cells)} cells are measured."
    rows = [[*key, ", ".join(map(str, sorted(tokens)))] for key, tokens in left.items()]
    table = markdown(Sheet(["clock", "model", "routing", "tokens"], rows))
    return f"Not measured yet, {count} of {len(cells)} cells:\n\n{table}"


def layer_section(
    lines: Sequence[Line], targets: Sequence[Target], name: str, folder: str,
    cells: Sequence[Cell], measured: Callable[[Line], Cell | None], results: Path,
) -> tuple[str, dict[str, str]]:  # fmt: skip
    """The whole part, and its figures by file name; `results`: folder of the device's lines."""
    from .plots import draw

    timed = [x for x in lines if x["clock"] not in WINDOWS]
    drawn = draw(next(iter(by_clock(timed).values())), name)
    parts = [section(timed, targets, [f"{folder}/{file}" for file in drawn]).rstrip("\n")]
    if (energy := energy_sheet(lines)).rows:
        parts += ["#### Joules", markdown(energy)]
    if (host := host_sheet(lines)).rows:
        parts += ["#### What an eager call of one token costs the host", markdown(host)]
    parts += ["#### Cells over their limit", misses_part(lines, results)]
    parts += ["#### Missing", missing_text(lines, cells, measured)]
    return "\n\n".join(parts) + "\n", drawn
