"""`proportional`: SMs in proportion to the newest loads, at every step."""

from __future__ import annotations

from typing import Any

from ..plan import Curves, GroupProfile, MachineSlices, Plan
from .sizing import in_proportion, newest_loads, shares


def proportional(profile: GroupProfile, curves: Curves, machine: MachineSlices, state: Any) -> Plan:
    """Sizes in proportion to what each group had to do in the newest step."""
    loads_N = newest_loads(profile)
    if loads_N is None:
        return Plan(policy="proportional", reason="no loads were recorded yet")
    sizes_N = in_proportion(loads_N, machine)
    if sizes_N is None:
        return Plan(policy="proportional", reason="more groups than slices")
    return Plan(
        policy="proportional",
        reason="in proportion to the newest loads",
        shares=shares(profile.groups, sizes_N),
    )
