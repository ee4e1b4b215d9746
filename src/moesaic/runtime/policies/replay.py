"""Replaying what was recorded under a policy, and under an oracle that knows the next step.

    N groups · E experts · C numbers of context

A policy sees the steps before, answers with a plan, and the step is timed by the curves
(`plan_ms`). *Regret* is the time of all steps over the oracle's, less one.

>>> from moesaic.runtime.plan import Curve
>>> group = SliceGroup(name="all", kind="hot", curve="any")
>>> steps = [Step(loads_N=(2.0,))] * 4
>>> machine, curves = MachineSlices(), {"any": Curve(work="any", sms=(132,), ms=(1.0,))}
>>> replay(lambda *_: Plan(policy="p", reason="r"), (group,), steps, curves, machine, warm=1).ms
(2.0, 2.0, 2.0)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..plan import Curves, GroupProfile, MachineSlices, Plan, Policy, SliceGroup
from .guard import Guard
from .sizing import fastest, plan_ms

WINDOW = 32


@dataclass(frozen=True, kw_only=True)
class Step:
    """One recorded step: work of each group, rows per expert, and what was known before it."""

    loads_N: tuple[float, ...]
    counts_E: tuple[int, ...] = ()
    context_C: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Replay:
    """Times and plans of the steps after the warm-up.

    `replans`: how often the sizes changed. `flaps`: how often they went back at once to what they
    were before. `faults`: what the guard counted.
    """

    ms: tuple[float, ...]
    plans: tuple[Plan, ...]
    replans: int
    flaps: int
    faults: int = 0

    @property
    def total_ms(self) -> float:
        """The time of all steps."""
        return sum(self.ms)

    @property
    def sliced(self) -> float:
        """The share of the steps whose plan slices."""
        return sum(plan.sliced for plan in self.plans) / max(1, len(self.plans))

    def regret(self, oracle: Replay) -> float:
        """Time beyond the oracle's, as a part of it."""
        return self.total_ms / oracle.total_ms - 1


def _account(ms: Sequence[float], plans: Sequence[Plan], faults: int = 0) -> Replay:
    sizes = [plan.sizes for plan in plans]
    replans = sum(a != b for a, b in pairwise(sizes))
    flaps = sum(a == c != b for a, b, c in zip(sizes, sizes[1:], sizes[2:], strict=False))
    return Replay(ms=tuple(ms), plans=tuple(plans), replans=replans, flaps=flaps, faults=faults)


def busy(
    groups: Sequence[SliceGroup], step: Step, plan: Plan, curves: Curves, machine: MachineSlices
) -> tuple[float, ...]:
    """The share of the step's time in which each group computes, by the curves."""
    profile = GroupProfile(step=0, groups=tuple(groups))
    whole = plan_ms(profile, step.loads_N, plan, curves, machine) or 1.0
    times = (
        curves[group.curve].ms_at(plan.sms_of(group.name, machine), load)
        for group, load in zip(groups, step.loads_N, strict=True)
    )
    return tuple(min(1.0, time / whole) for time in times)


def replay(
    policy: Policy,
    groups: tuple[SliceGroup, ...],
    steps: Sequence[Step],
    curves: Curves,
    machine: MachineSlices,
    *,
    warm: int = WINDOW,
) -> Replay:
    """The steps after the first `warm`, each under the plan that the policy made before it.

    The warm-up runs unsliced. The policy is guarded, as it is in use.
    """
    guard = Guard(policy, curves, machine)
    plan = Plan(policy="none", reason="warm-up")
    busy_WN: list[tuple[float, ...]] = []
    ms: list[float] = []
    plans: list[Plan] = []
    for number, step in enumerate(steps):
        if number >= warm:
            past = steps[max(0, number - WINDOW) : number]
            known = [*past, step]
            profile = GroupProfile(
                step=number - 1,
                groups=groups,
                counts_WE=tuple(s.counts_E for s in past if s.counts_E),
                loads_WN=tuple(s.loads_N for s in past),
                busy_WN=tuple(busy_WN[-len(past) :]),
                context_VC=tuple(s.context_C for s in known) if step.context_C else (),
            )
            plan = guard(profile)
            plans.append(plan)
            ms.append(plan_ms(profile, step.loads_N, plan, curves, machine))
        busy_WN.append(busy(groups, step, plan, curves, machine))
    return _account(ms, plans, sum(guard.faults.values()))


def oracle(
    groups: tuple[SliceGroup, ...],
    steps: Sequence[Step],
    curves: Curves,
    machine: MachineSlices,
    *,
    warm: int = WINDOW,
) -> Replay:
    """The same steps, each under the best plan for what it really brought."""
    profile = GroupProfile(step=0, groups=groups)
    plans = [fastest(profile, s.loads_N, curves, machine, policy="oracle") for s in steps[warm:]]
    ms = [
        plan_ms(profile, s.loads_N, plan, curves, machine)
        for s, plan in zip(steps[warm:], plans, strict=True)
    ]
    return _account(ms, plans)
