"""Interleaved timing: every candidate is sampled in turn, in random order, in one process.

A *call* is a function without arguments that runs one layer; a candidate brings several calls over
rotating weights and inputs, so that caches hold no more than they would in use. A *sampler* times
some calls and gives milliseconds per call. `interleave` goes round the samplers until each has used
its share of the time, so that clock drift, heat and neighbours fall on all of them alike.

>>> ticks = iter(range(1000))
>>> fast = cpu_sampler([lambda: None], min_ms=0.0, clock=lambda: float(next(ticks)))
>>> timed = interleave({"fast": fast}, budget_s=0.0, min_samples=3)
>>> timed.measured["fast"].median  # two readings of this clock lie one second apart
1000.0
"""

from __future__ import annotations

import contextlib
import gc
import math
import random
import time
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any, Generic, TypeVar

import torch

from ..types import Measurement

Call = Callable[[], Any]
Sampler = Callable[[], float]
Clock = Callable[[], float]
Name = TypeVar("Name", bound=Hashable)
LONG_MS = 6.0


class GraphError(RuntimeError):
    """The calls cannot be captured into a CUDA graph; the message is the reason."""


class DeviceLost(RuntimeError):
    """The device answers no more after an error; nothing later in this process can be measured."""


@dataclass
class Timed(Generic[Name]):
    """What `interleave` found: a measurement per candidate, or the error that ended it."""

    measured: dict[Name, Measurement] = field(default_factory=dict)
    errors: dict[Name, str] = field(default_factory=dict)


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of `values` lie, linear between neighbours."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summary(samples: Sequence[float]) -> Measurement:
    """Median, 20th and 80th percentile of samples."""
    return Measurement(
        median=percentile(samples, 0.5),
        p20=percentile(samples, 0.2),
        p80=percentile(samples, 0.8),
        samples=len(samples),
    )


def reason(error: BaseException) -> str:
    """An exception as one line of at most 300 characters."""
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text}"[:300]


