"""A single token needs no sort: each of its K slots is a task of one row, in slot order.

K top-k
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..taskmap import TaskMap


@lru_cache(maxsize=64)
def _every_slot(top_k: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Constants of a map with one row per task: slot numbers from 0, from 1, and the totals."""
    slots = torch.arange(top_k + 1, dtype=torch.int32, device=device)
    return slots[:-1], slots[1:].clone(), torch.full((2,), top_k, dtype=torch.int32, device=device)


@lru_cache(maxsize=64)
def _ones(top_k: int, device: torch.device) -> Tensor:
    return torch.ones(top_k, dtype=torch.int32, device=device)


def constants(top_k: int, device: torch.device) -> tuple[Tensor, ...]:
    """The tensors of `one_token` that are the same for every token."""
    return (*_every_slot(top_k, device), _ones(top_k, device))


def one_token(topk_ids: Tensor, *, as_given: bool = False) -> tuple[Tensor, TaskMap]:
    """Order and task map of a single token's ids (1, K): each slot is a task of one row.

    `as_given`: int64 ids stay int64, for a launch that takes both.
    """
    top_k, device = topk_ids.shape[1], topk_ids.device
    start, end, total = _every_slot(top_k, device)
    ones = _ones(top_k, device)
    ids = topk_ids.view(-1)
    if ids.dtype != torch.int32 and not as_given:
        ids = ids.to(torch.int32)
    return start, TaskMap(end, ids, start, ones, ones, total, total)
