"""Weights that later launches will read, asked into the L2 while the memory has little to do.

After the experts of a few tokens come norms and residuals, which leave the memory idle, and then
the products of the next decoder layer's attention, whose weights are known: `fetch_ahead`. While a
router chooses and slots are sorted, the memory is idle too; where tokens are many for the experts
there are, every expert is chosen, and what the first tiles read is known: `fetch_starts`. A launch
asks the L2 for them: it starts when the one before it ends, writes nothing, waits for none of what
it asked for, and changes no result.

    a, b, c, d    up to four tensors, taken in order, the last one cut where LIMIT is reached
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from .aot import AotCase

LIMIT = 38 << 20
"""Bytes of a launch: less than an H200's L2 of 50 MB."""
CHUNK = 4096
LANES = 32
MOST = 4
ENDS = tuple(f"end_{letter}" for letter in "abcd")

_ASK = tl.constexpr(
    """{
    .reg .pred live;
    setp.ne.s32 live, $2, 0;
    @live cp.async.bulk.prefetch.L2.global [$1], $3;
    mov.u32 $0, 0;
    }"""
)


@triton.jit(do_not_specialize=[*ENDS])
def ahead_kernel(
    ahead_a, ahead_b, ahead_c, ahead_d, end_a, end_b, end_c, end_d,
    SIZE: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """A program asks for COUNT chunks of SIZE bytes, a lane for one, from number program * COUNT.

    ahead_*: 16-byte aligned addresses. Chunks below end_a are those of ahead_a, those up to end_b
    of ahead_b, and so on.

    Example: COUNT 2, SIZE 4096, ends 3, 3, 4, 4: program 1 asks for bytes 8192 to 12287 of ahead_a
    and the first 4096 of ahead_c.
    """
    chunk = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    at = ahead_a.to(tl.int64) + chunk.to(tl.int64) * SIZE
    at = tl.where(chunk >= end_a, ahead_b.to(tl.int64) + (chunk - end_a).to(tl.int64) * SIZE, at)
    at = tl.where(chunk >= end_b, ahead_c.to(tl.int64) + (chunk - end_b).to(tl.int64) * SIZE, at)
    at = tl.where(chunk >= end_c, ahead_d.to(tl.int64) + (chunk - end_c).to(tl.int64) * SIZE, at)
    live = (chunk < end_d).to(tl.int32)
    size = tl.full([COUNT], SIZE, tl.int32)
    tl.inline_asm_elementwise(
        _ASK, "=r,l,r,r", [at, live, size], dtype=tl.int32, is_pure=False, pack=1
    )
    # Whoever waits for this launch waits for those before it.
    gdc_wait()


@triton.jit(do_not_specialize=["per", "stride", "count"])
def starts_kernel(ptr, per, stride, count, SIZE: tl.constexpr, COUNT: tl.constexpr):
    """As `ahead_kernel`, of one tensor: `per` chunks at every `stride` bytes, `count` in all.

    Example: SIZE 4096, per 2, stride 1048576: chunk 3 is the bytes from 1048576 + 4096 on.
    """
    chunk = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    at = ptr.to(tl.int64) + (chunk // per).to(tl.int64) * stride
    at += (chunk % per).to(tl.int64) * SIZE
    size = tl.full([COUNT], SIZE, tl.int32)
    live = (chunk < count).to(tl.int32)
    tl.inline_asm_elementwise(
        _ASK, "=r,l,r,r", [at, live, size], dtype=tl.int32, is_pure=False, pack=1
    )
    gdc_wait()


def plan_ahead(ahead: Sequence[Tensor]) -> tuple[int, tuple[Any, ...]]:
    """Programs, and the arguments of a launch; no programs where there is nothing to ask for.

    Tensors that are not contiguous or do not start at a multiple of 16 bytes are left out.
    """
    left, total, taken, ends = LIMIT // CHUNK, 0, [], []
    for tensor in ahead[:MOST]:
        chunks = min(left, tensor.numel() * tensor.element_size() // CHUNK)
        if chunks and tensor.is_contiguous() and tensor.data_ptr() % 16 == 0:
            left, total = left - chunks, total + chunks
            taken.append(tensor)
            ends.append(total)
    if not taken:
        return 0, ()
    missing = MOST - len(taken)
    arguments = (*taken, *taken[-1:] * missing, *ends, *ends[-1:] * missing)
    return triton.cdiv(total, LANES), arguments


def fetch_ahead(ahead: Sequence[Tensor]) -> None:
    """Ask the L2 for the first `LIMIT` bytes of tensors on a GPU; before sm_90: nothing."""
    if torch.cuda.get_device_capability(ahead[0].device) < (9, 0):
        return
    programs, arguments = plan_ahead(ahead)
    if programs:
        ahead_kernel[(programs,)](*arguments, SIZE=CHUNK, COUNT=LANES, num_warps=1, launch_pdl=True)


def fetch_starts(blocks: Tensor) -> None:
    """Ask for the starts of the blocks of a tensor (blocks, ...), `LIMIT` bytes in all."""
    number = blocks.shape[0]
    stride = blocks.stride(0) * blocks.element_size()
    per = min(LIMIT // number, stride) // CHUNK
    aligned = blocks.data_ptr() % 16 == 0 and stride % 16 == 0 and blocks.is_contiguous()
    if not per or not aligned or torch.cuda.get_device_capability(blocks.device) < (9, 0):
        return
    count = per * number
    starts_kernel[(triton.cdiv(count, LANES),)](
        blocks, per, stride, count, SIZE=CHUNK, COUNT=LANES, num_warps=1, launch_pdl=True
    )


def aot_cases() -> list[AotCase]:
    """One form of each."""
    names = tuple(f"ahead_{letter}" for letter in "abcd")
    return [
        AotCase(
            name="ahead/bf16",
            fn=ahead_kernel,
            signature=dict.fromkeys(names, "*bf16") | dict.fromkeys(ENDS, "i32"),
            constexprs={"SIZE": CHUNK, "COUNT": LANES},
            options={"num_warps": 1, "launch_pdl": True},
            archs=(90, 100),
            ptx={90: ("cp.async.bulk.prefetch.L2",)},
        ),
        AotCase(
            name="ahead/starts",
            fn=starts_kernel,
            signature={"ptr": "*bf16", "per": "i32", "stride": "i64", "count": "i32"},
            constexprs={"SIZE": CHUNK, "COUNT": LANES},
            options={"num_warps": 1, "launch_pdl": True},
            archs=(90, 100),
            ptx={90: ("cp.async.bulk.prefetch.L2",)},
        ),
    ]
