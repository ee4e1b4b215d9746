"""The frozen values of the control path: sizes, curves, plans that fit and plans that do not."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.runtime.plan import (
    Curve,
    GroupProfile,
    MachineSlices,
    Plan,
    Share,
    SliceGroup,
    step_ms,
)

MACHINE = MachineSlices(total_sms=132)
HOT = SliceGroup(name="hot", kind="hot", curve="gemm")
COLD = SliceGroup(name="cold", kind="cold", curve="gemm")
PROFILE = GroupProfile(step=3, groups=(HOT, COLD), loads_WN=((3.0, 1.0),))
GEMM = Curve(work="gemm", sms=(8, 64, 128), ms=(16.0, 2.0, 1.0), load=2.0, fixed_ms=0.5)


def test_sizes_are_multiples_of_eight_up_to_what_divides() -> None:
    assert MACHINE.sizes == tuple(range(8, 129, 8))
    assert [MACHINE.round_up(n) for n in (0, 8, 8.1, 66, 500)] == [8, 8, 16, 72, 128]


@given(st.floats(8, 128), st.floats(8, 128))
def test_a_curve_falls_with_more_sms_and_meets_its_points(a: float, b: float) -> None:
    assert [GEMM.ms_at(sms) for sms in (4, 8, 64, 128, 132)] == [32.0, 16.0, 2.0, 1.0, 1.0]
    low, high = sorted((a, b))
    assert GEMM.ms_at(low) >= GEMM.ms_at(high) - 1e-9
    assert GEMM.ms_at(100) == pytest.approx(128 / 100)  # perfect scaling between its points


def test_only_the_variable_part_grows_with_the_load() -> None:
    assert GEMM.ms_at(128, load=2.0) == 1.0
    assert GEMM.ms_at(128, load=4.0) == 1.5
    assert GEMM.smallest(MACHINE, slowdown=2.0) == 64
    assert GEMM.smallest(MACHINE, slowdown=0.5) == 128


def test_a_step_is_the_slowest_slice_or_the_sum_without_slices() -> None:
    sliced = Plan(policy="t", reason="", shares=(Share("hot", 64), Share("cold", 64)))
    curves = {"gemm": GEMM}
    assert step_ms(PROFILE, (3.0, 1.0), sliced, curves, MACHINE) == 0.5 + 1.5 * 1.5
    whole = Plan(policy="t", reason="")
    assert step_ms(PROFILE, (3.0, 1.0), whole, curves, MACHINE) == 0.5 + 0.75 + 0.25


@pytest.mark.parametrize(
    ("shares", "complaint"),
    [
        ((), None),
        ((Share("hot", 64), Share("cold", 64)), None),
        ((Share("hot", 64),), "no share for"),
        ((Share("hot", 60), Share("cold", 64)), "none of"),
        ((Share("hot", 72), Share("cold", 64)), "together"),
        ((Share("hot", 8), Share("cold", 8), Share("else", 8)), "do not exist"),
    ],
)
def test_a_plan_that_does_not_fit_says_why(
    shares: tuple[Share, ...], complaint: str | None
) -> None:
    problem = Plan(policy="t", reason="", shares=shares).problem(PROFILE, MACHINE)
    assert problem is None if complaint is None else complaint in str(problem)


def test_a_prediction_of_nan_is_a_problem() -> None:
    plan = Plan(policy="t", reason="", predicted_ms=math.nan)
    assert plan.problem(PROFILE, MACHINE) == "predicted_ms is nan"


@pytest.mark.parametrize(
    "make",
    [
        lambda: Curve(work="w", sms=(), ms=()),
        lambda: Curve(work="w", sms=(16, 8), ms=(1.0, 2.0)),
        lambda: Curve(work="w", sms=(8,), ms=(math.nan,)),
        lambda: MachineSlices(total_sms=4),
        lambda: MachineSlices(granularity=3),
        lambda: SliceGroup(name="a", kind="warm", curve="gemm"),  # type: ignore[arg-type]
        lambda: SliceGroup(name="a", kind="hot", curve="gemm", slo=0.5),
        lambda: GroupProfile(step=0, groups=(HOT, HOT)),
        lambda: GroupProfile(step=0, groups=(HOT,), loads_WN=((1.0, 2.0),)),
        lambda: Plan(policy="t", reason="", shares=(Share("a", 8), Share("a", 8))),
        lambda: Plan(policy="t", reason="", shares=(Share("a", 0),)),
    ],
)
def test_values_that_cannot_be_are_refused(make: object) -> None:
    with pytest.raises(ValueError, match="must be"):
        make()  # type: ignore[operator]
