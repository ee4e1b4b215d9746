"""The paper's per-expert streams: the sequential experts of PyTorch, each on a stream of its own.

For comparison only: `runtime.executors.StreamedExperts` over the same five launches an expert that
the FasterMoE-style executor makes, so what differs is the streams.
"""

from __future__ import annotations

from functools import partial

from ....runtime.executors import StreamedExperts
from ....types import ExpertWeights
from ...baselines import Forward
from ...workloads import Model
from ..executor import Executor, expert_forward


def build(model: Model, weights: ExpertWeights) -> Forward:
    """The layer with a stream per expert (32 at most, torch has no more)."""
    expert = expert_forward(weights, model.spec())
    return StreamedExperts([partial(expert, e=e) for e in range(model.num_experts)])


EXECUTOR = Executor(
    name="expert-streams",
    label="per-expert streams",
    about="the sequential experts, each on a stream of its own, joined before the sum",
    build=build,
    exact=build,
    host_counts=True,
    order=40,
)
