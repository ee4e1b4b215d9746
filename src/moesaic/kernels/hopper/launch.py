"""Host side of the Hopper grouped GEMM: descriptors, one launch over a task map, its torch twin.

    S routed rows · T tokens · E experts · C output columns · U weight rows (2C when gated) · K depth

Descriptors are values of (pointer, shape, box) and are cached, so a repeated shape builds none.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..taskmap import TaskMap
from .decode import decode_kernel
from .prefill import prefill_kernel
from .tiles import check_triton

RAGGED_EXTENT = 0x7FFF0000
RAGGED_ROWS = 1 << 30
GLUON_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


class HopperConfig(NamedTuple):
    """How one grouped GEMM is tiled; moves time, never bits.

    `prefill` tiles are 128 rows by `bn` weight rows, `decode` tiles `bm` rows (16 to 128) by `bn`
    (64 or 128).
    """

    kernel: Literal["prefill", "decode"]
    bm: int
    bn: int
    stages: int
    bk: int = 64
    group_m: int = 8
    ctas_per_sm: int = 1


@lru_cache(maxsize=4096)
def _layout(box: tuple[int, ...], dtype: torch.dtype) -> Any:
    return gl.NVMMASharedLayout.get_default_for(list(box), GLUON_DTYPES[dtype])


def _descriptor(
    base: Tensor, shape: list[int], strides: list[int], box: tuple[int, ...]
) -> TensorDescriptor:
    return TensorDescriptor(base, shape, strides, list(box), _layout(box, base.dtype))


def weight_descriptor(weight: Tensor, gated: bool, config: HopperConfig) -> TensorDescriptor:
    """TMA view of a weight (E, U, K): by rows, or gate and up rows in alternating eights."""
    experts, rows, depth = weight.shape
    if not gated:
        box = (1, config.bn, config.bk)
        return _descriptor(weight, [experts, rows, depth], [rows * depth, depth, 1], box)
    half = rows // 2
    shape = [experts, half // 8, 2, 8, depth]
    strides = [rows * depth, 8 * depth, half * depth, depth, 1]
    return _descriptor(weight, shape, strides, (1, config.bn // 16, 2, 8, config.bk))


def ragged_descriptor(out: Tensor, box_rows: int, box_cols: int) -> TensorDescriptor:
    """TMA view of rows (S, C) whose stores are clipped at the end of a segment of rows.

    Two leading dimensions wrap the 64-bit address around, so that a segment's end can be put at
    the bound that the hardware checks.
    """
    cols = out.shape[1]
    shape = [RAGGED_EXTENT, RAGGED_EXTENT, RAGGED_ROWS, cols]
    strides = [2**34 - cols, cols, cols, 1]
    return _descriptor(out, shape, strides, (1, 1, box_rows, box_cols))


def grouped_mm_hopper(
    x: Tensor,
    weight: Tensor,
    tasks: TaskMap,
    out: Tensor,
    *,
    config: HopperConfig,
    num_sms: int,
    order_S: Tensor | None = None,
    top_k: int = 1,
    gated: bool = False,
    activation: str = "none",
    limit: float | None = None,
    alpha: float = 1.0,
    up_offset: float = 0.0,
    pdl: Literal["off", "wait", "prefetch"] = "off",
) -> Tensor:
    """``out[row] = act(x[token of row] @ weight[e].T)`` for the rows of every task, one launch.

    Args:
        x: (T, K) tokens, read through `order_S` (int32 slots, token = slot // top_k), or already
            sorted rows (S, K) when `order_S` is None. bf16 or fp16, K a multiple of `config.bk`.
        weight: (E, U, K); U = 2C when `gated`.
        tasks: built with ``heights=(config.bm,)``.
        out: (S, C), written where rows are live.
        num_sms: SM budget; the persistent grid has `num_sms * ctas_per_sm` programs.
        pdl: how to overlap with the launch before, see `pipeline.begin`.

    Raises:
        RuntimeError: Triton is outside the tested range.
    """
    check_triton()
    depth, cols = weight.shape[2], out.shape[1]
    halve = config.kernel == "prefill" or gated
    box = (64 if config.kernel == "prefill" else config.bm, config.bn // (2 if halve else 1))
    gather = order_S is not None
    operand = x if gather else _descriptor(x, list(x.shape), [depth, 1], (config.bm, config.bk))
    entries = tasks.task_N.numel()
    kernel = prefill_kernel if config.kernel == "prefill" else decode_kernel
    extra = (
        {"CREG": 232 if gather else 240, "LREG": 40 if gather else 24, "maxnreg": 168}
        if config.kernel == "prefill"
        else {"LREG": 56 if gather else 40, "maxnreg": 128 if config.bm <= 32 else 255}
    )
    kernel[(num_sms * config.ctas_per_sm,)](
        operand,
        order_S if gather else tasks.task_N,
        weight_descriptor(weight, gated, config),
        ragged_descriptor(out, *box),
        tasks.tile_end_N,
        tasks.task_N,
        tasks.row_start_N,
        tasks.rows_N,
        tasks.total_2,
        depth,
        -(-cols // (config.bn // 2 if gated else config.bn)),
        top_k,
        0.0 if limit is None else limit,
        alpha,
        up_offset,
        N=entries,
        LANES=max(32, 1 << (entries - 1).bit_length()),
        GROUP_M=config.group_m,
        GATED=gated,
        GATHER=gather,
        ACTIVATION=activation,
        HAS_LIMIT=limit is not None,
        BM=config.bm,
        BN=config.bn,
        BK=config.bk,
        NB=config.stages,
        PDL=pdl,
        launch_pdl=pdl != "off",
        num_warps=4,
        **extra,
    )
    return out
