"""Host side of `paired`: descriptors, the launch of both products at once, its torch twin.

    S routed rows · T tokens · E experts · H hidden width · I intermediate width · K top-k

Of one token, and of few, the launch also makes the weighted sum: one launch is the whole layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..aot import AotCase
from ..batching import batch_rows, batch_rows_ref
from ..combine import combine
from ..launching import launch
from ..taskmap import Order, TaskMap
from .few import MAX_SLOTS, few_tasks
from .launch import HopperConfig, _descriptor, _layout, grouped_mm_hopper_ref, weight_descriptor
from .paired import pair_kernel
from .single import one_token
from .tiles import check_triton
from .zeros import WORDS, zeroed

LOADER_REGISTERS = 56
FIRST_COLUMN = 1 + MAX_SLOTS
"""Counters of few tokens: a ticket, their slots, and from here on the column tiles of H."""
FLIGHT = {64: 4, 128: 3}
"""Deep stages asked for at once, by weight rows: more do not come sooner, see `pair_kernel`."""
FIRST = 3
"""Stages whose weights are asked for before their rows, where there are rows to look up."""
FEW_TOKENS = 16
"""Up to so many tokens an expert's rows are one tile."""
FEW_SLOTS = 64
"""Of more slots a program finds the tasks more slowly than the sort."""


