"""Host side of the Hopper grouped GEMM: descriptors, one launch over a task map, its torch twin.

    S routed rows · T tokens · E experts · C output columns · U weight rows (2C gated) · K depth

Descriptors are values of (pointer, shape, box) and are cached, so a repeated shape builds none.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..activation import activate_ref
from ..aot import AotCase
from ..launching import launch
from ..taskmap import TaskMap
from .decode import decode_kernel
from .prefill import prefill_kernel
from .tall import tall_kernel
from .tiles import check_triton
from .trim import BOX, trim_kernel

LOADER_REGISTERS = {
    "prefill": {True: 40, False: 24},
    "tall": {False: 24},
    "trim": {True: 56, False: 24},
    "decode": {True: 56, False: 40},
}
CONSUMER_REGISTERS = {
    "prefill": {True: 232, False: 240}, "tall": {False: 240}, "trim": {True: 224, False: 240},
}  # fmt: skip
KERNELS = {
    "prefill": prefill_kernel, "tall": tall_kernel, "trim": trim_kernel, "decode": decode_kernel,
}  # fmt: skip
RAGGED_EXTENT = 0x7FFF0000
RAGGED_ROWS = 1 << 30
GLUON_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


class HopperConfig(NamedTuple):
    """How one grouped GEMM is tiled; moves time, never bits.

    `prefill` tiles are 128 rows by `bn` weight rows, `decode` tiles `bm` rows (16 to 128) by `bn`
    (64 or 128), `tall` tiles up to `bm` sorted rows (a multiple of 64, to 384) by 128, `trim` tiles
    as many rows as there are, up to `bm` (a multiple of 16, to 160), by 256. `pair` and `flex` are
    both products in one launch, by tiles of `bm` rows and by such as tall as their rows.
    """

    kernel: Literal["prefill", "tall", "trim", "decode", "pair", "flex"]
    bm: int
    bn: int
    stages: int
    bk: int = 64
    group_m: int = 8
    ctas_per_sm: int = 1


class SharedTiles(NamedTuple):
    """A task map whose tiles several launches draw, see `tiles.draw_shared`.

    `counter_2`: [0, programs of all launches], int32. `wanted_1`: not 0 while guests' SMs are
    wanted back, int32. The owner's launch may run beside guests' and ends when every tile is drawn;
    whoever reads the output waits for all of them.
    """

    counter_2: Tensor
    wanted_1: Tensor
    role: Literal["owner", "guest"]


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


def _row_box(config: HopperConfig) -> tuple[int, int]:
    """Rows and depth of one load of sorted rows: tall tiles load them in units, trim in boxes."""
    return {"tall": 64, "trim": BOX.value}.get(config.kernel, config.bm), config.bk


def _store_box(config: HopperConfig, gated: bool) -> tuple[int, int]:
    """Rows and columns of one store: pieces, but of decode whole tiles."""
    if config.kernel != "decode":
        return (32 if config.kernel == "trim" else 64), 64
    return config.bm, config.bn // (2 if gated else 1)


def _constants(
    config: HopperConfig, *, entries: int, gather: bool, gated: bool, bias: bool = False
) -> dict[str, Any]:
    registers = {}
    if config.kernel in CONSUMER_REGISTERS:
        registers = {"CREG": CONSUMER_REGISTERS[config.kernel][gather]}
    return {
        "N": entries,
        "LANES": max(32, 1 << (entries - 1).bit_length()),
        "GROUP_M": config.group_m,
        "GATED": gated,
        "GATHER": gather,
        "BM": config.bm,
        "BN": config.bn,
        "BK": config.bk,
        "NB": config.stages,
        "HAS_BIAS": bias,
        "LREG": LOADER_REGISTERS[config.kernel][gather],
        **registers,
    }


def _options(config: HopperConfig) -> dict[str, Any]:
    """Warps and register caps: three warpgroups share 168 each, small tiles leave room for two."""
    if config.kernel != "decode":
        return {"num_warps": 4, "maxnreg": 168}
    return {"num_warps": 4, "maxnreg": 128 if config.bm <= 32 else 255}


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
    bias: Tensor | None = None,
    gated: bool = False,
    activation: str = "none",
    limit: float | None = None,
    alpha: float = 1.0,
    up_offset: float = 0.0,
    ticket: int | SharedTiles | None = None,
    pdl: Literal["off", "wait", "prefetch"] = "off",
) -> Tensor:
    """``out[row] = act(x[token of row] @ weight[e].T + bias[e])`` for the rows of every task.

    One launch.

    Args:
        x: (T, K) tokens, read through `order_S` (int32 slots, token = slot // top_k), or already
            sorted rows (S, K) when `order_S` is None. bf16 or fp16, K a multiple of `config.bk`.
        weight: (E, U, K); U = 2C when `gated`.
        bias: (E, C), dtype of x, of an ungated product.
        tasks: built with ``heights=(config.bm,)``.
        out: (S, C), written where rows are live.
        num_sms: SM budget; the persistent grid has `num_sms * ctas_per_sm` programs.
        ticket: which of `tasks.tickets_2` to draw tiles from; None: a fixed stride; `SharedTiles`:
            several launches draw the `tall` tiles of this map.
        pdl: how to overlap with the launch before, see `pipeline.begin`.

    Raises:
        RuntimeError: Triton is outside the tested range.
        ValueError: `tall` tiles with rows that are not sorted, shared tiles that are not `tall`,
            or a bias of a gated product or of `trim` tiles.
    """
    check_triton()
    if gated and bias is not None:
        raise ValueError("only ungated products have a bias here; use the Triton path")
    if config.kernel == "trim" and bias is not None:
        raise ValueError("trim tiles have no bias; use tall or prefill tiles")
    if config.kernel == "tall" and order_S is not None:
        raise ValueError("tall tiles take sorted rows; call gather_rows first and pass no order_S")
    shared = ticket if isinstance(ticket, SharedTiles) else None
    if shared and config.kernel != "tall":
        raise ValueError(f"only tall tiles are shared by launches, got {config.kernel}")
    depth, cols = weight.shape[2], out.shape[1]
    gather = order_S is not None
    operand = x if gather else _descriptor(x, list(x.shape), [depth, 1], _row_box(config))
    launch(
        KERNELS[config.kernel],
        num_sms * config.ctas_per_sm,
        operand,
        order_S if gather else shared.wanted_1 if shared else tasks.task_N,
        weight_descriptor(weight, gated, config),
        ragged_descriptor(out, *_store_box(config, gated)),
        tasks.tile_end_N,
        tasks.task_N,
        tasks.row_start_N,
        tasks.rows_N,
        tasks.total_2,
        _ticket_counter(tasks, ticket),
        tasks.task_N if bias is None else bias,
        depth,
        cols,
        weight.shape[0],
        -(-cols // (config.bn // 2 if gated else config.bn)),
        top_k,
        0.0 if limit is None else float(limit),
        float(alpha),
        float(up_offset),
        ACTIVATION=activation,
        HAS_LIMIT=limit is not None,
        DYNAMIC=shared.role if shared else ticket is not None,
        PDL=pdl,
        launch_pdl=pdl != "off",
        **_constants(
            config,
            entries=tasks.task_N.numel(),
            gather=gather,
            gated=gated,
            bias=bias is not None,
        ),
        **_options(config),
    )
    return out


def _ticket_counter(tasks: TaskMap, ticket: int | SharedTiles | None) -> Tensor:
    """Where a launch's programs draw their tiles."""
    if isinstance(ticket, SharedTiles):
        return ticket.counter_2
    return tasks.total_2 if ticket is None else tasks.tickets_2[ticket:]


def grouped_mm_hopper_ref(
    x: Tensor,
    weight: Tensor,
    tasks: TaskMap,
    *,
    order_S: Tensor | None = None,
    top_k: int = 1,
    bias: Tensor | None = None,
    gated: bool = False,
    activation: str = "none",
    limit: float | None = None,
    alpha: float = 1.0,
    up_offset: float = 0.0,
) -> Tensor:
    """The torch twin of `grouped_mm_hopper`: fp32 products, one rounding; rows of no task are 0."""
    rows_SK = x if order_S is None else x[order_S.long() // top_k]
    cols = weight.shape[1] // (2 if gated else 1)
    out_SC = x.new_zeros((rows_SK.shape[0], cols))
    for task, start, rows in zip(tasks.task_N, tasks.row_start_N, tasks.rows_N, strict=True):
        span = slice(int(start), int(start) + int(rows))
        product = rows_SK[span].float() @ weight[int(task)].float().T
        if bias is not None:
            product = product + bias[int(task)].float()
        if activation != "none" or gated:
            product = activate_ref(
                product,
                activation=activation,
                gated=gated,
                limit=limit,
                alpha=alpha,
                up_offset=up_offset,
            )
        out_SC[span] = product.to(x.dtype)
    return out_SC


def _aot_case(
    config: HopperConfig,
    gather: bool,
    gated: bool,
    dtype: str,
    quick: bool,
    bias: bool = False,
    role: str = "",
) -> AotCase:
    torch_dtype = torch.bfloat16 if dtype == "bf16" else torch.float16

    def described(*box: int) -> str:
        return f"tensordesc<{dtype}[{', '.join(map(str, box))}],{_layout(box, torch_dtype)!r}>"

    weight = (1, config.bn // 16, 2, 8, config.bk) if gated else (1, config.bn, config.bk)
    integers = ("order_ptr", "tile_end_ptr", "task_ptr", "row_start_ptr", "rows_ptr")
    counters = ("total_ptr", "ticket_ptr")
    kind = "up" if gated else "down"
    if config.kernel == "trim" and gather:
        kind += "-gathered"
    if bias:
        kind = "relu-gathered" if gather else "relu"
    kind += f"-{role}" if role else ""
    return AotCase(
        name=f"hopper/{config.kernel}-{config.bm}x{config.bn}-{kind}-{dtype}",
        fn=KERNELS[config.kernel],
        signature={
            "x": f"*{dtype}" if gather else described(*_row_box(config)),
            "w_desc": described(*weight),
            "out_desc": described(1, 1, *_store_box(config, gated)),
            **dict.fromkeys((*integers, *counters), "*i32"),
            "bias_ptr": f"*{dtype}" if bias else "*i32",
            **dict.fromkeys(("K", "cols", "experts", "n_tiles", "top_k"), "i32"),
            **dict.fromkeys(("limit", "alpha", "up_offset"), "fp32"),
        },
        constexprs={
            **_constants(config, entries=128, gather=gather, gated=gated, bias=bias),
            "ACTIVATION": "silu" if gated else "relu" if bias else "none",
            "HAS_LIMIT": False,
            "DYNAMIC": role or True,
            "PDL": "wait" if gated else "prefetch",
        },
        options=_options(config) | {"launch_pdl": True},
        archs=(90,),
        aligned=("K", "cols"),
        unaligned=("ticket_ptr",),
        ptx={90: ("cp.async.bulk.tensor", "griddepcontrol.launch_dependents")},
        wgmma=True,
        gluon=True,
        quick=quick,
    )


def aot_cases() -> list[AotCase]:
    """Both products on every tile that `experts.choose` can pick, bf16; one in fp16."""
    tiles = [HopperConfig("prefill", 128, 256, 4)]
    tiles += [HopperConfig("decode", bm, 128, stages) for bm, stages in ((16, 5), (32, 5), (64, 8))]
    tiles += [HopperConfig("decode", 16, 64, 12), HopperConfig("decode", 128, 128, 6)]
    tall = [HopperConfig("tall", 384, 128, 3), HopperConfig("tall", 256, 128, 4)]
    cases = [
        _aot_case(tile, False, gated, "bf16", gated) for tile in tall for gated in (True, False)
    ]
    trim = [HopperConfig("trim", bm, 256, stages) for bm, stages in ((128, 4), (160, 4))]
    cases += [
        _aot_case(tile, gather, gated, "bf16", tile.bm == 160)
        for tile in trim
        for gather, gated in ((False, True), (False, False), (True, True), (True, False))
        if tile.bm == 160 or not gather or gated
    ]
    cases += [
        _aot_case(tile, gather, gather, "bf16", tile.kernel == "prefill" or tile.bm == 16)
        for tile in tiles
        for gather in (True, False)
    ]
    # Three-layer experts: ungated, biased, activated; a tile of each kernel, gathered and sorted.
    narrow = ((32, 12), (64, 10), (128, 8))
    tiles += [HopperConfig("decode", bm, 64, stages) for bm, stages in narrow]
    heights = ((64, 8), (128, 6), (192, 4), (320, 3))
    tiles += [*(HopperConfig("tall", bm, 128, stages) for bm, stages in heights), *tall]
    cases += [
        _aot_case(tile, gather, False, "bf16", tile.bm == 128, bias=True)
        for tile in tiles
        for gather in ((False,) if tile.kernel == "tall" else (True, False))
    ]
    cases += [
        _aot_case(tall[1], False, gated, "bf16", gated, role=role)
        for role in ("owner", "guest")
        for gated in (True, False)
    ]
    return [*cases, _aot_case(tiles[0], True, True, "fp16", False)]
