"""Host side of `flexed`: the launch of both products at once by tiles as tall as their rows.

S routed rows · T tokens · E experts · H hidden width · I intermediate width · K top-k
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..aot import AotCase
from ..batching import batch_rows
from ..combine import combine
from ..launching import launch
from ..taskmap import Order, TaskMap
from .flexed import flex_kernel
from .launch import HopperConfig, _layout, weight_descriptor
from .pair import FIRST, pair_mm_hopper_ref, rows_descriptor
from .tiles import check_triton

flex_mm_hopper_ref = pair_mm_hopper_ref
"""The torch twin: that of `pair_mm_hopper`, which computes the same."""


def _constants(config: HopperConfig, entries: int, gated: bool) -> dict[str, Any]:
    return {
        "N": entries,
        "LANES": max(32, 1 << (entries - 1).bit_length()),
        "GATED": gated,
        "BM": config.bm,
        "BN": config.bn,
        "BK": config.bk,
        "NB": config.stages,
        "FIRST": FIRST if config.bn == 128 else config.stages,
        "CREG": 136 if config.bn == 128 else 224,
        "LREG": 56,
    }


def _options(config: HopperConfig) -> dict[str, int]:
    """Three warpgroups share the registers, a thread that multiplies has more than one that loads.

    Narrow tiles leave some, so that the combine's programs wait for the end on the same SMs.
    """
    return {"num_warps": 4, "maxnreg": 112 if config.bn == 128 else 168}


def flex_mm_hopper(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    tasks: TaskMap,
    act: Tensor,
    out: Tensor,
    *,
    config: HopperConfig,
    num_sms: int,
    order_S: Tensor,
    top_k: int,
    gated: bool = False,
    activation: str = "none",
    limit: float | None = None,
    alpha: float = 1.0,
    up_offset: float = 0.0,
    pdl: bool = False,
) -> Tensor:
    """``out[row] = act(x[token of row] @ up[e].T) @ down[e].T``, one launch, `act` in between.

    Args:
        x: (T, H) tokens, read through `order_S` (int32 slots, token = slot // top_k).
        up: (E, U, H), U = 2I when `gated`. down: (E, H, I). bf16 or fp16; H, I multiples of 64.
        tasks: built with ``heights=(config.bm,)`` and given to no other launch of this kind: its
            heights become counters.
        act: (S, I) scratch. out: (S, H), written where rows are live.
        num_sms: SM budget; the grid has as many programs.
        pdl: start while the launch before still runs and wait for it on the device.
    """
    check_triton()
    hidden, inner = x.shape[1], act.shape[1]
    launch(
        flex_kernel,
        num_sms,
        x,
        order_S,
        weight_descriptor(up, True, config) if gated else rows_descriptor(up, config),
        rows_descriptor(down, config),
        act,
        out,
        tasks.tile_end_N,
        tasks.task_N,
        tasks.row_start_N,
        tasks.rows_N,
        tasks.height_N,
        tasks.tickets_2,
        hidden,
        inner,
        -(-inner // (config.bn // 2 if gated else config.bn)),
        -(-hidden // config.bn),
        top_k,
        0.0 if limit is None else float(limit),
        float(alpha),
        float(up_offset),
        ACTIVATION=activation,
        HAS_LIMIT=limit is not None,
        PDL=pdl,
        launch_pdl=pdl,
        **_constants(config, tasks.task_N.numel(), gated),
        **_options(config),
    )
    return out


def layer_flex(
    hidden: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    up: Tensor,
    down: Tensor,
    *,
    config: HopperConfig,
    order: Order,
    num_sms: int,
    epilogue: dict[str, Any],
    counters: Tensor | None,
) -> Tensor:
    """A layer by `flex_mm_hopper`: with the sort and the combine, three launches.

    `epilogue`: gated, activation, limit, alpha, up_offset. `counters`: as of `experts_hopper`.
    """
    tokens, top_k = topk_ids.shape
    sort, tasks = batch_rows(
        topk_ids, up.shape[0], heights=(config.bm,), order=order, counters=counters, pdl=True
    )
    rows_SH = flex_mm_hopper(
        hidden,
        up,
        down,
        tasks,
        hidden.new_empty((tokens * top_k, down.shape[2])),
        hidden.new_empty((tokens * top_k, hidden.shape[1])),
        config=config,
        num_sms=num_sms,
        order_S=sort.order_S,
        top_k=top_k,
        pdl=True,
        **epilogue,
    )
    return combine(rows_SH, sort.position_S.view(tokens, top_k), topk_weights, pdl=True)


def aot_cases() -> list[AotCase]:
    """Every height of tiles and width of weights, gated; one ungated."""
    cases = []
    for bm, bn, stages, gated in (
        (64, 128, 8, True), (64, 256, 5, True), (128, 128, 6, True), (128, 256, 4, True),
        (64, 128, 8, False), (128, 128, 6, False), (128, 256, 4, False),
    ):  # fmt: skip
        config = HopperConfig("flex", bm, bn, stages)
        box = (1, bn // 16, 2, 8, 64)
        described = f"tensordesc<bf16[1, {bn // 16}, 2, 8, 64],{_layout(box, torch.bfloat16)!r}>"
        pointers = ("tile_end_ptr", "task_ptr", "row_start_ptr", "rows_ptr", "done_ptr")
        case = AotCase(
            name=f"hopper/flex-{bm}x{bn}-{'gated' if gated else 'relu'}",
            fn=flex_kernel,
            signature={
                "x": "*bf16", "order_ptr": "*i32", "up_desc": described, "down_desc": described,
                "act_ptr": "*bf16", "out_ptr": "*bf16",
                **dict.fromkeys((*pointers, "ticket_ptr"), "*i32"),
                **dict.fromkeys(("hidden", "inner", "up_n_tiles", "down_n_tiles"), "i32"),
                "top_k": "i32",
                **dict.fromkeys(("limit", "alpha", "up_offset"), "fp32"),
            },
            constexprs={
                **_constants(config, 128, gated),
                "ACTIVATION": "silu" if gated else "relu", "HAS_LIMIT": False, "PDL": True,
            },
            options=_options(config) | {"launch_pdl": True},
            archs=(90,),
            aligned=("hidden", "inner"),
            unaligned=("ticket_ptr",),
            ptx={90: ("cp.async.bulk.tensor", "griddepcontrol.launch_dependents")},
            wgmma=True,
            gluon=True,
            quick=bm == 128 and bn == 256,
        )  # fmt: skip
        cases.append(case)
    return cases
