"""Host side of `chained`: descriptors, the launch of all three products at once, its torch twin.

S routed rows · T tokens · E experts · H hidden width · I intermediate width · K top-k
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..aot import AotCase
from ..launching import launch
from ..taskmap import TaskMap
from .chained import chain_kernel
from .launch import HopperConfig, _layout, grouped_mm_hopper_ref, weight_descriptor
from .tiles import check_triton

DEPTH = 64


class ChainTiles(NamedTuple):
    """Tiles of up to `bm` rows (at most 128 + `rest`) by `bn` weight rows; moves time, never bits.

    `split`: row tiles of the last product for each of the others, where its columns are few.
    """

    bm: int
    bn: int
    rest: int
    stages: int
    split: int = 1


class Experts(NamedTuple):
    """Weights (E, I, H), (E, I, I), (E, H, I) and biases (E, I), (E, I), (E, H)."""

    weights: tuple[Tensor, Tensor, Tensor]
    biases: tuple[Tensor, Tensor, Tensor]


def _constants(tiles: ChainTiles, entries: int) -> dict[str, Any]:
    return {
        "N": entries,
        "LANES": max(32, 1 << (entries - 1).bit_length()),
        "BM": tiles.bm,
        "REST": tiles.rest,
        "BN": tiles.bn,
        "BK": DEPTH,
        "NB": tiles.stages,
        "SPLIT": tiles.split,
        "CREG": 208,
        "LREG": 72,
    }


OPTIONS: dict[str, Any] = {"num_warps": 4, "maxnreg": 128}
"""Four warpgroups, of which the last has one warp at work, share the registers."""


def chain_mm_hopper(
    x: Tensor,
    experts: Experts,
    tasks: TaskMap,
    out: Tensor,
    *,
    tiles: ChainTiles,
    num_sms: int,
    order_S: Tensor,
    top_k: int,
    pdl: bool = False,
) -> Tensor:
    """``out[row] = relu(relu(x[token of row] @ up[e].T) @ mid[e].T) @ down[e].T``, biases added.

    One launch.

    Args:
        x: (T, H) tokens, read through `order_S` (int32 slots, token = slot // top_k); bf16 or
            fp16, H and I multiples of 64.
        tasks: built with ``heights=(tiles.bm,)`` and given to no other launch of this kind: its
            heights become counters.
        out: (S, H), written where rows are live.
        num_sms: SM budget, one program each.
        pdl: start while the launch before still runs and wait for it on the device.
    """
    check_triton()
    up, mid, down = experts.weights
    hidden, inner = x.shape[1], up.shape[1]
    first, second = (x.new_empty((order_S.numel(), inner)) for _ in range(2))
    box = HopperConfig("prefill", tiles.bm, tiles.bn, tiles.stages)
    launch(
        chain_kernel,
        num_sms,
        x,
        order_S,
        *(weight_descriptor(weight, False, box) for weight in experts.weights),
        first,
        second,
        out,
        *experts.biases,
        tasks.tile_end_N,
        tasks.task_N,
        tasks.row_start_N,
        tasks.rows_N,
        tasks.height_N,
        tasks.tickets_2,
        hidden,
        inner,
        -(-inner // tiles.bn),
        -(-mid.shape[1] // tiles.bn),
        -(-down.shape[1] // tiles.bn),
        top_k,
        PDL=pdl,
        launch_pdl=pdl,
        **_constants(tiles, tasks.task_N.numel()),
        **OPTIONS,
    )
    return out


def chain_mm_hopper_ref(
    x: Tensor,
    experts: Experts,
    tasks: TaskMap,
    *,
    order_S: Tensor,
    top_k: int,
) -> Tensor:
    """The torch twin of `chain_mm_hopper`; rows of no task are 0."""
    rows, order = x, order_S
    for number, (weight, bias) in enumerate(zip(experts.weights, experts.biases, strict=True)):
        last = number == 2
        rows = grouped_mm_hopper_ref(
            rows, weight, tasks, order_S=order, top_k=top_k, bias=bias,
            activation="none" if last else "relu",
        )  # fmt: skip
        order = None  # type: ignore[assignment]
    return rows


def aot_cases() -> list[AotCase]:
    """The tiles that are chosen and the tallest of both widths, one in fp16."""
    cases = []
    for (bm, bn, rest, stages), dtype in (
        ((96, 128, 16, 6), "bf16"), ((128, 128, 16, 6), "bf16"), ((144, 128, 16, 6), "bf16"),
        ((128, 256, 32, 4), "bf16"), ((160, 128, 32, 5), "bf16"), ((160, 256, 32, 4), "bf16"),
        ((160, 256, 32, 4), "fp16"),
    ):  # fmt: skip
        tiles = ChainTiles(bm, bn, rest, stages)
        layout = _layout((1, bn, DEPTH), torch.bfloat16 if dtype == "bf16" else torch.float16)
        described = f"tensordesc<{dtype}[1, {bn}, {DEPTH}],{layout!r}>"
        rows = ("x", "first_ptr", "second_ptr", "out_ptr")
        biases = ("up_bias_ptr", "mid_bias_ptr", "down_bias_ptr")
        maps = ("order_ptr", "tile_end_ptr", "task_ptr", "row_start_ptr", "rows_ptr")
        case = AotCase(
            name=f"hopper/chain-{tiles.bm}x{bn}-{dtype}",
            fn=chain_kernel,
            signature={
                **dict.fromkeys((*rows, *biases), f"*{dtype}"),
                **dict.fromkeys(("up_desc", "mid_desc", "down_desc"), described),
                **dict.fromkeys((*maps, "done_ptr", "ticket_ptr"), "*i32"),
                **dict.fromkeys(("hidden", "inner", "up_n", "mid_n", "down_n", "top_k"), "i32"),
            },
            constexprs={
                **_constants(tiles, 16),
                "PDL": True,
            },
            options=OPTIONS | {"launch_pdl": True},
            archs=(90,),
            aligned=("hidden", "inner"),
            unaligned=("done_ptr", "ticket_ptr"),
            ptx={90: ("cp.async.bulk.tensor", "griddepcontrol.launch_dependents")},
            wgmma=True,
            gluon=True,
            quick=(bm, bn) == (128, 256),
        )  # fmt: skip
        cases.append(case)
    return cases
