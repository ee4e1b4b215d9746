"""Facts of a device that launches need, read once; memory that is made once and kept."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import lru_cache
from typing import TypeVar

import torch

Made = TypeVar("Made")


@lru_cache(maxsize=64)
def sm_count(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; 1 for the CPU, where the interpreter runs."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def for_good(make: Callable[[], Made], device: torch.device) -> Made:
    """What `make` makes, to be kept beyond this call; complete, so that any stream may use it.

    A thread of its own makes it, on the caller's stream. The caller's may be allocating in a pool
    that is taken back as a whole (torch.compile's CUDA graph trees, a user's), where nothing may
    stay, or may have forbidden to wait for the device. Not for use inside a capture.
    """
    if device.type != "cuda":
        return make()
    stream = torch.cuda.current_stream(device)
    made: list[Made] = []
    failed: list[BaseException] = []

    def work() -> None:
        try:
            with torch.cuda.stream(stream):
                made.append(make())
                event = torch.cuda.Event()
                event.record(stream)
                while not event.query():
                    pass
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work, name="moesaic-for-good")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return made[0]


@lru_cache(maxsize=8)
def triton_since(version: tuple[int, int]) -> bool:
    """Whether Triton is of this version or a later one."""
    import triton

    return tuple(int(part) for part in triton.__version__.split(".")[:2]) >= version


@lru_cache(maxsize=64)
def registers(most: int, since: tuple[int, int]) -> dict[str, int]:
    """The launch option that lets a thread have up to `most` registers, from Triton `since` on.

    Some assemblers take fewer by themselves than a kernel needs, and spill; others spill when told.
    What is compiled for 3.6 stays what was measured.
    """
    return {"maxnreg": most} if triton_since(since) else {}
