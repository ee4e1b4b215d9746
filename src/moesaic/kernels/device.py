"""Facts of a device that launches need, read once."""

from __future__ import annotations

from functools import lru_cache

import torch


@lru_cache(maxsize=64)
def sm_count(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; 1 for the CPU, where the interpreter runs."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


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
