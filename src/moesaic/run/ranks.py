"""`torchrun --nproc-per-node N -m moesaic run`: the main job with its experts spread over ranks.

Every rank runs the whole job on the same text, the baseline included; what differs is that
moesaic's experts live on different ranks. Rank 0 alone shows and reports.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ..parallel.replicated import SpreadExperts, backend_for


def world_size() -> int:
    """Ranks that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def on_ranks(job: Callable[..., int], where: torch.device, most_tokens: int, **options: Any) -> int:
    """Run `job` on every rank, with `experts` spread; the exit code of this rank.

    Args:
        job: takes `experts`, `out` and `options`.
        where: kind of device; a GPU is the one of the local rank.
        most_tokens: the most tokens of a forward.
    """
    if where.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        where = torch.device("cuda", torch.cuda.current_device())
    dist.init_process_group(
        backend_for(where),
        timeout=timedelta(minutes=10),
        device_id=where if where.type == "cuda" else None,
    )
    group = dist.group.WORLD
    assert group is not None
    experts = SpreadExperts(group, most_tokens=most_tokens)
    try:
        if dist.get_rank() == 0:
            return job(experts=experts, **options)
        with (
            tempfile.TemporaryDirectory() as folder,
            open(os.devnull, "w", encoding="utf-8") as nowhere,
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
        ):
            return job(experts=experts, **{**options, "out": folder})
    finally:
        dist.destroy_process_group()
