"""One cell tuned: every candidate of every product timed, the best combinations timed as a layer.

What a candidate takes comes from a `Lab`; this module only decides. A candidate that does not
compile, does not fit or gives other bits is refused and told.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol

from .grid import Cut, Group, Space

FINALISTS = 3
ROUNDS = 3
ORDERS = ("index", "large_first", "mixed")
WITHIN = 1.10
HOST_SHARE = 1.03
"""So much slower may a single token's layer be for a launch less: eager calls wait for the host."""
ROUTING = "routing next_pow2(E)"
Advance = Callable[[], None]


class Unfit(RuntimeError):
    """A candidate that cannot be used; the message says why."""


class Lab(Protocol[Cut]):
    """Times candidates of one cell, in seconds of one call.

    Every method raises Unfit for what cannot be used.
    """

    def part_s(self, part: str, group: Group, cut: Cut, best_s: float) -> float:
        """One product; one much slower than `best_s` may be timed less often."""
        ...

    def layer_s(self, config: Any) -> float:
        """The whole layer with a configuration."""
        ...

    def combined(self, group: Group, chosen: dict[str, Cut], order: str) -> Any:
        """The configuration of a cut for every product and an order of experts."""
        ...

    def heuristic(self) -> Any:
        """The configuration that runs where nothing was measured."""
        ...

    def more(self, config: Any) -> Sequence[Any]:
        """Other ways to run the layer beside the best combination."""
        ...

    def launches(self, config: Any) -> int:
        """How many launches the products of a configuration take."""
        ...

    def row(self, config: Any) -> dict[str, Any]:
        """The table's row of a configuration."""
        ...

    def routing_s(self) -> dict[int, float]:
        """The routing kernel by rows of next_pow2(E) that one program takes."""
        ...


@dataclass(frozen=True)
class Timing(Generic[Cut]):
    """What one candidate of one product took; infinite when it was refused."""

    part: str
    group: Group
    cut: Cut
    seconds: float


@dataclass(frozen=True)
class Rank:
    """Where a block size of the paper stands among all candidates of its product; None: refused."""

    name: str
    rank: int | None
    of: int
    over_best: float | None


@dataclass(frozen=True)
class Result:
    """The tuned cell: the best row, its time, the heuristic's, the paper's ranks, the refused."""

    impl: str
    tokens: int
    row: dict[str, Any]
    best_us: float
    heuristic_us: float | None
    ranks: tuple[Rank, ...]
    refused: tuple[str, ...] = field(default=(), repr=False)

    @property
    def ratio(self) -> float | None:
        """The heuristic's time over the best."""
        return None if self.heuristic_us is None else self.heuristic_us / self.best_us

    @property
    def kept(self) -> bool | None:
        """Whether the untuned choice stays within a tenth of the tuned one."""
        return None if self.ratio is None else self.ratio <= WITHIN


def rank_of(name: str, mine: Sequence[float], every: Sequence[float]) -> Rank:
    """The rank of the best of `mine` among the finite times of `every`.

    >>> rank_of("x", [2.0, 3.0], [1.0, 2.0, 3.0, 4.0])
    Rank(name='x', rank=2, of=4, over_best=2.0)
    """
    own = min(mine, default=math.inf)
    timed = [seconds for seconds in every if math.isfinite(seconds)]
    if not math.isfinite(own):
        return Rank(name, None, len(timed), None)
    return Rank(name, 1 + sum(s < own for s in timed), len(timed), own / min(timed))


def time_parts(
    space: Space[Cut], lab: Lab[Cut], refused: list[str], advance: Advance
) -> list[Timing[Cut]]:
    """Every candidate of every product, a group at a time."""
    best: dict[tuple[Group, str], float] = {}
    found: list[Timing[Cut]] = []
    for group, part, cut in space:
        seconds = math.inf
        try:
            seconds = lab.part_s(part, group, cut, best.get((group, part), math.inf))
        except Unfit as error:
            refused.append(f"{part} {group} {cut}: {error}")
        best[group, part] = min(seconds, best.get((group, part), math.inf))
        found.append(Timing(part, group, cut, seconds))
        advance()
    return found


def combinations(timings: Sequence[Timing[Cut]], lab: Lab[Cut]) -> list[Any]:
    """The configurations worth timing whole: the best groups, and orders of the very best."""
    groups: dict[Group, dict[str, Timing[Cut]]] = {}
    for t in timings:
        parts = groups.setdefault(t.group, {})
        if t.part not in parts or t.seconds < parts[t.part].seconds:
            parts[t.part] = t
    totals = {g: sum(t.seconds for t in parts.values()) for g, parts in groups.items()}
    ranked = sorted((g for g in totals if math.isfinite(totals[g])), key=lambda g: totals[g])
    chosen = {g: {part: t.cut for part, t in groups[g].items()} for g in ranked[:FINALISTS]}
    found = [lab.combined(g, cuts, "index") for g, cuts in chosen.items()]
    for group in ranked[:1]:
        found += [lab.combined(group, chosen[group], order) for order in ORDERS[1:]]
        found += lab.more(found[0])
    return found


def time_whole(
    configs: Sequence[Any], lab: Lab[Cut], refused: list[str], advance: Advance
) -> dict[Any, float]:
    """The least layer time of each configuration over rounds in turn."""
    seconds: dict[Any, float] = dict.fromkeys(configs, math.inf)
    left = list(seconds)
    for _ in range(ROUNDS):
        for config in list(left):
            try:
                seconds[config] = min(seconds[config], lab.layer_s(config))
            except Unfit as error:
                refused.append(f"layer {config}: {error}")
                left.remove(config)
                seconds[config] = math.inf
        advance()
    return seconds


def fastest(seconds: dict[Any, float], lab: Lab[Cut], tokens: int) -> Any:
    """The configuration of the least time; of a single token, with the fewest launches near it."""
    best = min(seconds, key=lambda config: seconds[config])
    if tokens > 1:
        return best
    near = [c for c in seconds if seconds[c] <= HOST_SHARE * seconds[best]] or [best]
    return min(near, key=lambda config: (lab.launches(config), seconds[config]))


def tune_cell(space: Space[Cut], lab: Lab[Cut], tokens: int, advance: Advance) -> Result:
    """The fastest configuration of one cell and how the heuristic and the paper's sizes compare.

    Raises:
        RuntimeError: nothing could be timed; says what was refused.
    """
    refused: list[str] = []
    timings = time_parts(space, lab, refused, advance)
    heuristic = lab.heuristic()
    configs = dict.fromkeys((heuristic, *combinations(timings, lab)))
    seconds = time_whole(list(configs), lab, refused, advance)
    best = fastest(seconds, lab, tokens)
    if not math.isfinite(seconds[best]):
        raise RuntimeError(f"no candidate could be timed: {'; '.join(refused[:3])}")
    ranks = [
        rank_of(
            name,
            [t.seconds for t in timings if t.part == part and paper(t.group, t.cut)],
            [t.seconds for t in timings if t.part == part],
        )
        for name, part, paper in space.paper
    ]
    try:
        routing = lab.routing_s()
        ranks.append(rank_of(ROUTING, [routing[1]], list(routing.values())))
    except Unfit as error:
        refused.append(f"routing: {error}")
    own = seconds[heuristic]
    return Result(
        space.impl, tokens, lab.row(best), seconds[best] * 1e6,
        own * 1e6 if math.isfinite(own) else None, tuple(ranks), tuple(refused),
    )  # fmt: skip


def steps_of(space: Space[Cut]) -> int:
    """How often a cell calls `advance`."""
    return len(space) + ROUNDS
