"""Device time of calls under a CUDA graph, and what calls take in turn: weights and routings.

A rotation holds weights of over `ROTATED_BYTES` together and several fresh routings, so that caches
hold no more than they do in use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...types import ExpertWeights
from ..timing import Captured, Sampler, check_device, graph_sampler, reason
from ..workloads import Model, make_inputs, make_weights, weight_bytes
from .cell import Unfit

ROTATED_BYTES = 256 << 20
HOPELESS = 1.5


@dataclass(frozen=True)
class Rotation:
    """Weights, hidden states, ids and routing weights that calls take in turn."""

    weights: list[ExpertWeights]
    hidden_TH: list[Tensor]
    ids_TK: list[Tensor]
    shares_TK: list[Tensor]

    def __len__(self) -> int:
        return len(self.ids_TK)

    def set_of(self, turn: int) -> ExpertWeights:
        """The weights of a call."""
        return self.weights[turn % len(self.weights)]


def draw_weights(
    model: Model, dtype: torch.dtype, device: torch.device, seed: int
) -> list[ExpertWeights]:
    """Fresh random sets, together at least `ROTATED_BYTES`."""
    generator = torch.Generator(device).manual_seed(seed)
    count = max(1, -(-ROTATED_BYTES // weight_bytes(model.spec(), dtype.itemsize)))
    return [make_weights(model.spec(), dtype=dtype, generator=generator) for _ in range(count)]


def draw(
    model: Model, tokens: int, weights: list[ExpertWeights], device: torch.device, seed: int,
    routing: str = "uniform",
) -> Rotation:  # fmt: skip
    """Fresh routings: as many as make the experts they touch outgrow the caches."""
    generator = torch.Generator(device).manual_seed(seed)
    count = 16 if tokens <= 16 else 4 if tokens <= 1024 else 2
    dtype = weights[0].up.dtype
    drawn = [
        make_inputs(model, tokens, routing, dtype=dtype, generator=generator)
        for _ in range(max(count, min(16, len(weights))))
    ]
    return Rotation(weights, *(list(column) for column in zip(*drawn, strict=True)))


def captured(calls: Sequence[Callable[[], Any]]) -> Captured:
    """A graph of the calls; made by hand, as `torch.cuda.graph` collects garbage each time."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        calls[0]()
        torch.cuda.synchronize()
        graph.capture_begin()
        try:
            for call in calls:
                call()
        finally:
            graph.capture_end()
    return Captured(graph, len(calls), None, tuple(calls))


def replay_s(sample: Sampler, best_s: float) -> float:
    """Seconds a call: the least of three samples, or of one where it is hopeless.

    >>> replay_s(iter([2.0, 1.0, 3.0]).__next__, best_s=1.0)
    0.001
    >>> replay_s(iter([2.0, 1.0, 3.0]).__next__, best_s=1e-3)
    0.002
    """
    taken: list[float] = []
    for _ in range(3):
        taken.append(sample() / 1e3)
        if taken[-1] > HOPELESS * best_s:
            break
    return min(taken)


def attempt(step: Callable[[], Any]) -> Any:
    """What `step` gives; what it raises makes the candidate unfit, unless the device is gone.

    Raises:
        Unfit: it failed. DeviceLost: the GPU answers no more.
    """
    try:
        return step()
    except Unfit:
        raise
    except Exception as error:
        text = reason(error)
        check_device(text)
        raise Unfit(text) from error


def seconds_of(calls: Sequence[Callable[[], Any]], best_s: float) -> float:
    """Device seconds of one of the calls under a CUDA graph.

    Raises:
        Unfit: a call fails.
    """
    return float(attempt(lambda: replay_s(graph_sampler(captured(calls)), best_s)))


class SameBits:
    """Holds the first answer to each question and refuses candidates that answer otherwise."""

    def __init__(self) -> None:
        self._answers: dict[str, Tensor] = {}

    def check(self, question: str, call: Callable[[], Tensor]) -> None:
        """Run `call` once and compare.

        Raises:
            Unfit: it fails or its bits differ.
        """
        answer = attempt(call)
        held = self._answers.setdefault(question, answer)
        if not attempt(lambda: torch.equal(held, answer)):
            raise Unfit("its bits are not those of the first candidate")
