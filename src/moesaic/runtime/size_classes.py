"""Experts in size classes: few rows, some, many; each class its own launches on its own stream.

    T tokens · H hidden width · E experts · K top-k · C classes

An expert's class follows from its rows of this very call and is found on the device, so that no
host waits and the call can be captured. Every class runs over the same weights and writes rows; one
combine sums them, and the bits are those of the layer in one launch.

>>> class_ids(torch.tensor([3, 100, 0, 9]), torch.tensor([8, 64])).tolist()
[[0, -1, 2, -1], [-1, -1, -1, 3], [-1, 1, -1, -1]]
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..dispatch import Impl
from ..types import ExpertSpec, ExpertWeights
from .seats import Seat
from .sliced import SlicedExperts
from .streams import CudaLanes, open_lanes

BOUNDS = (16, 128)


def count_slots(topk_ids_TK: Tensor, num_experts: int) -> Tensor:
    """Rows (E,) int64 of each expert, without a wait; ids outside [0, E) count for nobody."""
    flat_S = topk_ids_TK.reshape(-1).long()
    flat_S = torch.where((flat_S >= 0) & (flat_S < num_experts), flat_S, num_experts)
    counts = flat_S.new_zeros(num_experts + 1)
    return counts.scatter_add_(0, flat_S, torch.ones_like(flat_S))[:num_experts]


def class_ids(counts_E: Tensor, bounds: Tensor) -> Tensor:
    """Which ids each class sees, int32 (C, E): the expert's own, -1 where it is of another class.

    Class c holds experts with at least ``bounds[c - 1]`` and under ``bounds[c]`` rows.
    """
    class_E = torch.bucketize(counts_E, bounds, right=True)
    classes_C1 = torch.arange(bounds.numel() + 1, device=counts_E.device)[:, None]
    experts_E = torch.arange(counts_E.numel(), device=counts_E.device)
    return torch.where(class_E == classes_C1, experts_E, -1).to(torch.int32)


class SizeClassExperts:
    """The experts of one layer in classes by their rows, each class on a stream.

    Args:
        weights, spec: of the layer; without gradients.
        bounds: rows at which a class ends and the next begins, ascending; at most three.
        impl: as in `moe`.

    Raises:
        ValueError: bounds are not ascending and positive, or too many.
        RuntimeError: `impl` cannot run here.
    """

    def __init__(
        self,
        weights: ExpertWeights,
        spec: ExpertSpec,
        *,
        bounds: Sequence[int] = BOUNDS,
        impl: Impl = "auto",
    ) -> None:
        if not 1 <= len(bounds) <= 3 or list(bounds) != sorted({*bounds} - {0}):
            raise ValueError(f"bounds must be one to three, positive and ascending, got {bounds}")
        # On the device once: a copy from the host in a call would wait, and break a capture.
        self._bounds = torch.tensor(list(bounds), device=weights.up.device)
        self._num_experts = spec.num_experts
        groups: list[list[int]] = [list(range(spec.num_experts)), *([] for _ in bounds)]
        lanes = open_lanes(weights.up.device, len(bounds), "size class")
        streams = lanes.streams if isinstance(lanes, CudaLanes) else [None] * len(bounds)
        # The first class stays on the current stream.
        seats = [Seat(sms=0), *(Seat(sms=0, stream=stream) for stream in streams)]
        self._sliced = SlicedExperts(weights, spec, groups, seats, impl=impl)

    def __call__(self, hidden_TH: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        """The output (T, H), with the bits of `moe`."""
        ids_CE = class_ids(count_slots(topk_ids_TK, self._num_experts), self._bounds)
        return self._sliced(hidden_TH, topk_ids_TK, topk_weights_TK, ids_GE=ids_CE)
