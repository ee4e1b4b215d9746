"""The ring in host memory that counters are published into, and the torch twin of `publish`.

    L layers · E experts · R slots · W numbers of a slot, 3 * E of each layer

>>> counters, state = torch.tensor([[1, 0], [1, 0], [1, 0]], dtype=torch.int32), new_state("cpu")
>>> ring, head = new_ring(2, 6)
>>> publish_ref([counters], ring, head, state, time_ns=5)
>>> ring[0].tolist(), head.tolist(), state.tolist()
([1, 0, 1, 0, 1, 0], [[1, 5, 1], [0, 0, 0]], [1, 0, 1])
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def new_ring(slots: int, width: int, *, pinned: bool = False) -> tuple[Tensor, Tensor]:
    """A ring (R, W) int32 and its heads (R, 3) int64, zeros, on the host.

    A head is the number of the publication, from 1, its time in ns, and the steps until then.
    """
    ring = torch.zeros((slots, width), dtype=torch.int32, pin_memory=pinned)
    return ring, torch.zeros((slots, 3), dtype=torch.int64, pin_memory=pinned)


def new_state(device: torch.device | str) -> Tensor:
    """Steps so far, tickets of the launch in progress, publications so far: (3,) int64."""
    return torch.zeros(3, dtype=torch.int64, device=device)


def publish_ref(
    counters: Sequence[Tensor],
    ring: Tensor,
    head: Tensor,
    state: Tensor,
    *,
    every: int = 1,
    steps: int = 1,
    time_ns: int = 0,
) -> None:
    """The torch twin of `publish`, for tensors of the host."""
    before, number = int(state[0]), int(state[2]) + 1
    now = before + steps
    if now // every > before // every:
        slot = (number - 1) % ring.shape[0]
        torch.cat([tensor.reshape(-1) for tensor in counters], out=ring[slot])
        head[slot, 1], head[slot, 2] = time_ns, now
        head[slot, 0] = number
        state[2] = number
    state[0] = now
