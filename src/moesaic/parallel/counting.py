"""Measured routing: how many rows every source rank had for every expert, for `planning.plan`.

    T tokens · K top-k · L layers · G ranks · E experts

Each layer counts on its own device, in a graph too; nothing is read until somebody asks.

>>> for layer in layers:
...     layer.count()
...
>>> run(model)
>>> counts_LGE = measured_counts(layers, group)
>>> better = plan(counts_LGE, topology, row_bytes=2 * hidden_size).placement
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from .expert_parallel import ExpertParallel


def add_rows(counts_E: Tensor, topk_ids_TK: Tensor) -> None:
    """Add a batch to int64 counts, without a host read; an id outside [0, E) is of nobody.

    >>> counts = torch.zeros(3, dtype=torch.int64)
    >>> add_rows(counts, torch.tensor([[0, 2], [2, -1]])); counts.tolist()
    [1, 0, 2]
    """
    ids_S = topk_ids_TK.flatten().long()
    valid_S = (ids_S >= 0) & (ids_S < counts_E.numel())
    counts_E.scatter_add_(0, ids_S * valid_S, valid_S.long())


def measured_counts(
    layers: Sequence[ExpertParallel], group: dist.ProcessGroup | None
) -> npt.NDArray[np.int64]:
    """What every rank has counted since `ExpertParallel.count`, (L, G, E), on every rank.

    A collective of `group`; the host waits for the device.

    Args:
        layers: of one number of experts, the same on every rank.
        group: None: this process alone.

    Raises:
        ValueError: no layer, a layer that does not count, or layers of different E.
    """
    counts = [layer.counts_E for layer in layers if layer.counts_E is not None]
    if len(counts) < len(layers) or len({one.numel() for one in counts}) != 1:
        sizes = [None if layer.counts_E is None else layer.counts_E.numel() for layer in layers]
        raise ValueError(f"layers must count rows of equally many experts, got {sizes}; call count")
    own_LE = torch.stack(counts)
    if group is None:
        return own_LE.cpu().numpy()[:, None]
    all_GLE = [torch.empty_like(own_LE) for _ in range(dist.get_world_size(group))]
    dist.all_gather(all_GLE, own_LE, group=group)
    return torch.stack(all_GLE, 1).cpu().numpy()
