"""Weights that launches after the router will read, asked into the L2 while it chooses.

One token's choice of experts is a program or two: for its time the memory would stand idle. Further
programs of the same launch ask the L2 for the first bytes of what the next decoder layer reads
whatever the choice. They neither wait for anything nor are waited for, write nothing, and change no
result; the lines are asked to stay while the experts' weights stream by.

    a, b, c, d    up to four tensors, taken in order, the last one cut where LIMIT is reached
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LIMIT = 24 << 20
"""Bytes of a launch: about half of an H200's L2 beside the experts."""
PROGRAM = 128 << 10
MOST = 4
NAMES = tuple(f"ahead_{letter}" for letter in "abcd")
ENDS = tuple(f"end_{letter}" for letter in "abcd")
NOTHING: dict[str, Any] = dict.fromkeys((*NAMES, *ENDS)) | {"LANES": 0}
"""A launch that asks for nothing."""

_ASK = tl.constexpr(
    """{
    .reg .pred live;
    .reg .b64 keep;
    setp.ne.s32 live, $2, 0;
    createpolicy.fractional.L2::evict_last.b64 keep, 1.0;
    @live cp.async.bulk.prefetch.L2.global.L2::cache_hint [$1], $3, keep;
    mov.u32 $0, 0;
    }"""
)


@triton.jit
def fetch_ahead(
    program, ahead_a, ahead_b, ahead_c, ahead_d, end_a, end_b, end_c, end_d,
    LANES: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Ask for LANES chunks of SIZE bytes, from number `program` * LANES of all.

    Chunks below end_a are those of ahead_a, up to end_b those of ahead_b, and so on.

    Example: LANES 2, SIZE 4096, ends 3, 3, 4, 4: program 1 asks for bytes 8192 to 12287 of ahead_a
    and the first 4096 of ahead_c.
    """
    chunk = program * LANES + tl.arange(0, LANES)
    at = ahead_a.to(tl.int64) + chunk.to(tl.int64) * SIZE
    at = tl.where(chunk >= end_a, ahead_b.to(tl.int64) + (chunk - end_a).to(tl.int64) * SIZE, at)
    at = tl.where(chunk >= end_b, ahead_c.to(tl.int64) + (chunk - end_b).to(tl.int64) * SIZE, at)
    at = tl.where(chunk >= end_c, ahead_d.to(tl.int64) + (chunk - end_c).to(tl.int64) * SIZE, at)
    live = (chunk < end_d).to(tl.int32)
    size = tl.full([LANES], SIZE, tl.int32)
    tl.inline_asm_elementwise(
        _ASK, "=r,l,r,r", [at, live, size], dtype=tl.int32, is_pure=False, pack=1
    )


def plan_ahead(ahead: Sequence[Tensor], num_warps: int) -> tuple[int, dict[str, Any]]:
    """Programs that fetch, and the arguments of the launch that has them; 0 and `NOTHING` if none.

    Tensors that are not contiguous or do not start at a multiple of 16 bytes are left out.
    """
    lanes = 32 * num_warps
    size = PROGRAM // lanes
    left, total, taken, ends = LIMIT // size, 0, [], []
    for tensor in ahead[:MOST]:
        chunks = min(left, tensor.numel() * tensor.element_size() // size)
        if chunks and tensor.is_contiguous() and tensor.data_ptr() % 16 == 0:
            left, total = left - chunks, total + chunks
            taken.append(tensor)
            ends.append(total)
    if not taken:
        return 0, dict(NOTHING)
    missing = MOST - len(taken)
    values = [*taken, *taken[-1:] * missing, *ends, *ends[-1:] * missing]
    named = dict(zip((*NAMES, *ENDS), values, strict=True))
    return triton.cdiv(total, lanes), named | {"LANES": lanes}


def can_fetch(tensor: Tensor) -> bool:
    """Whether the device of a tensor has the instruction."""
    return tensor.is_cuda and torch.cuda.get_device_capability(tensor.device) >= (9, 0)
