"""Policies: plans fit the machine, gain by what they know, do not flap, and survive what fails."""

from __future__ import annotations

import itertools
import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.runtime.plan import Curve, GroupProfile, MachineSlices, Plan, Share, SliceGroup
from moesaic.runtime.policies import POLICIES, find
from moesaic.runtime.policies.adaptive import WAYS, by
from moesaic.runtime.policies.forecast import Way
from moesaic.runtime.policies.guard import FORGET_AFTER, Guard
from moesaic.runtime.policies.replay import Step, oracle, replay
from moesaic.runtime.policies.search import Table
from moesaic.runtime.policies.sizing import in_proportion, plan_ms, shares, shortest
from moesaic.runtime.predictors import Predictor, ewma, last

H200 = MachineSlices(total_sms=132, slices=15)
SIZES = (8, 16, 32, 48, 64, 96, 128, 132)
GEMM = Curve(work="gemm", sms=SIZES, ms=(14.1, 7.1, 3.6, 2.3, 1.8, 1.28, 1.08, 1.0))
COPY = Curve(work="copy", sms=SIZES, ms=(6.6, 3.5, 1.9, 1.37, 1.16, 1.08, 1.0, 1.0))
CURVES = {"gemm": GEMM, "copy": COPY}
HOT = SliceGroup(name="hot", kind="hot", curve="gemm", experts=(0, 1))
COLD = SliceGroup(name="cold", kind="cold", curve="copy", experts=(2, 3))
TENANT = SliceGroup(name="tenant", kind="tenant", curve="gemm")
GROUPS = (HOT, COLD)

loads = st.floats(0, 50) | st.just(0.0)
machines = st.builds(
    lambda total, step, least: MachineSlices(
        total_sms=max(total, step * least), granularity=step, min_sms=step * least
    ),
    st.integers(8, 160), st.sampled_from([1, 2, 8]), st.integers(1, 2),
)  # fmt: skip


def profile(rows: list[tuple[float, ...]], groups=GROUPS, **more) -> GroupProfile:
    return GroupProfile(step=len(rows) - 1, groups=groups, loads_WN=tuple(rows), **more)


def steps(rows: np.ndarray) -> list[Step]:
    return [Step(loads_N=tuple(map(float, row))) for row in rows]


@settings(max_examples=30, deadline=None)
@given(machines, st.integers(1, 6), st.data())
def test_every_policy_s_plan_fits_the_machine(machine, count, data) -> None:
    kinds = data.draw(st.lists(st.sampled_from(["gemm", "copy"]), min_size=count, max_size=count))
    slo = st.one_of(st.none(), st.floats(1.0, 3.0))
    groups = tuple(
        SliceGroup(name=f"g{n}", kind="tenant", curve=kind, slo=data.draw(slo))
        for n, kind in enumerate(kinds)
    )
    row = st.tuples(*[loads] * count)
    share = st.tuples(*[st.floats(0, 1)] * count)
    for name, policy in POLICIES.items():
        state = None
        for step in range(4):
            history = data.draw(st.lists(row, min_size=1, max_size=4))
            busy = tuple(data.draw(share) for _ in history)
            seen = GroupProfile(step=step, groups=groups, loads_WN=tuple(history), busy_WN=busy)
            plan = policy(seen, CURVES, machine, state)
            assert plan.problem(seen, machine) is None, (name, plan)
            assert all(s.sms % machine.granularity == 0 for s in plan.shares)
            assert sum(plan.sizes.values()) <= machine.total_sms
            state = plan.state


@settings(max_examples=100, deadline=None)
@given(st.lists(loads, min_size=1, max_size=8), machines)
def test_proportion_uses_up_the_machine_and_keeps_the_order(weights, machine) -> None:
    sizes = in_proportion(weights, machine)
    if machine.min_sms * len(weights) > machine.sizes[-1]:
        assert sizes is None
        return
    assert sizes is not None and all(size in machine.sizes for size in sizes)
    used = sum(sizes)
    assert machine.sizes[-1] - machine.granularity * len(weights) < used <= machine.sizes[-1]
    for (a, x), (b, y) in itertools.combinations(zip(weights, sizes, strict=True), 2):
        assert not (a > b and x < y) and not (a < b and x > y)


