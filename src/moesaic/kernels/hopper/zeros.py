"""Zeroed counters for launches that put them back, one set for each piece of scratch memory.

A launch whose programs count for one another needs zeros when it begins. Filling them would be a
launch of its own; so each launch leaves zeros behind, and the next user of the same scratch finds
them. Scratch comes from torch's allocator, which never lends one address to two launches that may
run at once, whatever their streams or graphs: what is told apart by address is safe for as long as
the scratch is. Sets are taken from one block that is filled once for a device, before any use.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

WORDS = 512
"""int32 counters of one set."""
SETS = 4096
_lock = threading.Lock()
_free: dict[torch.device, list[Tensor]] = {}
_given: dict[tuple[torch.device, int], Tensor] = {}


def prepare(device: torch.device) -> None:
    """Fill the block of a device, unless it is there or a graph is being captured."""
    if device in _free or torch.cuda.is_current_stream_capturing():
        return
    block = torch.zeros((SETS, WORDS), dtype=torch.int32, device=device)
    torch.cuda.current_stream(device).synchronize()
    with _lock:
        _free.setdefault(device, list(block.unbind(0)))


def zeroed(device: torch.device, address: int) -> Tensor | None:
    """The counters (256,) int32 of the scratch at `address`; None when there are none left."""
    found = _given.get((device, address))
    if found is not None:
        return found
    with _lock:
        free = _free.get(device)
        if not free:
            return None
        return _given.setdefault((device, address), free.pop())


def given(device: torch.device, address: int) -> Tensor | None:
    """The counters that `zeroed` gave to this address, if it gave any."""
    return _given.get((device, address))
