"""Memory that every rank of a group can write: of GPUs by torch, of CPU processes by a shared file.

Both give one allocation a rank, zeroed, and the addresses at which *this* process finds them all.
"""

from __future__ import annotations

import os
import tempfile
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

MADE: list[int] = []
"""Bytes of every region that this process made by torch, kept or not: torch counts them too."""


class SharedMemory(NamedTuple):
    """One allocation a rank; `own` is this rank's, uint8."""

    own: Tensor
    addresses_G: list[int]
    kept: object
    """What keeps the memory alive."""


def shared_memory(num_bytes: int, group: dist.ProcessGroup, device: torch.device) -> SharedMemory:
    """Allocate `num_bytes` a rank; a collective of `group`, outside any graph capture.

    Raises:
        RuntimeError: the ranks cannot reach each other's memory, and what they need.
    """
    if device.type == "cpu":
        return _by_file(num_bytes, group)
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("symmetric memory is made before a capture; build the exchange first")
    return _by_torch(num_bytes, group, device)


def _by_torch(num_bytes: int, group: dist.ProcessGroup, device: torch.device) -> SharedMemory:
    # A multicast object is never needed here, and can take a host's GPUs out of service.
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    import torch.distributed._symmetric_memory as symmetric

    made: list[object] = [None] * dist.get_world_size(group)
    dist.all_gather_object(made, len(MADE), group=group)
    if len(set(made)) > 1:
        raise RuntimeError(
            f"the ranks of this group have made {made} regions of symmetric memory before; torch "
            "would wait for ever (pytorch issue 196082): make those of all ranks first, or cut all "
            "ranks into groups that make equally many"
        )
    MADE.append(num_bytes)
    try:
        own = symmetric.empty(num_bytes, dtype=torch.uint8, device=device)
        handle = symmetric.rendezvous(own, group)
    except RuntimeError as error:
        raise RuntimeError(
            f"backend 'symmetric' needs GPUs of one NVLink domain with peer access: {error}; "
            "use backend='nccl'"
        ) from error
    own.zero_()
    torch.cuda.synchronize(device)
    dist.barrier(group)
    return SharedMemory(own, [int(address) for address in handle.buffer_ptrs], (own, handle))


def _by_file(num_bytes: int, group: dist.ProcessGroup) -> SharedMemory:
    folder = "/dev/shm" if os.path.isdir("/dev/shm") else None
    handle, mine = tempfile.mkstemp(prefix="moesaic-", dir=folder)
    os.close(handle)
    try:
        os.truncate(mine, num_bytes)
        names: list[str] = [""] * dist.get_world_size(group)
        dist.all_gather_object(names, mine, group=group)
        views = [
            torch.from_file(name, shared=True, size=num_bytes, dtype=torch.uint8) for name in names
        ]
        dist.barrier(group)
    finally:
        os.unlink(mine)
    return SharedMemory(views[dist.get_rank(group)], [view.data_ptr() for view in views], views)
