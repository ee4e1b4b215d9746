"""The slice manager: the paper's rules, atomicity, fairness, memory, steps; nothing ever leaks."""

from __future__ import annotations

import random
import threading
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from moesaic.runtime.plan import Allocation, MachineSlices, Plan, Share, SliceGroup
from moesaic.runtime.slices import SliceBusy, SliceError, SliceLeak, SliceManager

MACHINE = MachineSlices(total_sms=132, memory_bytes=1000, streams=4)
NAMES = st.sampled_from("abcdef")


def paper(machine: MachineSlices = MACHINE) -> SliceManager:
    """A manager with the paper's rules alone."""
    return SliceManager(machine, ageing=0)


def test_an_existing_allocation_is_returned_whatever_is_asked() -> None:
    manager = paper()
    first = manager.allocate("a", sms=20, memory_bytes=100)
    assert manager.allocate("a", sms=128, memory_bytes=900, priority=9) is first
    assert (first.sms, first.slices, manager.memory_bytes) == (24, (0, 1, 2), 100)


def test_least_utilised_slices_come_first_and_streams_follow_slices() -> None:
    manager = paper()
    manager.allocate("a", sms=64)
    manager.observe("a", 1.0)
    manager.release("a")
    fresh = manager.allocate("b", sms=48)
    assert fresh.slices == (8, 9, 10, 11, 12, 13) and fresh.stream == 0
    mixed = manager.allocate("c", sms=24)
    assert mixed.slices == (0, 14, 15)
    assert [s.stream for s in manager.slices()[:6]] == [0, 1, 2, 3, 0, 1]
    assert manager.slices()[0].utilisation == pytest.approx(0.2)


def test_only_lower_priorities_are_evicted_the_lowest_first() -> None:
    manager = paper()
    manager.allocate("low", sms=32, priority=0)
    manager.allocate("mid", sms=32, priority=1)
    manager.allocate("top", sms=64, priority=2)
    with pytest.raises(SliceBusy, match="nobody of lower priority than 0"):
        manager.allocate("new", sms=8, priority=0)
    assert set(manager.allocations) == {"low", "mid", "top"}
    manager.allocate("new", sms=8, priority=2)
    assert set(manager.allocations) == {"mid", "top", "new"}
    with pytest.raises(SliceBusy):
        manager.allocate("vast", sms=128, priority=2)
    assert set(manager.allocations) == {"mid", "top", "new"}


class Written:
    """The paper's algorithm once more, over a list of slices: [holder, priority, utilisation]."""

    def __init__(self, count: int, streams: int) -> None:
        self.slices: list[list] = [[None, 0, 0.0] for _ in range(count)]
        self.streams, self.order = streams, list[str]()

    def held(self, group: str) -> tuple[int, ...]:
        return tuple(n for n, slot in enumerate(self.slices) if slot[0] == group)

    def drop(self, group: str) -> None:
        self.order.remove(group)
        for n in self.held(group):
            self.slices[n][0] = None

    def allocate(self, group: str, count: int, priority: int) -> tuple[tuple[int, ...], int] | None:
        if not self.held(group):
            free = self.held(None)  # type: ignore[arg-type]
            below = [g for g in self.order if self.slices[self.held(g)[0]][1] < priority]
            below.sort(key=lambda g: self.slices[self.held(g)[0]][1])
            if len(free) + sum(len(self.held(g)) for g in below) < count:
                return None
            while len(self.held(None)) < count:  # type: ignore[arg-type]
                self.drop(below.pop(0))
            free = self.held(None)  # type: ignore[arg-type]
            for n in sorted(free, key=lambda n: (self.slices[n][2], n))[:count]:
                self.slices[n][:2] = [group, priority]
            self.order.append(group)
        return self.held(group), self.held(group)[0] % self.streams


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(NAMES, st.integers(0, 16), st.integers(0, 3), st.floats(0, 1)),
        min_size=10,
        max_size=60,
    )
)
def test_every_answer_is_that_of_the_paper_s_algorithm(requests) -> None:
    """Sizes of 0 release; else groups ask, and are seen busy afterwards."""
    manager, written = paper(), Written(MACHINE.atoms, MACHINE.streams)
    for name, count, priority, busy in requests:
        if count == 0:
            if name in manager.allocations:
                manager.release(name)
                written.drop(name)
            continue
        expected = written.allocate(name, count, priority)
        try:
            made = manager.allocate(name, sms=8 * count, priority=priority)
            assert expected == (made.slices, made.stream)
        except SliceBusy:
            assert expected is None
        manager.observe(name, busy)
        for n in written.held(name):
            written.slices[n][2] += 0.2 * (busy - written.slices[n][2])
        assert {g: a.slices for g, a in manager.allocations.items()} == {
            g: written.held(g) for g in written.order
        }


