"""Many LoRA adapters in one batch: a second application of the static-batching framework.

Every row names its adapter; the rows of one adapter are a task, whatever their number, and one
launch over the task map adds ``scale * (x A^T) B^T`` to the rows that have an adapter. Rows are
read and written through the sort order, so nothing is gathered, and the rank-wide product in the
middle never leaves the chip. Each output element is one in-order fp32 chain over H and one over R,
whatever the tile, so a row's bits do not depend on the rest of the batch.

    T rows · H input width · O output width · N adapters · R rank · B tiles

>>> x_TH = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
>>> a_NRH, b_NOR = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]), torch.tensor([[[1.0]], [[10.0]]])
>>> adapters_T, scale_N = torch.tensor([1, 2, 0]), torch.tensor([1.0, 2.0])  # 2: no adapter
>>> add_lora_ref_(torch.ones(3, 1), x_TH, adapters_T, a_NRH, b_NOR, scale_N).tolist()
[[41.0], [1.0], [6.0]]
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .batching import Order, RowSort, TaskMap, batch_rows, find_task, tile_capacity
from .taskmap import lanes

AdapterBatch = tuple[RowSort, TaskMap]
HEIGHTS = (16, 32, 64)
BLOCK_O = 128
MAX_RANK = 64
PROGRAMS = 256


def blocks(dtype: torch.dtype) -> dict[str, int]:
    """Block sizes and warps; fp32 has no tensor cores to keep its accumulators and needs less."""
    if dtype == torch.float32:
        return {"BLOCK_K": 32, "BLOCK_O": 64, "num_warps": 8, "num_stages": 2}
    return {"BLOCK_K": 128, "BLOCK_O": BLOCK_O, "num_warps": 4, "num_stages": 3}


def column_split(tiles: int, width: int) -> int:
    """Programs that share the columns of one tile, so that few tiles fill a GPU; a power of two.

    >>> column_split(tiles=8, width=4096), column_split(tiles=1000, width=4096)
    (32, 1)
    """
    wanted = max(1, PROGRAMS // max(1, tiles))
    return 1 << (min(wanted, -(-width // BLOCK_O)).bit_length() - 1)


def _check(
    out_TO: Tensor,
    x_TH: Tensor,
    adapters_T: Tensor,
    a_NRH: Tensor,
    b_NOR: Tensor,
    scale_N: Tensor,
) -> None:
    adapters, rank, hidden = a_NRH.shape
    expected = {
        "x": (x_TH, (len(adapters_T), hidden), x_TH.dtype),
        "b": (b_NOR, (adapters, out_TO.shape[-1], rank), x_TH.dtype),
        "out": (out_TO, (len(adapters_T), b_NOR.shape[1]), x_TH.dtype),
        "a": (a_NRH, (adapters, rank, hidden), x_TH.dtype),
        "scale": (scale_N, (adapters,), torch.float32),
    }
    for name, (tensor, shape, dtype) in expected.items():
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous {dtype} of shape {shape}, "
                f"got {tensor.dtype} of shape {tuple(tensor.shape)}"
            )
    if not 1 <= rank <= MAX_RANK:
        raise ValueError(f"the rank must be in [1, {MAX_RANK}], got {rank}")


def add_lora_ref_(
    out_TO: Tensor,
    x_TH: Tensor,
    adapters_T: Tensor,
    a_NRH: Tensor,
    b_NOR: Tensor,
    scale_N: Tensor,
) -> Tensor:
    """The torch twin of `add_lora_`, one adapter after another; the middle rounded to x's dtype."""
    _check(out_TO, x_TH, adapters_T, a_NRH, b_NOR, scale_N)
    wide = torch.float64 if x_TH.dtype == torch.float64 else torch.float32
    for adapter in range(len(a_NRH)):
        row = (adapters_T == adapter).nonzero()[:, 0]
        middle = (x_TH[row].to(wide) @ a_NRH[adapter].to(wide).T).to(x_TH.dtype).to(wide)
        delta = middle @ b_NOR[adapter].to(wide).T
        out_TO[row] = (out_TO[row].to(wide) + scale_N[adapter] * delta).to(out_TO.dtype)
    return out_TO


