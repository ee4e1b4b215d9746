"""The routing kernel by how many rows of next_pow2(E) one program takes; the paper's takes one.

Reported only: the kernel's own plan stays as it is.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..workloads import Model
from .cell import Unfit
from .clock import SameBits, seconds_of

ROTATED = 8


def row_blocks(experts: int) -> tuple[int, ...]:
    """Rows a program may take: one warp holds at most 512 columns, padding included.

    >>> row_blocks(128), row_blocks(8), row_blocks(1000)
    ((1, 2, 4), (1, 2, 4, 8, 16, 32), (1,))
    """
    columns = 1 << (experts - 1).bit_length()
    return tuple(b for b in (1, 2, 4, 8, 16, 32) if b == 1 or b * columns <= 512)


def route_with(logits_TE: Tensor, top_k: int, block: int) -> Tensor:
    """The ids of softmax top-k routing with `block` rows a program."""
    from ...kernels.routing import MAX_PROGRAMS, plan_route, route_kernel

    tokens, experts = logits_TE.shape
    _, plan = plan_route(
        tokens, experts, top_k=top_k, scoring="softmax", renormalize=True, n_group=1, topk_group=1
    )
    alone = tokens <= 2 * block
    plan |= {"BLOCK_T": block, "ALONE": alone}
    programs = 1 if alone else min(-(-tokens // block), MAX_PROGRAMS)
    ids_TK = logits_TE.new_empty((tokens, top_k), dtype=torch.int32)
    weights_TK = logits_TE.new_empty((tokens, top_k), dtype=torch.float32)
    counts_E = logits_TE.new_zeros((experts,), dtype=torch.int32)
    route_kernel[(programs,)](
        logits_TE, None, ids_TK, weights_TK, counts_E, tokens, logits_TE.stride(0), 1.0,
        counters_ptr=None, **plan,
    )  # fmt: skip
    return ids_TK


def time_routing(model: Model, tokens: int, device: torch.device) -> dict[int, float]:
    """Seconds of the routing kernel on fresh logits by rows a program takes.

    Raises:
        Unfit: the one-row program of the paper cannot run.
    """
    generator = torch.Generator(device).manual_seed(tokens)
    drawn = [
        torch.randn(tokens, model.num_experts, generator=generator, device=device)
        for _ in range(ROTATED)
    ]
    bits, found = SameBits(), {}
    for block in row_blocks(model.num_experts):
        calls = [partial(route_with, logits_TE, model.top_k, block) for logits_TE in drawn]
        try:
            bits.check("ids", calls[0])
            found[block] = seconds_of(calls, float("inf"))
        except Unfit:
            if block == 1:
                raise
    return found