def test_memory_is_a_budget_and_eviction_frees_it() -> None:
    manager = paper()
    manager.allocate("small", sms=8, memory_bytes=100)
    manager.allocate("none", sms=8)
    manager.allocate("big", sms=8, memory_bytes=800)
    with pytest.raises(SliceBusy, match="900 of 1000 bytes"):
        manager.allocate("late", sms=8, memory_bytes=200)
    manager.allocate("late", sms=8, memory_bytes=250, priority=1)
    # SMs were free, so "none", which holds no bytes, was left alone.
    assert set(manager.allocations) == {"none", "late"} and manager.memory_bytes == 250
    with pytest.raises(SliceError, match="1001 of 1000 bytes"):
        manager.allocate("more", sms=8, memory_bytes=1001, priority=9)


def test_more_than_the_gpu_is_refused_and_earns_nothing() -> None:
    manager = SliceManager(MACHINE, ageing=1)
    manager.allocate("a", sms=128, priority=3)
    for _ in range(50):
        with pytest.raises(SliceError, match="the GPU has 1 to 128"):
            manager.allocate("b", sms=129)
    with pytest.raises(SliceBusy):
        manager.allocate("b", sms=8)
    assert manager.counts["refuse"] == 51


def test_a_resize_keeps_slices_and_gives_back_the_most_utilised() -> None:
    manager = paper()
    manager.allocate("a", sms=16)
    manager.observe("a", 1.0)
    manager.resize("a", sms=32, memory_bytes=10)
    assert manager.allocations["a"].slices == (0, 1, 2, 3)
    assert manager.resize("a", sms=16).slices == (2, 3)
    manager.allocate("b", sms=112, priority=5)
    with pytest.raises(SliceBusy):
        manager.resize("a", sms=24)
    assert manager.allocations["a"].slices == (2, 3)
    manager.check()


def test_who_keeps_asking_is_served_in_bounded_time_and_not_at_once_evicted() -> None:
    manager = SliceManager(MACHINE, ageing=8)
    manager.allocate("high", sms=128, priority=3)
    refusals = 0
    while "low" not in manager.allocations:
        try:
            manager.allocate("low", sms=64, priority=0)
        except SliceBusy:
            refusals += 1
        assert refusals <= 8 * 4
    assert refusals == 8 * 4 and manager.standing("low") == 4
    with pytest.raises(SliceBusy):
        manager.allocate("high", sms=128, priority=3)
    starved = paper()
    starved.allocate("high", sms=128, priority=3)
    for _ in range(500):
        with pytest.raises(SliceBusy):
            starved.allocate("low", sms=64)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=5), st.integers(0, 2**32))
def test_nobody_who_keeps_asking_starves(priorities: list[int], seed: int) -> None:
    """Everybody wants the whole GPU all the time; each is served again and again."""
    rng, manager = random.Random(seed), SliceManager(MACHINE, ageing=4)
    served = dict.fromkeys(range(len(priorities)), 0)
    for _ in range(200 * len(priorities)):
        n = rng.randrange(len(priorities))
        if str(n) not in manager.allocations:
            with suppress(SliceBusy):
                manager.allocate(str(n), sms=128, priority=priorities[n])
                served[n] += 1
    assert min(served.values()) >= 2


