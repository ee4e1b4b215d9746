"""Frozen values of the control path: who wants a share of the GPU, what was measured, who gets it.

A *slice* is an atom of the GPU: a few SMs (8 on Hopper) and a stream. A *slice group* is somebody
who wants slices: hot experts, cold experts, a shared expert, the exchange, another tenant. A policy
is a pure function of what was seen and measured:

    policy(GroupProfile, Curves, MachineSlices, state) -> Plan

and `Plan.state` is what it wants handed back at its next call, so that a recorded run can be
replayed anywhere. A plan may also say "do not slice": then every group has the whole GPU.

    W steps of history · E experts · N groups

>>> machine = MachineSlices(total_sms=132)
>>> machine.sizes[:3], machine.sizes[-1], machine.atoms
((8, 16, 24), 128, 16)
>>> copy = Curve(work="copy", sms=(8, 64, 128), ms=(6.0, 1.2, 1.0))
>>> copy.ms_at(64), copy.smallest(machine, slowdown=1.25)
(1.2, 64)
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

GroupKind = Literal["hot", "cold", "shared", "exchange", "tenant"]


def _need(right: bool, what: str, expected: str, got: object) -> None:
    if not right:
        raise ValueError(f"{what} must be {expected}, got {got!r}")


@dataclass(frozen=True, kw_only=True)
class MachineSlices:
    """How a GPU can be cut: SMs in all, the step and least size of a slice, memory, streams.

    Raises:
        ValueError: a number is out of range.
    """

    total_sms: int = 132
    granularity: int = 8
    min_sms: int = 8
    memory_bytes: int = 0
    """What allocations together may hold; 0: memory is not accounted."""
    streams: int = 4
    slices: int = 0
    """Slices that the driver gives, which may be fewer than would fit; 0: as many as fit."""

    def __post_init__(self) -> None:
        for name in ("granularity", "min_sms", "streams"):
            _need(getattr(self, name) >= 1, name, "positive", getattr(self, name))
        _need(self.total_sms >= self.min_sms, "total_sms", f">= {self.min_sms}", self.total_sms)
        fit = self.total_sms // self.granularity
        _need(0 <= self.slices <= fit, "slices", f"in [0, {fit}]", self.slices)
        _need(self.memory_bytes >= 0, "memory_bytes", "0 or more", self.memory_bytes)
        right = self.min_sms % self.granularity == 0
        _need(right, "min_sms", f"a multiple of {self.granularity}", self.min_sms)

    @property
    def atoms(self) -> int:
        """Slices of `granularity` SMs; what does not divide goes to a plan's largest group."""
        return self.slices or self.total_sms // self.granularity

    @property
    def sizes(self) -> tuple[int, ...]:
        """Every number of SMs that a group can be given, ascending."""
        step = self.granularity
        return tuple(range(self.min_sms, self.atoms * step + 1, step))

    def round_up(self, sms: float) -> int:
        """The smallest size that is at least `sms`, the largest one when none is."""
        size = math.ceil(sms / self.granularity) * self.granularity
        return min(max(size, self.min_sms), self.sizes[-1])


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Measured milliseconds of some work on ever more SMs, at one reference load.

    `work` is its kind: groups whose curves have the same one share what bounds it. `load` is the
    work of the measurement in any unit (rows, tokens); of its time, `fixed_ms` does not grow with
    the load. The last point is the whole GPU.

    Raises:
        ValueError: no points, SMs not ascending, times not positive and finite.
    """

    work: str
    sms: tuple[int, ...]
    ms: tuple[float, ...]
    load: float = 1.0
    fixed_ms: float = 0.0

    def __post_init__(self) -> None:
        _need(len(self.sms) == len(self.ms) > 0, "sms and ms", "equally long, not empty", self)
        _need(list(self.sms) == sorted(set(self.sms)), "sms", "ascending", self.sms)
        _need(self.sms[0] > 0, "sms", "positive", self.sms)
        _need(all(0 < t < math.inf for t in self.ms), "ms", "positive and finite", self.ms)
        _need(0 < self.load < math.inf, "load", "positive and finite", self.load)
        right = 0 <= self.fixed_ms <= min(self.ms)
        _need(right, "fixed_ms", "in [0, the shortest time]", self.fixed_ms)

    def ms_at(self, sms: float, load: float | None = None) -> float:
        """Predicted milliseconds; between points linear in 1/SMs, below the first as 1/SMs."""
        time = self._at(sms)
        if load is None:
            return time
        return self.fixed_ms + (time - self.fixed_ms) * load / self.load

    def _at(self, sms: float) -> float:
        place = bisect_left(self.sms, sms)
        if place == len(self.sms):
            return self.ms[-1]
        if self.sms[place] == sms:
            return self.ms[place]
        if place == 0:
            return self.ms[0] * self.sms[0] / sms
        low, high = self.sms[place - 1], self.sms[place]
        part = (1 / low - 1 / sms) / (1 / low - 1 / high)
        return self.ms[place - 1] + part * (self.ms[place] - self.ms[place - 1])

    def slowdown(self, sms: float) -> float:
        """Time on `sms` over the time on the whole GPU."""
        return self._at(sms) / self.ms[-1]

    def smallest(self, machine: MachineSlices, *, slowdown: float) -> int:
        """The smallest size that slows this work down by at most `slowdown`, else the largest."""
        fits = (size for size in machine.sizes if self.slowdown(size) <= slowdown)
        return next(fits, machine.sizes[-1])


Curves = Mapping[str, Curve]


@dataclass(frozen=True, kw_only=True)
class SliceGroup:
    """Somebody who wants slices: experts of one temperature, a shared expert, another tenant.

    `curve` names its work among the curves; `slo`: the largest slowdown, against having the GPU
    alone, that it must not exceed; `memory_bytes`: what its weights take while it is resident.
    """

    name: str
    kind: GroupKind
    curve: str
    experts: tuple[int, ...] = ()
    priority: int = 0
    memory_bytes: int = 0
    slo: float | None = None

    def __post_init__(self) -> None:
        _need(self.kind in get_args(GroupKind), "kind", f"in {get_args(GroupKind)}", self.kind)
        _need(self.memory_bytes >= 0, "memory_bytes", "0 or more", self.memory_bytes)
        _need(self.slo is None or self.slo >= 1, "slo", "None or at least 1", self.slo)


@dataclass(frozen=True, kw_only=True)
class GroupProfile:
    """What was seen of slice groups up to a step, oldest first; all that a policy may look at.

    Made of the profiler's `runtime.profile.Profile`s by `runtime.grouping.observed`, or by whoever
    knows the loads of other tenants.

    `counts_WE`: rows per expert of the last W steps. `loads_WN`: work of each group in the units of
    its curve. `busy_WN`: share of the step's time in which the group computed, in [0, 1]. Both may
    be empty where nothing was recorded. `interval_ms`: time between two steps, when it is fixed
    from outside (an open loop), else None. `context_VC`: other numbers known before a step begins
    (what other layers counted), a row for each of the W steps and one for the step to come
    (V = W + 1), or empty. `took_ms`: measured time of the last step, under the plan that was in
    force then, or None.
    """

    step: int
    groups: tuple[SliceGroup, ...]
    counts_WE: tuple[tuple[int, ...], ...] = ()
    loads_WN: tuple[tuple[float, ...], ...] = ()
    busy_WN: tuple[tuple[float, ...], ...] = ()
    interval_ms: float | None = None
    context_VC: tuple[tuple[float, ...], ...] = ()
    took_ms: float | None = None

    def __post_init__(self) -> None:
        names = [group.name for group in self.groups]
        _need(len(set(names)) == len(names), "names of groups", "distinct", names)
        for what in ("loads_WN", "busy_WN"):
            right = all(len(row) == len(names) for row in getattr(self, what))
            _need(right, what, f"rows of {len(names)} numbers", getattr(self, what))


@dataclass(frozen=True)
class Share:
    """What a plan gives to one group: SMs, and the priority of its stream (lower runs first).

    `borrows`: while others leave their SMs idle it may use those too, see `runtime.borrowing`; what
    cannot borrow keeps to its own, which no promise suffers from.
    """

    group: str
    sms: int
    priority: int = 0
    borrows: bool = False


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes per group, or no shares at all: do not slice. `reason` says why, in words.

    `predicted_ms`: what the policy expects of a step, None where it does not predict.
    `state`: handed back to the policy at its next call; no part of what the plan is.

    Raises:
        ValueError: a group has two shares or a size is not positive.
    """

    policy: str
    reason: str
    shares: tuple[Share, ...] = ()
    predicted_ms: float | None = None
    state: Any = None

    def __post_init__(self) -> None:
        names = [share.group for share in self.shares]
        _need(len(set(names)) == len(names), "groups of the shares", "distinct", names)
        for share in self.shares:
            _need(share.sms > 0, "the SMs of a share", "positive", share)

    @property
    def sliced(self) -> bool:
        """Whether any group is confined to a part of the GPU."""
        return bool(self.shares)

    @property
    def sizes(self) -> dict[str, int]:
        """SMs by group; empty when the plan does not slice."""
        return {share.group: share.sms for share in self.shares}

    def sms_of(self, group: str, machine: MachineSlices) -> int:
        """SMs that a group may use under this plan: its share, or the whole GPU without one."""
        return self.sizes.get(group, machine.total_sms)

    def problem(self, profile: GroupProfile, machine: MachineSlices) -> str | None:
        """Why this plan cannot be carried out on that machine for those groups, or None."""
        known = {group.name for group in profile.groups}
        if unknown := sorted(set(self.sizes) - known):
            return f"shares for groups that do not exist: {unknown}"
        if self.sliced and (left := sorted(known - set(self.sizes))):
            return f"no share for {left}"
        for share in self.shares:
            if share.sms not in machine.sizes:
                return f"{share.group} gets {share.sms} SMs, which is none of {machine.sizes}"
        used = sum(self.sizes.values())
        if used > machine.sizes[-1]:
            return f"shares of {used} SMs together, the GPU has {machine.sizes[-1]} to give"
        if self.predicted_ms is not None and not 0 <= self.predicted_ms < math.inf:
            return f"predicted_ms is {self.predicted_ms}"
        return None


