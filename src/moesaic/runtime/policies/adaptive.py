"""`adaptive`: predicts the next step's work, and cuts the GPU for it where that pays.

Of not slicing, the sizes under which the slowest group ends soonest, and the plan in force, it
takes what is predicted to be fastest; and it leaves the plan in force until another is faster by
more than `MARGIN`, so that noise in the loads does not make plans alternate.

The predictor is `learned`, which holds the plain ones as members and follows whoever errs least.
`by` makes the same policy with another predictor, for comparison.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..plan import Curves, MachineSlices, Plan, Policy, Profile
from ..predictors import Predictor, learned
from .forecast import Forecast, forecast
from .sizing import plan_ms, shares, shortest

MARGIN = 0.02


@dataclass(frozen=True)
class Held:
    """State: what was learned, and the plan in force."""

    learned: Forecast
    plan: Plan


def decide(
    name: str,
    profile: Profile,
    loads_N: tuple[float, ...],
    curves: Curves,
    machine: MachineSlices,
    *,
    before: Plan | None = None,
    margin: float = MARGIN,
) -> Plan:
    """The fastest plan for these loads, or `before` unless that is slower by more than `margin`."""
    plans = [Plan(policy=name, reason="predicted to be fastest on the whole GPU")]
    sizes_N = shortest(profile.groups, loads_N, curves, machine)
    if sizes_N is not None:
        cut = shares(profile.groups, sizes_N)
        plans.append(Plan(policy=name, reason="predicted to be fastest", shares=cut))
    times = [plan_ms(profile, loads_N, plan, curves, machine) for plan in plans]
    best = min(range(len(plans)), key=times.__getitem__)
    reason, cut, time = plans[best].reason, plans[best].shares, times[best]
    if before is not None and before.problem(profile, machine) is None:
        kept_ms = plan_ms(profile, loads_N, before, curves, machine)
        if kept_ms <= time * (1 + margin):
            reason, cut, time = f"kept, within {margin:.0%} of the fastest", before.shares, kept_ms
    return Plan(policy=name, reason=reason, shares=cut, predicted_ms=time)


def by(
    predictor: Predictor,
    *,
    counts: bool = True,
    margin: float = MARGIN,
    name: str | None = None,
) -> Policy:
    """The adaptive policy with `predictor` for work, and with `counts` for experts' rows too."""
    called = name or f"adaptive:{predictor.name}"

    def policy(profile: Profile, curves: Curves, machine: MachineSlices, state: Any) -> Plan:
        if not profile.loads_WN:
            return Plan(policy=called, reason="no loads were recorded yet")
        held = state if isinstance(state, Held) else None
        loads_N, known = forecast(
            profile, held.learned if held else None, predictor, predictor if counts else None
        )
        plan = decide(
            called, profile, loads_N, curves, machine,
            before=held.plan if held else None, margin=margin,
        )  # fmt: skip
        return Plan(
            policy=called,
            reason=plan.reason,
            shares=plan.shares,
            predicted_ms=plan.predicted_ms,
            state=Held(known, plan),
        )

    return policy


adaptive = by(learned(), name="adaptive")
