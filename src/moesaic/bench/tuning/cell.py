"""One cell tuned: every candidate of every product timed, the best combinations timed as a layer.

What a candidate takes comes from a `Lab`; this module only decides. Whoever launches a layer does
not know its routing, so every candidate is timed under several and judged by the geometric mean of
its times, which ranks as the mean of time over the best time of each routing does, among those
near the best under uniform routing. A candidate that does not compile, does not fit or gives other
bits is refused and told.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import geometric_mean
from typing import Any, Generic, Protocol

from .grid import Cut, Group, Space

FINALISTS = 3
ROUNDS = 3
ORDERS = ("index", "large_first", "mixed")
WITHIN = 1.10
EVEN = 1.02
"""So much slower than the best under uniform routing a choice may be."""
BEHIND = 1.15
"""Layers that take so much longer than the best after a round are not timed again."""
NOISE = 1.01
"""A gain under this is none: the heuristic's tiles stay."""
HOST_SHARE = 1.03
"""So much slower may a single token's layer be for a launch less: eager calls wait for the host."""
ROUTING = "routing next_pow2(E)"
Advance = Callable[[], None]
Late = Callable[[], bool]
Times = dict[str, float]
"""Seconds of a call by routing; none where it was refused."""


class Unfit(RuntimeError):
    """A candidate that cannot be used; the message says why."""


class OutOfTime(Exception):
    """The time ended before a cell had anything to choose from."""


def score(times: Mapping[str, float]) -> float:
    """The geometric mean over routings; infinite for none.

    >>> score({"uniform": 1.0, "worst": 4.0}), score({})
    (2.0, inf)
    """
    return geometric_mean(times.values()) if times else math.inf


class Lab(Protocol[Cut]):
    """Times candidates of one cell, in seconds of one call under each routing.

    Every method raises Unfit for what cannot be used.
    """

    def part_s(self, part: str, group: Group, cut: Cut, best: Mapping[str, float]) -> Times:
        """One product; one much slower than `best` may be timed less often."""
        ...

    def layer_s(self, config: Any) -> Times:
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
    times: Times

    @property
    def seconds(self) -> float:
        """Its score."""
        return score(self.times)


@dataclass(frozen=True)
class Rank:
    """Where a block size of the paper stands among all candidates of its product; None: refused."""

    name: str
    rank: int | None
    of: int
    over_best: float | None


@dataclass(frozen=True)
class Result:
    """The tuned cell: the best row, its time, the heuristic's, the paper's ranks, the refused.

    `best_us` and `heuristic_us` are geometric means over the routings of `best` and `heuristic`, in
    seconds; `skipped` candidates were left out as the time ended.
    """

    impl: str
    tokens: int
    row: dict[str, Any]
    best_us: float
    heuristic_us: float | None
    ranks: tuple[Rank, ...]
    refused: tuple[str, ...] = field(default=(), repr=False)
    best: Times = field(default_factory=dict)
    heuristic: Times = field(default_factory=dict)
    heuristic_row: dict[str, Any] = field(default_factory=dict)
    skipped: int = 0

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
    space: Space[Cut], lab: Lab[Cut], refused: list[str], advance: Advance, late: Late
) -> list[Timing[Cut]]:
    """Every candidate of every product, a group at a time, until it is late."""
    best: dict[tuple[Group, str], Times] = {}
    found: list[Timing[Cut]] = []
    for group, part, cut in space:
        if late():
            break
        times, least = {}, best.setdefault((group, part), {})
        try:
            times = lab.part_s(part, group, cut, least)
        except Unfit as error:
            refused.append(f"{part} {group} {cut}: {error}")
        for routing, seconds in times.items():
            least[routing] = min(seconds, least.get(routing, math.inf))
        found.append(Timing(part, group, cut, times))
        advance()
    return found


def combinations(
    timings: Sequence[Timing[Cut]], lab: Lab[Cut], needed: frozenset[str]
) -> list[Any]:
    """The configurations worth timing whole: the best groups, and orders of the very best.

    `needed`: the products, of which a group has to have timed every one.
    """
    groups: dict[Group, dict[str, Timing[Cut]]] = {}
    for t in timings:
        parts = groups.setdefault(t.group, {})
        if t.part not in parts or t.seconds < parts[t.part].seconds:
            parts[t.part] = t
    totals = {
        g: sum(t.seconds for t in parts.values())
        for g, parts in groups.items()
        if parts.keys() == needed
    }
    ranked = sorted((g for g in totals if math.isfinite(totals[g])), key=lambda g: totals[g])
    chosen = {g: {part: t.cut for part, t in groups[g].items()} for g in ranked[:FINALISTS]}
    found = [lab.combined(g, cuts, "index") for g, cuts in chosen.items()]
    for group in ranked[:1]:
        found += [lab.combined(group, chosen[group], order) for order in ORDERS[1:]]
    return [*found, *(one for config in found[:2] for one in lab.more(config))]


