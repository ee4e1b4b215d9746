"""Activations on the CPU whose bits for one element do not depend on where it stands.

    M rows · U width of the first product

torch computes the last few elements of each thread's share by scalar code, whose exponential rounds
differently from the vector code. So `flat_blocks` cuts every call such that no such rest exists.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .activation import pointwise_ref

VECTOR = 64
GRAIN = 32768


def flat_blocks(flat: Tensor, threads: int) -> list[Tensor]:
    """`flat` (a multiple of 64 elements) in parts of which each thread gets a multiple of 64.

    torch gives each of ``min(threads, ceil(n / 32768))`` threads one contiguous share of n
    elements; in every part returned here that share is 32768 elements a thread, a multiple of
    that, or the whole part.
    """
    n = flat.numel()
    even = n // (GRAIN * threads) * (GRAIN * threads)
    full = n // GRAIN * GRAIN
    cuts = sorted({0, even, full, n})
    return [flat[a:b] for a, b in pairwise(cuts)]


def _pointwise_(x: Tensor, activation: str, alpha: float) -> Tensor:
    """The activation of `x`, with the same bits wherever an element stands; may overwrite `x`."""
    if activation == "relu":
        return x.relu_()
    if activation == "relu2":
        return x.relu_().square_()
    n = x.numel()
    if n % VECTOR == 0:
        flat = x.contiguous().view(-1)
    else:
        flat = x.new_zeros(-(-n // VECTOR) * VECTOR)
        flat[:n].view(x.shape).copy_(x)
    for block in (flat,) if n < GRAIN else flat_blocks(flat, torch.get_num_threads()):
        if activation == "silu" and alpha == 1.0:
            torch.nn.functional.silu(block, inplace=True)
        else:
            block.copy_(pointwise_ref(block, activation, alpha))
    return flat[:n].view(x.shape)


class Act(NamedTuple):
    """The activation's options, as in `activation.activate_ref`."""

    activation: str
    gated: bool
    interleaved: bool
    limit: float | None
    alpha: float
    up_offset: float


def activate(h: Tensor, columns: bool, act: Act) -> Tensor:
    """The activated product (..., M, U), or (..., U, M) when `columns`. Overwrites `h`."""
    if not act.gated:
        h = h if act.limit is None else h.clamp_(max=act.limit)
        return _pointwise_(h, act.activation, act.alpha)
    dim = -2 if columns else -1
    half = h.shape[dim] // 2
    if not act.interleaved:
        gate, up = h.narrow(dim, 0, half), h.narrow(dim, half, half)
    elif columns:
        gate, up = h[..., ::2, :], h[..., 1::2, :]
    else:
        gate, up = h[..., ::2], h[..., 1::2]
    if act.limit is not None:
        gate, up = gate.clamp(max=act.limit), up.clamp(-act.limit, act.limit)
    if act.up_offset:
        up = up + act.up_offset
    return _pointwise_(gate, act.activation, act.alpha).mul_(up)
