"""Requests that come by themselves to copies of an engine, as SimPy processes.

    R requests, in the order in which they come

Each goes to the copy with the fewest unfinished, whose front end takes them in one by one and which
takes its steps as `batching` has them. Nothing is random: equal input gives equal output.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from typing import Any

import numpy as np

from .batching import Run, Served, summed
from .requests import Requests
from .serving import Deployment


def queued(d: Deployment, requests: Requests, copies: int) -> Served:
    """Requests that come by themselves to so many copies, until all are answered.

    Raises:
        ValueError: a request whose cache does not fit at all.
    """
    import simpy

    env: Any = simpy.Environment()
    nodes = [Copy(env, d, requests) for _ in range(min(copies, len(requests)))]

    def front() -> Generator[Any, Any, None]:
        for number, when in enumerate(requests.seconds_R):
            if when > env.now:
                yield env.timeout(when - env.now)
            min(nodes, key=lambda node: node.unfinished).take(number)

    env.process(front())
    env.run()
    used = [node for node in nodes if node.numbers]
    for node in used:
        node.shorten()
    sent = [requests.seconds_R[node.numbers] for node in used]
    last = max(float(node.run.last_R.max()) for node in used)
    return summed([node.run for node in used], sent, last)


class Copy:
    """One copy of a queue: a `Run` whose requests are sent to it one by one."""

    def __init__(self, env: Any, d: Deployment, requests: Requests) -> None:
        self.env, self.requests, self.numbers = env, requests, list[int]()
        room = np.zeros(len(requests), np.int64)
        self.run = Run(d, room, room.copy(), np.zeros(len(requests)), 0)
        # The next comes when the router sends it, not when one is answered.
        self.run.total = 0
        self.came = env.event()
        self.run.check(requests.prompt_R, requests.output_R)
        env.process(self.work())

    @property
    def unfinished(self) -> int:
        """Requests that were sent here and are not answered."""
        return len(self.numbers) - self.run.done

    def take(self, number: int) -> None:
        """A request of the trace is sent here now."""
        run, at = self.run, len(self.numbers)
        self.numbers.append(number)
        run.prompt_R[at] = run.left_R[at] = self.requests.prompt_R[number]
        run.output_R[at] = self.requests.output_R[number]
        before = float(run.ready_R[at - 1]) if at else 0.0
        run.ready_R[at] = max(float(self.env.now), before) + run.d.engine.front_s
        run.sent = run.total = at + 1
        came, self.came = self.came, self.env.event()
        came.succeed()

    def work(self) -> Generator[Any, Any, None]:
        """Steps while there is work; a stretch of equal ones ends when a request comes."""
        run = self.run
        while True:
            if not self.unfinished:
                yield self.came
            run.now = float(self.env.now)
            if not run.running:
                ready = max(run.now, float(run.ready_R[run.next]))
                yield self.env.timeout(ready - run.now)
                run.now = ready
            began, step = run.now, run.begin()
            taken = step.repeats
            if taken > 1:
                yield self.env.timeout(taken * step.seconds) | self.came
                passed = (float(self.env.now) - began) / step.seconds
                taken = min(taken, max(1, math.ceil(passed - 1e-6)))
            left = began + taken * step.seconds - float(self.env.now)
            yield self.env.timeout(max(0.0, left))
            run.end(step, taken)

    def shorten(self) -> None:
        """Leave only requests that were sent here."""
        for name in ("prompt_R", "output_R", "first_R", "last_R"):
            setattr(self.run, name, getattr(self.run, name)[: len(self.numbers)])
