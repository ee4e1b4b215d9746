"""Requests that arrive, queue and are served by one deployment, as a SimPy process.

A copy takes prompts one batch at a time, then gives every sequence it holds one token a step, new
ones joining between steps. Step times come from the planner at a few batch sizes, read off between
them. Seeded; equal input gives equal output.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .requests import Arrival


@dataclass(frozen=True, kw_only=True)
class Service:
    """How fast one copy is.

    Args:
        copies: copies side by side.
        slots: sequences that one copy holds at most.
        batches, step_s: step times at rising numbers of sequences of a copy.
        prefill_s: seconds that one prompt occupies a copy, its share of a step of several.
        first_s: seconds from a prompt's start to its first token.
        output: tokens of an answer.
    """

    copies: int
    slots: int
    batches: tuple[float, ...]
    step_s: tuple[float, ...]
    prefill_s: float
    first_s: float
    output: int


@dataclass(frozen=True, kw_only=True)
class Queued:
    """What requests saw.

    Args:
        finished: requests done by the end; offered: requests that came.
        ttft_s, tpot_s: (median, 95th percentile).
        tokens_per_s: given in the whole time.
    """

    offered: int
    finished: int
    ttft_s: tuple[float, float]
    tpot_s: tuple[float, float]
    tokens_per_s: float


class _Copy:
    """One copy at work, and what its requests saw: seconds to the first token, then of each."""

    def __init__(self, env: Any, service: Service) -> None:
        import simpy

        self.env, self.service, self.queue = env, service, simpy.Store(env)
        self.first: list[float] = []
        self.pace: list[float] = []
        self.tokens = 0
        # Of every running sequence how many tokens it has, and since when.
        self.running: list[list[float]] = []
        env.process(self.work())

    def work(self) -> Generator[Any, Any, None]:
        """A prompt whenever one waits and there is room, else a step of all that run."""
        service = self.service
        while True:
            if not self.running:
                yield from self.admit((yield self.queue.get()))
            while self.queue.items and len(self.running) < service.slots:
                yield from self.admit((yield self.queue.get()))
            step = float(np.interp(len(self.running), service.batches, service.step_s))
            yield self.env.timeout(step)
            self.tokens += len(self.running)
            for sequence in self.running:
                sequence[0] += 1
            for sequence in [s for s in self.running if s[0] >= service.output]:
                self.pace.append((self.env.now - sequence[1]) / max(1, service.output - 1))
                self.running.remove(sequence)

    def admit(self, came: float) -> Generator[Any, Any, None]:
        """A prompt that came then is taken in and gets its first token."""
        service = self.service
        yield self.env.timeout(service.prefill_s)
        late = max(0.0, service.first_s - service.prefill_s)
        self.first.append(self.env.now - came + late)
        self.tokens += 1
        self.running.append([1.0, self.env.now])


def simulate_queue(service: Service, arrival: Arrival, *, seed: int = 0) -> Queued:
    """Serve the arrivals, in turns by the copies, until the time is over.

    Raises:
        ValueError: nothing arrives within the time.
    """
    import simpy

    times = arrival.drawn(seed)
    env: Any = simpy.Environment()
    copies = [_Copy(env, service) for _ in range(service.copies)]

    def source() -> Generator[Any, Any, None]:
        for number, when in enumerate(times):
            yield env.timeout(when - env.now)
            yield copies[number % service.copies].queue.put(when)

    env.process(source())
    env.run(until=arrival.seconds)
    first = [s for copy in copies for s in copy.first]
    pace = [s for copy in copies for s in copy.pace]
    return Queued(
        offered=len(times), finished=len(pace), ttft_s=_both(first), tpot_s=_both(pace),
        tokens_per_s=sum(copy.tokens for copy in copies) / arrival.seconds,
    )  # fmt: skip


def _both(values: list[float]) -> tuple[float, float]:
    """Median and 95th percentile."""
    if not values:
        return (float("nan"), float("nan"))
    return float(np.median(values)), float(np.percentile(values, 95))
