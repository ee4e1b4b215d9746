"""Experts in a hot and a cold group, each with a share of the SMs in proportion to its load.

    T tokens · E experts · K top-k

What the paper's dynamic slicing does, in the form that a GPU allows: slices of 8 SMs and more, for
groups of experts. The plan comes from the loads of the first call and stays, so that later calls
read nothing on the host and a graph can hold them; fresh routings meet a plan that is a step old.

>>> plan_groups([40, 8, 8, 8], sms=132)
SlicePlan(groups=((0,), (1, 2, 3)), sms=(72, 48), rest_sms=12)
>>> plan_groups([64, 0], sms=132).budgets
(124, 8)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...runtime.seats import Seat
from ...runtime.sliced import SlicedExperts
from ...types import ExpertWeights
from ..workloads import Model

ATOM_SMS = 8


@dataclass(frozen=True)
class SlicePlan:
    """Groups of experts, hot ones first, the SMs of each in whole slices, and SMs left over."""

    groups: tuple[tuple[int, ...], ...]
    sms: tuple[int, ...]
    rest_sms: int

    @property
    def budgets(self) -> tuple[int, ...]:
        """The SMs of each group, those left over given to the largest."""
        largest = max(range(len(self.sms)), key=lambda g: self.sms[g])
        return tuple(n + self.rest_sms * (g == largest) for g, n in enumerate(self.sms))


def plan_groups(loads: Sequence[int], sms: int) -> SlicePlan:
    """The most loaded experts that take half of the rows, and the others; SMs by load, in slices.

    Raises:
        ValueError: there are fewer than two experts to share the GPU.
    """
    if len(loads) < 2:
        raise ValueError(f"slices need two experts or more, got {len(loads)}")
    order = sorted(range(len(loads)), key=lambda e: (-loads[e], e))
    total, taken, hot = sum(loads), 0, 0
    while not hot or (hot < len(loads) - 1 and 2 * taken < total):
        taken += loads[order[hot]]
        hot += 1
    # The driver leaves one slice's worth of SMs to the rest (132 SMs: 15 slices, 12 left over).
    atoms = (sms - 1) // ATOM_SMS - 1
    share = taken / total if total else 0.5
    mine = min(atoms - 1, max(1, round(atoms * share)))
    groups = (tuple(sorted(order[:hot])), tuple(sorted(order[hot:])))
    sizes = (mine * ATOM_SMS, (atoms - mine) * ATOM_SMS)
    return SlicePlan(groups, sizes, sms - sum(sizes))


class SlicedByLoad:
    """The layer under a plan made at its first call.

    Args:
        seats: from the plan, the seat of each group.
    """

    def __init__(
        self, model: Model, weights: ExpertWeights, seats: Callable[[SlicePlan], list[Seat]]
    ) -> None:
        self._model, self._weights, self._seats = model, weights, seats
        self._layer: SlicedExperts | None = None
        self.plan: SlicePlan | None = None

    def __call__(self, hidden_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """The output (T, H)."""
        if self._layer is None:
            counts = ids_TK.flatten().bincount(minlength=self._model.num_experts).tolist()
            device = hidden_TH.device
            gpu = device.type == "cuda"
            sms = torch.cuda.get_device_properties(device).multi_processor_count if gpu else 132
            self.plan = plan_groups(counts, sms)
            self._layer = SlicedExperts(
                self._weights, self._model.spec(), self.plan.groups, self._seats(self.plan)
            )
        return self._layer(hidden_TH, ids_TK, weights_TK)
