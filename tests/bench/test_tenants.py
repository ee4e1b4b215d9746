"""Closed and open loops on a simulated device: latencies, throughput, lateness, early ends."""

from __future__ import annotations

import pytest

from moesaic.bench.tenants import Trial, closed_loop, open_loop, pooled


class Machine:
    """A clock that the host's questions move on: each one takes 10 microseconds."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def clock(self) -> float:
        self.now_s += 1e-5
        return self.now_s


class Point:
    def __init__(self, machine: Machine, at_s: float) -> None:
        self.machine, self.at_s = machine, at_s

    def passed(self) -> bool:
        return self.machine.clock() >= self.at_s

    def at_ms(self) -> float:
        return self.at_s * 1e3


class Stream:
    """Launches that take their turn, each as long as `lengths_ms` says, over and over."""

    def __init__(self, machine: Machine, *lengths_ms: float) -> None:
        self.machine, self.lengths, self.count, self.free_s = machine, lengths_ms, 0, 0.0

    def launch(self) -> Point:
        length = self.lengths[self.count % len(self.lengths)]
        self.count += 1
        self.free_s = max(self.free_s, self.machine.clock()) + length / 1e3
        return Point(self.machine, self.free_s)

    def mark(self) -> Point:
        return Point(self.machine, max(self.free_s, self.machine.clock()))


def test_back_to_back_steps_take_what_they_take_and_the_other_is_never_idle() -> None:
    machine = Machine()
    trial = closed_loop(
        Stream(machine, 1.0, 3.0),
        Stream(machine, 5.0),
        steps=400,
        limit_s=60,
        clock=machine.clock,
    )
    assert trial.complete and len(trial.latencies_ms) == 400
    assert sorted(set(round(x, 6) for x in trial.latencies_ms)) == [1.0, 3.0]
    assert trial.other_per_s == pytest.approx(200, rel=0.01)
    assert trial.at(0.99) == pytest.approx(3.0)


def test_arrivals_count_waiting_behind_a_late_step() -> None:
    machine = Machine()
    line = Stream(machine, 1.0, 1.0, 5.0)
    trial = open_loop(
        line,
        None,
        Stream(machine, 0.0).mark,
        steps=300,
        interval_ms=4.0,
        limit_s=60,
        clock=machine.clock,
    )
    assert trial.complete and trial.other_per_s is None
    # 1, 1, 5 and then, because the step of 5 ends 1 after the next arrival, 2.
    assert sorted(set(round(x) for x in trial.latencies_ms)) == [1, 2, 5]


def test_the_other_is_queued_between_arrivals_and_never_runs_dry() -> None:
    class Slow(Stream):
        """Launching takes the host 300 microseconds."""

        def launch(self) -> Point:
            self.machine.now_s += 3e-4
            return super().launch()

    machine = Machine()
    other = Slow(machine, 5.0)
    trial = open_loop(
        Stream(machine, 0.2),
        other,
        Stream(machine, 0.0).mark,
        steps=2000,
        interval_ms=0.8,
        limit_s=60,
        clock=machine.clock,
    )
    assert trial.other_per_s == pytest.approx(200, rel=0.02)
    assert trial.at(0.99) < 0.3


def test_an_overloaded_loop_ends_at_its_limit_and_says_so() -> None:
    machine = Machine()
    trial = open_loop(
        Stream(machine, 8.0),
        None,
        Stream(machine, 0.0).mark,
        steps=10_000,
        interval_ms=4.0,
        limit_s=2.0,
        clock=machine.clock,
    )
    assert not trial.complete and 245 < len(trial.latencies_ms) < 265
    assert trial.latencies_ms[-1] > 100 * trial.latencies_ms[0]
    closed = closed_loop(Stream(machine, 8.0), None, steps=10_000, limit_s=2.0, clock=machine.clock)
    assert not closed.complete


def test_what_comes_while_clocks_settle_does_not_count() -> None:
    lengths = [3.0] * 20 + [1.0] * 2000
    for interval in (None, 4.0):
        machine = Machine()
        line, other = Stream(machine, *lengths), Stream(machine, 5.0)
        kept = {"steps": 300, "limit_s": 60, "warm_s": 0.15, "clock": machine.clock}
        if interval is None:
            trial = closed_loop(line, other, **kept)  # type: ignore[arg-type]
        else:
            marks = Stream(machine, 0.0).mark
            trial = open_loop(line, other, marks, interval_ms=interval, **kept)  # type: ignore[arg-type]
        assert trial.complete and len(trial.latencies_ms) == 300
        assert max(trial.latencies_ms) < 1.1
        assert trial.other_per_s == pytest.approx(200, rel=0.02)


def test_runs_are_pooled() -> None:
    both = pooled([Trial((1.0, 2.0), 10.0, True), Trial((3.0,), 20.0, False)])
    assert both == Trial((1.0, 2.0, 3.0), 15.0, False)
    assert pooled([Trial((1.0,), None, True)]).other_per_s is None
