"""Tables of benchmark lines: what the terminal shows, what docs/performance.md holds.

A table row is one cell in one mode; a column is one implementation. Losses stand beside wins: every
implementation that was measured or failed has its column, an error its word.

`moesaic report` rewrites the parts of a Markdown file between ``<!-- results: SUITE on DEVICE -->``
and ``<!-- end -->`` from the committed lines, and draws the plots.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .results import Line, ResultsError, Target, geomean, read_lines, write_atomic
from .suite import registry

OURS = "moesaic"
PAGES = tuple(
    Path(f"docs/{name}.md")
    for name in (
        "performance",
        "paper",
        "graphs",
        "energy",
        "slices",
        "policies",
        "profiler",
        "expert-parallel",
        "transformers",
    )
)
CELL = ("model", "tokens", "routing", "dtype", "mode")
WORDS = (
    "impl",
    "state",
    "target",
    "executor",
    "layer",
    "stage",
    "rung",
    "component",
    "claim",
    "device",
)
MARK = re.compile(
    r"(<!-- results: (?P<suite>[\w-]+) on (?P<device>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL
)


@dataclass(frozen=True)
class Sheet:
    """A table: column heads and rows of text."""

    heads: list[str]
    rows: list[list[str]]


def short(value: float | None) -> str:
    """A number in at most four figures, `-` for none."""
    if value is None:
        return "-"
    if value != 0 and abs(value) < 0.1:
        return f"{value:.4f}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def word(line: Line | None) -> str:
    """What a cell says of one implementation: its milliseconds, or in a word why there are none."""
    if line is None:
        return "-"
    if line.get("wrong"):
        return "wrong"
    if line["ms"] is None:
        text = str(line.get("error", ""))
        return "skipped" if text.startswith("skipped") else text.split(":")[0] or "-"
    return short(line["ms"])


def speedup(lines: dict[str, Line]) -> float | None:
    """The best other project's time over moesaic's, or None without either.

    `moesaic-...` are variants of ours.
    """
    mine = lines.get(OURS)
    others = [
        x["ms"] for name, x in lines.items()
        if not name.startswith(OURS) and name != "dense-twin" and x["ms"] and not x.get("wrong")
    ]  # fmt: skip
    if mine is None or not mine["ms"] or mine.get("wrong") or not others:
        return None
    return float(min(others) / mine["ms"])


def cells_of(lines: Sequence[Line]) -> dict[tuple[Any, ...], dict[str, Line]]:
    """The lines of measured layers by cell and mode, then by implementation."""
    found: dict[tuple[Any, ...], dict[str, Line]] = {}
    for line in lines:
        if line["clock"] != "ceiling":
            found.setdefault(tuple(line[k] for k in CELL), {})[line["impl"]] = line
    return found


def by_clock(lines: Sequence[Line]) -> dict[str, list[Line]]:
    """The lines of each clock but `ceiling`; all together where there is no other."""
    found: dict[str, list[Line]] = {}
    for line in lines:
        if line["clock"] != "ceiling":
            found.setdefault(line["clock"], []).append(line)
    return found or {"ceiling": list(lines)}


def counters_sheet(lines: Sequence[Line]) -> Sheet:
    """Megabytes read and written and launches, one row per cell and implementation."""
    heads = ["model", "tokens", "dtype", "impl", "MB read", "MB written", "launches", "state"]
    rows = []
    for x in lines:
        sizes = [x.get(key) for key in ("bytes_read", "bytes_written")]
        counts = [short(None if size is None else size / 1e6) for size in sizes]
        state = "wrong" if x.get("wrong") else str(x.get("error", "right"))
        place = [str(x[key]) for key in ("model", "tokens", "dtype", "impl")]
        rows.append([*place, *counts, str(x.get("launches", "-")), state])
    return Sheet(heads, rows)


def sheet(lines: Sequence[Line]) -> Sheet:
    """Milliseconds of every implementation per cell and mode; the speed-up over the best other.

    Lines of counters give `counters_sheet`.
    """
    if any(x["clock"] == "counters" for x in lines):
        return counters_sheet(lines)
    by_cell = cells_of(lines)
    names = list(dict.fromkeys(name for row in by_cell.values() for name in row))
    names.sort(key=lambda name: (name != OURS, name == "dense-twin"))
    heads = [*CELL, *(f"{name} ms" for name in names), "p20–p80", "of floor", "× best other"]
    rows = []
    for cell, row in by_cell.items():
        mine = row.get(OURS, {})
        spread = (
            "-" if mine.get("ms") is None else f"{short(mine['ms_p20'])}–{short(mine['ms_p80'])}"
        )
        tail = [spread, short(mine.get("of_floor")), short(speedup(row))]
        rows.append([*map(str, cell), *(word(row.get(name)) for name in names), *tail])
    return Sheet(heads, rows)


def markdown(table: Sheet) -> str:
    """A sheet as a Markdown table."""
    words = {*CELL, *WORDS}
    aligned = ["---" if head in words else "---:" for head in table.heads]
    every = [table.heads, aligned, *table.rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in every)


def targets_sheet(targets: Sequence[Target]) -> Sheet:
    """Targets as a table."""
    rows = [[t.name, short(t.value), t.goal, "yes" if t.met else "no"] for t in targets]
    return Sheet(["target", "value", "goal", "met"], rows)


def overview(lines: Sequence[Line]) -> Sheet:
    """Geometric mean of the speed-up over each other implementation, per model and mode."""
    by_cell = cells_of(lines)
    others = list(dict.fromkeys(n for row in by_cell.values() for n in row))
    others = [n for n in others if n not in (OURS, "dense-twin")]
    gained: dict[tuple[str, str], dict[str, list[float]]] = {}
    for cell, row in by_cell.items():
        mine = row.get(OURS)
        if mine is None or not mine["ms"] or mine.get("wrong"):
            continue
        place = gained.setdefault((cell[0], cell[4]), {})
        for name in others:
            theirs = row.get(name)
            if theirs is not None and theirs["ms"] and not theirs.get("wrong"):
                place.setdefault(name, []).append(theirs["ms"] / mine["ms"])
    rows = [
        [model, mode, *(short(geomean(place.get(name, []))) for name in others)]
        for (model, mode), place in gained.items()
    ]
    return Sheet(["model", "mode", *(f"× {name}" for name in others)], rows)


def provenance(lines: Sequence[Line]) -> str:
    """One sentence: devices, versions, commits and days of the lines."""

    def every(key: str) -> str:
        return ", ".join(sorted({str(x[key])[: 10 if key == "date" else None] for x in lines}))

    return (
        f"{len(lines)} lines; {every('device')}; torch {every('torch')}, "
        f"Triton {every('triton')}; commit {every('commit')}; {every('date')}."
    )


def section(lines: Sequence[Line], targets: Sequence[Target], plots: Sequence[str]) -> str:
    """The generated Markdown of one suite on one device."""
    parts = [provenance(lines), markdown(targets_sheet(targets))]
    clocks = by_clock(lines)
    of = {clock: f", clock `{clock}`" if len(clocks) > 1 else "" for clock in clocks}
    for clock, some in clocks.items():
        if (seen := overview(some)).rows:
            parts += [f"Geometric mean of the speed-up of moesaic{of[clock]}:", markdown(seen)]
    parts += [f"![{Path(plot).stem}]({plot})" for plot in plots]
    for clock, some in clocks.items():
        parts += [f"#### Every cell{of[clock]}", markdown(sheet(some))]
    return "\n\n".join(parts) + "\n"


def rewrite(text: str, root: Path, folder: str) -> tuple[str, dict[str, str]]:
    """`text` with each marked part made anew from the lines under `root`, and its figures as SVG
    text by file name, which the new text shows from `folder`.

    Raises:
        ResultsError: a mark names a suite that does not exist, or lines cannot be read.
    """
    from .plots import draw

    suites = registry()
    figures: dict[str, str] = {}

    def fresh(match: re.Match[str]) -> str:
        name, device = match["suite"], match["device"]
        if name not in suites:
            raise ResultsError(f"there is no suite named {name!r}; see `moesaic bench --list`")
        path = root / device / f"{name}.jsonl"
        if not path.exists():
            return f"{match[1]}\nNot measured yet.\n\n{match[4]}"
        lines = read_lines(path)
        if (own := suites[name].section) is not None:
            text, drawn = own(lines, suites[name].summarize(lines), root, device, folder)
            figures.update(drawn)
            return f"{match[1]}\n{text}\n{match[4]}"
        main_clock = next(iter(by_clock(lines).values()))
        drawn = draw(main_clock, f"{name}-{device}")
        figures.update(drawn)
        shown = [f"{folder}/{file}" for file in drawn]
        return f"{match[1]}\n{section(lines, suites[name].summarize(lines), shown)}\n{match[4]}"

    return MARK.sub(fresh, text), figures


def main(
    *,
    page: Path | None = None,
    root: Path = Path("benchmarks/results"),
    check: bool = False,
) -> int:
    """Rewrite the generated parts of `page` (None: of every page of `PAGES`) and its figures; with
    `check` write nothing and say (exit code 1) if one is stale.

    Raises:
        ResultsError: the page or lines cannot be read or written.
    """
    pages = PAGES if page is None else (page,)
    return max([fill(one, root, check) for one in pages])


def fill(page: Path, root: Path, check: bool) -> int:
    """`main` for one page.

    Raises:
        ResultsError: the page or lines cannot be read or written.
    """
    try:
        old = page.read_text(encoding="utf-8")
    except OSError as error:
        raise ResultsError(f"cannot read {page}: {error.strerror}; name another --page") from error
    new, figures = rewrite(old, root, "figures")
    stale = new != old
    if not check:
        for name, svg in figures.items():
            write_atomic(page.parent / "figures" / name, svg)
        write_atomic(page, new)
    elif stale:
        print(f"{page} is stale; run `moesaic report`", file=sys.stderr)
    print(json.dumps({"page": str(page), "changed": stale, "figures": list(figures)}))
    return int(stale and check)