@settings(max_examples=40, deadline=None)
@given(st.tuples(loads, loads, loads), st.sampled_from([(0, 0, 1), (0, 1, 1), (0, 0, 0)]))
def test_shortest_is_the_best_of_all_sizes(work, kinds) -> None:
    machine = MachineSlices(total_sms=66)
    groups = tuple(
        SliceGroup(name=f"g{n}", kind="tenant", curve=("gemm", "copy")[kind])
        for n, kind in enumerate(kinds)
    )
    found = shortest(groups, work, CURVES, machine)
    every = (
        sizes for sizes in itertools.product(machine.sizes, repeat=3)
        if sum(sizes) <= machine.sizes[-1]
    )  # fmt: skip

    def slowest(sizes) -> float:
        pairs = zip(groups, sizes, work, strict=True)
        return max(CURVES[g.curve].ms_at(n, load) for g, n, load in pairs)

    assert slowest(found) == pytest.approx(min(map(slowest, every)))
    steps_ = [Step(loads_N=work)]
    best = oracle(groups, steps_, CURVES, machine, warm=0)
    seen = GroupProfile(step=0, groups=groups)
    for name in ("none", "static", "proportional"):
        plan = POLICIES[name](profile([work], groups), CURVES, machine, None)
        assert best.total_ms <= plan_ms(seen, work, plan, CURVES, machine) * (1 + 1e-9)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(loads, loads, loads), min_size=1, max_size=8))
def test_the_table_computes_what_plan_ms_computes(rows) -> None:
    groups = (HOT, COLD, TENANT)
    curves = {"gemm": GEMM, "copy": Curve(work="copy", sms=SIZES, ms=COPY.ms, fixed_ms=0.3)}
    table, possible = Table.of(groups, curves, H200), np.array(rows)
    seen = GroupProfile(step=0, groups=groups)
    whole = [plan_ms(seen, row, Plan(policy="", reason=""), curves, H200) for row in rows]
    assert table.whole_ms(possible) == pytest.approx(whole)
    sizes = table.best(possible)
    places = np.array([[H200.sizes.index(size) for size in sizes]])
    plan = Plan(policy="", reason="", shares=shares(groups, sizes))
    expected = [plan_ms(seen, row, plan, curves, H200) for row in rows]
    assert table.sliced_ms(places, possible)[0] == pytest.approx(expected)
    start = shortest(groups, tuple(possible.mean(axis=0)), curves, H200)
    begun = table.sliced_ms(np.array([[H200.sizes.index(n) for n in start]]), possible).mean()
    assert np.mean(expected) <= begun * (1 + 1e-9)


def test_promises_are_kept_or_the_gpu_stays_whole() -> None:
    promised = SliceGroup(name="decode", kind="tenant", curve="copy", slo=1.2)
    groups = (promised, TENANT)
    for name in ("static", "adaptive"):
        plan = POLICIES[name](profile([(1.0, 5.0)] * 4, groups), CURVES, H200, None)
        assert COPY.slowdown(plan.sizes["decode"]) <= 1.2
    both = (promised, SliceGroup(name="x", kind="tenant", curve="gemm", slo=1.2))
    assert shortest(both, (1.0, 5.0), CURVES, H200) is None
    assert not POLICIES["adaptive"](profile([(1.0, 5.0)] * 4, both), CURVES, H200, None).sliced


def test_the_oracle_has_no_regret_and_nobody_less() -> None:
    rng = np.random.default_rng(0)
    rows = rng.uniform(0.1, 4, (120, 2)) * np.where(np.arange(120)[:, None] % 40 < 20, 1, [3, 0.2])
    best = oracle(GROUPS, steps(rows), CURVES, H200)
    assert best.regret(best) == 0
    for name, policy in POLICIES.items():
        done = replay(policy, GROUPS, steps(rows), CURVES, H200)
        assert done.regret(best) >= 0 and done.faults == 0, name
        assert len(done.ms) == 120 - 32


def test_adaptive_slices_unlike_work_and_leaves_like_work_alone() -> None:
    unlike = [(2.0, 2.0)] * 8
    plan = POLICIES["adaptive"](profile(unlike), CURVES, H200, None)
    assert plan.sizes["hot"] > plan.sizes["cold"] and plan.predicted_ms < 4.0
    alike = (HOT, TENANT)
    plan = POLICIES["adaptive"](profile(unlike, alike), CURVES, H200, None)
    assert not plan.sliced and "whole GPU" in plan.reason and plan.predicted_ms == 4.0