def time_whole(
    configs: Sequence[Any], lab: Lab[Cut], refused: list[str], advance: Advance, late: Late
) -> dict[Any, Times]:
    """The least layer times of each configuration over rounds in turn; one round when late.

    The first one, which the others are compared with, takes part in every round.
    """
    times: dict[Any, Times] = {config: {} for config in configs}
    left = list(times)
    for turn in range(ROUNDS):
        if turn and late():
            break
        for config in list(left):
            try:
                found = lab.layer_s(config)
                own = times[config]
                times[config] = {r: min(s, own.get(r, math.inf)) for r, s in found.items()}
            except Unfit as error:
                refused.append(f"layer {config}: {error}")
                left.remove(config)
                times[config] = {}
        advance()
        best = min(map(score, times.values()), default=math.inf)
        left = [c for c in left if c == configs[0] or score(times[c]) <= BEHIND * best]
    return times


def fastest(times: Mapping[Any, Times], lab: Lab[Cut], tokens: int) -> Any:
    """The configuration of the best score, the heuristic's where it is as fast but for noise.

    Only those near the best under the first routing are chosen from: even loads are not to pay for
    uneven ones. Of a single token, the one with the fewest launches near the best score.
    """
    first = {c: next(iter(own.values())) for c, own in times.items() if own}
    even = {c for c in first if first[c] <= EVEN * min(first.values())}
    scores = {c: score(own) for c, own in times.items() if c in even or not first}
    best = min(scores, key=lambda config: scores[config])
    if tokens == 1:
        near = [c for c in scores if scores[c] <= HOST_SHARE * scores[best]] or [best]
        best = min(near, key=lambda config: (lab.launches(config), scores[config]))
    own = lab.heuristic()
    same = lab.launches(own) == lab.launches(best) or tokens > 1
    return own if same and scores.get(own, math.inf) <= NOISE * scores[best] else best


def tune_cell(
    space: Space[Cut], lab: Lab[Cut], tokens: int, advance: Advance,
    late: Late = lambda: False,
) -> Result:  # fmt: skip
    """The fastest configuration of one cell and how the heuristic and the paper's sizes compare.

    `late`: whether the time has ended; what is timed by then is chosen from.

    Raises:
        RuntimeError: nothing could be timed; says what was refused.
        OutOfTime: it was late before the products of any tile height had been timed.
    """
    refused: list[str] = []
    timings = time_parts(space, lab, refused, advance, late)
    skipped = len(space) - len(timings)
    heuristic, found = lab.heuristic(), combinations(timings, lab, space.parts)
    if skipped and not found:
        raise OutOfTime
    configs = dict.fromkeys((heuristic, *found))
    times = time_whole(list(configs), lab, refused, advance, late)
    best = fastest(times, lab, tokens)
    if not times[best]:
        raise RuntimeError(f"no candidate could be timed: {'; '.join(refused[:3])}")
    ranks = ranks_of(space, timings)
    if not late():
        try:
            routing = lab.routing_s()
            ranks.append(rank_of(ROUTING, [routing[1]], list(routing.values())))
        except Unfit as error:
            refused.append(f"routing: {error}")
    own = times[heuristic]
    return Result(
        space.impl, tokens, lab.row(best), score(times[best]) * 1e6,
        score(own) * 1e6 if own else None, tuple(ranks), tuple(refused), times[best], own,
        lab.row(heuristic), skipped,
    )  # fmt: skip


def ranks_of(space: Space[Cut], timings: Sequence[Timing[Cut]]) -> list[Rank]:
    """Where the paper's block sizes stand among the candidates that were timed."""
    return [
        rank_of(
            name,
            [t.seconds for t in timings if t.part == part and paper(t.group, t.cut)],
            [t.seconds for t in timings if t.part == part],
        )
        for name, part, paper in space.paper
    ]


def steps_of(space: Space[Cut]) -> int:
    """How often a cell calls `advance`."""
    return len(space) + ROUNDS
