"""Facts of a device that launches need, read once; memory that is made once and kept."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from functools import lru_cache
from typing import TypeVar

import torch

Made = TypeVar("Made", torch.Tensor, tuple[torch.Tensor, ...])
NON_BLOCKING = 1
"""CU_STREAM_NON_BLOCKING: the stream does not wait for the legacy default stream."""


@lru_cache(maxsize=64)
def sm_count(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; 1 for the CPU, where the interpreter runs."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache(maxsize=64)
def own_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream of a CUDA device that nobody else has; those of torch's pool are lent again.

    Raises:
        RuntimeError: the driver makes none.
    """
    handle, context = ctypes.c_void_p(), ctypes.c_void_p()
    driver, stream, into = ctypes.CDLL("libcuda.so.1"), ctypes.byref(handle), ctypes.byref(context)
    # A thread that has called nothing of CUDA has no context: the device's own is lent to it.
    index = torch.cuda.current_device() if device.index is None else device.index
    code = driver.cuInit(0) or driver.cuDevicePrimaryCtxRetain(into, index)
    code = code or driver.cuCtxPushCurrent_v2(context)
    if not code:
        code = driver.cuStreamCreate(stream, NON_BLOCKING)
        driver.cuCtxPopCurrent_v2(into)
    if code:
        raise RuntimeError(f"the CUDA driver made no stream: error {code}")
    return torch.cuda.ExternalStream(handle.value, device=device)


def for_good(make: Callable[[], Made], device: torch.device) -> Made:
    """What `make` makes, to be kept beyond this call; complete, so that any stream may use it.

    A thread of its own makes it, on a stream of its own. The caller's thread may be allocating in a
    pool that is taken back as a whole (torch.compile's CUDA graph trees, a user's), where nothing
    may stay, or may have forbidden to wait for the device; the caller's stream may hold a kernel
    that waits for another GPU, whose part of the work this very thread has yet to launch. Not for
    use inside a capture.

    Args:
        make: makes a tensor or a tuple of tensors; the caller's stream may use them until they are
            freed, another stream must be recorded on them.
    """
    if device.type != "cuda":
        return make()
    stream, caller = own_stream(device), torch.cuda.current_stream(device)
    made: list[Made] = []
    failed: list[BaseException] = []

    def work() -> None:
        try:
            with torch.cuda.stream(stream):
                made.append(make())
                for tensor in (made[0],) if isinstance(made[0], torch.Tensor) else made[0]:
                    tensor.record_stream(caller)
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
