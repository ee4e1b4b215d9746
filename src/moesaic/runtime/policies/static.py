"""`static`: sizes found once, from the mean of the first profile, and kept."""

from __future__ import annotations

from typing import Any

from ..plan import Curves, MachineSlices, Plan, Profile
from .sizing import plan_ms, shares, shortest


def static(profile: Profile, curves: Curves, machine: MachineSlices, state: Any) -> Plan:
    """The plan that was best for the first profile with loads; `state` is that plan."""
    names = {group.name for group in profile.groups}
    if isinstance(state, Plan) and (not state.sliced or set(state.sizes) == names):
        return Plan(
            policy="static", reason=state.reason, shares=state.shares,
            predicted_ms=state.predicted_ms, state=state,
        )  # fmt: skip
    if not profile.loads_WN:
        return Plan(policy="static", reason="no loads were recorded yet")
    rows = profile.loads_WN
    mean_N = tuple(sum(column) / len(rows) for column in zip(*rows, strict=True))
    whole = Plan(policy="static", reason="the whole GPU was best for the first profile")
    sizes_N = shortest(profile.groups, mean_N, curves, machine)
    plans = [whole]
    if sizes_N is not None:
        reason = f"best for the mean of the first {len(rows)} steps"
        cut = shares(profile.groups, sizes_N)
        plans.append(Plan(policy="static", reason=reason, shares=cut))
    best = min(plans, key=lambda plan: plan_ms(profile, mean_N, plan, curves, machine))
    time = plan_ms(profile, mean_N, best, curves, machine)
    found = Plan(policy="static", reason=best.reason, shares=best.shares, predicted_ms=time)
    return Plan(
        policy="static", reason=best.reason, shares=best.shares, predicted_ms=time, state=found
    )
