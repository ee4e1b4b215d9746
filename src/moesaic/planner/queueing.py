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
        finished: requests done by the end; started: those that got a first token; offered: all.
        ttft_s, tpot_s: (median, 95th percentile) of those that started, and of those that finished;
            None where there is none.
        tokens_per_s: given in the whole time.
    """

    offered: int
    started: int
    finished: int
    ttft_s: tuple[float, float] | None
    tpot_s: tuple[float, float] | None
    tokens_per_s: float

    def __str__(self) -> str:
        text = f"{self.finished} of {self.offered} finished, {self.tokens_per_s:.0f} tokens/s"
        if self.ttft_s is None:
            return f"{text}, a first token for none in time"
        middle, late = (1e3 * s for s in self.ttft_s)
        text += f", first token {middle:.0f} ms (p95 {late:.0f})"
        if self.started < self.offered:
            text += f" of the {self.started} that got one in time"
        if self.tpot_s is not None:
            middle, late = (1e3 * s for s in self.tpot_s)
            text += f", then {middle:.1f} ms each (p95 {late:.1f})"
        return text


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
        self.finished = 0
        env.process(self.work())

    def work(self) -> Generator[Any, Any, None]:
        """A prompt whenever one waits and there is room, else a step of all that run."""
        service = self.service
        while True:
            if not self.running:
                yield from self.admit((yield self.queue.get()))
            while self.queue.items and len(self.running) < service.slots:
                yield from self.admit((yield self.queue.get()))
            if not self.running:
                continue
            step = float(np.interp(len(self.running), service.batches, service.step_s))
            yield self.env.timeout(step)
            self.tokens += len(self.running)
            for sequence in self.running:
                sequence[0] += 1
            for sequence in [s for s in self.running if s[0] >= service.output]:
                self.pace.append((self.env.now - sequence[1]) / (service.output - 1))
                self.running.remove(sequence)
                self.finished += 1

    def admit(self, came: float) -> Generator[Any, Any, None]:
        """A prompt that came then is taken in and gets its first token."""
        service = self.service
        yield self.env.timeout(service.prefill_s)
        late = max(0.0, service.first_s - service.prefill_s)
        self.first.append(self.env.now - came + late)
        self.tokens += 1
        if service.output > 1:
            self.running.append([1.0, self.env.now])
        else:
            self.finished += 1


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
        offered=len(times), started=len(first), finished=sum(copy.finished for copy in copies),
        ttft_s=_both(first), tpot_s=_both(pace),
        tokens_per_s=sum(copy.tokens for copy in copies) / arrival.seconds,
    )  # fmt: skip


def _both(values: list[float]) -> tuple[float, float] | None:
    """Median and 95th percentile."""
    if not values:
        return None
    return float(np.median(values)), float(np.percentile(values, 95))
