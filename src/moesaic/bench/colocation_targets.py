"""What the co-location suite must show, computed from its lines.

A *point* is (p99 over alone, the other's share of its throughput alone) of one way in one loop.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..runtime.policies import POLICIES
from .results import Line, Target, at_least, at_most
from .suite import Cell

OURS, ALONE, NO_CONTROL, STREAMS, BUDGETS = (
    "moesaic",
    "alone",
    "no-control",
    "stream-priority",
    "sm-budgets",
)
ADAPTIVE = "policy:adaptive"
SPLIT, LENT = "split@", "lend@"
"""Ways of the sweep: two parts, and two parts the first of which is lent."""
LOOPS = {"closed": (1.5, 0.60), "open": (1.25, 0.70)}
"""Largest p99 over alone and least share of the other's throughput, by loop."""
STEPS = 2000
SETTLED_S = 0.8
"""Seconds of steps from which a trial says what goes on for good: in the first half a second clocks
are higher, and prefill's share up to a twentieth."""
REQUIRED_STEPS = (ALONE, NO_CONTROL, STREAMS, OURS, *(f"policy:{name}" for name in POLICIES))


def points(lines: Sequence[Line], cell: Cell) -> dict[str, tuple[float, float]]:
    """(p99 over alone, the other's share) of every way that was measured in a loop."""
    return {
        x["impl"]: (x["slowdown_p99"], x["other_share"])
        for x in lines
        if measured_in(x, cell) and x.get("other_share") is not None
    }


def measured_in(line: Line, cell: Cell) -> bool:
    """Whether a line is a measurement of this loop."""
    of = (line["model"], line["tokens"], line["clock"])
    return of == (cell.model, cell.tokens, cell.clock) and line["ms"] is not None


def score(point: tuple[float, float], slo: float) -> tuple[bool, float]:
    """How good a point is: the other's share where the promise is kept, else how near it comes."""
    return (True, point[1]) if point[0] <= slo else (False, -point[0])


def of_best(points_: dict[str, tuple[float, float]], slo: float, impl: str = OURS) -> float | None:
    """A chosen plan over the best point of the sweep; 0 where only the sweep keeps the promise.

    Both keep it: the ratio of shares. Neither does: the ratio of the slowdowns.
    """
    swept = [point for impl, point in points_.items() if impl.startswith((SPLIT, LENT))]
    if impl not in points_ or not swept:
        return None
    ours, best = points_[impl], max(swept, key=lambda point: score(point, slo))
    kept, best_kept = ours[0] <= slo, best[0] <= slo
    if kept and best_kept:
        return ours[1] / best[1]
    if kept or best_kept:
        return float(kept)
    return best[0] / ours[0]


def settled(line: Line, alone_ms: float) -> bool:
    """Whether a trial may be held against a long one: it is complete, or `SETTLED_S` long at least
    and keeps up (in an overloaded open loop every step waits longer than the last)."""
    keeps_up = line["clock"] == "closed" or line["ms"] <= 2 * alone_ms
    return bool(line["complete"] or (keeps_up and line["steps"] * line["ms"] >= 1e3 * SETTLED_S))


def dominated(lines: Sequence[Line], cell: Cell, impl: str) -> float | None:
    """1 where some split has no larger p99 and no smaller share than `impl`, else 0; None where all
    that have were measured for too short a time to tell."""
    found, mine = points(lines, cell), [x for x in lines if measured_in(x, cell)]
    alone = [x["ms"] for x in mine if x["impl"] == ALONE]
    swept = [x for x in mine if x["impl"].startswith((SPLIT, LENT, OURS))]
    if impl not in found or not alone or not swept:
        return None
    p99, share = found[impl]
    better = [x for x in swept if x["slowdown_p99"] <= p99 and x["other_share"] >= share]
    if any(settled(x, alone[0]) for x in better):
        return 1.0
    return None if better else 0.0


def summarize(lines: Sequence[Line], cells: Sequence[Cell]) -> list[Target]:
    """The promises of each loop, the front, the sweep, and that no answer differs."""
    targets = []
    for cell in cells:
        slo, share = LOOPS[cell.clock]
        found, what = points(lines, cell), f"{cell.model}, {cell.tokens} tokens, {cell.clock} loop"
        ours = found.get(OURS, (None, None))
        mine = [x for x in lines if measured_in(x, cell)]
        steps = [x["steps"] for x in mine if x["impl"] in REQUIRED_STEPS]
        targets += [
            at_most(f"{what}: decode p99 over alone", ours[0], slo),
            at_least(f"{what}: share of the other's throughput", ours[1], share),
            at_least(f"{what}: chosen plan over the sweep's best", of_best(found, slo), 0.9),
            at_least(
                f"{what}: {ADAPTIVE} over the sweep's best", of_best(found, slo, ADAPTIVE), 0.9
            ),
            at_least(
                f"{what}: {NO_CONTROL} inside the front", dominated(lines, cell, NO_CONTROL), 1
            ),
            at_least(f"{what}: {STREAMS} inside the front", dominated(lines, cell, STREAMS), 1),
            at_least(f"{what}: fewest steps of a way", min(steps, default=None), STEPS),
        ]
    bits = [x["differing"] for x in lines if x["clock"].startswith("bits")]
    targets.append(at_most("answers whose bits differ from the whole GPU's", _sum(bits), 0))
    return targets


def _sum(values: Sequence[int]) -> float | None:
    return float(sum(values)) if values else None
