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


def simulate_queue(service: Service, arrival: Arrival, *, seed: int = 0) -> Queued:
    """Serve the arrivals until the time is over.

    Raises:
        ValueError: nothing arrives within the time.
    """
    import simpy

    times = arrival.drawn(seed)
    env: Any = simpy.Environment()
    waiting = [simpy.Store(env) for _ in range(service.copies)]
    first: list[float] = []
    pace: list[float] = []
    tokens = [0]

    def source() -> Generator[Any, Any, None]:
        for number, when in enumerate(times):
            yield env.timeout(when - env.now)
            yield waiting[number % service.copies].put(when)

    def copy(queue: Any) -> Generator[Any, Any, None]:
        running: list[list[float]] = []
        while True:
            if not running:
                came = yield queue.get()
                yield from admit(came, running)
            while queue.items and len(running) < service.slots:
                came = yield queue.get()
                yield from admit(came, running)
            step = float(np.interp(len(running), service.batches, service.step_s))
            yield env.timeout(step)
            tokens[0] += len(running)
            for sequence in running:
                sequence[0] += 1
            for sequence in [s for s in running if s[0] >= service.output]:
                pace.append((env.now - sequence[1]) / max(1, service.output - 1))
                running.remove(sequence)

    def admit(came: float, running: list[list[float]]) -> Generator[Any, Any, None]:
        yield env.timeout(service.prefill_s)
        first.append(env.now - came + max(0.0, service.first_s - service.prefill_s))
        tokens[0] += 1
        running.append([1.0, env.now])

    env.process(source())
    for queue in waiting:
        env.process(copy(queue))
    env.run(until=arrival.seconds)

    def both(values: list[float]) -> tuple[float, float]:
        if not values:
            return (float("nan"), float("nan"))
        return float(np.median(values)), float(np.percentile(values, 95))

    return Queued(
        offered=len(times), finished=len(pace), ttft_s=both(first), tpot_s=both(pace),
        tokens_per_s=tokens[0] / arrival.seconds,
    )  # fmt: skip
