"""Zeroed counters for launches that put them back, one set for each piece of scratch memory.

A launch whose programs count for one another needs zeros when it begins. Filling them would be a
launch of its own; so each launch leaves zeros behind, and the next user of the same scratch finds
them. Scratch comes from torch's allocator, which never lends one address to two launches that may
run at once, whatever their streams or graphs: what is told apart by address is safe for as long as
the scratch is. Nobody says when a graph that holds an address has gone, so sets are never taken
back: there are more of them, a block at a time, as new addresses come. Past MOST_SETS, or in a
capture that finds none, a call fills counters of its own: a launch more, and always right.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from ..device import for_good

WORDS = 512
"""int32 counters of one set."""
SETS = 4096
"""Sets of one block, 8 MiB."""
MOST_SETS = 8 * SETS
_lock = threading.Lock()
_free: dict[torch.device, list[Tensor]] = {}
_given: dict[tuple[torch.device, int], Tensor] = {}


def prepare(device: torch.device) -> None:
    """Fill a block of a device where none of its sets is left, unless a graph is being captured."""
    if _free.get(device) or torch.cuda.is_current_stream_capturing():
        return
    if sum(key[0] == device for key in tuple(_given)) >= MOST_SETS:
        return
    block = for_good(lambda: torch.zeros((SETS, WORDS), dtype=torch.int32, device=device), device)
    with _lock:
        if not _free.get(device):
            _free[device] = list(block.unbind(0))


def zeroed(device: torch.device, address: int) -> Tensor:
    """The counters (512,) int32 of the scratch at `address`, or newly filled ones of nobody."""
    found = _given.get((device, address))
    if found is not None:
        return found
    if not _free.get(device):
        prepare(device)
    with _lock:
        free = _free.get(device)
        if free:
            return _given.setdefault((device, address), free.pop())
    return torch.zeros(WORDS, dtype=torch.int32, device=device)


def given(device: torch.device, address: int) -> Tensor | None:
    """The counters that `zeroed` gave to this address, if it gave any."""
    return _given.get((device, address))
