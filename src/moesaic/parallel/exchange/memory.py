"""Memory that every rank of a group can write: of GPUs by torch, of CPU processes by a shared file.

Both give one allocation a rank, zeroed, and the addresses at which *this* process finds them all.
Ranks meet through the store of their group, on the host: one that never comes is an error of the
others after a time, whatever the backend does.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

MADE: list[int] = []
"""Bytes of every region that this process made by torch, kept or not: torch counts them too."""
MET: Counter[str] = Counter()
"""How often this process has met each group."""


class SharedMemory(NamedTuple):
    """One allocation a rank; `own` is this rank's, uint8."""

    own: Tensor
    addresses_G: list[int]
    kept: object
    """What keeps the memory alive."""


def _store(group: dist.ProcessGroup) -> Any:
    from torch.distributed.distributed_c10d import _get_process_group_store

    return _get_process_group_store(group)


def meet(group: dist.ProcessGroup, value: str, timeout_s: float) -> list[str]:
    """What every rank of the group says, by rank; nobody waits longer than `timeout_s`.

    Raises:
        RuntimeError: which rank did not come.
    """
    from torch.distributed.distributed_c10d import PrefixStore

    members = dist.get_process_group_ranks(group)
    name = "moesaic-" + hashlib.sha1(repr(members).encode()).hexdigest()[:12]
    store, number, own = PrefixStore(name, _store(group)), MET[name], dist.get_rank(group)
    MET[name] += 1
    store.set(f"{number}/{own}", value)
    until, said = time.monotonic() + timeout_s, []
    for rank in range(len(members)):
        key = f"{number}/{rank}"
        try:
            store.wait([key], timedelta(seconds=max(0.001, until - time.monotonic())))
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {own}: rank {rank} did not come to meeting {number} of ranks {members} in "
                f"{timeout_s:g} s; every rank must make and resize its exchanges in the same "
                "order; restart the group"
            ) from error
        said.append(store.get(key).decode())
    # Who came to this meeting has read all of the one before.
    if number:
        store.delete_key(f"{number - 1}/{own}")
    return said


@contextmanager
def _patience(group: dist.ProcessGroup, timeout_s: float) -> Iterator[None]:
    """Inside, what waits for the group's store, torch's own rendezvous too, gives up in time."""
    store = _store(group)
    before = store.timeout
    store.set_timeout(timedelta(seconds=timeout_s))
    try:
        yield
    finally:
        store.set_timeout(before)


def shared_memory(
    num_bytes: int, group: dist.ProcessGroup, device: torch.device, timeout_s: float
) -> SharedMemory:
    """Allocate `num_bytes` a rank; a collective of `group`, outside any graph capture.

    Raises:
        RuntimeError: the ranks cannot reach each other's memory, and what they need; one of them
            did not come within `timeout_s`.
    """
    if device.type == "cpu":
        return _by_file(num_bytes, group, timeout_s)
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("symmetric memory is made before a capture; build the exchange first")
    return _by_torch(num_bytes, group, device, timeout_s)


def _by_torch(
    num_bytes: int, group: dist.ProcessGroup, device: torch.device, timeout_s: float
) -> SharedMemory:
    # A multicast object is never needed here, and can take a host's GPUs out of service.
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    made = [int(said) for said in meet(group, str(len(MADE)), timeout_s)]
    if len(set(made)) > 1:
        raise RuntimeError(
            f"the ranks of this group have made {made} regions of symmetric memory before; torch "
            "would wait in vain (pytorch issue 196082): make those of all ranks first, or cut all "
            "ranks into groups that make equally many"
        )
    MADE.append(num_bytes)
    own, handle = rendezvous(num_bytes, group, device, timeout_s)
    own.zero_()
    torch.cuda.synchronize(device)
    meet(group, "zeroed", timeout_s)
    return SharedMemory(own, [int(address) for address in handle.buffer_ptrs], (own, handle))


def rendezvous(
    num_bytes: int, group: dist.ProcessGroup, device: torch.device, timeout_s: float
) -> tuple[Tensor, Any]:
    """An allocation and torch's handle of everybody's.

    Raises:
        RuntimeError: no peer access, or a rank that torch waited for in vain.
    """
    import torch.distributed._symmetric_memory as symmetric

    try:
        with _patience(group, timeout_s):
            own = symmetric.empty(num_bytes, dtype=torch.uint8, device=device)
            return own, symmetric.rendezvous(own, group)
    except RuntimeError as error:
        raise RuntimeError(
            f"backend 'symmetric' needs GPUs of one NVLink domain with peer access: {error}; "
            "use backend='nccl'"
        ) from error


def _by_file(num_bytes: int, group: dist.ProcessGroup, timeout_s: float) -> SharedMemory:
    folder = "/dev/shm" if os.path.isdir("/dev/shm") else None
    handle, mine = tempfile.mkstemp(prefix="moesaic-", dir=folder)
    os.close(handle)
    try:
        os.truncate(mine, num_bytes)
        names = meet(group, mine, timeout_s)
        views = [
            torch.from_file(name, shared=True, size=num_bytes, dtype=torch.uint8) for name in names
        ]
        meet(group, "mapped", timeout_s)
    finally:
        os.unlink(mine)
    return SharedMemory(views[dist.get_rank(group)], [view.data_ptr() for view in views], views)
