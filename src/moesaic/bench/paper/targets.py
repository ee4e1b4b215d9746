"""What the lines of suite `paper` must show; pure functions of the lines.

    T tokens

Batches of the paper (32 to 512): where the loop takes at least `LOOP_OVER_FLOOR` floors, the static
batch under a graph must be `FASTER` times the loop and take at most `ENERGY_SHARE` of its gross
joules per token. Elsewhere, and from 1024 to 8192 tokens, a cell must keep within its floor over
the share of its regime plus `LAUNCHES_MS` (`bench.layer_targets`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ..layer_targets import LAUNCHES_MS, REGIMES, judge
from ..results import Line, Target, at_least, at_most, geomean
from ..suite import Cell
from .configuration import grid, main_cells
from .executor import GROUPED, LOOP, OURS

LOOP_OVER_FLOOR = 12.0
FASTER = 10.0
ENERGY_SHARE = 0.25
OVER_GROUPED = 1.5
LAYERS = ("experts", "break-even")


@dataclass
class Row:
    """One cell: right times by (executor, mode), the floor, gross joules per token."""

    ms: dict[tuple[str, str], float] = field(default_factory=dict)
    floor_ms: float | None = None
    joules: dict[str, float] = field(default_factory=dict)

    def best(self, impl: str) -> float | None:
        """The time of an executor in its better mode."""
        return min((ms for (name, _), ms in self.ms.items() if name == impl), default=None)

    def ours(self) -> float | None:
        """The static batch under a graph."""
        return self.ms.get((OURS, "graph"))

    def over_loop(self) -> float | None:
        """The loop's time over ours."""
        loop, ours = self.best(LOOP), self.ours()
        return loop / ours if loop and ours else None

    def loop_over_floor(self) -> float | None:
        """The loop's time over the floor: what there is to gain."""
        loop = self.best(LOOP)
        return loop / self.floor_ms if loop and self.floor_ms else None

    def energy_share(self) -> float | None:
        """Our joules per token over the loop's."""
        ours, loop = self.joules.get(OURS), self.joules.get(LOOP)
        return ours / loop if ours and loop else None


def key_of(line: Line) -> Cell:
    """The cell of a line, whatever its clock."""
    return Cell(line["model"], line["tokens"], line["routing"], line["dtype"])


def rows_of(lines: Iterable[Line]) -> dict[Cell, Row]:
    """Right times of clock `experts` and joules of clock `energy`, by cell."""
    rows: dict[Cell, Row] = {}
    for x in lines:
        if not x["ms"] or x.get("wrong") or x["clock"] not in ("experts", "energy"):
            continue
        row = rows.setdefault(key_of(x), Row())
        if x["clock"] == "experts":
            row.ms[x["impl"], x["mode"]] = x["ms"]
            row.floor_ms = x["floor_ms"] or row.floor_ms
        elif (x["impl"], x["mode"]) in ((LOOP, "eager"), (OURS, "graph")):
            row.joules[x["impl"]] = x["j_per_1000_tokens"] / 1000
    return rows


def share_of_floor(tokens: int) -> float:
    """The share of the floor that the regime of so many tokens asks for; between two regimes the
    upper one's.

    >>> [share_of_floor(t) for t in (1, 32, 256, 1024, 8192)]
    [0.95, 0.93, 0.75, 0.75, 0.8]
    """
    return next(r.every for r in REGIMES if tokens <= max(r.tokens))


def over_rule(cell: Cell, row: Row) -> float | None:
    """1 when the static batch takes longer than the cell rule allows, else 0."""
    ours = row.ours()
    if ours is None or row.floor_ms is None:
        return None
    return float(ours > row.floor_ms / share_of_floor(cell.tokens) + LAUNCHES_MS)


def split(cells: Sequence[Cell], rows: dict[Cell, Row]) -> tuple[list[Cell], list[Cell]]:
    """The cells where the loop leaves much to gain (or was not measured), and the others."""
    much = [c for c in cells if (rows.get(c, Row()).loop_over_floor() or 1e9) >= LOOP_OVER_FLOOR]
    return much, [c for c in cells if c not in much]


def judged_by_rule(rows: dict[Cell, Row]) -> list[Cell]:
    """The cells that must keep within the cell rule."""
    wide = [c for c in main_cells("wide") if c.tokens >= 1024]
    return [*split(main_cells("paper"), rows)[1], *wide]


def bits_targets(lines: Sequence[Line]) -> list[Target]:
    """Executors of moesaic's arithmetic that differ in a bit; lines of it compared."""
    from .executor import registry

    names = {x.name for x in registry().values() if x.ours}
    compared = [
        x for x in lines
        if x["clock"] == "experts" and x["impl"] in names and x.get("bits_differ") is not None
    ]  # fmt: skip
    differing = sum(bool(x["bits_differ"]) for x in compared)
    name = f"lines of moesaic's arithmetic with other bits (of {len(compared)} compared)"
    target = at_most(name, float(differing) if compared else None, 0.0)
    return [target]


def summarize(lines: Sequence[Line]) -> list[Target]:
    """Every target."""
    rows = rows_of(lines)

    def row(cell: Cell) -> Row:
        return rows.get(cell, Row())

    paper = main_cells("paper")
    to_512 = [c for c in (*paper, *main_cells("wide")) if c.tokens <= 512]
    much, _ = split(paper, rows)
    names = f"batch {min(grid()['batches']['paper'])}–512 with loop ÷ floor >= {LOOP_OVER_FLOOR:g}"
    bad = [
        x for x in lines
        if x["impl"] == OURS and x["clock"] in LAYERS and (x.get("wrong") or x.get("error"))
    ]  # fmt: skip
    over_grouped = [
        theirs / ours if (theirs := row(c).best(GROUPED)) and (ours := row(c).ours()) else None
        for c in to_512
    ]
    faster = [row(c).over_loop() for c in much]
    return [
        judge(f"{names}: lowest loop ÷ ms", at_least, min, FASTER, faster),
        judge(
            f"{names}: highest share of the loop's joules per token", at_most, max, ENERGY_SHARE,
            [row(c).energy_share() for c in much],
        ),
        judge(
            "elsewhere, and 1024–8192 tokens: cells over the cell rule", at_most, sum, 0.0,
            [over_rule(c, row(c)) for c in judged_by_rule(rows)],
        ),
        judge(
            "batch <= 512: geomean speed-up over torch grouped_mm in its better mode",
            at_least, geomean, OVER_GROUPED, over_grouped,
        ),
        *bits_targets(lines),
        at_most("moesaic lines wrong or failed", float(len(bad)), 0.0),
    ]  # fmt: skip
