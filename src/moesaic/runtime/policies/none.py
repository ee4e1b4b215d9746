"""`none`: never slice; every group has the whole GPU, one launch after the other."""

from __future__ import annotations

from typing import Any

from ..plan import Curves, GroupProfile, MachineSlices, Plan


def none(profile: GroupProfile, curves: Curves, machine: MachineSlices, state: Any) -> Plan:
    """The plan that does not slice."""
    return Plan(policy="none", reason="asked not to slice")
