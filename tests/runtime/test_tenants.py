"""`protect`: promises first, the rest to the others, or: do not slice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.runtime.plan import Curve, GroupProfile, MachineSlices, SliceGroup
from moesaic.runtime.tenants import protect

MACHINE = MachineSlices(total_sms=132, slices=15)


def group(name: str, slo: float | None = None) -> SliceGroup:
    return SliceGroup(name=name, kind="tenant", curve=name, slo=slo)


def curve(work: str, *slower: float) -> Curve:
    """A curve over 8, 32, 64 and 132 SMs from slowdowns, the last of which is 1."""
    return Curve(work=work, sms=(8, 32, 64, 132), ms=slower)


CURVES = {
    "a": curve("a", 4.0, 1.6, 1.1, 1.0),
    "b": curve("b", 8.0, 3.0, 1.2, 1.0),
    "rest": curve("rest", 16.0, 4.0, 2.0, 1.0),
    "never": curve("never", 9.0, 9.0, 9.0, 1.0),
}


@given(st.floats(1.3, 6.0), st.floats(0.7, 1.0))
def test_the_smallest_size_that_keeps_the_promise(slo: float, margin: float) -> None:
    profile = GroupProfile(step=0, groups=(group("a", slo), group("rest")))
    plan = protect(profile, CURVES, MACHINE, None, margin=margin)
    most = max(1.0, margin * slo)
    if not plan.sliced:
        assert CURVES["a"].slowdown(112) > most
        return
    size = plan.sizes["a"]
    assert CURVES["a"].slowdown(size) <= most
    assert size == 8 or CURVES["a"].slowdown(size - 8) > most
    assert plan.sizes["rest"] == 120 - size and plan.problem(profile, MACHINE) is None


def test_two_promises_and_two_others_share_what_there_is() -> None:
    groups = (group("a", 1.8), group("b", 3.4), group("rest"), group("never"))
    plan = protect(GroupProfile(step=0, groups=groups), CURVES, MACHINE, None)
    assert plan.sizes == {"a": 32, "b": 32, "rest": 32, "never": 24}
    assert [share.priority for share in plan.shares] == [-1, -1, 0, 0]


@pytest.mark.parametrize(
    ("groups", "why"),
    [
        ((group("rest"),), "nobody to protect"),
        ((group("a", 1.5),), "nobody to protect"),
        ((group("never", 1.5), group("rest")), "no size keeps never within 1.35"),
        ((group("a", 1.2), group("b", 1.3), group("rest")), "too little is left"),
    ],
)
def test_it_may_decide_not_to_slice_and_says_why(groups, why: str) -> None:
    plan = protect(GroupProfile(step=0, groups=groups), CURVES, MACHINE, None)
    assert not plan.sliced and why in plan.reason


def test_others_borrow_where_that_slows_them_down_less() -> None:
    profile = GroupProfile(step=0, groups=(group("a", 1.8), group("rest")))
    fixed = protect(profile, CURVES, MACHINE, None)
    idle = CURVES | {"rest": curve("rest", 4.0, 1.5, 1.2, 1.0)}
    plan = protect(profile, CURVES, MACHINE, None, borrowing=idle)
    assert plan.sizes == fixed.sizes and "borrowing" in plan.reason
    assert [(share.group, share.borrows) for share in plan.shares] == [("a", False), ("rest", True)]
    busy = CURVES | {"a": curve("a", 9.0, 9.0, 1.6, 1.0)}
    assert protect(profile, CURVES, MACHINE, None, borrowing=busy) == fixed
    never = {**CURVES, "a": CURVES["never"]}
    assert protect(profile, CURVES, MACHINE, None, borrowing=never) == fixed
    assert protect(profile, never, MACHINE, None, borrowing=idle).shares == plan.shares


def test_steps_that_arrive_faster_than_the_promise_bound_the_slowdown() -> None:
    groups = (group("a", 4.0), group("rest"))
    plan = protect(GroupProfile(step=0, groups=groups, interval_ms=2.0), CURVES, MACHINE, None)
    assert CURVES["a"].slowdown(plan.sizes["a"]) <= 0.9 * 2.0