def batch_adapters(
    adapters_T: Tensor, adapters: int, *, order: Order = "large_first"
) -> AdapterBatch:
    """The rows of a batch sorted by adapter and the map of their tiles.

    Args:
        adapters_T: int32 or int64 (T,); ids outside [0, N) mean no adapter.
        adapters: N, at most 1024.
        order: which adapter gets the first tiles; see `taskmap`.
    """
    return batch_rows(adapters_T[:, None], adapters, heights=HEIGHTS, order=order)


def add_lora_(
    out_TO: Tensor,
    x_TH: Tensor,
    adapters_T: Tensor,
    a_NRH: Tensor,
    b_NOR: Tensor,
    scale_N: Tensor,
    *,
    batch: AdapterBatch | None = None,
) -> Tensor:
    """Add each row's adapter to `out_TO`, in place: ``out[t] += scale[n] * (x[t] A[n]^T) B[n]^T``.

    One launch, and one (up to 4096 rows, else three) to sort; no host sync. Products sum in fp32,
    the rank-wide middle is rounded to the dtype of x, the sum with `out` is rounded once.

    Args:
        out_TO: fp32, fp16 or bf16; what the base layer gave. Rows without adapter stay as they are.
        x_TH: the dtype of out.
        adapters_T: int32 or int64; ids outside [0, N) mean no adapter. N at most 1024.
        a_NRH, b_NOR: the dtype of out, PEFT's `lora_A.weight` and `lora_B.weight` stacked; R <= 64.
        scale_N: fp32.
        batch: `batch_adapters(adapters_T, N)`, to sort once for many projections of the same rows.

    Raises:
        ValueError: a tensor of another shape, dtype or layout, or a rank out of range.
    """
    _check(out_TO, x_TH, adapters_T, a_NRH, b_NOR, scale_N)
    tokens, hidden = x_TH.shape
    adapters, width, rank = b_NOR.shape
    rows, task_map = batch or batch_adapters(adapters_T, adapters)
    tiles = tile_capacity(tokens, adapters, HEIGHTS)
    if tiles == 0 or width == 0:
        return out_TO
    split = column_split(tiles, width)
    block = blocks(x_TH.dtype)
    lora_kernel[(tiles * split,)](
        x_TH,
        a_NRH,
        b_NOR,
        scale_N,
        out_TO,
        rows.order_S,
        *task_map[:6],
        hidden,
        width,
        rank,
        N=adapters,
        SPLIT=split,
        EVEN=hidden % block["BLOCK_K"] == 0,
        R_POW2=max(16, triton.next_power_of_2(rank)),
        HEIGHTS=HEIGHTS,
        N_POW2=lanes(adapters),
        **block,
        enable_fp_fusion=True,
    )
    return out_TO


