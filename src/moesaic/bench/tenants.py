"""Two tenants on one GPU: steps of one, back to back or at fixed arrivals, beside work of another.

The tenant that is watched runs *steps*; the other's work is kept queued, so that it is never idle.
A `Line` launches one step and gives a `Mark` at its end; marks tell, later, when they were passed.

- Closed loop: the next step begins when the last one ends; a step's latency is the time between
  the two ends.
- Open loop: steps arrive at fixed times whatever happened to the last one; a step's latency counts
  from its arrival, so waiting behind a late step is part of it.

The other's throughput is counted between its first and its last completion within the window of
the steps. One host thread drives both; what it is late with is added to an arrival's latency.
"""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import torch

from .timing import Clock, percentile

QUEUED = 2
AHEAD = 8
FAR_S = 4e-4
"""Time to the next arrival in which the other's work is queued without making that arrival late."""


class Mark(Protocol):
    """A point in a stream's work."""

    def passed(self) -> bool:
        """Whether the device has come this far; never waits."""

    def at_ms(self) -> float:
        """When it was passed, on the clock that all marks share; waits for it."""


class Line(Protocol):
    """Something that can be launched again and again, in order."""

    def launch(self) -> Mark:
        """Queue it once; the mark is its end."""

    def mark(self) -> Mark:
        """A mark behind everything queued so far."""


@dataclass(frozen=True)
class Trial:
    """What one run gave: latencies in ms, the other's launches per second, None without another.

    `complete`: whether as many steps ran as were asked for.
    """

    latencies_ms: tuple[float, ...]
    other_per_s: float | None
    complete: bool

    def at(self, share: float) -> float:
        """A percentile of the latencies."""
        return percentile(self.latencies_ms, share)


def pooled(trials: Sequence[Trial]) -> Trial:
    """Several runs of the same thing as one: all latencies, the other's mean rate."""
    rates = [t.other_per_s for t in trials if t.other_per_s is not None]
    return Trial(
        tuple(x for t in trials for x in t.latencies_ms),
        sum(rates) / len(rates) if rates else None,
        all(t.complete for t in trials),
    )


@dataclass
class Feeder:
    """Keeps a line's work queued, and remembers the ends."""

    line: Line | None
    ends: list[Mark] = field(default_factory=list)
    _pending: deque[Mark] = field(default_factory=deque)

    def top_up(self) -> None:
        """Queue until `QUEUED` launches have not ended."""
        if self.line is None:
            return
        while self._pending and self._pending[0].passed():
            self._pending.popleft()
        while len(self._pending) < QUEUED:
            self._launch()

    def top_up_between(self, next_arrival_s: float, interval_s: float) -> None:
        """Queue one launch more where the next arrival is far enough, or nothing is queued."""
        if self.line is None:
            return
        while self._pending and self._pending[0].passed():
            self._pending.popleft()
        enough = next_arrival_s > min(FAR_S, interval_s / 2)
        if not self._pending or (enough and len(self._pending) < QUEUED):
            self._launch()

    def _launch(self) -> None:
        assert self.line is not None
        end = self.line.launch()
        self._pending.append(end)
        self.ends.append(end)

    def per_s(self, start_ms: float, end_ms: float) -> float | None:
        """Launches per second between the first and last end within the window."""
        if self.line is None:
            return None
        inside = [at for at in (end.at_ms() for end in self.ends) if start_ms <= at <= end_ms]
        if len(inside) < 2:
            return 0.0
        return (len(inside) - 1) / (inside[-1] - inside[0]) * 1e3