def test_what_a_step_holds_is_not_taken() -> None:
    manager = paper()
    manager.allocate("a", sms=128)
    with manager.step() as held:
        assert [a.group for a in held] == ["a"]
        with pytest.raises(SliceBusy):
            manager.allocate("b", sms=8, priority=9)
        for change in (
            lambda: manager.release("a"),
            lambda: manager.evict("a"),
            lambda: manager.resize("a", sms=8),
            lambda: manager.apply(Plan(policy="t", reason=""), []),
        ):
            with pytest.raises(SliceError, match="a step is running"):
                change()
    assert manager.allocate("b", sms=8, priority=9).slices == (0,)


def test_asking_for_more_earns_priority_whatever_others_are_given_meanwhile() -> None:
    manager = SliceManager(MACHINE, ageing=4)
    manager.allocate("high", sms=64, priority=1)
    manager.allocate("low", sms=32)
    for refusals in range(8):
        with pytest.raises(SliceBusy):
            manager.resize("low", sms=96)
        assert manager._refused["low"] == refusals + 1
        manager.allocate("other", sms=8)
        manager.release("other")
    assert manager.resize("low", sms=96).sms == 96 and "high" not in manager.allocations
    assert not manager._refused


def test_a_plan_evicts_strangers_in_its_way_only_where_they_are_lower() -> None:
    manager = paper()
    manager.allocate("aside", sms=64)
    manager.observe("aside", 1.0)
    manager.allocate("stranger", sms=64, memory_bytes=500, priority=1)
    manager.release("aside")
    manager.allocate("low", sms=8)
    groups = [SliceGroup(name=n, kind="hot", curve="", priority=1) for n in "ab"]
    plan = Plan(policy="t", reason="", shares=(Share("a", 32), Share("b", 32)))
    manager.apply(plan, groups)
    assert set(manager.allocations) == {"a", "b", "stranger"}  # "low" was in the way
    wide = Plan(policy="t", reason="", shares=(Share("a", 64), Share("b", 32)))
    before = manager.allocations
    with pytest.raises(SliceError, match="'stranger', of no lower priority"):
        manager.apply(wide, groups)
    assert manager.allocations == before
    heavy = [SliceGroup(name="a", kind="hot", curve="", priority=1, memory_bytes=600)]
    with pytest.raises(SliceError, match="in the plan's way"):
        manager.apply(Plan(policy="t", reason="", shares=(Share("a", 8),)), heavy)
    manager.apply(Plan(policy="t", reason=""), groups)
    assert set(manager.allocations) == {"stranger"}
    manager.check()


class Disk:
    """A pager that keeps the books of bytes, and refuses where told."""

    def __init__(self) -> None:
        self.inside: list[Allocation] = []
        self.refuses: set[str] = set()

    def enter(self, allocation: Allocation) -> None:
        if allocation.group in self.refuses:
            raise OSError("disk gone")
        self.inside.append(allocation)

    def leave(self, allocation: Allocation) -> None:
        self.inside.remove(allocation)


def test_a_pager_that_fails_undoes_the_whole_request() -> None:
    disk = Disk()
    manager = SliceManager(MACHINE, ageing=0, pager=disk)
    manager.allocate("a", sms=64, memory_bytes=300)
    disk.refuses = {"b"}
    with pytest.raises(SliceError, match="disk gone"):
        manager.allocate("b", sms=128, memory_bytes=900, priority=1)
    assert disk.inside == list(manager.allocations.values())
    groups = [SliceGroup(name=n, kind="hot", curve="", memory_bytes=10) for n in "ab"]
    shares = (Share("a", 32), Share("b", 32))
    with pytest.raises(SliceError, match="the pager refused"):
        manager.apply(Plan(policy="t", reason="", shares=shares), groups)
    assert disk.inside == list(manager.allocations.values())
    assert manager.allocations["a"].sms == 64


def test_a_leak_is_noticed() -> None:
    manager = paper()
    a = manager.allocate("a", sms=16)
    manager._books.held["b"] = Allocation(**(vars(a) | {"group": "b"}))
    with pytest.raises(SliceLeak, match="held twice"):
        manager.check()


