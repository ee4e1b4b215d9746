"""The control path in one object: profile in, plan out, books kept, graphs chosen; never a capture.

Between two steps `replan` asks the policy (through a `Guard`), enters the plan into the slice
manager and moves every group's work to the seat of its new slices. All of it happens or none of it:
whatever fails, the last good plan stays in force, the layer goes on with the same bits, the kind of
the fault is logged once and counted. During a step nothing moves: a profile that comes then is
planned for when the step ends, and nobody can evict what it holds. A group that loses its slices
between steps, to a tenant of higher priority in the same books, goes on with its graph for the
whole GPU until a plan can be carried out again.

    control = Control(policy, curves, machine, {"hot": hot_work, "cold": cold_work})
    while True:
        with control.step():
            ...                       # replay hot_work.current and cold_work.current
        control.replan(profile)
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from .plan import Allocation, Curves, GroupProfile, MachineSlices, Plan, Policy
from .policies.guard import Guard
from .seats import SeatedWork
from .slices import SliceError, SliceManager

log = logging.getLogger("moesaic")
WHOLE = Plan(policy="none", reason="there is no plan yet")


def label_of(slices: tuple[int, ...]) -> str:
    """What names the seat of these slices: "0-3" or "0,2"; "" for the whole GPU.

    >>> label_of((4, 5, 6)), label_of((1, 3)), label_of(())
    ('4-6', '1,3', '')
    """
    if not slices:
        return ""
    if len(slices) > 1 and slices == tuple(range(slices[0], slices[-1] + 1)):
        return f"{slices[0]}-{slices[-1]}"
    return ",".join(map(str, slices))


class Control:
    """Re-plans between steps and keeps the last good plan.

    Args:
        policy: as in `plan.Policy`.
        curves: as there.
        machine: as there.
        works: each group's graphs, prepared for the whole GPU (``Seat(total_sms)``) and for every
            seat that a plan may give it (``Seat(sms, stream, label_of(slices))``).
        manager: the books; a new one when None.

    `plan` is in force; `faults` counts what went wrong, by kind; `deferred` profiles that came
    during a step.
    """

    def __init__(
        self,
        policy: Policy,
        curves: Curves,
        machine: MachineSlices,
        works: Mapping[str, SeatedWork[Any]],
        manager: SliceManager | None = None,
    ) -> None:
        self.machine, self.works = machine, dict(works)
        self.manager = manager or SliceManager(machine)
        self.plan = WHOLE
        self.deferred = 0
        self._guard = Guard(policy, curves, machine)
        self._faults: Counter[str] = Counter()
        self._stepping = False
        self._waiting: GroupProfile | None = None
        self._given: dict[str, Allocation] = {}
        for work in self.works.values():
            work.use(machine.total_sms)

    @property
    def faults(self) -> Counter[str]:
        """Faults by kind, those of the policy included."""
        return self._faults + Counter(self._guard.faults)

    @contextmanager
    def step(self) -> Iterator[Plan]:
        """The plan of one step; nothing moves until the block ends.

        Raises:
            RuntimeError: a step is running already.
        """
        if self._stepping:
            raise RuntimeError("a step is running already; steps of one control do not nest")
        self._stepping = True
        try:
            with self.manager.step():
                self._give_up_lost()
                yield self.plan
        finally:
            self._stepping = False
            waiting, self._waiting = self._waiting, None
            if waiting is not None:
                self.replan(waiting)

    def replan(self, profile: GroupProfile) -> Plan:
        """The plan for the next step, in force at once, or after the running step; never raises."""
        if self._stepping:
            self._waiting = profile
            self.deferred += 1
            return self.plan
        self._give_up_lost()
        plan = self._guard(profile)
        if plan.shares == self.plan.shares and plan.sizes.keys() == self._given.keys():
            self.plan = plan
            return plan
        # Looked up before the books change: after that nothing can fail any more.
        size, laid = self.machine.granularity, self.manager.layout(plan)
        seats = {name: (size * len(slices), label_of(slices)) for name, slices in laid.items()}
        for name in seats.keys() & self.works.keys():
            if not self.works[name].prepared(*seats[name]):
                return self._fault("no graph", KeyError(f"{name!r} has none for {seats[name]}"))
        try:
            held = {a.group: a for a in self.manager.apply(plan, profile.groups)}
        except SliceError as error:
            return self._fault("SliceError", error)
        self._given = {name: held[name] for name in seats}
        for name, work in self.works.items():
            work.use(*seats.get(name, (self.machine.total_sms,)))
        self.plan = plan
        return plan

    def _give_up_lost(self) -> None:
        """Groups that do not hold what the plan gave them move to the whole GPU."""
        held = self.manager.allocations
        lost = sorted(name for name, given in self._given.items() if held.get(name) != given)
        for name in lost:
            del self._given[name]
            if name in self.works:
                self.works[name].use(self.machine.total_sms)
        if lost:
            self._fault("evicted", SliceError(f"{', '.join(lost)} lost the slices of the plan"))

    def _fault(self, kind: str, error: Exception) -> Plan:
        if kind not in self._faults:
            log.warning(
                "a plan could not be carried out (%s); the last good one stays in force (%s: %s)",
                error, self.plan.policy, self.plan.reason,
            )  # fmt: skip
        self._faults[kind] += 1
        return self.plan