@contextmanager
def _no_collection() -> Iterator[None]:
    """No pause of the garbage collector between launches."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def closed_loop(
    line: Line,
    other: Line | None,
    *,
    steps: int,
    limit_s: float,
    warm_s: float = 0.0,
    clock: Clock = time.perf_counter,
) -> Trial:
    """Steps back to back, `AHEAD` queued at most, beside the other; ends early at `limit_s`.

    `warm_s`: seconds before that, of which nothing is counted: clocks and power settle.
    """
    feeder, ends, warm = Feeder(other), list[Mark](), 0
    with _no_collection():
        feeder.top_up()
        begin = clock()
        while len(ends) - warm <= steps and (
            clock() - begin < warm_s + limit_s or len(ends) - warm < 3
        ):
            feeder.top_up()
            if len(ends) < AHEAD or ends[-AHEAD].passed():
                ends.append(line.launch())
                if clock() - begin < warm_s:
                    warm = len(ends)
        times = [end.at_ms() for end in ends[warm:]]
    latencies = tuple(b - a for a, b in pairwise(times))
    return Trial(latencies, feeder.per_s(times[0], times[-1]), len(latencies) >= steps)


def open_loop(
    line: Line,
    other: Line | None,
    arrivals: Callable[[], Mark],
    *,
    steps: int,
    interval_ms: float,
    limit_s: float,
    warm_s: float = 0.0,
    clock: Clock = time.perf_counter,
) -> Trial:
    """Steps that arrive every `interval_ms`, beside the other; ends early at `limit_s`.

    `arrivals`: a mark now, on a stream that has nothing else to do. `warm_s`: as in `closed_loop`.
    """
    feeder, ends = Feeder(other), list[Mark]()
    arrived, late_ms, waiting = list[Mark](), list[float](), 0
    warm = int(warm_s * 1e3 / interval_ms)
    with _no_collection():
        feeder.top_up()
        begin = clock()
        while len(ends) - warm < steps and (clock() - begin < warm_s + limit_s or len(ends) < 2):
            late_s = clock() - begin - len(arrived) * interval_ms / 1e3
            if late_s >= 0 and len(arrived) - warm < steps:
                arrived.append(arrivals())
                late_ms.append(late_s * 1e3)
                waiting += 1
            # A device queue that is full would block the host, and the other's feeding with it.
            if waiting and (len(ends) < AHEAD or ends[-AHEAD].passed()):
                ends.append(line.launch())
                waiting -= 1
            to_come_s = len(arrived) * interval_ms / 1e3 - (clock() - begin)
            feeder.top_up_between(to_come_s, interval_ms / 1e3)
        times = [end.at_ms() for end in ends]
        begins = [arrival.at_ms() for arrival in arrived[: len(ends)]]
    warm = min(warm, len(ends) - 2)  # steps that do not keep up end late, but some must count
    counted = zip(begins[warm:], times[warm:], late_ms[warm:], strict=False)
    latencies = tuple(b - a + late for a, b, late in counted)
    return Trial(latencies, feeder.per_s(begins[warm], times[-1]), len(latencies) >= steps)


class EventMark:
    """A mark on a GPU: an event, in milliseconds since a common one."""

    __slots__ = ("_base", "_event")

    def __init__(self, event: Any, base: Any) -> None:
        self._event, self._base = event, base

    def passed(self) -> bool:
        """Whether the event was recorded."""
        return bool(self._event.query())

    def at_ms(self) -> float:
        """Milliseconds since the common event."""
        self._event.synchronize()
        return float(self._base.elapsed_time(self._event))


class GpuLine:
    """Graphs replayed in turn on one stream."""

    def __init__(self, graphs: Sequence[Any], stream: torch.cuda.Stream, base: Any) -> None:
        self._graphs, self._stream, self._base = graphs, stream, base
        self._turn = 0

    def launch(self) -> EventMark:
        """Replay the next graph."""
        graph = self._graphs[self._turn % len(self._graphs)]
        self._turn += 1
        with torch.cuda.stream(self._stream):
            graph.replay()
        return self.mark()

    def mark(self) -> EventMark:
        """An event behind everything queued so far."""
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return EventMark(event, self._base)


def common_event(device: torch.device) -> Any:
    """An event that all marks of a device count from."""
    base = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    base.record(torch.cuda.current_stream(device))
    base.synchronize()
    return base
