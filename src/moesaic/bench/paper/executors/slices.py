"""The paper's "+ dynamic slicing": a hot and a cold group, each held to its share of the SMs.

The groups run one after the other on one stream; side by side is the next rung.
"""

from __future__ import annotations

from ....runtime.seats import Seat
from ....types import ExpertWeights
from ...baselines import Forward
from ...workloads import Model
from ..executor import Executor
from ..slicing import SlicedByLoad, SlicePlan
from .static import as_they_are


def seats(plan: SlicePlan) -> list[Seat]:
    """An SM budget for each group."""
    return [Seat(sms=sms) for sms in plan.budgets]


def build(model: Model, weights: ExpertWeights) -> Forward:
    """The static batch of two groups, each with an SM budget by its load."""
    return SlicedByLoad(model, weights, seats)


EXECUTOR = Executor(
    name="slices",
    label="dynamic slicing, hot and cold group",
    about="two groups by load, each in one launch a layer on its share of the SMs, in turn",
    build=build,
    exact=build,
    ours=True,
    inputs=as_they_are,
    needs="cuda",
    order=70,
)
