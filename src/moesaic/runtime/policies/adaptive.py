"""`adaptive`: foresees the next step's work, and cuts the GPU for it where that pays.

Several ways to foresee (`forecast.Way`) each propose a plan: not to slice, or the sizes with the
least mean time over what may come (`search.Table`). The policy follows the way whose proposals
would have cost least of late, so it is not bound to a learned predictor where a plain one serves
better. Where measured times of steps come back (`GroupProfile.took_ms`), it learns by how much the
curves' predictions are wrong for sliced steps and for whole ones: slices that are slower than
foreseen, because what is shared is not in the curves, are given up. It leaves the plan in force
until the proposal is faster by more than `MARGIN`, so that noise in the loads does not make plans
alternate.

`by` makes the same policy with other ways, for comparison.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..plan import Curves, GroupProfile, MachineSlices, Plan, Policy, SliceGroup
from ..predictors import Array, ewma, last, learned
from .forecast import Learned, Way, expect, learn, possible, start
from .search import Table
from .sizing import keeps_promises, shares

MARGIN = 0.02
FORGET = 0.98
"""Of what the proposals cost, from one step to the next."""
LISTEN = 0.3
"""Weight of the newest measured time in how wrong predictions are."""
MOST_WRONG = 20.0
WAYS = (
    Way("learned", learned(context=False)),
    Way("learned by counts", learned(context=False), learned()),
    Way("last", last()),
    Way("ewma0.3", ewma(0.3)),
    Way("ewma0.1", ewma(0.1)),
)


Wrong = tuple[float | None, float | None]


@dataclass(frozen=True)
class Held:
    """State: what each way learned, what it proposed, what its proposals cost, the plan in force.

    A proposal or plan is the sizes, () for the whole GPU. `of`: the groups that this is about.
    `wrong`: measured over predicted time of whole and of sliced steps; None: not measured yet.
    """

    step: int
    of: tuple[SliceGroup, ...]
    ways: tuple[Learned, ...]
    proposed: tuple[tuple[int, ...], ...] | None
    cost_W: Array
    force: tuple[int, ...] | None
    wrong: Wrong = (None, None)


def _cost(table: Table, sizes: tuple[int, ...], loads_KN: Array, wrong: Wrong) -> float:
    """Mean milliseconds over some loads under sizes, () for the whole GPU, as measured times have
    corrected it.
    """
    factor = wrong[bool(sizes)] or 1.0
    if not sizes:
        return factor * float(table.whole_ms(loads_KN).mean())
    places_1N = np.array([[table.machine.sizes.index(size) for size in sizes]])
    return factor * float(table.sliced_ms(places_1N, loads_KN).mean())


def _listen(held: Held, profile: GroupProfile, table: Table) -> Wrong:
    """How wrong predictions are, after the measured time of the newest step."""
    took = profile.took_ms
    if held.force is None or took is None or not 0 < took < np.inf:
        return held.wrong
    came_1N = np.asarray(profile.loads_WN[-1], dtype=np.float64)[None]
    foreseen = _cost(table, held.force, came_1N, (None, None))
    if not 0 < foreseen < np.inf:
        return held.wrong
    kind = bool(held.force)
    ratio = float(np.clip(took / foreseen, 1 / MOST_WRONG, MOST_WRONG))
    before = held.wrong[kind]
    after = ratio if before is None else before * (ratio / before) ** LISTEN
    return (held.wrong[0], after) if kind else (after, held.wrong[1])


def _propose(table: Table, loads_KN: Array, wrong: Wrong) -> tuple[int, ...]:
    """The sizes with the least mean time, () where the whole GPU is no slower and no promise is
    broken by that, or where no sizes keep the promises.
    """
    sizes = table.best(loads_KN)
    if sizes is None:
        return ()
    mean_N = tuple(map(float, loads_KN.mean(axis=0)))
    if not keeps_promises(table.groups, mean_N, table.curves, table.machine):
        return sizes
    cut, whole = (_cost(table, tried, loads_KN, wrong) for tried in (sizes, ()))
    return sizes if cut < whole else ()


def _begin(profile: GroupProfile, ways: Sequence[Way]) -> Held:
    return Held(
        step=profile.step - len(profile.loads_WN),
        of=profile.groups,
        ways=tuple(start(way, profile) for way in ways),
        proposed=None,
        cost_W=np.zeros(len(ways)),
        force=None,
    )


def _catch_up(held: Held, profile: GroupProfile, ways: Sequence[Way], table: Table) -> Held:
    """What was learned from the rows that are new; costs of proposals made for the first."""
    history = len(profile.loads_WN)
    first = history - min(history, max(0, profile.step - held.step))
    states, cost_W = held.ways, held.cost_W
    if held.proposed is not None and first < history:
        came_1N = np.asarray(profile.loads_WN[first], dtype=np.float64)[None]
        if np.isfinite(came_1N).all():
            spent = [_cost(table, sizes, came_1N, held.wrong) for sizes in held.proposed]
            cost_W = FORGET * cost_W + np.array(spent)
    for row in range(first, history):
        states = tuple(learn(w, s, profile, row) for w, s in zip(ways, states, strict=True))
    wrong = _listen(held, profile, table) if first < history else held.wrong
    return Held(profile.step, held.of, states, None, cost_W, held.force, wrong)


def _choose(
    held: Held, profile: GroupProfile, ways: Sequence[Way], table: Table
) -> tuple[Held, int]:
    """Every way's proposal for the step to come, and the place of the way to follow."""
    row = len(profile.loads_WN)
    states = tuple(expect(w, s, profile, row) for w, s in zip(ways, held.ways, strict=True))
    proposed = tuple(_propose(table, possible(state), held.wrong) for state in states)
    after = replace(held, ways=states, proposed=proposed)
    return after, int(held.cost_W.argmin())


def by(ways: Sequence[Way], *, margin: float = MARGIN, name: str = "adaptive") -> Policy:
    """The adaptive policy with these ways to foresee."""

    def policy(profile: GroupProfile, curves: Curves, machine: MachineSlices, state: Any) -> Plan:
        if not profile.loads_WN:
            return Plan(policy=name, reason="no loads were recorded yet", state=state)
        held = state if isinstance(state, Held) else None
        if held is None or held.of != profile.groups:
            held = _begin(profile, ways)
        table = Table.of(profile.groups, curves, machine)
        held, place = _choose(_catch_up(held, profile, ways, table), profile, ways, table)
        loads_KN, proposal = possible(held.ways[place]), (held.proposed or ())[place]
        time = _cost(table, proposal, loads_KN, held.wrong)
        reason = f"fastest as {ways[place].name} foresees it"
        if held.force is not None and held.force != proposal:
            kept = _cost(table, held.force, loads_KN, held.wrong)
            if kept <= time * (1 + margin):
                proposal, time = held.force, kept
                reason = f"kept, within {margin:.0%} of what {ways[place].name} proposes"
        after = replace(held, force=proposal)
        return Plan(
            policy=name,
            reason=reason if proposal else f"whole GPU: {reason}",
            shares=shares(profile.groups, proposal) if proposal else (),
            predicted_ms=time,
            state=after,
        )

    return policy


adaptive = by(WAYS)
