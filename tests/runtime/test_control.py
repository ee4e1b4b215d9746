"""Faults of the control path: the last good plan, the same bits, one log line, nothing leaked."""

from __future__ import annotations

import logging
import math
import random
from collections import Counter

import pytest
import torch

from moesaic import moe
from moesaic.hardware.green import GreenDevice, GreenUnavailable
from moesaic.runtime.control import Control, label_of
from moesaic.runtime.plan import Curve, GroupProfile, MachineSlices, Plan, Share, SliceGroup
from moesaic.runtime.policies import POLICIES
from moesaic.runtime.seats import Seat, SeatedWork
from moesaic.runtime.sliced import SlicedExperts
from moesaic.types import ExpertSpec, ExpertWeights

MACHINE = MachineSlices(total_sms=132)
CURVES = {"any": Curve(work="any", sms=(8, 132), ms=(16.5, 1.0))}
GROUPS = (
    SliceGroup(name="hot", kind="hot", curve="any", experts=(0, 1), priority=1),
    SliceGroup(name="cold", kind="cold", curve="any", experts=(2, 3)),
)
SPEC = ExpertSpec(num_experts=4, hidden_size=16, intermediate_size=24)


def profile(step: int = 0, loads=(3.0, 1.0)) -> GroupProfile:
    return GroupProfile(step=step, groups=GROUPS, loads_WN=(loads,))


def cut(hot: int, cold: int, **more) -> Plan:
    return Plan(policy="t", reason="", shares=(Share("hot", hot), Share("cold", cold)), **more)


def works(sizes=range(8, 128, 8)) -> dict[str, SeatedWork[str]]:
    """Graphs of two groups for every split: the one from the first slice on, the other after it."""
    made = {
        name: SeatedWork(name, lambda seat: f"{seat.sms} {seat.label}") for name in ("hot", "cold")
    }
    for work in made.values():
        work.prepare(Seat(132))
    for size in sizes:
        atoms = size // 8
        made["hot"].prepare(Seat(size, None, label_of(tuple(range(atoms)))))
        made["cold"].prepare(Seat(128 - size, None, label_of(tuple(range(atoms, 16)))))
    return made


def control(policy, **more) -> Control:
    return Control(policy, CURVES, MACHINE, works(**more))


def test_a_plan_moves_the_work_to_its_slices_and_captures_nothing() -> None:
    made = control(lambda p, c, m, s: cut(8 * (p.step + 1), 128 - 8 * (p.step + 1)))
    captures = {name: work.captures for name, work in made.works.items()}
    made.replan(profile(step=3))
    assert made.works["hot"].current == "32 0-3" and made.works["cold"].current == "96 4-15"
    assert {name: work.captures for name, work in made.works.items()} == captures
    assert made.manager.allocations["cold"].slices == tuple(range(4, 16))


def raises(p, c, m, s) -> Plan:
    raise ArithmeticError("no")


