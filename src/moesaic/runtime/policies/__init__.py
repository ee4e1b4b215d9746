"""Policies: who gets which share of the GPU in the next step, and whether it is shared at all.

Each is a pure function ``(GroupProfile, Curves, MachineSlices, state) -> Plan``; `Plan.state` is
handed back at its next call, so that a recorded run gives the same plans again.

>>> sorted(POLICIES)
['adaptive', 'dynamic', 'none', 'proportional', 'static']
"""

from __future__ import annotations

from ..plan import Policy
from .adaptive import adaptive
from .dynamic import dynamic
from .none import none
from .proportional import proportional
from .static import static

POLICIES: dict[str, Policy] = {
    "none": none,
    "static": static,
    "dynamic": dynamic,
    "proportional": proportional,
    "adaptive": adaptive,
}


def find(name: str) -> Policy:
    """The policy of a name.

    Raises:
        ValueError: there is none.
    """
    if name not in POLICIES:
        raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {name!r}")
    return POLICIES[name]
