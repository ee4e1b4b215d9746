"""A time line of one step: which micro-batch occupies which resource when.

    G GPUs of a stage · M micro-batches

A micro-batch is a chain of tasks. A task takes a resource of every GPU (``compute``, ``nvlink``,
``nic``, ``copy`` or, with attention on GPUs of its own, ``attention``), each GPU for its own time,
and may take others `also`, for shorter; it is done when all are. A task marked `joint` ends for all
GPUs when the last one is done, as an exchange does. A resource does one task at a time; of the
tasks that could start, the one that can start first does, then the one furthest behind. Nothing is
random.

>>> ab = [Task("a", "compute", 1.0), Task("x", "nic", 2.0, joint=True, also=(("nvlink", 0.5),))]
>>> line = run([ab, ab], overlap=True)
>>> line.seconds, line.busy["nic"], line.busy["nvlink"]
(5.0, 4.0, 1.0)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
LINKS = ("nvlink", "nic", "copy")


@dataclass(frozen=True, eq=False)
class Task:
    """One operation of a micro-batch: a number, or one per GPU, of seconds."""

    name: str
    resource: str
    seconds: float | Floats
    joint: bool = False
    layer: int = -1
    also: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Span:
    """A task on the time line, on the GPU where it ends last."""

    name: str
    resource: str
    layer: int
    micro_batch: int
    start: float
    end: float


@dataclass(frozen=True)
class TimeLine:
    """A simulated step: its length, its spans, and per resource the mean busy time of a GPU."""

    seconds: float
    spans: tuple[Span, ...]
    busy: dict[str, float]

    def bubble(self, resource: str = "compute") -> float:
        """The share of the step in which a GPU's resource does nothing, on average."""
        return 1.0 - self.busy.get(resource, 0.0) / self.seconds if self.seconds else 0.0

    def hidden(self) -> float:
        """The share of the links' time that lies under compute."""
        moving = [s for s in self.spans if s.resource in LINKS]
        compute = [s for s in self.spans if s.resource not in LINKS]
        total = sum(s.end - s.start for s in moving)
        if not total:
            return 1.0
        return _overlap(moving, compute) / total


def _overlap(some: Sequence[Span], others: Sequence[Span]) -> float:
    """Seconds of `some` during which any of `others` runs."""
    merged: list[list[float]] = []
    for span in sorted(others, key=lambda s: s.start):
        if merged and span.start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], span.end)
        else:
            merged.append([span.start, span.end])
    if not merged:
        return 0.0
    low, high = np.array(merged).T
    total = 0.0
    for span in some:
        total += float(np.clip(np.minimum(high, span.end) - np.maximum(low, span.start), 0, None)
                       .sum())  # fmt: skip
    return total


def run_best(chains: Sequence[Sequence[Task]], *, overlap: bool, gpus: int = 1) -> TimeLine:
    """The shorter of two schedules: whoever can start first, and strictly in turns.

    Either can be a poor order for some durations, as greedy schedules are; see `run`.
    """
    first = run(chains, overlap=overlap, gpus=gpus)
    if not overlap or len(chains) == 1:
        return first
    turns = run(chains, overlap=overlap, gpus=gpus, turns=True)
    return turns if turns.seconds < first.seconds else first


def _resources(task: Task, overlap: bool) -> set[str]:
    """What a task waits for; without overlap every task waits for the one before."""
    return {task.resource, *(name for name, _ in task.also)} if overlap else {"all"}


def _occupy(
    task: Task, start: Floats, end: Floats, free: dict[str, Floats], busy: dict[str, Floats]
) -> None:
    """Book what a task does with its resources from `start` on."""
    for name, seconds in ((task.resource, task.seconds), *task.also):
        busy[name] = busy.get(name, np.zeros(len(start))) + seconds
        free[name] = end if name == task.resource else np.minimum(start + seconds, end)


def run(
    chains: Sequence[Sequence[Task]], *, overlap: bool, gpus: int = 1, turns: bool = False
) -> TimeLine:
    """Simulate micro-batches that start together.

    Args:
        chains: per micro-batch its tasks in order.
        overlap: whether different resources may work at the same time; otherwise every task
            waits for the one before, whatever it takes.
        gpus: G of the per-GPU arrays.
        turns: whether the micro-batch furthest behind goes next, even if another could start
            earlier.
    """
    ready = [np.zeros(gpus) for _ in chains]
    at = [0] * len(chains)
    free: dict[str, Floats] = {}
    busy: dict[str, Floats] = {}
    spans: list[Span] = []
    # Per micro-batch when its next task could start; None once what it depends on has changed.
    starts: list[tuple[float, Floats] | None] = [None] * len(chains)
    while waiting := [n for n, chain in enumerate(chains) if at[n] < len(chain)]:
        for n in waiting:
            if starts[n] is None:
                start = ready[n]
                for name in _resources(chains[n][at[n]], overlap) & free.keys():
                    start = np.maximum(start, free[name])
                starts[n] = (float(start.max()), start)
        first = min(
            waiting,
            key=lambda n: (0.0 if turns else starts[n][0], at[n], n),  # type: ignore[index]
        )
        task, start = chains[first][at[first]], starts[first][1]  # type: ignore[index]
        end = start + task.seconds
        last = int(end.argmax())
        spans.append(
            Span(task.name, task.resource, task.layer, first, float(start[last]), float(end[last]))
        )
        end = np.full(gpus, end.max()) if task.joint else end
        _occupy(task, start, end, free, busy)
        ready[first] = free["all"] = end
        at[first] += 1
        taken = _resources(task, overlap)
        for n in waiting:
            if n == first or taken & _resources(chains[n][at[n]], overlap):
                starts[n] = None
    seconds = float(max((r.max() for r in ready), default=0.0))
    return TimeLine(seconds, tuple(spans), {k: float(v.mean()) for k, v in busy.items()})


def pipeline_s(
    stage_s: Sequence[float], hop_s: float, micro_batches: int, *, steady: bool
) -> float:
    """Seconds of a step through a pipeline of stages.

    Args:
        stage_s: of one micro-batch in each stage.
        hop_s: from a stage to the next.
        micro_batches: M.
        steady: steps follow one another, as in decode: a micro-batch's next step waits only for
            its own last one, so filling and draining cost nothing when M fills the stages.
    """
    stages = np.asarray(stage_s, np.float64)
    if len(stages) == 1:
        return float(stages[0]) * micro_batches
    round_trip = float(stages.sum()) + hop_s * len(stages)
    if steady:
        return max(round_trip, micro_batches * float(stages.max()))
    # The last micro-batch waits at the slowest stage behind all others.
    return round_trip + (micro_batches - 1) * float(stages.max())
