"""From loads to sizes: the arithmetic that policies share, and the time that a plan would take.

    N groups

>>> machine = MachineSlices(total_sms=132)
>>> in_proportion((3.0, 1.0), machine)
(96, 32)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..plan import Curves, GroupProfile, MachineSlices, Plan, Share, SliceGroup, step_ms


def in_proportion(weights_N: Sequence[float], machine: MachineSlices) -> tuple[int, ...] | None:
    """Sizes in proportion to weights, each at least the least one; None if that is too many.

    What division leaves over goes to the largest remainders, the first of equal ones.

    Raises:
        ValueError: a weight is negative or not finite.
    """
    if not all(0 <= w < math.inf for w in weights_N):
        raise ValueError(f"weights must be 0 or more and finite, got {tuple(weights_N)}")
    step, least = machine.granularity, machine.min_sms
    spare = (machine.sizes[-1] - least * len(weights_N)) // step
    if not weights_N or spare < 0:
        return None
    total = sum(weights_N)
    even = 1 / len(weights_N)
    wanted = [machine.sizes[-1] * (w / total if total else even) for w in weights_N]
    extra = [max(0.0, (sms - least) / step) for sms in wanted]
    # Groups under the least size got more than their part, which the others pay in proportion.
    asked = sum(extra)
    given = [part * min(1.0, spare / asked) if asked else 0.0 for part in extra]
    atoms = [int(part) for part in given]
    order = sorted(range(len(given)), key=lambda n: (atoms[n] - given[n], n))
    for n in order[: max(0, min(spare, round(sum(given))) - sum(atoms))]:
        atoms[n] += 1
    return tuple(least + step * n for n in atoms)


def shortest(
    groups: Sequence[SliceGroup],
    loads_N: Sequence[float],
    curves: Curves,
    machine: MachineSlices,
) -> tuple[int, ...] | None:
    """Sizes under which the slowest group ends soonest; None when not all fit, or their `slo`s.

    From the least sizes on, a step goes to whoever is slowest. Where no curve rises with the SMs
    this finds the best sizes there are.

    Raises:
        ValueError: a load is negative or not finite.
    """
    if not all(0 <= load < math.inf for load in loads_N):
        raise ValueError(f"loads must be 0 or more and finite, got {tuple(loads_N)}")
    sizes = [
        machine.min_sms
        if group.slo is None
        else curves[group.curve].smallest(machine, slowdown=group.slo)
        for group in groups
    ]
    for group, size in zip(groups, sizes, strict=True):
        if group.slo is not None and curves[group.curve].slowdown(size) > group.slo:
            return None
    if not sizes or sum(sizes) > machine.sizes[-1]:
        return None
    asked = [curves[group.curve] for group in groups]
    times = [c.ms_at(n, load) for c, n, load in zip(asked, sizes, loads_N, strict=True)]
    best, best_ms = tuple(sizes), max(times)
    while sum(sizes) + machine.granularity <= machine.sizes[-1]:
        slowest = times.index(max(times))
        sizes[slowest] += machine.granularity
        times[slowest] = asked[slowest].ms_at(sizes[slowest], loads_N[slowest])
        if max(times) < best_ms:
            best, best_ms = tuple(sizes), max(times)
    return best


def keeps_promises(
    groups: Sequence[SliceGroup],
    loads_N: Sequence[float],
    curves: Curves,
    machine: MachineSlices,
) -> bool:
    """Whether nobody's `slo` is broken when all take the whole GPU one after the other."""
    profile = GroupProfile(step=0, groups=tuple(groups))
    whole = plan_ms(profile, loads_N, Plan(policy="", reason=""), curves, machine)
    return all(
        group.slo is None or whole <= group.slo * curves[group.curve].ms_at(machine.total_sms, load)
        for group, load in zip(groups, loads_N, strict=True)
    )


def fastest(
    profile: GroupProfile,
    loads_N: Sequence[float],
    curves: Curves,
    machine: MachineSlices,
    *,
    policy: str,
) -> Plan:
    """The best plan for known loads: `shortest` sizes, or the whole GPU where that is no slower
    and breaks no promise.
    """
    whole = Plan(policy=policy, reason="the whole GPU is fastest")
    sizes_N = shortest(profile.groups, loads_N, curves, machine)
    if sizes_N is None:
        return Plan(policy=policy, reason="no sizes fit, or none keeps every promise")
    cut = Plan(policy=policy, reason="fastest sizes", shares=shares(profile.groups, sizes_N))
    if not keeps_promises(profile.groups, loads_N, curves, machine):
        return cut
    return min((whole, cut), key=lambda plan: plan_ms(profile, loads_N, plan, curves, machine))


def shares(groups: Sequence[SliceGroup], sizes_N: Sequence[int]) -> tuple[Share, ...]:
    """Sizes as the shares of a plan; streams keep the groups' priorities."""
    return tuple(
        Share(group.name, sms, group.priority) for group, sms in zip(groups, sizes_N, strict=True)
    )


def plan_ms(
    profile: GroupProfile,
    loads_N: Sequence[float],
    plan: Plan,
    curves: Curves,
    machine: MachineSlices,
) -> float:
    """Predicted milliseconds of a step: `step_ms`, and never less than what is shared allows.

    Curves are measured alone. Beside each other, groups with the same kind of work share what
    bounds it (tensor cores and power, or memory bandwidth), so together they take at least the sum
    of their times on the whole GPU.
    """
    alone = step_ms(profile, tuple(loads_N), plan, curves, machine)
    if not plan.sliced:
        return alone
    together: dict[str, float] = {}
    for group, load in zip(profile.groups, loads_N, strict=True):
        curve = curves[group.curve]
        time = curve.ms_at(machine.total_sms, load)
        together[curve.work] = together.get(curve.work, 0.0) + time
    return max([alone, *together.values()])


def newest_loads(profile: GroupProfile) -> tuple[float, ...] | None:
    """The newest work of each group; rows of its experts where work was not recorded, else None."""
    if profile.loads_WN:
        return profile.loads_WN[-1]
    if not profile.counts_WE:
        return None
    counts_E = profile.counts_WE[-1]
    return tuple(float(sum(counts_E[e] for e in group.experts)) for group in profile.groups)
