"""The round robin, its shares, its errors and the samplers, on clocks that the tests turn."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

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


class FakeCuda:
    """`torch.cuda` on a fake clock: work moves the clock, a capture can be made to fail."""

    def __init__(self, clock: FakeClock, fails: str | None = None) -> None:
        self.clock, self.fails = clock, fails
        self.stream_now: object = "outer"
        self.mode = 0
        self.slept = 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fake = self

        class Event:
            at = 0.0

            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = fake.clock()

            def synchronize(self) -> None: ...

            def elapsed_time(self, end: Event) -> float:
                return (end.at - self.at) * 1e3

        class Stream:
            def wait_stream(self, other: object) -> None: ...

        class Outer(Stream): ...

        @contextlib.contextmanager
        def stream(side: object) -> Iterator[None]:
            before, fake.stream_now = fake.stream_now, side
            yield
            fake.stream_now = before

        @contextlib.contextmanager
        def graph(graph: object, stream: object) -> Iterator[None]:
            before, fake.stream_now = fake.stream_now, stream
            yield
            if fake.fails:
                raise RuntimeError(fake.fails)  # as torch: its stream stays current
            fake.stream_now = before

        class CUDAGraph:
            def replay(self) -> None:
                fake.clock.now += 0.004

            def reset(self) -> None: ...

        def sleep(_: int) -> None:
            fake.slept += 1

        outer = Outer()
        self.stream_now = self.outer = outer
        replaced = {
            "Event": Event, "Stream": Stream, "stream": stream, "graph": graph,
            "CUDAGraph": CUDAGraph, "_sleep": sleep, "synchronize": lambda: None,
            "is_initialized": lambda: True, "current_stream": lambda: fake.stream_now,
            "set_stream": lambda s: setattr(fake, "stream_now", s),
            "get_sync_debug_mode": lambda: fake.mode,
            "set_sync_debug_mode": lambda mode: setattr(fake, "mode", mode),
        }  # fmt: skip
        for name, value in replaced.items():
            monkeypatch.setattr(timing.torch.cuda, name, value)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def test_a_replay_is_divided_by_its_calls_and_repeated_to_a_millisecond(
    clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = FakeCuda(clock)
    cuda.install(monkeypatch)
    order: list[int] = []
    calls = [lambda i=i: order.append(i) or f"out {i}" for i in range(8)]
    captured = timing.capture(calls)
    assert captured.calls == 8 and captured.first_output == "out 0"
    assert order == [0, 0, *range(8), *range(8)] and cuda.stream_now is cuda.outer
    sample = timing.graph_sampler(captured, min_ms=10.0)
    before = clock.now
    assert sample() == pytest.approx(0.5)
    assert clock.now - before == pytest.approx(3 * 0.004) and cuda.slept == 3


def test_long_calls_are_warmed_up_by_the_first_alone(
    clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeCuda(clock).install(monkeypatch)
    cases = ((6e-3, True, [0]), (1e-3, True, [0, *range(4)]), (6e-3, False, [*range(4)]))
    for seconds, alike, warm in cases:
        order: list[int] = []
        wait = clock.work(seconds)
        calls = [lambda i=i, wait=wait, order=order: order.append(i) or wait() for i in range(4)]
        timing.capture(calls, alike=alike)
        assert order == [0, 0, *warm, *range(4)]


def test_an_eager_sample_is_whole_rotations_unless_they_are_very_long(
    clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeCuda(clock).install(monkeypatch)
    for seconds, wanted in ((0.0001, 50), (0.01, 9), (0.1, 2)):
        sample = timing.eager_sampler([clock.work(seconds)] * 9)
        before = clock.now
        assert sample() == pytest.approx(seconds * 1e3)
        assert clock.now - before == pytest.approx(wanted * seconds)


def test_a_capture_that_fails_or_waits_gives_the_reason_and_the_stream_back(
    clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = FakeCuda(clock, fails="operation not permitted")
    cuda.install(monkeypatch)
    with pytest.raises(timing.GraphError, match="operation not permitted"):
        timing.capture([lambda: None])
    assert cuda.stream_now is cuda.outer

    def waits() -> None:
        if cuda.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    with pytest.raises(timing.GraphError, match=r"waits for the device: .*synchronizing"):
        timing.capture([waits])
    assert cuda.mode == 0


def test_a_device_that_answers_no_more_ends_the_run(
    clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeCuda(clock).install(monkeypatch)

    def gone() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(timing.torch.cuda, "synchronize", gone)

    def broken() -> float:
        raise RuntimeError("launch failed")

    with pytest.raises(timing.DeviceLost, match="after mine: RuntimeError: launch failed"):
        timing.interleave({"mine": broken}, budget_s=0.0)
