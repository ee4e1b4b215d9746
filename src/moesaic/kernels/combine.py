"""Combine: each token's K expert rows, weighted and summed in slot order, rounded once.

    out[t] = round(((0 + w[t,0] y[t,0]) + w[t,1] y[t,1]) + ...),   y[t,k] = rows[position[t,k]]

Products and sums are fp32, each rounded on its own (no fused multiply-add, no atomics), and the sum
runs over k in order. So the bits of a token depend on nothing but its rows and weights: not on
BLOCK_H, warps, architecture or the rest of the batch, and `combine_ref` has the same bits.

    T tokens · K top-k · S routed rows · H hidden width

>>> rows = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
>>> combine_ref(rows, torch.tensor([[2, 0], [1, -1]]), torch.tensor([[0.5, 2.0], [1.0, 9.0]]))
tensor([[4.5000, 7.0000],
        [3.0000, 4.0000]])
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .aot import AotCase
from .launching import launch

UNROLL = 8
WANTED_PROGRAMS = 132
MAX_K = tl.constexpr(64)
COUNTING = {"ids_ptr": "*i32", "counters_ptr": "*i32", "experts": "i32"}


@triton.jit
def combine_kernel(
    rows_ptr,
    position_ptr,
    weights_ptr,
    out_ptr,
    HIDDEN: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    UNROLL: tl.constexpr,
    PDL: tl.constexpr = False,
    ids_ptr=None,
    counters_ptr=None,
    experts=None,
):
    """One token and one block of columns per program.

    rows_ptr: (S, HIDDEN) row-major, model dtype. position_ptr: (T, TOP_K) int32 or int64, the row
    of slot k or a negative number for a slot of nobody. weights_ptr: (T, TOP_K), fp32 or model
    dtype. out_ptr: (T, HIDDEN) row-major, any float dtype. Program p computes columns
    ``(p % B) * BLOCK_H ...`` of token ``p // B``, B = ceil(HIDDEN / BLOCK_H). ids_ptr: (TOP_K,)
    int32 or int64, with counters_ptr: (3, experts) int32, for a single token whose slots nobody
    else counts: one more program adds 1 to lines 1 and 2 of each slot's expert. Else both are None.

    Example: rows [[1, 2], [3, 4], [5, 6]], position [[2, 0], [1, -1]], weights
    [[0.5, 2], [1, 9]] give [[4.5, 7], [3, 4]].
    """
    blocks: tl.constexpr = (HIDDEN + BLOCK_H - 1) // BLOCK_H
    program = tl.program_id(0).to(tl.int64)
    token = program // blocks
    column = (program % blocks).to(tl.int32) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = column < HIDDEN
    if counters_ptr is not None:
        # The program after the token's waits for nobody: it counts beside the products.
        inside = inside & (token == 0)
        slot_K = tl.arange(0, MAX_K)
        expert_K = tl.load(ids_ptr + slot_K, (slot_K < TOP_K) & (token > 0), other=-1)
        known_K = (expert_K >= 0) & (expert_K < experts)
        one_K = tl.full((MAX_K,), 1, tl.int32)
        counted_ptr = counters_ptr + experts + expert_K
        tl.atomic_add(counted_ptr, one_K, known_K, sem="relaxed")
        tl.atomic_add(counted_ptr + experts, one_K, known_K, sem="relaxed")
    if PDL:
        gdc_launch_dependents()
    acc = tl.zeros((BLOCK_H,), tl.float32)
    for start in range(0, TOP_K, UNROLL):
        rows = ()
        weights = ()
        for step in tl.static_range(UNROLL):
            slot = token * TOP_K + start + step
            live = start + step < TOP_K
            if counters_ptr is not None:
                live = live & (token == 0)
            rows += (tl.load(position_ptr + slot, live, other=-1).to(tl.int64),)  # type: ignore[assignment]
            weights += (tl.load(weights_ptr + slot, live, other=0.0).to(tl.float32),)  # type: ignore[assignment]
        if PDL:
            # What stands above is older than the launch that is waited for, see `combine`.
            gdc_wait()
        for step in tl.static_range(UNROLL):
            at = rows_ptr + rows[step] * HIDDEN + column
            value = tl.load(at, inside & (rows[step] >= 0), other=0.0).to(tl.float32)
            acc += tl.where(rows[step] >= 0, weights[step], 0.0) * value
    tl.store(out_ptr + token * HIDDEN + column, acc.to(out_ptr.dtype.element_ty), inside)


def plan_combine(tokens: int, hidden: int, top_k: int, itemsize: int) -> dict[str, Any]:
    """Constants and options of a launch: 16-byte accesses, and the SMs filled when T is small."""
    lanes = 16 // itemsize * 32
    block = min(4 * lanes, triton.next_power_of_2(hidden))
    while block > 64 and tokens * triton.cdiv(hidden, block) < WANTED_PROGRAMS:
        block //= 2
    return {
        "HIDDEN": hidden,
        "TOP_K": top_k,
        "BLOCK_H": block,
        "UNROLL": min(UNROLL, top_k),
        "num_warps": max(1, block // lanes),
        "enable_fp_fusion": False,
    }


def combine(
    rows_SH: Tensor,
    position_TK: Tensor,
    weights_TK: Tensor,
    out: Tensor | None = None,
    *,
    pdl: bool = False,
    counted: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The weighted sum over k, in slot order, of rows ``rows_SH[position_TK[t, k]]``: (T, H).

    Args:
        rows_SH: fp32, fp16 or bf16, contiguous.
        position_TK: int32 or int64, contiguous; negative for a slot of nobody, which adds nothing.
        weights_TK: fp32 or the dtype of `rows_SH`, contiguous.
        out: (T, H), contiguous, of any of these dtypes; made in that of `rows_SH` when None.
        pdl: start while the launch before still runs and wait for it on the device (sm_90 and up);
            positions and weights are older than that launch, only the rows come from it.
        counted: ids (K,) of a single token and counters (3, E) int32; each slot adds a row and a
            tile to its expert.

    Raises:
        ValueError: shapes disagree or a tensor is not contiguous.
    """
    tokens, top_k = position_TK.shape
    hidden = rows_SH.shape[1]
    if out is None:
        out = rows_SH.new_empty((tokens, hidden))
    if weights_TK.shape != (tokens, top_k) or out.shape != (tokens, hidden):
        raise ValueError(
            f"combine needs weights {(tokens, top_k)} and out {(tokens, hidden)}, "
            f"got {tuple(weights_TK.shape)} and {tuple(out.shape)}"
        )
    if not all(t.is_contiguous() for t in (rows_SH, position_TK, weights_TK, out)):
        raise ValueError("combine needs contiguous tensors: call .contiguous() first")
    if tokens:
        plan = plan_combine(tokens, hidden, top_k, rows_SH.element_size())
        grid = tokens * triton.cdiv(hidden, plan["BLOCK_H"]) + (counted is not None)
        overlap = {"PDL": True, "launch_pdl": True} if pdl else {}
        extra = {} if counted is None else _counting(*counted)
        launch(
            combine_kernel, grid, rows_SH, position_TK, weights_TK, out, **plan, **overlap, **extra
        )
    return out