def test_adaptive_comes_near_the_oracle_where_there_is_something_to_learn() -> None:
    rng = np.random.default_rng(1)
    turn = np.arange(300) % 2
    rows = np.stack([np.where(turn, 6.0, 1.0), np.where(turn, 1.0, 6.0)], axis=1)
    rows = rows * rng.lognormal(0, 0.05, rows.shape)
    best = oracle(GROUPS, steps(rows), CURVES, H200)
    regret = {
        name: replay(policy, GROUPS, steps(rows), CURVES, H200).regret(best)
        for name, policy in {
            **POLICIES, "ewma": by((Way("ewma0.3", ewma(0.3)),)), "last": by((Way("", last()),)),
        }.items()
    }  # fmt: skip
    assert regret["adaptive"] < 0.5 * min(regret["ewma"], regret["last"], regret["static"])


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 1000), st.floats(0.5, 5), st.floats(0.5, 5))
def test_noise_in_the_loads_does_not_make_plans_alternate(seed, hot, cold) -> None:
    noise = np.random.default_rng(seed).uniform(0.995, 1.005, (90, 2))
    rows = steps(np.array([hot, cold]) * noise)
    done = replay(POLICIES["adaptive"], GROUPS, rows, CURVES, H200)
    assert done.flaps == 0 and done.replans <= 2


def test_hysteresis_is_what_keeps_plans_still() -> None:
    noise = np.random.default_rng(7).uniform(0.9, 1.1, (150, 2))
    rows = steps(np.array([1.5, 1.2]) * noise)
    way = (Way("last", last()),)
    hasty, calm = (
        replay(by(way, margin=m), GROUPS, rows, CURVES, H200).replans for m in (0.0, 0.05)
    )
    assert calm < hasty / 2


def test_dynamic_follows_use_and_proportional_follows_load() -> None:
    seen = profile([(3.0, 1.0)] * 8, busy_WN=((0.25, 0.75),) * 8)
    assert POLICIES["dynamic"](seen, CURVES, H200, None).sizes == {"hot": 32, "cold": 88}
    assert POLICIES["proportional"](seen, CURVES, H200, None).sizes == {"hot": 88, "cold": 32}
    held = POLICIES["dynamic"](seen, CURVES, H200, None)
    later = GroupProfile(step=9, groups=GROUPS, loads_WN=seen.loads_WN, busy_WN=((1.0, 0.1),) * 8)
    kept = POLICIES["dynamic"](later, CURVES, H200, held.state)
    assert kept.sizes == held.sizes
    much = GroupProfile(step=15, groups=GROUPS, loads_WN=seen.loads_WN, busy_WN=((1.0, 0.1),) * 8)
    assert POLICIES["dynamic"](much, CURVES, H200, kept.state).sizes["hot"] > 80


def test_static_keeps_its_first_plan() -> None:
    first = POLICIES["static"](profile([(2.0, 2.0)] * 4), CURVES, H200, None)
    later = POLICIES["static"](profile([(0.1, 9.0)] * 4), CURVES, H200, first.state)
    assert first.sliced and later.sizes == first.sizes


def test_a_policy_without_history_does_not_slice() -> None:
    for name, policy in POLICIES.items():
        plan = policy(GroupProfile(step=0, groups=GROUPS), CURVES, H200, None)
        assert not plan.sliced, name
    with pytest.raises(ValueError, match="policy must be one of none, static"):
        find("clever")


def test_counts_teach_slice_times() -> None:
    # Work is a bent function of rows; the way by counts must find it, and mean rows mislead.
    rng = np.random.default_rng(5)
    share = np.abs(np.sin(np.arange(300)[:, None] / 7 + np.arange(4))) + 0.2
    counts = rng.poisson(400 * share / share.sum(1, keepdims=True))
    work = np.maximum(1.0, counts / 100)
    rows = [
        Step(loads_N=(w[:2].sum(), w[2:].sum()), counts_E=tuple(map(int, c)), context_C=())
        for w, c in zip(work, counts, strict=True)
    ]
    best = oracle(GROUPS, rows, CURVES, H200)
    found = [replay(by((way,)), GROUPS, rows, CURVES, H200) for way in (WAYS[1], WAYS[4])]
    assert found[0].faults == 0 and found[0].regret(best) < 0.5 * found[1].regret(best)


def test_replays_are_exact_and_late_calls_catch_up() -> None:
    rng = np.random.default_rng(6)
    rows = [tuple(map(float, row)) for row in rng.uniform(0.5, 3, (60, 2))]
    policy = POLICIES["adaptive"]
    done = [replay(policy, GROUPS, steps(np.array(rows)), CURVES, H200).ms for _ in range(2)]
    assert done[0] == done[1]
    state = policy(profile(rows[:10]), CURVES, H200, None).state
    late = policy(
        GroupProfile(step=13, groups=GROUPS, loads_WN=tuple(rows[:14])), CURVES, H200, state
    )
    for end in (11, 12, 13, 14):
        plan = policy(
            GroupProfile(step=end - 1, groups=GROUPS, loads_WN=tuple(rows[:end])),
            CURVES,
            H200,
            state,
        )
        state = plan.state
    for once, often in zip(late.state.ways, plan.state.ways, strict=True):
        assert np.allclose(once.expected_N, often.expected_N)
        assert np.allclose(once.errors_KN, often.errors_KN)


