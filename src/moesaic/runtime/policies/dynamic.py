"""`dynamic`: SMs as they were used of late, looked at again every few steps.

A group that was busy for half of the time on 64 SMs made use of 32: sizes are in proportion to SMs
times the busy share, over the steps since the last plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..plan import Curves, GroupProfile, MachineSlices, Plan
from .sizing import in_proportion, shares

PERIOD = 8
"""Steps between two looks."""


@dataclass(frozen=True)
class Held:
    """The plan in force and the step after which it was made."""

    step: int
    plan: Plan


def dynamic(profile: GroupProfile, curves: Curves, machine: MachineSlices, state: Any) -> Plan:
    """Sizes by recent utilisation; `state` is what is in force."""
    names = {group.name for group in profile.groups}
    held = state if isinstance(state, Held) else None
    if held and held.plan.sliced and set(held.plan.sizes) != names:
        held = None
    if not profile.busy_WN:
        return Plan(policy="dynamic", reason="no utilisation was recorded yet")
    if held and profile.step - held.step < PERIOD:
        kept = held.plan
        return Plan(policy="dynamic", reason=kept.reason, shares=kept.shares, state=held)
    since = profile.step - held.step if held else len(profile.busy_WN)
    rows = profile.busy_WN[-since:]
    used_N = [
        sum(column) / len(rows) * (held.plan.sms_of(group.name, machine) if held else 1.0)
        for group, column in zip(profile.groups, zip(*rows, strict=True), strict=True)
    ]
    sizes_N = in_proportion(used_N, machine)
    reason = f"by utilisation of the last {len(rows)} steps"
    cut = shares(profile.groups, sizes_N) if sizes_N else ()
    plan = Plan(policy="dynamic", reason=reason if cut else "more groups than slices", shares=cut)
    return Plan(policy="dynamic", reason=plan.reason, shares=cut, state=Held(profile.step, plan))
