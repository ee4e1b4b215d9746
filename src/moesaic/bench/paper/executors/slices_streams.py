"""The paper's "+ streams": the groups side by side, each on the stream of its slice of the GPU.

Slices are green contexts of one split (`hardware.green`): disjoint SMs, so the groups do not take
them from each other. Where there are none the executor says so.
"""

from __future__ import annotations

from functools import cache

import torch

from ....hardware.green import GreenDevice
from ....runtime.seats import Seat
from ....types import ExpertWeights
from ...baselines import Forward
from ...workloads import Model
from ..executor import Executor
from ..slicing import SlicedByLoad, SlicePlan
from .static import as_they_are


@cache
def split(device: int) -> GreenDevice:
    """The one split of a GPU, which lives as long as the process."""
    return GreenDevice(device)


def seats(plan: SlicePlan) -> list[Seat]:
    """A slice of the GPU for each group, with its stream."""
    parts = split(torch.cuda.current_device()).carve(plan.sms)
    return [Seat(sms=part.sms, stream=part.stream) for part in parts]


def build(model: Model, weights: ExpertWeights) -> Forward:
    """The static batch of two groups, each on its slice."""
    return SlicedByLoad(model, weights, seats)


EXECUTOR = Executor(
    name="slices-streams",
    label="slices and streams",
    about="the same two groups side by side, each on the stream of its slice (green contexts)",
    build=build,
    exact=build,
    ours=True,
    inputs=as_they_are,
    needs="cuda",
    order=71,
)
