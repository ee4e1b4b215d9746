"""Sizes for tenants that share a GPU: those with a promise first, the rest to the others.

A tenant with an `slo` must not be slowed down by more than that, against having the GPU alone. It
gets the smallest size whose predicted slowdown, with a margin for what curves measured alone cannot
show (memory bandwidth and caches stay shared), keeps the promise; what remains goes to the tenants
without one, by weight. When no size keeps it, or nothing remains, the answer is: do not slice.

>>> decode = SliceGroup(name="decode", kind="tenant", curve="decode", slo=1.5)
>>> prefill = SliceGroup(name="prefill", kind="tenant", curve="prefill")
>>> curves = {
...     "decode": Curve(work="decode", sms=(8, 32, 64, 128), ms=(8.0, 2.0, 1.1, 1.0)),
...     "prefill": Curve(work="prefill", sms=(8, 128), ms=(16.0, 1.0)),
... }
>>> plan = protect(GroupProfile(step=0, groups=(decode, prefill)), curves, MachineSlices(), None)
>>> plan.sizes
{'decode': 56, 'prefill': 72}
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .plan import Curve, Curves, GroupProfile, MachineSlices, Plan, Share, SliceGroup

MARGIN = 0.9


def allowed_slowdown(group: SliceGroup, curve: Curve, interval_ms: float | None) -> float:
    """How much slower a step may be: the promise, and no longer than steps arrive."""
    slo = group.slo or 1.0
    if interval_ms is None:
        return slo
    return min(slo, max(1.0, interval_ms / curve.ms[-1]))


def protect(
    profile: GroupProfile,
    curves: Curves,
    machine: MachineSlices,
    state: Any,
    *,
    margin: float = MARGIN,
    borrowing: Curves | None = None,
) -> Plan:
    """The plan of this module: the smallest slices that keep the promises, the rest to the others.

    Args:
        margin: the part of the promise that curves measured alone may use up.
        borrowing: curves measured while the others borrow what the promised leave idle; the plan
            lets them where that slows them down less.
    """
    plan = _sized(profile, curves, machine, margin)
    if borrowing is None:
        return plan
    lent = _sized(profile, borrowing, machine, margin)
    if not lent.sliced or (
        plan.sliced and _slowest(plan, profile, curves) <= _slowest(lent, profile, borrowing)
    ):
        return plan
    promised = {group.name for group in profile.groups if group.slo is not None}
    shares = tuple(replace(s, borrows=s.group not in promised) for s in lent.shares)
    return replace(lent, shares=shares, reason=f"{lent.reason}, borrowing what is idle")


def _slowest(plan: Plan, profile: GroupProfile, curves: Curves) -> float:
    """The largest slowdown among the groups without a promise."""
    return max(
        curves[group.curve].slowdown(plan.sizes[group.name])
        for group in profile.groups
        if group.slo is None
    )


def _sized(profile: GroupProfile, curves: Curves, machine: MachineSlices, margin: float) -> Plan:
    promised = [group for group in profile.groups if group.slo is not None]
    others = [group for group in profile.groups if group.slo is None]
    if not promised or not others:
        return Plan(policy="protect", reason="do not slice: nobody to protect from anybody")
    sizes, told = {}, []
    for group in promised:
        curve = curves[group.curve]
        most = max(1.0, margin * allowed_slowdown(group, curve, profile.interval_ms))
        size = curve.smallest(machine, slowdown=most)
        if curve.slowdown(size) > most:
            reason = f"do not slice: no size keeps {group.name} within {most:.2f} of alone"
            return Plan(policy="protect", reason=reason)
        sizes[group.name] = size
        told.append(f"{group.name} {size} SMs: {curve.slowdown(size):.2f} <= {most:.2f} x alone")
    left = (machine.sizes[-1] - sum(sizes.values())) // machine.granularity
    if left * machine.granularity < machine.min_sms * len(others):
        return Plan(policy="protect", reason=f"do not slice: {'; '.join(told)}, too little is left")
    for place, group in enumerate(others):
        atoms = left // len(others) + (place < left % len(others))
        sizes[group.name] = atoms * machine.granularity
        slower = curves[group.curve].slowdown(sizes[group.name])
        told.append(f"{group.name} the rest, {sizes[group.name]} SMs: {slower:.2f} x alone")
    shares = tuple(
        Share(group.name, sizes[group.name], -1 if group.slo is not None else 0)
        for group in profile.groups
    )
    return Plan(policy="protect", reason="; ".join(told), shares=shares)