Policy = Callable[[GroupProfile, Curves, MachineSlices, Any], Plan]


def step_ms(
    profile: GroupProfile,
    loads_N: tuple[float, ...],
    plan: Plan,
    curves: Curves,
    machine: MachineSlices,
) -> float:
    """Predicted milliseconds of one step under a plan.

    Sliced, the groups run beside each other and the slowest counts; not sliced, one launch holds
    the tiles of all of them, so their times on the whole GPU add up, a fixed part counted once.
    """
    times = [
        curves[group.curve].ms_at(plan.sms_of(group.name, machine), load)
        for group, load in zip(profile.groups, loads_N, strict=True)
    ]
    if plan.sliced or not times:
        return max(times, default=0.0)
    fixed = [curves[group.curve].fixed_ms for group in profile.groups]
    return sum(times) - sum(fixed) + max(fixed)


@dataclass(frozen=True, kw_only=True)
class Slice:
    """One atom of the GPU as the slice manager shows it; `group` is its holder, or None."""

    id: int
    sms: int
    stream: int
    utilisation: float = 0.0
    group: str | None = None
    priority: int | None = None
    memory_bytes: int = 0
    """Its even part of what its holder keeps in memory."""


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """What one group holds: slices by id, memory, the stream it launches on, since when.

    A higher `priority` may take from a lower one. `since` counts the manager's requests.
    """

    group: str
    slices: tuple[int, ...]
    sms: int
    memory_bytes: int
    stream: int
    priority: int
    since: int