def check_device(after: str) -> None:
    """Raise DeviceLost, naming what it came `after`, when CUDA is in use and does not answer."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        raise DeviceLost(f"the GPU answers no more after {after}") from error


def interleave(
    samplers: Mapping[Name, Sampler],
    *,
    budget_s: float,
    min_samples: int = 5,
    max_samples: int = 100,
    seed: int = 0,
    clock: Clock = time.perf_counter,
) -> Timed[Name]:
    """Sample every candidate once a round, in a new random order, until its time is used.

    A candidate leaves after `max_samples`, or after `min_samples` once it has used its equal share
    of `budget_s`. One that raises is reported under `errors` and the others go on.

    Raises:
        DeviceLost: the GPU answers no more.
    """
    rng = random.Random(seed)
    share_s = budget_s / max(1, len(samplers))
    samples: dict[Name, list[float]] = {name: [] for name in samplers}
    spent_s = dict.fromkeys(samplers, 0.0)
    timed: Timed[Name] = Timed()
    left = dict(samplers)
    while left:
        order = list(left)
        rng.shuffle(order)
        for name in order:
            start = clock()
            try:
                samples[name].append(left[name]())
            except Exception as error:
                timed.errors[name] = reason(error)
                del left[name]
                check_device(f"{name}: {timed.errors[name]}")
                continue
            spent_s[name] += clock() - start
            taken = len(samples[name])
            if taken >= max_samples or (taken >= min_samples and spent_s[name] >= share_s):
                del left[name]
    for name, values in samples.items():
        if name not in timed.errors:
            timed.measured[name] = summary(values)
    return timed


def rotation(calls: Sequence[Call]) -> Iterator[Call]:
    """The calls, over and over."""
    return cycle(calls)


def cpu_sampler(
    calls: Sequence[Call], *, min_ms: float = 5.0, clock: Clock = time.perf_counter
) -> Sampler:
    """A sampler by wall clock: as many calls a sample as make `min_ms` of work, after a warm-up."""
    for call in calls:
        call()
    start = clock()
    calls[0]()
    one_ms = (clock() - start) * 1e3
    repeats = max(1, math.ceil(min_ms / one_ms)) if one_ms > 0 else 1
    turn = rotation(calls)

    def sample() -> float:
        batch = list(islice(turn, repeats))
        begin = clock()
        for call in batch:
            call()
        return (clock() - begin) * 1e3 / repeats

    return sample


def _events_ms(work: Callable[[], None], *, head_start: bool) -> float:
    """Device time of `work` by events; with `head_start` the host runs ahead of a short spin."""
    start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    if head_start:
        torch.cuda._sleep(600_000)  # type: ignore[no-untyped-call]
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def eager_sampler(calls: Sequence[Call], *, target_ms: float = 5.0, whole: bool = True) -> Sampler:
    """A sampler of unsynchronised calls between two events: host time counts where it is longer.

    At least one full rotation a sample, or two calls where a rotation takes over 0.4 s; without
    `whole` as many calls as make `target_ms`, each sample going on where the last one ended.
    """
    calls[0]()
    one_ms = _events_ms(calls[0], head_start=False)
    if whole and one_ms * len(calls) < 400:
        _run(calls)
        one_ms = _events_ms(lambda: _run(calls), head_start=False) / len(calls)
    least = 1
    if whole:
        least = 2 if one_ms * len(calls) > 400 else max(8, len(calls))
    repeats = max(least, min(200, math.ceil(target_ms / max(one_ms, 1e-3))))
    turn = rotation(calls)

    def sample() -> float:
        batch = list(islice(turn, repeats))
        return _events_ms(lambda: _run(batch), head_start=False) / repeats

    return sample


def _run(calls: Sequence[Call]) -> None:
    for call in calls:
        call()


def refuse_sync(call: Call) -> None:
    """Run `call` once with synchronisation forbidden, which finds what a graph could not hold
    without the damage of a broken capture.

    Raises:
        GraphError: the call waits for the device.
    """
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        raise GraphError(f"waits for the device: {reason(error)}") from error
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@dataclass(frozen=True)
class Captured:
    """A graph of some calls, and the output of the first, rewritten by every replay.

    `held` are the calls themselves: a graph holds addresses, and what a call made for itself before
    the capture lives only as long as the call does.
    """

    graph: Any
    calls: int
    first_output: Any
    held: tuple[Call, ...] = ()


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Inside, Python collects nothing: a graph of before that dies in a capture invalidates it."""
    gc.collect()
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def capture(calls: Sequence[Call], *, alike: bool = False) -> Captured:
    """All calls in one CUDA graph, warmed up on the stream that captures.

    `alike`: they differ in data alone, so of calls over `LONG_MS` only the first is warmed up.

    Raises:
        GraphError: they cannot be captured, and why.
        DeviceLost: the failure took the device with it.
    """
    outer = torch.cuda.current_stream()
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(outer)
    with torch.cuda.stream(side):
        calls[0]()
        refuse_sync(calls[0])
        if not alike or _events_ms(calls[0], head_start=False) < LONG_MS:
            _run(calls)
    outer.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with _no_collection(), torch.cuda.graph(graph, stream=side):
            first = calls[0]()
            _run(calls[1:])
    except Exception as error:
        torch.cuda.set_stream(outer)  # a capture that fails leaves its own stream current
        with contextlib.suppress(RuntimeError):
            graph.reset()
        check_device(f"a capture: {reason(error)}")
        raise GraphError(reason(error)) from error
    return Captured(graph, len(calls), first, tuple(calls))


def graph_sampler(captured: Captured, *, min_ms: float = 1.0) -> Sampler:
    """A sampler of replays, as many a sample as make `min_ms`, divided by the calls they hold."""
    replay = captured.graph.replay
    one_ms = _events_ms(replay, head_start=True)
    if one_ms < 50:  # the first replay also uploads the graph
        one_ms = _events_ms(replay, head_start=True)
    repeats = max(1, min(50, math.ceil(min_ms / max(one_ms, 1e-3))))

    def replays() -> None:
        for _ in range(repeats):
            replay()

    return lambda: _events_ms(replays, head_start=True) / (repeats * captured.calls)
