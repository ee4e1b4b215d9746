"""Grouped matrix products in plain Triton (sm_80 and newer): one launch covers every expert.

A launch walks the tiles of a `TaskMap`; a program computes one tile of rows of one expert times
BLOCK_N output columns, with the bias and the activation in its epilogue and a single rounding.
Rows of the first product are read through the sort order, so no gathered copy of the tokens exists.
Gate and up columns of a gated product sit side by side in one accumulator, so that both halves of
a pair end in the same thread. Each output element is one in-order fp32 chain over the contraction
whatever the tile, which is why tile sizes, warps and operand order do not show in the bits. fp32
layers, whose error is that of the sum alone, sum blocks of FP32_BLOCK_K and then the blocks, in
order: the same two levels for every tile (N. Higham, Accuracy and Stability of Numerical
Algorithms, section 4.2).

    T tokens · E experts · K top-k · S = T*K routed rows · C contraction width · N output width
    U = 2N when gated, else N: the weight rows of an expert

`grouped_mm(x_SC, weight_EUC, sort, tasks, ...)` gives rows (S, N) in sorted order.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import activate_ref
from .activation_triton import activate, pointwise
from .aot import AotCase
from .batching import RowSort, TaskMap, find_task, tile_capacity
from .device import registers, sm_count, triton_since
from .tune import FP32_BLOCK_K, GemmConfig, Problem, cdiv, heuristic


class Epilogue(NamedTuple):
    """What happens to the fp32 accumulator: the arguments of `activation.activate_ref`."""

    activation: str = "none"
    gated: bool = False
    interleaved: bool = False
    limit: float | None = None
    alpha: float = 1.0
    up_offset: float = 0.0


@triton.jit
def dot_add(left, right, acc):
    """acc + left @ right in fp32; the terms of an fp32 block are summed apart, then added."""
    if left.dtype == tl.float32:
        # With the default, 0, the compiler would make the sum the start of the dot's own chain.
        acc += tl.dot(left, right, input_precision="ieee", max_num_imprecise_acc=1)
    else:
        acc = tl.dot(left, right, acc)
    return acc


@triton.jit
def _tile(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    order_ptr,
    expert,
    row_start,
    rows,
    m,
    n,
    contraction,
    width,
    limit,
    alpha,
    up_offset,
    TOP_K: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    SWAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Rows [m*BLOCK_M, ...) of a task times output columns [n*BLOCK_N, ...) of its expert.

    Padding rows repeat the task's first row and padding columns the expert's first weight row (or
    zero, when transposed): they read valid memory and are not stored.
    """
    COLS: tl.constexpr = BLOCK_N * 2 if GATED else BLOCK_N
    # Gate and up columns alternate in runs of PAIR. A thread holds neighbours of an accumulator of
    # the tensor core along its columns (c, c+1) and, when swapped, along its rows (c, c+8); weights
    # that are contiguous along the columns also want runs that fill a 16-byte load.
    PAIR: tl.constexpr = 1 if (INTERLEAVED and TRANSPOSED) or not (SWAP or TRANSPOSED) else 8
    row = m * BLOCK_M + tl.arange(0, BLOCK_M)
    keep_row = row < rows
    position = row_start + tl.where(keep_row, row, 0)
    if TOP_K > 0:
        source = tl.load(order_ptr + position) // TOP_K
    else:
        source = position
    col = tl.arange(0, COLS)
    if GATED:
        out_col = n * BLOCK_N + (col // (2 * PAIR)) * PAIR + col % PAIR
        half = (col // PAIR) % 2
        if INTERLEAVED and PAIR == 1:
            weight_row = n * COLS + col
        elif INTERLEAVED:
            weight_row = out_col * 2 + half
        else:
            weight_row = out_col + half * width
        weight_rows = width * 2
    else:
        out_col = n * BLOCK_N + col
        weight_row = out_col
        weight_rows = width
    if not (EVEN_N or TRANSPOSED):
        weight_row = tl.where(out_col < width, weight_row, 0)
    k = tl.arange(0, BLOCK_K)
    base = weight_ptr + expert.to(tl.int64) * weight_rows * contraction
    x_ptrs = x_ptr + source[:, None].to(tl.int64) * contraction + k[None, :]
    if TRANSPOSED:
        w_ptrs = base + k[:, None] * weight_rows + weight_row[None, :]
        w_step = BLOCK_K * weight_rows
    else:
        w_ptrs = base + weight_row[:, None] * contraction + k[None, :]
        w_step = BLOCK_K
    if SWAP:
        acc = tl.zeros((COLS, BLOCK_M), tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, COLS), tl.float32)
    for start in range(0, contraction, BLOCK_K):
        keep_k = k < contraction - start
        if EVEN_K:
            x = tl.load(x_ptrs)
        else:
            x = tl.load(x_ptrs, mask=keep_k[None, :], other=0.0)
        if TRANSPOSED and not (EVEN_K and EVEN_N):
            keep_w = keep_k[:, None] & (weight_row < weight_rows)[None, :]
            w = tl.load(w_ptrs, mask=keep_w, other=0.0)
        elif EVEN_K:
            w = tl.load(w_ptrs)
        else:
            w = tl.load(w_ptrs, mask=keep_k[None, :], other=0.0)
        if SWAP:
            left = tl.trans(w) if TRANSPOSED else w
            acc = dot_add(left, tl.trans(x), acc)
        else:
            right = w if TRANSPOSED else tl.trans(w)
            acc = dot_add(x, right, acc)
        x_ptrs += BLOCK_K
        w_ptrs += w_step
    if SWAP:
        acc = tl.trans(acc)
    if HAS_BIAS:
        bias_ptrs = bias_ptr + expert.to(tl.int64) * weight_rows + weight_row
        bias = tl.load(bias_ptrs, mask=weight_row < weight_rows, other=0.0)
        acc += bias[None, :].to(tl.float32)
    if GATED:
        pairs = tl.reshape(acc, (BLOCK_M, BLOCK_N // PAIR, 2, PAIR))
        pairs = tl.reshape(tl.permute(pairs, (0, 1, 3, 2)), (BLOCK_M, BLOCK_N, 2))
        gate, up = tl.split(pairs)
        result = activate(gate, up, ACTIVATION, HAS_LIMIT, limit, alpha, up_offset)
    else:
        if HAS_LIMIT:
            acc = tl.where(acc > limit, limit, acc)
        result = pointwise(acc, ACTIVATION, alpha)
    store_col = n * BLOCK_N + tl.arange(0, BLOCK_N)
    out_ptrs = out_ptr + position[:, None].to(tl.int64) * width + store_col[None, :]
    keep = keep_row[:, None] if EVEN_N else keep_row[:, None] & (store_col[None, :] < width)
    tl.store(out_ptrs, result.to(out_ptr.dtype.element_ty), mask=keep)


@triton.jit
def grouped_mm_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    order_ptr,
    tile_end_ptr,
    task_ptr,
    row_start_ptr,
    rows_ptr,
    height_ptr,
    total_ptr,
    contraction8,
    width8,
    limit,
    alpha,
    up_offset,
    ENTRIES: tl.constexpr,
    ENTRIES_POW2: tl.constexpr,
    HEIGHTS: tl.constexpr,
    TOP_K: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    SWAP_UP_TO: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """out[r] = activation(x[source(r)] @ weight[expert of r] + bias), for every routed row r.

    x_ptr: (T, C) with `order_ptr` (S,) int32 slots, source(r) = order[r] // TOP_K; or (S, C) in
    sorted order when TOP_K = 0 (`order_ptr` unused). weight_ptr: (E, U, C), or (E, C, U) when
    TRANSPOSED; gate and up are its halves along U, or alternate when INTERLEAVED. bias_ptr: (E, U).
    out_ptr: (S, N), rows in sorted order. The next six: the `TaskMap`, ENTRIES long. C and N come
    divided by 8, so that the compiler knows rows to be aligned.

    Tiles are numbered in groups of GROUP_M row tiles times all column blocks, rows fastest: with
    GROUP_M = 2 and three column blocks the programs do (0,0) (1,0) (0,1) (1,1) (0,2) (1,2).
    One expert, x = [[1, 2]], weight rows [1, 1] and [3, -1], no bias, "none": out = [[3, 1]].
    """
    contraction = contraction8 * 8
    width = width8 * 8
    columns = tl.cdiv(width, BLOCK_N)
    tiles = tl.load(total_ptr + 1)
    programs = tl.cdiv(tiles, GROUP_M) * GROUP_M * columns
    for program in range(tl.program_id(0), programs, tl.num_programs(0)):
        group = program // (GROUP_M * columns)
        inside = program % (GROUP_M * columns)
        tile = group * GROUP_M + inside % GROUP_M
        n = inside // GROUP_M
        if tile < tiles:
            entry, m = find_task(tile_end_ptr, tile, ENTRIES, ENTRIES_POW2)
            expert = tl.load(task_ptr + entry)
            row_start = tl.load(row_start_ptr + entry)
            rows = tl.load(rows_ptr + entry)
            height = tl.load(height_ptr + entry)
            for h in tl.static_range(len(HEIGHTS)):
                if height == HEIGHTS[h]:
                    _tile(
                        x_ptr, weight_ptr, bias_ptr, out_ptr, order_ptr,
                        expert, row_start, rows, m, n, contraction, width,
                        limit, alpha, up_offset,
                        TOP_K, GATED, INTERLEAVED, TRANSPOSED, ACTIVATION, HAS_BIAS, HAS_LIMIT,
                        EVEN_K, EVEN_N, HEIGHTS[h] <= SWAP_UP_TO, HEIGHTS[h], BLOCK_N, BLOCK_K,
                    )  # fmt: skip


@lru_cache(maxsize=4096)
def plan_grouped_mm(
    slots: int,
    entries: int,
    contraction: int,
    weight_shape: tuple[int, ...],
    top_k: int,
    heights: tuple[int, ...],
    has_bias: bool,
    transposed: bool,
    epilogue: Epilogue,
    config: GemmConfig,
    itemsize: int,
) -> tuple[int, int, dict[str, Any]]:
    """Output width, programs and constants of a launch: a pure function of shapes and choices.

    Raises:
        ValueError: see `grouped_mm`.
    """
    _, first, second = weight_shape
    weight_rows, depth = (second, first) if transposed else (first, second)
    width = weight_rows // 2 if epilogue.gated else weight_rows
    if depth != contraction:
        raise ValueError(f"weight must contract {contraction} elements, got shape {weight_shape}")
    if contraction % 8 or width % 8:
        raise ValueError(
            f"widths must be multiples of 8, got {contraction} and {width}; pad with zeros"
        )
    if weight_rows * contraction >= 2**31:
        raise ValueError(f"an expert must have fewer than 2**31 weights, got {weight_shape}")
    block_k = FP32_BLOCK_K if itemsize == 4 else config.block_k
    row_tiles = cdiv(tile_capacity(slots, entries, heights), config.group_m) * config.group_m
    # The largest gated, biased tiles spill from Triton 3.9 on, unless their columns are masked.
    large = max(heights) >= 128 and itemsize == 2
    masked = epilogue.gated and has_bias and large and triton_since((3, 9))
    constants: dict[str, Any] = {
        "ENTRIES": entries,
        "ENTRIES_POW2": 1 << (entries - 1).bit_length(),
        "HEIGHTS": heights,
        "TOP_K": top_k,
        "GATED": epilogue.gated,
        "INTERLEAVED": epilogue.interleaved,
        "TRANSPOSED": transposed,
        "ACTIVATION": epilogue.activation,
        "HAS_BIAS": has_bias,
        "HAS_LIMIT": epilogue.limit is not None,
        "EVEN_K": contraction % block_k == 0,
        "EVEN_N": width % config.block_n == 0 and not masked,
        "SWAP_UP_TO": config.swap_up_to,
        "BLOCK_N": config.block_n,
        "BLOCK_K": block_k,
        "GROUP_M": config.group_m,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": True,
        **(registers(168, (3, 9)) if itemsize == 4 else {}),
    }
    return width, row_tiles * cdiv(width, config.block_n), constants


def grouped_mm(
    x: Tensor,
    weight: Tensor,
    sort: RowSort,
    tasks: TaskMap,
    *,
    top_k: int,
    heights: tuple[int, ...],
    bias: Tensor | None = None,
    transposed: bool = False,
    epilogue: Epilogue = Epilogue(),  # noqa: B008 - immutable
    config: GemmConfig = GemmConfig(),  # noqa: B008 - immutable
    num_sms: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Rows (S, N) in sorted order: each routed row times its expert's weights, one launch.

    Args:
        x: tokens (T, C) read through the sort when `top_k` > 0, sorted rows (S, C) when it is 0.
        weight: (E, U, C), or (E, C, U) when `transposed`; dtype of x.
        sort, tasks: of `batch_rows`, built with the same `heights`.
        bias: (E, U), dtype of x.
        config: the cut; fp32 takes FP32_BLOCK_K for its block_k, which would show in the bits.
        num_sms: the most programs resident, times `config.ctas_per_sm` (at least 1); None: all.
        out: (S, N) contiguous, dtype of x, to write the rows of `tasks` into; None: a new one.

    Raises:
        ValueError: widths do not fit, are not multiples of 8, or an expert has 2**31 weights.
    """
    slots, contraction = sort.order_S.numel(), x.shape[1]
    width, programs, constants = plan_grouped_mm(
        slots, tasks.task_N.numel(), contraction, tuple(weight.shape), top_k, heights,
        bias is not None, transposed, epilogue, config, x.element_size(),
    )  # fmt: skip
    if out is None:
        out = torch.empty((slots, width), dtype=x.dtype, device=x.device)
    if num_sms is None and config.ctas_per_sm:
        num_sms = sm_count(x.device)
    if num_sms is not None:
        programs = min(programs, num_sms * max(1, config.ctas_per_sm))
    if programs:
        grouped_mm_kernel[(programs,)](
            x, weight, bias, out, sort.order_S, *tasks[:6], contraction // 8, width // 8,
            epilogue.limit or 0.0, epilogue.alpha, epilogue.up_offset, **constants,
        )  # fmt: skip
    return out


def grouped_mm_ref(
    x: Tensor,
    weight: Tensor,
    sort: RowSort,
    *,
    top_k: int,
    bias: Tensor | None = None,
    transposed: bool = False,
    epilogue: Epilogue = Epilogue(),  # noqa: B008 - immutable
) -> Tensor:
    """The torch twin of `grouped_mm`, expert by expert in fp32 (fp64 stays), rounded once.

    Positions that belong to nobody are zero.
    """
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    source_S = (sort.order_S // top_k if top_k else torch.arange(x.shape[0])).long()
    offsets = sort.offsets_E1.tolist()
    width = weight.shape[2 if transposed else 1] // (2 if epilogue.gated else 1)
    out = x.new_zeros((source_S.numel(), width))
    for e in range(weight.shape[0]):
        rows = slice(offsets[e], offsets[e + 1])
        matrix = weight[e].to(compute)
        product = x[source_S[rows]].to(compute) @ (matrix if transposed else matrix.T)
        if bias is not None:
            product = product + bias[e].to(compute)
        if epilogue.activation != "none":
            product = activate_ref(product, **epilogue._asdict())
        out[rows] = product.to(x.dtype)
    return out


def aot_cases() -> list[AotCase]:
    """The cuts that the heuristics choose, by architecture, in both layouts and in fp32."""
    gate, plain = Epilogue("silu", gated=True), Epilogue()
    oss = Epilogue("silu", True, True, 7.0, 1.702, 1.0)
    models = (
        ("swiglu", gate, "bfloat16", False),
        ("down", plain, "bfloat16", False),
        ("oss", oss, "bfloat16", True),
        ("halves", gate, "bfloat16", True),
        ("swiglu_tails", gate, "bfloat16", False),
        ("oss_tails", oss, "bfloat16", True),
        ("columns", plain, "bfloat16", True),
        ("fp32", gate, "float32", False),
        ("fp32_tails", gate, "float32", False),
        ("fp32_oss_tails", oss, "float32", True),
        ("fp32_columns_tails", plain, "float32", True),
    )
    return [
        _aot_case(name, epilogue, dtype, transposed, tokens, arch)
        for name, epilogue, dtype, transposed in models
        for tokens in (16, 512, 8192)
        for arch in (80, 90, 100)
    ]


def _aot_case(
    name: str, epilogue: Epilogue, dtype: str, transposed: bool, tokens: int, arch: int
) -> AotCase:
    uneven = name.endswith("tails")
    problem = Problem(tokens, 8, 128, 2048, 768, True, 2, dtype, arch, transposed=transposed)
    config = heuristic(problem)
    cut = config.up if epilogue.gated else config.down
    pointer = {"bfloat16": "*bf16", "float32": "*fp32"}[dtype]
    depth, width = (2040, 760) if uneven else (2048, 768)
    weight_rows = width * 2 if epilogue.gated else width
    shape = (128, depth, weight_rows) if transposed else (128, weight_rows, depth)
    top_k = 8 if epilogue.gated else 0
    _, _, planned = plan_grouped_mm(
        tokens * 8, 128, depth, shape, top_k, config.heights, True, transposed, epilogue, cut,
        4 if dtype == "float32" else 2,
    )  # fmt: skip
    constants = dict(planned)
    names = {"num_warps", "num_stages", "enable_fp_fusion", "maxnreg"} & constants.keys()
    options = {name: constants.pop(name) for name in names}
    tables = ("order", "tile_end", "task", "row_start", "rows", "height", "total")
    return AotCase(
        name=f"grouped_mm/{name}_T{tokens}_sm{arch}",
        fn=grouped_mm_kernel,
        signature={f"{n}_ptr": pointer for n in ("x", "weight", "bias", "out")}
        | {f"{n}_ptr": "*i32" for n in tables}
        | {"contraction8": "i32", "width8": "i32"}
        | {n: "fp32" for n in ("limit", "alpha", "up_offset")},
        constexprs=constants,
        options=options,
        archs=(arch,),
        aligned=() if uneven else ("contraction8", "width8"),
        wgmma=dtype == "bfloat16",
        quick=arch == 90 and tokens == 512,
    )
