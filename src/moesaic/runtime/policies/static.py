"""`static`: sizes found once, from the mean of the first profile, and kept."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..plan import Curves, GroupProfile, MachineSlices, Plan
from .sizing import fastest, plan_ms


def static(profile: GroupProfile, curves: Curves, machine: MachineSlices, state: Any) -> Plan:
    """The plan that was best for the first profile with loads; `state` is that plan."""
    names = {group.name for group in profile.groups}
    if isinstance(state, Plan) and (not state.sliced or set(state.sizes) == names):
        return replace(state, state=state)
    if not profile.loads_WN:
        return Plan(policy="static", reason="no loads were recorded yet")
    rows = profile.loads_WN
    mean_N = tuple(sum(column) / len(rows) for column in zip(*rows, strict=True))
    best = fastest(profile, mean_N, curves, machine, policy="static")
    time = plan_ms(profile, mean_N, best, curves, machine)
    reason = f"{best.reason} for the mean of the first {len(rows)} steps"
    found = Plan(policy="static", reason=reason, shares=best.shares, predicted_ms=time)
    return replace(found, state=found)