def _counting(ids_K: Tensor, counters: Tensor) -> dict[str, Any]:
    return {"ids_ptr": ids_K, "counters_ptr": counters, "experts": counters.shape[1]}


def combine_ref(
    rows_SH: Tensor, position_TK: Tensor, weights_TK: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """The torch twin of `combine`, with its bits; the result in `dtype` or that of `rows_SH`."""
    acc_TH = torch.zeros(
        (position_TK.shape[0], rows_SH.shape[1]), dtype=torch.float32, device=rows_SH.device
    )
    for position_T, weight_T in zip(position_TK.unbind(1), weights_TK.unbind(1), strict=True):
        live_T1 = (position_T >= 0)[:, None]
        product_TH = weight_T.float()[:, None] * rows_SH[position_T.clamp(min=0).long()].float()
        acc_TH = acc_TH + torch.where(live_T1, product_TH, 0.0)
    return acc_TH.to(dtype or rows_SH.dtype)


def aot_cases() -> list[AotCase]:
    """bf16 at one token and many, at a width that blocks do not divide, at K = 64; fp16; fp32."""
    shapes = [
        ("bf16", 2, 1, 7168, 8, True),
        ("bf16", 2, 4096, 7168, 8, True),
        ("bf16", 2, 4096, 2880, 4, False),
        ("bf16", 2, 4096, 4096, 2, False),
        ("bf16", 2, 4096, 2048, 64, True),
        ("fp16", 2, 4096, 2048, 8, False),
        ("fp32", 4, 4096, 1024, 6, True),
    ]
    cases = []
    for dtype, itemsize, tokens, hidden, top_k, quick in shapes:
        plan = plan_combine(tokens, hidden, top_k, itemsize)
        options = {k: plan.pop(k) for k in ("num_warps", "enable_fp_fusion")}
        wide = ("ld.global.v4.b32",) if tokens > 1 else ()
        types = {"rows_ptr": f"*{dtype}", "position_ptr": "*i32", "weights_ptr": "*fp32"}
        cases.append(
            AotCase(
                name=f"combine/{dtype}-t{tokens}-h{hidden}-k{top_k}",
                fn=combine_kernel,
                signature=types | {"out_ptr": f"*{dtype}"},
                constexprs=plan | {"PDL": False} | dict.fromkeys(COUNTING),
                options=options,
                ptx={arch: ("mul.rn.f32", "add.rn.f32", *wide) for arch in (80, 90, 100)},
                quick=quick,
            )
        )
    first = cases[0]
    overlapping = replace(
        first,
        name=f"{first.name}-pdl",
        archs=(90, 100),
        constexprs={**first.constexprs, "PDL": True},
        options={**first.options, "launch_pdl": True},
        ptx={90: ("griddepcontrol.wait", "mul.rn.f32", "add.rn.f32")},
    )
    cases.append(overlapping)
    cases.append(
        replace(
            first,
            name=f"{first.name}-counted",
            signature={**first.signature, **COUNTING},
            constexprs={k: v for k, v in first.constexprs.items() if k not in COUNTING},
        )
    )
    return cases
