"""The ring in host memory that counters are published into, and the torch twin of `publish`.

    L layers · E experts · R slots · W numbers of a slot, 4 of the step and 3 * E of each layer

>>> counters, state = torch.tensor([[1, 0], [1, 0], [1, 0]], dtype=torch.int32), new_state(1, "cpu")
>>> ring = new_ring(2, 6)
>>> publish_ref([counters], ring, state, time_ns=5)
>>> (ring[0] & LOW).tolist(), (ring[:, 0] >> 32).tolist(), state.tolist()
([5, 0, 1, 0, 1, 0, 1, 0, 1, 0], [1, 0], [[1, 1]])
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

HEAD = 4
"""Words before the counters of a slot: time in ns and steps until then, each its low half first."""
LOW = 0xFFFFFFFF


def new_ring(slots: int, width: int, *, pinned: bool = False) -> Tensor:
    """A ring for `width` counters, (R, 4 + width) int64 zeros on the host.

    A word is the number of its publication, from 1, above the 32 bits of its value.
    """
    return torch.zeros((slots, HEAD + width), dtype=torch.int64, pin_memory=pinned)


def new_state(layers: int, device: torch.device | str) -> Tensor:
    """Steps and publications so far, as the program of each layer counts them: (L, 2) int64."""
    return torch.zeros((layers, 2), dtype=torch.int64, device=device)


def publish_ref(
    counters: Sequence[Tensor],
    ring: Tensor,
    state: Tensor,
    *,
    every: int = 1,
    steps: int = 1,
    time_ns: int = 0,
) -> None:
    """The torch twin of `publish`, for tensors of the host."""
    before, number = int(state[0, 0]), int(state[0, 1]) + 1
    now = before + steps
    if now // every > before // every:
        head = torch.tensor([time_ns, time_ns >> 32, now, now >> 32])
        values = torch.cat([head, *(tensor.reshape(-1) for tensor in counters)])
        ring[(number - 1) % ring.shape[0]] = (torch.tensor(number) << 32) | (values & LOW)
        state[:, 1] = number
    state[:, 0] = now
