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
