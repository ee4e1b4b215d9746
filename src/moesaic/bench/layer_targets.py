"""What the lines of suite `layer` must show: shares of the floor by regime, speed-ups over others.

Pure functions of the lines. A target over a part of the grid says how many of its cells have a
right time of moesaic (clock `experts`, under a graph), and is unmet while one is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from .results import Line, Target, at_least, at_most, geomean
from .suite import Cell

LAUNCHES_MS = 0.007
MIXTRAL = "Mixtral-8x7B"
TWIN = "dense-twin"


@dataclass(frozen=True)
class Regime:
    """Token counts judged alike: every cell's share of the floor, and the geometric mean's."""

    name: str
    tokens: tuple[int, ...]
    every: float
    mean: float
    mixtral_mean: float | None = None


REGIMES = (
    Regime("1 token", (1,), 0.95, 0.80),
    Regime("4–128 tokens", (4, 16, 64, 128), 0.93, 0.92),
    Regime("512–1024 tokens", (512, 1024), 0.75, 0.84),
    Regime(">= 4096 tokens", (4096, 8192, 32768), 0.80, 0.88, mixtral_mean=0.96),
)


@dataclass
class Row:
    """One cell's right times: ours under a graph with its floor, others in their better mode."""

    ms: float | None = None
    floor_ms: float | None = None
    others: dict[str, float] = field(default_factory=dict)

    def share(self) -> float | None:
        """Floor over time."""
        return self.floor_ms / self.ms if self.ms and self.floor_ms else None

    def speedup(self, name: str | None = None) -> float | None:
        """Time of the named other, or of the best one, over ours."""
        theirs = self.others.get(name) if name else min(self.others.values(), default=None)
        return theirs / self.ms if self.ms and theirs else None


def rows_of(lines: Sequence[Line]) -> dict[Cell, Row]:
    """The right times of clock `experts` by cell."""
    rows: dict[Cell, Row] = {}
    for x in lines:
        if x["clock"] != "experts" or not x["ms"] or x.get("wrong") or x["impl"] == TWIN:
            continue
        cell = Cell(x["model"], x["tokens"], x["routing"], x["dtype"])
        row = rows.setdefault(cell, Row())
        if x["impl"] != "moesaic":
            row.others[x["impl"]] = min(x["ms"], row.others.get(x["impl"], x["ms"]))
        elif x["mode"] == "graph":
            row.ms, row.floor_ms = x["ms"], x["floor_ms"]
    return rows


def judge(
    name: str,
    test: Callable[[str, float | None, float], Target],
    measure: Callable[[list[float]], float | None],
    goal: float,
    values: Sequence[float | None],
) -> Target:
    """A target over one value per cell, unmet while a cell has none; the name says how many."""
    present = [v for v in values if v is not None]
    text = f"{name} ({len(present)} of {len(values)} cells)"
    target = test(text, measure(present) if present else None, goal)
    return replace(target, met=target.met and len(present) == len(values) > 0)


def regime_targets(regime: Regime, rows: dict[Cell, Row], grid: Sequence[Cell]) -> list[Target]:
    """How many cells take longer than the regime allows, and its geometric means."""
    cells = [c for c in grid if c.tokens in regime.tokens]

    def over(row: Row) -> float | None:
        if row.share() is None or row.ms is None or row.floor_ms is None:
            return None
        return float(row.ms > row.floor_ms / regime.every + LAUNCHES_MS)

    def shares(some: list[Cell]) -> list[float | None]:
        return [rows.get(c, Row()).share() for c in some if c.routing != "worst"]

    slow = [over(rows.get(c, Row())) for c in cells]
    name = f"{regime.name}: cells over floor ÷ {regime.every:g} + 7 µs"
    found = [judge(name, at_most, sum, 0.0, slow)]
    mean, apart = f"{regime.name}: geomean floor ÷ ms, worst case left out", regime.mixtral_mean
    if apart is None:
        return [*found, judge(mean, at_least, geomean, regime.mean, shares(cells))]
    mixtral = shares([c for c in cells if c.model == MIXTRAL])
    others = shares([c for c in cells if c.model != MIXTRAL])
    found.append(judge(f"{mean}, without Mixtral", at_least, geomean, regime.mean, others))
    return [*found, judge(f"{mean}, Mixtral", at_least, geomean, apart, mixtral)]


def rival_targets(
    rows: dict[Cell, Row], grid: Sequence[Cell], loop_grid: Sequence[Cell]
) -> list[Target]:
    """Against the best other of each cell, transformers' grouped_mm, and its eager loop."""

    def gains(some: Sequence[Cell], name: str | None = None) -> list[float | None]:
        return [rows.get(c, Row()).speedup(name) for c in some]

    def worst_ratio(values: list[float]) -> float:
        return max(1 / v for v in values)

    def faster(values: list[float]) -> float:
        return sum(v > 1 for v in values) / len(values)

    grouped, loop = "transformers-grouped_mm", "transformers-eager"
    best = gains(grid)
    return [
        judge("highest ms ÷ best baseline's", at_most, worst_ratio, 1.01, best),
        judge("share of cells faster than the best baseline", at_least, faster, 0.9, best),
        judge(f"geomean speed-up over {grouped}", at_least, geomean, 2.2, gains(grid, grouped)),
        judge(f"geomean speed-up over {loop}", at_least, geomean, 10.0, gains(loop_grid, loop)),
    ]


def layer_targets(
    lines: Sequence[Line], grid: Sequence[Cell], loop_grid: Sequence[Cell]
) -> list[Target]:
    """Every target; `grid`: all cells of clock `experts`, `loop_grid`: those of the eager loop."""
    rows = rows_of(lines)
    bad = [
        x for x in lines
        if x["impl"] == "moesaic" and x["clock"] != "ceiling" and (x.get("wrong") or x.get("error"))
    ]  # fmt: skip
    targets = [t for regime in REGIMES for t in regime_targets(regime, rows, grid)]
    targets += rival_targets(rows, grid, loop_grid)
    return [*targets, at_most("moesaic lines wrong or failed", float(len(bad)), 0.0)]