def test_ten_thousand_plans_leak_nothing() -> None:
    manager = SliceManager(MACHINE, keep=100)
    groups = [SliceGroup(name=n, kind="hot", curve="", memory_bytes=200) for n in "abc"]
    for n in range(10_000):
        sizes = (8 * (1 + n % 5), 8 * (1 + n % 7), 8 * (1 + n % 3))
        shares = tuple(Share(g.name, s) for g, s in zip(groups, sizes, strict=True))
        manager.apply(Plan(policy="t", reason="", shares=shares[: n % 4]), groups)
        if n % 100 == 0:
            manager.check()
    manager.apply(Plan(policy="t", reason=""), groups)
    assert manager.free_sms == 128 and manager.memory_bytes == 0 and len(manager.events) == 100
    assert not manager._books.held and not manager._running and not manager._refused


def test_threads_see_whole_books() -> None:
    manager = SliceManager(MACHINE, ageing=4)
    problems: list[BaseException] = []

    def work(name: str) -> None:
        try:
            for n in range(300):
                try:
                    manager.allocate(name, sms=8 * (1 + n % 9), priority=n % 3)
                    manager.check()
                    manager.release(name)
                except SliceError:
                    pass
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    manager.check()
    assert problems == []


class Requests(RuleBasedStateMachine):
    """Any sequence of requests: a failed one changes nothing, the books stay whole."""

    def __init__(self) -> None:
        super().__init__()
        self.disk = Disk()
        self.manager = SliceManager(MACHINE, ageing=3, pager=self.disk)

    def attempt(self, request) -> None:
        before = (self.manager.allocations, list(self.disk.inside))
        try:
            request()
        except SliceError:
            assert (self.manager.allocations, list(self.disk.inside)) == before

    @rule(name=NAMES, sms=st.integers(-1, 140), size=st.integers(-1, 1100), level=st.integers(0, 3))
    def allocate(self, name: str, sms: int, size: int, level: int) -> None:
        held = self.manager.allocations
        had, high = held.get(name), {g for g in held if self.manager.standing(g) >= level}

        def request() -> None:
            earned = self.manager._refused[name] // 3
            made = self.manager.allocate(name, sms=sms, memory_bytes=size, priority=level)
            assert made == had if had else 0 <= made.sms - sms < 8 and made.memory_bytes == size
            if not earned:
                assert high <= set(self.manager.allocations)

        self.attempt(request)

    @rule(name=NAMES, sms=st.integers(0, 136), size=st.integers(0, 1000))
    def resize(self, name: str, sms: int, size: int) -> None:
        self.attempt(lambda: self.manager.resize(name, sms=sms, memory_bytes=size))

    @rule(name=NAMES)
    def release(self, name: str) -> None:
        self.attempt(lambda: self.manager.release(name))

    @rule(name=NAMES, busy=st.floats(0, 1))
    def observe(self, name: str, busy: float) -> None:
        self.manager.observe(name, busy)

    @rule(sizes=st.lists(st.integers(1, 60), max_size=4), size=st.integers(0, 400))
    def plan(self, sizes: list[int], size: int) -> None:
        groups = [
            SliceGroup(name="abcdef"[n], kind="hot", curve="", memory_bytes=size)
            for n in range(len(sizes))
        ]
        shares = tuple(Share(g.name, s) for g, s in zip(groups, sizes, strict=True))
        self.attempt(lambda: self.manager.apply(Plan(policy="t", reason="", shares=shares), groups))

    @precondition(lambda self: self.manager.allocations)
    @rule(name=NAMES)
    def in_a_step(self, name: str) -> None:
        with self.manager.step() as held:
            self.attempt(lambda: self.manager.evict(name))
            self.attempt(lambda: self.manager.allocate("z", sms=128, priority=9))
            assert {a.group for a in held} <= set(self.manager.allocations)
        self.attempt(lambda: self.manager.release("z"))

    @rule(name=NAMES)
    def the_pager_fails(self, name: str) -> None:
        self.disk.refuses = {name} ^ self.disk.refuses

    @invariant()
    def whole(self) -> None:
        self.manager.check()
        assert sorted(self.disk.inside, key=lambda a: a.group) == sorted(
            self.manager.allocations.values(), key=lambda a: a.group
        )
        held = sum(a.sms for a in self.manager.allocations.values())
        assert held + self.manager.free_sms == 128


TestRequests = Requests.TestCase
TestRequests.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