@pytest.mark.parametrize(
    ("bad", "kind"),
    [
        (raises, "ArithmeticError"),
        (lambda p, c, m, s: cut(32, 96, predicted_ms=math.nan), "unfit plan"),
        (lambda p, c, m, s: cut(128, 128), "unfit plan"),
        (lambda p, c, m, s: cut(200, 8), "unfit plan"),
        (lambda p, c, m, s: "64", "no plan"),
        (lambda p, c, m, s: cut(64, 32), "no graph"),
    ],
)
def test_what_fails_leaves_the_last_good_plan_and_is_logged_once(
    bad, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    good = cut(32, 96)
    made = control(lambda p, c, m, s: good if p.step < 5 else bad(p, c, m, s))
    made.replan(profile(step=0))
    books = made.manager.allocations
    with caplog.at_level(logging.WARNING, logger="moesaic"):
        for step in range(5, 25):
            assert made.replan(profile(step)).shares == good.shares
    assert made.faults == Counter({kind: 20}) and len(caplog.records) == 1
    assert made.works["hot"].current == "32 0-3" and made.works["cold"].current == "96 4-15"
    assert {g: a.slices for g, a in made.manager.allocations.items()} == {
        g: a.slices for g, a in books.items()
    }
    made.manager.check()


def test_a_predictor_of_nan_keeps_every_policy_answering() -> None:
    for name, policy in POLICIES.items():
        made = control(policy)
        made.replan(profile(0))
        good = made.plan.shares
        plan = made.replan(profile(1, (math.nan, 1.0)))
        assert plan.problem(profile(1), MACHINE) is None, name
        assert plan.shares == good or plan.shares == made.plan.shares
        made.manager.check()


def test_nothing_moves_during_a_step_and_the_profile_is_not_lost() -> None:
    made = control(lambda p, c, m, s: cut(8 * (p.step + 1), 128 - 8 * (p.step + 1)))
    made.replan(profile(step=0))
    with made.step() as plan:
        for step in (4, 6):
            assert made.replan(profile(step)) is plan
        assert made.works["hot"].current == "8 0"
        with pytest.raises(RuntimeError, match="do not nest"), made.step():
            pass
    assert made.works["hot"].current == "56 0-6" and made.deferred == 2
    assert not made.faults


def test_ten_thousand_plans_with_faults_leak_nothing() -> None:
    rng = random.Random(0)

    def policy(p, c, m, s) -> Plan:
        draw = rng.random()
        if draw < 0.1:
            raise ValueError("drawn")
        if draw < 0.2:
            return cut(32, 96, predicted_ms=math.nan)
        if draw < 0.3:
            return Plan(policy="t", reason="whole")
        size = 8 * rng.randrange(1, 16)
        return cut(size, 128 - size) if draw < 0.9 else cut(size, 8)

    made = control(policy)
    captures = [work.captures for work in made.works.values()]
    for step in range(10_000):
        if step % 7 == 0:
            with made.step():
                made.replan(profile(step))
        else:
            made.replan(profile(step))
        held = made.manager.allocations
        for name, work in made.works.items():
            seat = work.current_seat
            slices = held[name].slices if name in held else ()
            assert (seat.sms, seat.label) == (held[name].sms if slices else 132, label_of(slices))
    made.manager.check()
    assert [work.captures for work in made.works.values()] == captures
    assert {"ValueError", "unfit plan", "no graph"} <= set(made.faults)
    assert len(made.manager.events) <= 4096 and not made.manager._running


def test_the_layer_answers_with_the_same_bits_under_every_plan_and_fault() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = ExpertWeights(
        **{n: torch.randn(s, generator=generator) for n, s in SPEC.weight_shapes().items()}
    )
    hidden = torch.randn(9, 16, generator=generator)
    ids = torch.randint(0, 4, (9, 2), generator=generator, dtype=torch.int32)
    share = torch.rand(9, 2, generator=generator)
    whole = moe(hidden, ids, share, weights, SPEC)
    rng = random.Random(1)

    def policy(p, c, m, s) -> Plan:
        if rng.random() < 0.3:
            raise ValueError("drawn")
        size = 8 * rng.randrange(1, 16)
        return cut(size, 128 - size)

    made = control(policy)
    for step in range(20):
        with made.step() as plan:
            groups = [list(g.experts) for g in GROUPS] if plan.sliced else [[0, 1, 2, 3]]
            assert torch.equal(SlicedExperts(weights, SPEC, groups)(hidden, ids, share), whole)
        made.replan(profile(step))
    assert made.faults["ValueError"]


def test_without_green_contexts_the_whole_gpu_is_used_and_the_reason_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """No seat but the whole GPU could be prepared: every cut is a fault, and changes nothing."""
    with pytest.raises(GreenUnavailable):
        GreenDevice(driver=object())
    made = control(lambda p, c, m, s: cut(32, 96), sizes=())
    with caplog.at_level(logging.WARNING, logger="moesaic"):
        for step in range(10):
            assert not made.replan(profile(step)).sliced
    assert made.works["hot"].current == "132 " and made.faults == Counter({"no graph": 10})
    assert len(caplog.records) == 1 and made.manager.free_sms == 128
