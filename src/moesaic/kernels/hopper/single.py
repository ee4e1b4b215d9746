"""A single token needs no sort: each of its K slots is a task of one row, in slot order.

K top-k
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..device import for_good
from ..taskmap import TaskMap

_made: dict[tuple[int, torch.device], tuple[Tensor, ...]] = {}


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def constants(top_k: int, device: torch.device) -> tuple[Tensor, ...]:
    """What is the same for every token: slot numbers from 0, from 1, the totals, ones.

    A capture that finds none makes its own, for they have no values before its graph has run.
    """
    found = _made.get((top_k, device))
    if found is not None:
        return found

    def make() -> tuple[Tensor, ...]:
        slots = torch.arange(top_k + 1, dtype=torch.int32, device=device)
        total = torch.full((2,), top_k, dtype=torch.int32, device=device)
        ones = torch.ones(top_k, dtype=torch.int32, device=device)
        return slots[:-1], slots[1:].clone(), total, ones

    if _capturing(device):
        return make()
    _made[top_k, device] = found = for_good(make, device)
    return found


def one_token(topk_ids: Tensor) -> tuple[Tensor, TaskMap]:
    """Order and task map of a single token's ids (1, K): each slot is a task of one row.

    The ids stay int32 or int64, as the products take both.
    """
    top_k, device = topk_ids.shape[1], topk_ids.device
    start, end, total, ones = constants(top_k, device)
    return start, TaskMap(end, topk_ids.view(-1), start, ones, ones, total, total)
