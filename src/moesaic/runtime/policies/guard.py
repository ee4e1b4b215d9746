"""A policy that fails must not stop a layer: the last good plan stays in force.

>>> machine = MachineSlices(total_sms=132)
>>> def broken(profile, curves, machine, state):
...     raise ArithmeticError("no")
>>> guard = Guard(broken, {}, machine)
>>> guard(GroupProfile(step=0, groups=())).sliced, guard.faults
(False, {'ArithmeticError': 1})
"""

from __future__ import annotations

import logging
from typing import Any

from ..plan import Curves, GroupProfile, MachineSlices, Plan, Policy

log = logging.getLogger("moesaic")

FORGET_AFTER = 3
"""Faults in a row after which the policy starts again without its state, which may be the cause."""


class Guard:
    """Calls a policy and answers with a plan that can be carried out, whatever the policy does.

    A policy that raises, answers something else than a plan, or a plan that does not fit the groups
    or the machine or predicts a time that is no number, is a fault: it is counted in `faults` by
    its kind, logged once a kind, and the last good plan is given again; where the groups have
    changed so that it does not fit either, the plan not to slice.
    """

    def __init__(self, policy: Policy, curves: Curves, machine: MachineSlices) -> None:
        self.policy, self.curves, self.machine = policy, curves, machine
        self.faults: dict[str, int] = {}
        self.good = Plan(policy="none", reason="there is no plan yet")
        self._state: Any = None
        self._in_a_row = 0

    def __call__(self, profile: GroupProfile) -> Plan:
        """The policy's plan, or the last good one."""
        try:
            plan = self.policy(profile, self.curves, self.machine, self._state)
            if not isinstance(plan, Plan):
                return self._fault(profile, "no plan", f"the policy gave {plan!r:.80}")
            problem = plan.problem(profile, self.machine)
        except Exception as error:  # whatever a policy does, the layer goes on
            return self._fault(profile, type(error).__name__, str(error))
        if problem is not None:
            return self._fault(profile, "unfit plan", problem)
        self.good, self._state, self._in_a_row = plan, plan.state, 0
        return plan

    def _fault(self, profile: GroupProfile, kind: str, what: str) -> Plan:
        if kind not in self.faults:
            log.warning(
                "the policy failed (%s: %s); the last good plan stays in force (%s: %s)",
                kind, what, self.good.policy, self.good.reason,
            )  # fmt: skip
        self.faults[kind] = self.faults.get(kind, 0) + 1
        self._in_a_row += 1
        if self._in_a_row >= FORGET_AFTER:
            self._state = None
        if self.good.problem(profile, self.machine) is not None:
            self.good = Plan(policy="none", reason="the last good plan does not fit these groups")
        return self.good
