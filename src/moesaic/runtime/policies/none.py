"""`none`: never slice; every group has the whole GPU, one launch after the other."""

from __future__ import annotations

from typing import Any

from ..plan import Curves, MachineSlices, Plan, Profile


def none(profile: Profile, curves: Curves, machine: MachineSlices, state: Any) -> Plan:
    """The plan that does not slice."""
    return Plan(policy="none", reason="asked not to slice")