@triton.jit
def lora_tile(
    x_ptr,
    a_ptr,
    b_ptr,
    out_ptr,
    order_ptr,
    scale,
    row_start,
    rows,
    first_row,
    part,
    hidden,
    width,
    rank,
    SPLIT: tl.constexpr,
    EVEN: tl.constexpr,
    R_POW2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Rows [first_row, first_row + BLOCK_M) of a task, column blocks part, part + SPLIT, ...

    `a_ptr` and `b_ptr` point at the task's adapter. Padding rows repeat the task's first row.
    """
    row_M = first_row + tl.arange(0, BLOCK_M)
    keep_M = row_M < rows
    token_M = tl.load(order_ptr + row_start + tl.where(keep_M, row_M, 0)).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    r = tl.arange(0, R_POW2)
    x_ptrs = x_ptr + token_M[:, None] * hidden + k[None, :]
    a_ptrs = a_ptr + tl.where(r < rank, r, 0)[:, None] * hidden + k[None, :]
    middle_MR = tl.zeros((BLOCK_M, R_POW2), tl.float32)
    for start in range(0, hidden, BLOCK_K):
        if EVEN:
            x_MK = tl.load(x_ptrs)
            a_RK = tl.load(a_ptrs)
        else:
            inside = k[None, :] < hidden - start
            x_MK = tl.load(x_ptrs, mask=inside, other=0.0)
            a_RK = tl.load(a_ptrs, mask=inside, other=0.0)
        middle_MR = tl.dot(x_MK, tl.trans(a_RK), middle_MR, input_precision="ieee")
        x_ptrs += BLOCK_K
        a_ptrs += BLOCK_K
    middle_MR = middle_MR.to(x_ptr.dtype.element_ty)
    for first in range(part * BLOCK_O, width, SPLIT * BLOCK_O):
        o = first + tl.arange(0, BLOCK_O)
        b_mask = (o[:, None] < width) & (r[None, :] < rank)
        b_OR = tl.load(b_ptr + o[:, None] * rank + r[None, :], mask=b_mask, other=0.0)
        delta_MO = tl.dot(middle_MR, tl.trans(b_OR), input_precision="ieee")
        out_ptrs = out_ptr + token_M[:, None] * width + o[None, :]
        out_mask = keep_M[:, None] & (o[None, :] < width)
        out_MO = tl.load(out_ptrs, mask=out_mask, other=0.0).to(tl.float32) + scale * delta_MO
        tl.store(out_ptrs, out_MO.to(out_ptr.dtype.element_ty), mask=out_mask)


@triton.jit
def lora_kernel(
    x_ptr,
    a_ptr,
    b_ptr,
    scale_ptr,
    out_ptr,
    order_ptr,
    tile_end_ptr,
    task_ptr,
    row_start_ptr,
    rows_ptr,
    height_ptr,
    total_ptr,
    hidden,
    width,
    rank,
    N: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN: tl.constexpr,
    R_POW2: tl.constexpr,
    HEIGHTS: tl.constexpr,
    N_POW2: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Program p adds column part p % SPLIT of tile p // SPLIT; tiles beyond the total do nothing.

    x_ptr (T, H), a_ptr (N, R, H), b_ptr (N, O, R), out_ptr (T, O): one float dtype. scale_ptr:
    fp32 (N,). order_ptr: int32 (T,). The six tensors of a `TaskMap` follow. With x = [[1, 2],
    [3, 4], [5, 6]], adapters [1, none, 0], A = [[[1, 0]], [[0, 1]]], B = [[[1]], [[10]]], scale
    [1, 2] and out = 1: tile 0 is row 2 (adapter 0: 1 + 5), tile 1 row 0 (1 + 2 * 10 * 2 = 41).
    """
    part = tl.program_id(0) % SPLIT
    tile = tl.program_id(0) // SPLIT
    if tile < tl.load(total_ptr + 1):
        entry, inner = find_task(tile_end_ptr, tile, N, N_POW2)
        adapter = tl.load(task_ptr + entry).to(tl.int64)
        row_start = tl.load(row_start_ptr + entry)
        rows = tl.load(rows_ptr + entry)
        height = tl.load(height_ptr + entry)
        scale = tl.load(scale_ptr + adapter)
        for level in tl.static_range(len(HEIGHTS)):
            if height == HEIGHTS[level]:
                lora_tile(
                    x_ptr,
                    a_ptr + adapter * rank * hidden,
                    b_ptr + adapter * rank * width,
                    out_ptr,
                    order_ptr,
                    scale,
                    row_start,
                    rows,
                    inner * HEIGHTS[level],
                    part,
                    hidden,
                    width,
                    rank,
                    SPLIT,
                    EVEN,
                    R_POW2,
                    HEIGHTS[level],
                    BLOCK_K,
                    BLOCK_O,
                )


def aot_cases() -> list[Any]:
    """The kernel of this module for ahead-of-time compilation."""
    from .aot import AotCase

    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    options = ("num_warps", "num_stages")
    floats = ("x_ptr", "a_ptr", "b_ptr", "out_ptr")
    tables = ("order", "tile_end", "task", "row_start", "rows", "height", "total")
    return [
        AotCase(
            name=f"ragged_lora/{dtype}-r{rank}",
            fn=lora_kernel,
            signature={
                **dict.fromkeys(floats, f"*{dtype}"),
                "scale_ptr": "*fp32",
                **{f"{name}_ptr": "*i32" for name in tables},
                **dict.fromkeys(("hidden", "width", "rank"), "i32"),
            },
            constexprs={
                "N": 64,
                "SPLIT": 4,
                "EVEN": dtype == "bf16",
                "R_POW2": rank,
                "HEIGHTS": HEIGHTS,
                "N_POW2": 64,
                **{k: v for k, v in blocks(dtypes[dtype]).items() if k not in options},
            },
            options={k: blocks(dtypes[dtype])[k] for k in options} | {"enable_fp_fusion": True},
            aligned=("hidden", "width", "rank"),
            quick=rank == 16,
        )
        for dtype in dtypes
        for rank in (16, 64)
    ]