def bad_plan(kind: str):
    def policy(profile, curves, machine, state):
        if profile.step < 1:
            return Plan(policy="good", reason="good", shares=(Share("hot", 64), Share("cold", 32)))
        if kind == "raises":
            raise ArithmeticError("no")
        return {
            "no plan": "what?",
            "nan": Plan(policy="p", reason="r", predicted_ms=float("nan")),
            "too many": Plan(policy="p", reason="r", shares=(Share("hot", 96), Share("cold", 96))),
            "uneven": Plan(policy="p", reason="r", shares=(Share("hot", 63), Share("cold", 8))),
            "stranger": Plan(policy="p", reason="r", shares=(Share("who", 64),)),
        }[kind]

    return policy


@pytest.mark.parametrize("kind", ["raises", "no plan", "nan", "too many", "uneven", "stranger"])
def test_the_last_good_plan_stays_logged_once_and_counted(kind: str, caplog) -> None:
    guard = Guard(bad_plan(kind), CURVES, H200)
    with caplog.at_level(logging.WARNING, logger="moesaic"):
        plans = [guard(GroupProfile(step=n, groups=GROUPS)) for n in range(50)]
    assert all(plan.sizes == {"hot": 64, "cold": 32} for plan in plans)
    assert sum(guard.faults.values()) == 49 and len(guard.faults) == 1
    assert len(caplog.records) == 1
    # Groups that the last good plan does not know: the whole GPU, still no error.
    assert not guard(GroupProfile(step=51, groups=(HOT, TENANT))).sliced


def test_a_predictor_that_says_nan_is_a_fault_and_a_bad_state_is_dropped() -> None:
    broken = Predictor(
        "nan", lambda n, c: None, lambda s, c: np.full(2, np.nan), lambda s, v, c: None
    )
    guard = Guard(by((Way("nan", broken),)), CURVES, H200)
    assert not guard(profile([(1.0, 2.0)])).sliced and guard.faults == {"ValueError": 1}

    def poisoned(profile, curves, machine, state):
        if state == "poison":
            raise ArithmeticError("the state")
        return Plan(policy="p", reason=f"from {state}", state="poison")

    guard = Guard(poisoned, CURVES, H200)
    for n in range(FORGET_AFTER + 1):
        guard(GroupProfile(step=n, groups=GROUPS))
    assert guard.faults == {"ArithmeticError": FORGET_AFTER}
    assert guard(GroupProfile(step=9, groups=GROUPS)).reason == "from None"


def test_nan_in_what_was_seen_is_passed_over() -> None:
    rows = [(1.0, 2.0)] * 20
    clean = POLICIES["adaptive"](profile(rows), CURVES, H200, None)
    bad = [*rows[:10], (float("nan"), 2.0), *rows[10:]]
    plan = POLICIES["adaptive"](profile(bad), CURVES, H200, None)
    assert plan.sizes == clean.sizes and plan.predicted_ms == pytest.approx(clean.predicted_ms)


def test_hundreds_of_replans_leave_nothing_behind() -> None:
    guard, rng = Guard(POLICIES["adaptive"], CURVES, H200), np.random.default_rng(8)
    rows: list[tuple[float, ...]] = []
    for n in range(300):
        rows = [*rows, tuple(map(float, rng.uniform(0, 3, 2)))][-4:]
        plan = guard(GroupProfile(step=n, groups=GROUPS, loads_WN=tuple(rows)))
    assert guard.faults == {} and len(plan.state.ways) == len(WAYS)
    assert all(len(way.errors_KN) == 64 for way in plan.state.ways)


def test_slices_slower_than_foreseen_are_given_up_and_whole_steps_may_be_too() -> None:
    rows = [(1.0, 1.0)] * 8

    def plan_after(times: list[float]) -> tuple[Plan, list[bool]]:
        state, sliced = None, []
        for n, took in enumerate([None, *times]):
            seen = GroupProfile(step=7 + n, groups=GROUPS, loads_WN=tuple(rows), took_ms=took)
            plan = POLICIES["adaptive"](seen, CURVES, H200, state)
            state, sliced = plan.state, [*sliced, plan.sliced]
        return plan, sliced

    first, _ = plan_after([])
    assert first.sliced and first.predicted_ms is not None
    again, kept = plan_after([first.predicted_ms] * 5)
    assert all(kept) and again.sizes == first.sizes
    slow, left = plan_after([2.5 * first.predicted_ms] * 5)
    assert left[0] and not any(left[1:]) and not slow.sliced
    ignored, still = plan_after([float("nan"), 0.0, -1.0])
    assert all(still) and ignored.sizes == first.sizes
