"""The round robin, its shares, its errors and the samplers, on clocks that the tests turn."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from moesaic.bench import timing


class FakeClock:
    """A clock that only `work` moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float) -> Callable[[], None]:
        def call() -> None:
            self.now += seconds

        return call


def test_percentiles_are_linear_between_neighbours() -> None:
    measured = timing.summary([4.0, 1.0, 3.0, 2.0, 5.0, 6.0])
    assert (measured.median, measured.p20, measured.p80, measured.samples) == (3.5, 2.0, 5.0, 6)
    assert timing.percentile([7.0], 0.8) == 7.0


def test_candidates_alternate_in_random_order_and_all_get_their_own_time() -> None:
    clock, order = FakeClock(), []

    def sampler(name: str, seconds: float) -> timing.Sampler:
        inner = timing.cpu_sampler([clock.work(seconds)], min_ms=0.0, clock=clock)

        def sample() -> float:
            order.append(name)
            return inner()

        return sample

    samplers = {"a": sampler("a", 0.001), "b": sampler("b", 0.002)}
    timed = timing.interleave(
        samplers, budget_s=1e9, min_samples=5, max_samples=40, clock=clock, seed=1
    )
    assert timed.measured["a"].median == pytest.approx(1.0)
    assert timed.measured["b"].median == pytest.approx(2.0)
    rounds = [tuple(order[i : i + 2]) for i in range(0, len(order), 2)]
    assert set(rounds) == {("a", "b"), ("b", "a")} and len(rounds) == 40


def test_a_slow_candidate_stops_at_its_share_but_never_under_the_least_samples() -> None:
    clock = FakeClock()
    samplers = {
        name: timing.cpu_sampler([clock.work(seconds)], min_ms=0.0, clock=clock)
        for name, seconds in (("fast", 0.001), ("slow", 1.0), ("slowest", 50.0))
    }
    timed = timing.interleave(samplers, budget_s=30.0, min_samples=3, max_samples=50, clock=clock)
    counts = {name: m.samples for name, m in timed.measured.items()}
    assert counts == {"fast": 50, "slow": 10, "slowest": 3}


def test_an_error_ends_one_candidate_and_is_told() -> None:
    calls = iter([1.0, 2.0])
    samplers = {"ok": lambda: 3.0, "broken": lambda: next(calls)}
    timed = timing.interleave(samplers, budget_s=0.0, min_samples=4)
    assert timed.measured.keys() == {"ok"} and timed.measured["ok"].samples == 4
    assert timed.errors["broken"].startswith("StopIteration")


def test_a_cpu_sample_holds_the_asked_work_and_rotates() -> None:
    clock, seen = FakeClock(), []

    def call(i: int) -> Callable[[], None]:
        def run() -> None:
            seen.append(i)
            clock.now += 0.001

        return run

    sample = timing.cpu_sampler([call(0), call(1), call(2)], min_ms=7.5, clock=clock)
    seen.clear()
    assert sample() == pytest.approx(1.0)
    assert seen == [0, 1, 2, 0, 1, 2, 0, 1]
    sample()
    assert seen[8] == 2


def test_reason_is_one_short_line() -> None:
    text = timing.reason(RuntimeError("a\nb\n" + "c" * 1000))
    assert "\n" not in text and text.startswith("RuntimeError: a b") and len(text) == 300
