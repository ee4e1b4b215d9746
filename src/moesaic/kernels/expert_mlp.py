"""The fused three-layer expert (input -> I -> I -> input) of the expert-slicing paper: one launch.

A program takes one tile of rows of one expert through all three layers; neither hidden layer ever
touches global memory. The first hidden layer is made in chunks of CHUNK columns, and each chunk is
used at once as a piece of the contraction of the second layer, whose whole width is accumulated:

    for each chunk c of I:   act1 = relu(x @ up[c].T + b)      (BLOCK_M, CHUNK)
                             acc2 += act1 @ mid[:, c].T        (BLOCK_M, I)   fp32, in registers
    act2 = relu(acc2 + b)                                      (BLOCK_M, I)   in registers
    for each chunk c of I:   out += act2[:, c] @ down[:, c].T  (BLOCK_M, H)   fp32, in registers

The limit is registers: `tune.fused_stages` states it. Sums run in the order of the tiled products
and both hidden layers are rounded to the dtype of the model there too, so fused and tiled give the
same bits. Every tile of 16 rows reads all weights of its expert again (from L2), so what the fusion
saves is the traffic of activations; whether it saves time is for `tune.choose` or the caller.

    T tokens · H hidden width · I intermediate width · E experts · K top-k · S = T*K routed rows
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation_triton import pointwise
from .aot import AotCase
from .batching import RowSort, TaskMap, find_task, tile_capacity
from .grouped_mm import Epilogue, dot_add, grouped_mm_ref
from .tune import FP32_BLOCK_K, FUSED_CHUNK, FUSED_ROWS, fused_stages, pow2_width


@triton.jit
def _biased(acc, bias_ptr, expert, width, column, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        bias = tl.load(bias_ptr + expert * width + column, mask=column < width, other=0.0)
        acc += bias[None, :].to(tl.float32)
    return acc


@triton.jit
def expert_mlp_kernel(
    x_ptr,
    up_ptr,
    mid_ptr,
    down_ptr,
    up_bias_ptr,
    mid_bias_ptr,
    down_bias_ptr,
    out_ptr,
    order_ptr,
    tile_end_ptr,
    task_ptr,
    row_start_ptr,
    rows_ptr,
    total_ptr,
    zero,
    alpha,
    HIDDEN: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    ENTRIES: tl.constexpr,
    ENTRIES_POW2: tl.constexpr,
    TOP_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
    H_POW2: tl.constexpr,
    I_POW2: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """out[r] = down(act(mid(act(up(x[order[r] // TOP_K]))))) of r's expert, for every routed row r.

    x_ptr: (T, H). up_ptr: (E, I, H). mid_ptr: (E, I, I). down_ptr: (E, H, I). Biases: (E, width).
    out_ptr: (S, H), rows in sorted order. order_ptr: (S,) int32 slots. The next five: the `TaskMap`
    (its heights are all BLOCK_M), ENTRIES long. zero: 0. H_POW2 and I_POW2 are the powers of two at
    or above HIDDEN and INTERMEDIATE; padding weights read as zero.

    H = I = 8, x = e0, up = mid = 2 * identity, down = -identity, relu: out = [-4, 0, ...].
    """
    hidden: tl.constexpr = HIDDEN
    intermediate: tl.constexpr = INTERMEDIATE
    h = tl.arange(0, BLOCK_H)
    i = tl.arange(0, I_POW2)
    chunk = tl.arange(0, CHUNK)
    keep_i = i < intermediate
    tiles = tl.load(total_ptr + 1)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        entry, m = find_task(tile_end_ptr, tile, ENTRIES, ENTRIES_POW2)
        expert = tl.load(task_ptr + entry).to(tl.int64)
        rows = tl.load(rows_ptr + entry)
        row = m * BLOCK_M + tl.arange(0, BLOCK_M)
        keep_row = row < rows
        position = tl.load(row_start_ptr + entry) + tl.where(keep_row, row, 0)
        source = tl.load(order_ptr + position) // TOP_K
        x_row = x_ptr + source[:, None].to(tl.int64) * hidden + h[None, :]
        up_row = up_ptr + expert * intermediate * hidden + chunk[:, None] * hidden + h[None, :]
        mid_base = mid_ptr + expert * intermediate * intermediate
        mid_ptrs = mid_base + i[:, None] * intermediate + chunk[None, :]
        acc2 = tl.zeros((BLOCK_M, I_POW2), tl.float32)
        for start in range(0, intermediate, CHUNK):
            keep_c = chunk < intermediate - start
            acc1 = tl.zeros((BLOCK_M, CHUNK), tl.float32)
            # The runtime zero keeps x from being hoisted into 128 registers of every thread.
            for h0 in tl.static_range(0, hidden, BLOCK_H):
                keep_h = h[None, :] < hidden - h0
                x = tl.load(x_row + start * zero + h0, mask=keep_h, other=0.0)
                up = tl.load(up_row + h0, mask=keep_c[:, None] & keep_h, other=0.0)
                acc1 = dot_add(x, tl.trans(up), acc1)
            acc1 = _biased(acc1, up_bias_ptr, expert, intermediate, start + chunk, HAS_BIAS)
            act1 = pointwise(acc1, ACTIVATION, alpha).to(out_ptr.dtype.element_ty)
            mid = tl.load(mid_ptrs, mask=keep_i[:, None] & keep_c[None, :], other=0.0)
            acc2 = dot_add(act1, tl.trans(mid), acc2)
            up_row += CHUNK * hidden
            mid_ptrs += CHUNK
        acc2 = _biased(acc2, mid_bias_ptr, expert, intermediate, i, HAS_BIAS)
        act2 = pointwise(acc2, ACTIVATION, alpha).to(out_ptr.dtype.element_ty)
        dtype = out_ptr.dtype.element_ty
        BITS: tl.constexpr = tl.int16 if dtype.primitive_bitwidth == 16 else tl.int32
        bits = tl.reshape(act2.to(BITS, bitcast=True), (BLOCK_M, I_POW2 // CHUNK, CHUNK))
        o = tl.arange(0, H_POW2)
        keep_o = o < hidden
        down_ptrs = down_ptr + expert * hidden * intermediate
        down_ptrs += o[:, None] * intermediate + chunk[None, :]
        acc3 = tl.zeros((BLOCK_M, H_POW2), tl.float32)
        for start in range(0, intermediate, CHUNK):
            keep_c = chunk < intermediate - start
            # The bits of the one piece whose turn it is, the others being zero.
            turn = tl.arange(0, I_POW2 // CHUNK)[None, :, None] * CHUNK == start
            piece = tl.xor_sum(tl.where(turn, bits, 0), axis=1).to(BITS)
            piece = piece.to(out_ptr.dtype.element_ty, bitcast=True)
            down = tl.load(down_ptrs, mask=keep_o[:, None] & keep_c[None, :], other=0.0)
            acc3 = dot_add(piece, tl.trans(down), acc3)
            down_ptrs += CHUNK
        acc3 = _biased(acc3, down_bias_ptr, expert, hidden, o, HAS_BIAS)
        out_ptrs = out_ptr + position[:, None].to(tl.int64) * hidden + o[None, :]
        keep = keep_row[:, None] & keep_o[None, :]
        tl.store(out_ptrs, acc3.to(out_ptr.dtype.element_ty), mask=keep)


def block_h(hidden: int, itemsize: int) -> int:
    """Columns of the input that one step of the first product takes; fp32's show in the bits.

    >>> block_h(512, 2), block_h(512, 4), block_h(8, 2)
    (128, 32, 16)
    """
    return min(FP32_BLOCK_K if itemsize == 4 else 128, pow2_width(hidden))


def registers(itemsize: int) -> int | None:
    """The limit of registers to state; without one ptxas spills fp32 tiles to fit two programs."""
    return 255 if itemsize == 4 else None


def expert_mlp(
    x_TH: Tensor,
    up: Tensor,
    mid: Tensor,
    down: Tensor,
    sort: RowSort,
    tasks: TaskMap,
    *,
    top_k: int,
    arch: int,
    biases: tuple[Tensor, Tensor, Tensor] | None = None,
    activation: str = "relu",
    alpha: float = 1.0,
    num_sms: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Rows (S, H) in sorted order: each routed row through its three-layer expert, one launch.

    Args:
        x_TH: tokens (T, H).
        up, mid, down: (E, I, H), (E, I, I), (E, H, I), dtype of x.
        sort, tasks: of `batch_rows` with ``heights=(FUSED_ROWS,)``.
        arch: compute capability (80, 90, ...), which limits what fits.
        biases: of up, mid and down, (E, I), (E, I), (E, H).
        num_sms: the most programs; None: one a tile.
        out: (S, H) contiguous, dtype of x, to write the rows of `tasks` into; None: a new one.

    Raises:
        ValueError: the layer does not fit on chip (`tune.fused_stages`).
    """
    slots, hidden, intermediate = sort.order_S.numel(), x_TH.shape[1], up.shape[1]
    stages = fused_stages(hidden, intermediate, x_TH.element_size(), arch)
    if not stages:
        raise ValueError(
            f"the fused expert does not fit on chip with H={hidden}, I={intermediate}, "
            f"{x_TH.dtype} (see tune.fused_stages); use the tiled products, fused=False"
        )
    if out is None:
        out = torch.empty((slots, hidden), dtype=x_TH.dtype, device=x_TH.device)
    entries = tasks.task_N.numel()
    programs = tile_capacity(slots, entries, (FUSED_ROWS,))
    if num_sms is not None:
        programs = min(programs, num_sms)
    if programs == 0:
        return out
    expert_mlp_kernel[(programs,)](
        x_TH,
        up,
        mid,
        down,
        *(biases or (None, None, None)),
        out,
        sort.order_S,
        tasks.tile_end_N,
        tasks.task_N,
        tasks.row_start_N,
        tasks.rows_N,
        tasks.total_2,
        0,
        alpha,
        HIDDEN=hidden,
        INTERMEDIATE=intermediate,
        ENTRIES=entries,
        ENTRIES_POW2=1 << (entries - 1).bit_length(),
        TOP_K=top_k,
        ACTIVATION=activation,
        HAS_BIAS=biases is not None,
        BLOCK_M=FUSED_ROWS,
        CHUNK=FUSED_CHUNK,
        H_POW2=pow2_width(hidden),
        I_POW2=max(FUSED_CHUNK, pow2_width(intermediate)),
        BLOCK_H=block_h(hidden, x_TH.element_size()),
        num_warps=8,
        num_stages=stages,
        maxnreg=registers(x_TH.element_size()),
        enable_fp_fusion=True,
    )
    return out


def expert_mlp_ref(
    x_TH: Tensor,
    up: Tensor,
    mid: Tensor,
    down: Tensor,
    sort: RowSort,
    *,
    top_k: int,
    biases: tuple[Tensor, Tensor, Tensor] | None = None,
    activation: str = "relu",
    alpha: float = 1.0,
) -> Tensor:
    """The torch twin of `expert_mlp`; positions that belong to nobody are zero."""
    b1, b2, b3 = biases or (None, None, None)
    act = Epilogue(activation, alpha=alpha)
    rows = grouped_mm_ref(x_TH, up, sort, top_k=top_k, bias=b1, epilogue=act)
    rows = grouped_mm_ref(rows, mid, sort, top_k=0, bias=b2, epilogue=act)
    return grouped_mm_ref(rows, down, sort, top_k=0, bias=b3)


def aot_cases() -> list[AotCase]:
    """The paper's Small expert in bf16, and the widest fp32 one, per architecture."""
    return [
        _aot_case(kind, itemsize, hidden, intermediate, arch)
        for kind, itemsize, hidden, intermediate in (("bf16", 2, 512, 1024), ("fp32", 4, 256, 256))
        for arch in (80, 90, 100)
    ]


def _aot_case(kind: str, itemsize: int, hidden: int, intermediate: int, arch: int) -> AotCase:
    names = ("x", "up", "mid", "down", "up_bias", "mid_bias", "down_bias", "out")
    tables = ("order", "tile_end", "task", "row_start", "rows", "total")
    return AotCase(
        name=f"expert_mlp/{kind}_H{hidden}_I{intermediate}_sm{arch}",
        fn=expert_mlp_kernel,
        signature={f"{name}_ptr": f"*{kind}" for name in names}
        | {f"{name}_ptr": "*i32" for name in tables}
        | {"zero": "i32", "alpha": "fp32"},
        constexprs={
            "HIDDEN": hidden,
            "INTERMEDIATE": intermediate,
            "ENTRIES": 8,
            "ENTRIES_POW2": 8,
            "TOP_K": 2,
            "ACTIVATION": "relu",
            "HAS_BIAS": True,
            "BLOCK_M": FUSED_ROWS,
            "CHUNK": FUSED_CHUNK,
            "H_POW2": hidden,
            "I_POW2": intermediate,
            "BLOCK_H": block_h(hidden, itemsize),
        },
        options={
            "num_warps": 8,
            "num_stages": fused_stages(hidden, intermediate, itemsize, arch),
            "maxnreg": registers(itemsize),
            "enable_fp_fusion": True,
        },
        archs=(arch,),
        aligned=("zero",),
        quick=arch == 90,
    )
