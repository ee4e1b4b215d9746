"""Faults of the control path: the last good plan, the same bits, one log line, nothing leaked."""

from __future__ import annotations

import logging
import math
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch

from moesaic import moe
from moesaic.hardware.green import GreenDevice, GreenUnavailable
from moesaic.runtime.control import Control, label_of
from moesaic.runtime.plan import (
    Allocation,
    Curve,
    GroupProfile,
    MachineSlices,
    Plan,
    Share,
    SliceGroup,
)
from moesaic.runtime.policies import POLICIES
from moesaic.runtime.policies.adaptive import by
from moesaic.runtime.policies.forecast import Way
from moesaic.runtime.predictors import ewma
from moesaic.runtime.seats import Seat, SeatedWork
from moesaic.runtime.sliced import SlicedExperts
from moesaic.runtime.slices import SliceError, SliceManager
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


def test_loads_of_nan_leave_every_policy_at_its_last_good_plan() -> None:
    told = {}
    for name, policy in POLICIES.items():
        made = control(policy)
        good = made.replan(profile(0)).shares
        seats = {group: work.current for group, work in made.works.items()}
        assert made.replan(profile(1, (math.nan, 1.0))).shares == good, name
        assert {group: work.current for group, work in made.works.items()} == seats, name
        made.manager.check()
        told[name] = (bool(good), sum(made.faults.values()))
    assert told["proportional"] == (True, 1) and told["none"] == (False, 0)


def test_a_predictor_of_nan_is_a_fault_and_changes_no_graph(
    caplog: pytest.LogCaptureFixture,
) -> None:
    last = ewma(1.0)
    broken = replace(
        last, predict=lambda s, c: last.predict(s, c) * (math.nan if s.seen > 1 else 1)
    )
    groups = (GROUPS[0], replace(GROUPS[1], curve="flat"))
    flat = Curve(work="flat", sms=(8, 132), ms=(1.1, 1.0))
    made = Control(by((Way("broken", broken),)), CURVES | {"flat": flat}, MACHINE, works())
    good = made.replan(replace(profile(0), groups=groups)).shares
    assert good and not made.faults
    seats = {group: work.current for group, work in made.works.items()}
    with caplog.at_level(logging.WARNING, logger="moesaic"):
        for step in range(1, 3):
            assert made.replan(replace(profile(step), groups=groups)).shares == good
    assert made.faults == Counter({"ValueError": 2}) and len(caplog.records) == 1
    assert {group: work.current for group, work in made.works.items()} == seats


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


def test_nobody_evicts_what_a_step_holds_and_every_try_is_noted() -> None:
    made = control(lambda p, c, m, s: cut(32, 96))
    made.replan(profile(0))
    with made.step():
        for _ in range(3):
            with pytest.raises(SliceError, match="a step is running"):
                made.manager.evict("hot")
        with pytest.raises(SliceError, match="nobody of lower priority"):
            made.manager.allocate("tenant", sms=64, priority=9)
        assert made.works["hot"].current == "32 0-3" and made.works["cold"].current == "96 4-15"
    assert made.manager.counts["refuse"] == 4 and not made.faults
    assert [(e.kind, e.group) for e in made.manager.events][-4:] == [
        *[("refuse", "hot")] * 3, ("refuse", "tenant"),
    ]  # fmt: skip


def test_who_loses_slices_between_steps_goes_on_and_gets_them_back(
    caplog: pytest.LogCaptureFixture,
) -> None:
    made = control(lambda p, c, m, s: cut(32, 96))
    made.replan(profile(0))
    made.manager.allocate("tenant", sms=64, priority=9)
    with caplog.at_level(logging.WARNING, logger="moesaic"):
        for step in range(1, 4):
            with made.step():
                # Slices of "cold" are the tenant's now: its graph must not run there any more.
                assert made.works["cold"].current == "132 "
                assert made.works["hot"].current == "32 0-3"
            made.replan(profile(step))
            assert made.manager.allocations["tenant"].priority == 9
            made.manager.check()
    assert made.faults == Counter({"evicted": 1, "SliceError": 3}) and len(caplog.records) == 2
    made.manager.release("tenant")
    made.replan(profile(5))
    assert made.works["cold"].current == "96 4-15" and set(made.manager.allocations) == {
        "hot", "cold",
    }  # fmt: skip


def test_a_pager_that_fails_leaves_plan_books_and_graphs() -> None:
    class Full:
        broken = False

        def enter(self, allocation: Allocation) -> None:
            if self.broken:
                raise OSError("no room")

        def leave(self, allocation: Allocation) -> None:
            pass

    pager, sizes = Full(), [32, 64, 56]
    manager = SliceManager(MACHINE, pager=pager)
    policy = lambda p, c, m, s: cut(sizes[p.step], 128 - sizes[p.step])  # noqa: E731
    made = Control(policy, CURVES, MACHINE, works((32, 64)), manager)
    made.replan(profile(0))
    books, pager.broken = manager.allocations, True
    for step in (1, 2):
        assert made.replan(profile(step)).sizes["hot"] == 32
        assert manager.allocations == books and made.works["hot"].current == "32 0-3"
    assert made.faults == Counter({"SliceError": 1, "no graph": 1})


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