def rows_descriptor(weight: Tensor, config: HopperConfig) -> TensorDescriptor:
    """TMA view of a weight (E, R, K) by rows, in the box of `weight_descriptor`'s paired view."""
    experts, rows, depth = weight.shape
    shape = [experts, rows // 16, 2, 8, depth]
    strides = [rows * depth, 16 * depth, 8 * depth, depth, 1]
    return _descriptor(weight, shape, strides, (1, config.bn // 16, 2, 8, config.bk))


def _constants(
    config: HopperConfig, entries: int, gated: bool, found: str, summed: int, counted: bool
) -> dict[str, Any]:
    """`found`: where tasks come from, "one", "few" or "map"; `summed`: slots of a token, or 0.

    Down weights wait where rows are few and tiles wide: narrow ones share an SM, their short rings
    cannot hold many.
    """
    flight = min(config.stages, FLIGHT[config.bn]) if config.bk == 128 else config.stages
    return {
        "N": entries,
        "LANES": max(32, 1 << (entries - 1).bit_length()),
        "ONE": found == "one",
        "FEW": found == "few",
        "TOP_K": summed,
        "SUM": summed > 0,
        "COUNT": counted,
        "GATED": gated,
        "BM": config.bm,
        "BN": config.bn,
        "BK": config.bk,
        "NB": config.stages,
        "LATE": (config.bm, config.bn) == (16, 128),
        "FLIGHT": flight,
        "FIRST": min(flight, FIRST) if config.bm == 64 else flight,
        "LREG": LOADER_REGISTERS,
    }


def _options(config: HopperConfig) -> dict[str, int]:
    # With all registers of an SM taken, the combine's programs could not wait there for the end.
    most = {16: 64, 32: 128, 64: 112}.get(config.bm, 255)
    return {"num_warps": 4, "maxnreg": most}


def pair_mm_hopper(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    tasks: TaskMap | Tensor,
    act: Tensor,
    out: Tensor,
    *,
    config: HopperConfig,
    num_sms: int,
    order_S: Tensor | None = None,
    top_k: int,
    gated: bool = False,
    activation: str = "none",
    limit: float | None = None,
    alpha: float = 1.0,
    up_offset: float = 0.0,
    counters: Tensor | None = None,
    weighted: tuple[Tensor, Tensor] | None = None,
    counted: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """``out[row] = act(x[token of row] @ up[e].T) @ down[e].T``, one launch, `act` in between.

    Args:
        x: (T, H) tokens, read through `order_S` (int32 slots, token = slot // top_k).
        up: (E, U, H), U = 2I when `gated`. down: (E, H, I). bf16 or fp16; H, I multiples of 64.
        tasks: built with ``heights=(config.bm,)`` and given to no other launch of this kind: its
            heights become counters. Or ids (T, K) of few tokens, `config.bm` 16 and at most 128
            slots, whose tasks the launch finds; rows are then in slot order.
        act: (S, I) scratch. out: (S, H), written where rows are live.
        num_sms: SM budget; the grid has `num_sms * ctas_per_sm` programs.
        counters: of ids, and of a single token, whose K slots are tasks of one row: zeros
            (`zeros.WORDS`,) int32, which are zeros again when the launch has ended. Ids, also as
            `tasks.task_N`, may then be int64.
        weighted: with `counters`, weights (T, K) and where the weighted sum of the rows goes,
            (T, H), as `combine` makes it.
        counted: with `counters`, (3, E) int32 to which each expert's rows and tiles are added.
        pdl: start while the launch before still runs and wait for it on the device.
    """
    check_triton()
    found = "few" if isinstance(tasks, Tensor) else "map" if counters is None else "one"
    entries = tasks.numel() if isinstance(tasks, Tensor) else tasks.task_N.numel()
    weights, total = (x, x) if weighted is None else weighted
    hidden, inner = x.shape[1], act.shape[1]
    columns = config.bn // 2 if gated else config.bn
    launch(
        pair_kernel,
        num_sms * config.ctas_per_sm,
        x,
        x if order_S is None else order_S,
        weight_descriptor(up, True, config) if gated else rows_descriptor(up, config),
        rows_descriptor(down, config),
        act,
        out,
        *_map_of(tasks),
        *_counters_of(tasks, counters),
        weights,
        total,
        _counters_of(tasks, counters)[1] if counted is None else counted,
        hidden,
        inner,
        -(-inner // columns),
        -(-hidden // config.bn),
        top_k,
        up.shape[0],
        0.0 if limit is None else float(limit),
        float(alpha),
        float(up_offset),
        ACTIVATION=activation,
        HAS_LIMIT=limit is not None,
        PDL=pdl,
        launch_pdl=pdl,
        **_constants(
            config, entries, gated, found, 0 if weighted is None else top_k, counted is not None
        ),
        **_options(config),
    )
    return out


def _map_of(tasks: TaskMap | Tensor) -> tuple[Tensor, ...]:
    if isinstance(tasks, Tensor):
        return (tasks,) * 4
    return tasks.tile_end_N, tasks.task_N, tasks.row_start_N, tasks.rows_N


def _counters_of(tasks: TaskMap | Tensor, counters: Tensor | None) -> tuple[Tensor, ...]:
    """What counts the tiles done of a task, the tiles drawn, and the rows done of a column."""
    if counters is not None:
        return counters[1:], counters, counters[FIRST_COLUMN:]
    assert isinstance(tasks, TaskMap), "tasks found by the launch need counters"
    return tasks.height_N, tasks.tickets_2, tasks.tickets_2


def layer_pair(
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
) -> Tensor | None:
    """A layer by `pair_mm_hopper`: with the sort and the combine, or alone for few tokens.

    None when a single token's H is too wide for a set of counters, see `zeros`.
    """
    tokens, top_k = topk_ids.shape
    width, inner = hidden.shape[1], down.shape[2]
    act_SI = hidden.new_empty((tokens * top_k, inner))
    rows_SH = hidden.new_empty((tokens * top_k, width))
    given = {"config": config, "num_sms": num_sms, "top_k": top_k, "pdl": True, **epilogue}
    zeros = None
    if tokens == 1 or is_few(tokens, top_k, config):
        enough = top_k <= MAX_SLOTS and FIRST_COLUMN - (-width // config.bn) <= WORDS
        zeros = zeroed(hidden.device, act_SI.data_ptr()) if enough else None
    if tokens > 1 and zeros is None:
        sort, tasks = batch_rows(
            topk_ids, up.shape[0], heights=(config.bm,), order=order, counters=counters, pdl=True
        )
        pair_mm_hopper(hidden, up, down, tasks, act_SI, rows_SH, order_S=sort.order_S, **given)
        return combine(rows_SH, sort.position_S.view(tokens, top_k), topk_weights, pdl=True)
    if zeros is None:
        return None
    out = torch.empty_like(hidden)
    given |= {"counters": zeros, "weighted": (topk_weights, out), "counted": counters}
    if tokens > 1:
        pair_mm_hopper(hidden, up, down, topk_ids, act_SI, rows_SH, **given)
        return out
    order_S, tasks = one_token(topk_ids)
    pair_mm_hopper(hidden, up, down, tasks, act_SI, rows_SH, order_S=order_S, **given)
    return out


def is_few(tokens: int, top_k: int, config: HopperConfig) -> bool:
    """Whether a launch of these tiles finds the tasks of so many tokens itself."""
    return config.bm == 16 and tokens <= FEW_TOKENS and tokens * top_k <= FEW_SLOTS


def pair_mm_hopper_ref(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    tasks: TaskMap | Tensor,
    *,
    order_S: Tensor | None = None,
    top_k: int,
    **how: Any,
) -> Tensor:
    """The torch twin of `pair_mm_hopper`; `how`: gated, activation, limit, alpha, up_offset."""
    if isinstance(tasks, TaskMap):
        act_SI = grouped_mm_hopper_ref(x, up, tasks, order_S=order_S, top_k=top_k, **how)
        return grouped_mm_hopper_ref(act_SI, down, tasks)
    found = [t for t in few_tasks(tasks.view(-1).tolist(), up.shape[0], 16) if t[0] >= 0]
    rows_SH = x.new_zeros((tasks.numel(), x.shape[1]))
    for expert, slots in found:
        own = torch.zeros(len(slots), 1, dtype=torch.int32)
        _, one = batch_rows_ref(own, 1, heights=(max(16, len(slots)),))
        order = torch.tensor(slots, dtype=torch.int32)
        weights = up[expert : expert + 1], down[expert : expert + 1]
        rows_SH[slots] = pair_mm_hopper_ref(x, *weights, one, order_S=order, top_k=top_k, **how)
    return rows_SH


def aot_cases() -> list[AotCase]:
    """The tiles that `experts.choose_layer` picks, of one token and of more, and a taller one."""
    cases = []
    few = (
        ("one", 16, 64, 10, 128), ("one", 16, 128, 6, 128), ("few", 16, 64, 10, 128),
        ("few", 16, 128, 6, 128), ("one", 16, 128, 12, 64),
    )  # fmt: skip
    many = (
        ("map", 16, 64, 10, 128), ("map", 16, 128, 6, 128), ("map", 16, 128, 10, 64),
        ("map", 32, 128, 8, 64), ("map", 64, 128, 8, 64),
    )  # fmt: skip
    each = [(*tile, counted) for counted in (False, True) for tile in few]
    for found, bm, bn, stages, bk, counted in [*each, *((*tile, False) for tile in many)]:
        config = HopperConfig("pair", bm, bn, stages, bk)
        box = (1, bn // 16, 2, 8, bk)
        described = f"tensordesc<bf16[1, {bn // 16}, 2, 8, {bk}],{_layout(box, torch.bfloat16)!r}>"
        pointers = ("tile_end_ptr", "task_ptr", "row_start_ptr", "rows_ptr")
        case = AotCase(
            name=f"hopper/pair-{bm}x{bn}x{bk}x{stages}-{found}{'-counted' * counted}",
            fn=pair_kernel,
            signature={
                "x": "*bf16", "order_ptr": "*i32", "up_desc": described, "down_desc": described,
                "act_ptr": "*bf16", "out_ptr": "*bf16",
                **dict.fromkeys((*pointers, "done_ptr", "ticket_ptr", "joined_ptr"), "*i32"),
                "weights_ptr": "*bf16" if found == "map" else "*fp32", "sum_ptr": "*bf16",
                "counters_ptr": "*i32",
                **dict.fromkeys(("hidden", "inner", "up_n_tiles", "down_n_tiles"), "i32"),
                **dict.fromkeys(("top_k", "experts"), "i32"),
                **dict.fromkeys(("limit", "alpha", "up_offset"), "fp32"),
            },
            constexprs={
                **_constants(
                    config, 8 if found == "one" else 128, True, found,
                    0 if found == "map" else 8, counted,
                ),
                "ACTIVATION": "silu", "HAS_LIMIT": False, "PDL": True,
            },
            options=_options(config) | {"launch_pdl": True},
            archs=(90,),
            aligned=("hidden", "inner"),
            unaligned=("ticket_ptr", "done_ptr", "joined_ptr", "counters_ptr"),
            ptx={90: ("cp.async.bulk.tensor", "griddepcontrol.launch_dependents")},
            wgmma=True,
            gluon=True,
            quick=found != "map",
        )  # fmt: skip
        cases.append(case)
    return cases
