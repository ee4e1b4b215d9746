"""The router in one launch: scores, grouped top-k, weights and counts from logits (T, E).

Logits become order-preserving int32 keys, and each of the K steps takes the largest key of a row
and, among equals, the lowest expert id. No reduction's order can show in the result: keys and ids
are integers, the K chosen scores are summed in slot order, and the softmax over all E experts is
summed in fixed point (exp <= 1, 40 fraction bits, int64). So the bits of a row's weights depend on
that row alone: not on the batch, BLOCK_T, warps, alignment or layout. Fused multiply-adds are
written out where they are meant, and the compiler may make no others.

The torch twin is `routing_ref.route_ref`, which says what happens to NaN, infinities and rows whose
scores are all zero; it stands in its own file because the CPU must not need Triton.

    T tokens · E experts · K top-k · G groups

    route(torch.tensor([[0.0, 2.0, 2.0, 1.0]], device="cuda"), top_k=2, scoring="softmax")
    # ids [[1, 2]] · weights [[0.5, 0.5]] · counts [0, 1, 1, 0]
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .aot import AotCase
from .launching import launch
from .routing_ref import route_ref
from .routing_triton import experts_of, write_routes

__all__ = ["aot_cases", "plan_route", "route", "route_kernel", "route_ref"]

MAX_PROGRAMS = 2112
ROW_EACH = 1024
"""Tokens up to which programs that count nothing take a row each."""


@triton.jit(do_not_specialize=["tokens"])
def route_kernel(
    logits_ptr,
    bias_ptr,
    ids_ptr,
    weights_ptr,
    counts_ptr,
    tokens,
    row_stride,
    scale,
    TOP_K: tl.constexpr,
    SCORING: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS_PAD: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ALONE: tl.constexpr,
    counters_ptr=None,
    PDL: tl.constexpr = False,
):
    """BLOCK_T rows at a time, the programs striding over the batch; E = GROUPS * GROUP.

    logits_ptr: (T, E) fp32 | fp16 | bf16, rows `row_stride` elements apart. bias_ptr: (E,) fp32 or
    None. ids_ptr: (T, TOP_K) int32. weights_ptr: (T, TOP_K) of any float dtype. counts_ptr: (E,)
    int32, zeros, or anything if the one program is ALONE, or None. Column c of a tile is expert
    ``c // GROUP_PAD * GROUP + c % GROUP_PAD``. counters_ptr: (E,) int32 to which the counts are
    added, or None.

    Example: logits [[0, 2, 2, 1], [5, nan, 1, 1]], TOP_K 2, renormalised softmax: ids
    [[1, 2], [0, 2]], weights [[0.5, 0.5], [0.98201, 0.01799]], counts [1, 1, 2, 0].
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    column_E = tl.arange(0, GROUPS_PAD * GROUP_PAD)
    expert_E, real_E = experts_of(column_E, GROUPS, GROUP, GROUPS_PAD, GROUP_PAD)
    seen_TE = tl.zeros([BLOCK_T, GROUPS_PAD * GROUP_PAD], tl.int32)
    for block in range(tl.program_id(0), tl.cdiv(tokens, BLOCK_T), tl.num_programs(0)):
        token_T = block * BLOCK_T + tl.arange(0, BLOCK_T)
        live_TE = (token_T < tokens)[:, None] & real_E[None, :]
        row_T1 = token_T.to(tl.int64)[:, None]
        at_TE = logits_ptr + row_T1 * row_stride + expert_E[None, :]
        chosen_TE = write_routes(
            tl.load(at_TE, live_TE, other=0.0).to(tl.float32),
            row_T1,
            live_TE,
            expert_E,
            real_E,
            bias_ptr,
            ids_ptr,
            weights_ptr,
            scale,
            TOP_K,
            SCORING,
            RENORMALIZE,
            GROUPS,
            GROUPS_PAD,
            GROUP,
            GROUP_PAD,
            TOPK_GROUP,
            BLOCK_T,
        )
        seen_TE += chosen_TE.to(tl.int32)
    count_E = tl.sum(seen_TE, 0)
    if counters_ptr is not None:
        tl.atomic_add(counters_ptr + expert_E, count_E, real_E & (count_E > 0), sem="relaxed")
    if counts_ptr is not None and ALONE:
        tl.store(counts_ptr + expert_E, count_E, real_E)
    elif counts_ptr is not None:
        tl.atomic_add(counts_ptr + expert_E, count_E, real_E & (count_E > 0), sem="relaxed")


def plan_route(
    tokens: int,
    experts: int,
    *,
    top_k: int,
    scoring: str,
    renormalize: bool,
    n_group: int,
    topk_group: int,
    counted: bool = True,
) -> tuple[int, dict[str, Any]]:
    """Programs, and constants and options, of a launch for tokens > 0.

    A program is one warp (rows never cross warps) up to 512 columns, padding included. It is
    alone, and then counts are stored rather than added, when the batch is one or two blocks. A row
    alone has a whole warp's reductions in one instruction each; several share a warp's latency,
    which pays where there are many.
    """
    groups = n_group if topk_group < n_group else 1
    group = experts // groups
    groups_pad, group_pad = triton.next_power_of_2(groups), triton.next_power_of_2(group)
    columns = groups_pad * group_pad
    block_t = max(1, min(32, 512 // columns))
    if tokens == 1 or (tokens <= ROW_EACH and not counted):
        block_t = 1
    alone = tokens <= 2 * block_t
    plan = {
        "TOP_K": top_k,
        "SCORING": scoring,
        "RENORMALIZE": renormalize,
        "GROUPS": groups,
        "GROUP": group,
        "GROUPS_PAD": groups_pad,
        "GROUP_PAD": group_pad,
        "TOPK_GROUP": topk_group if groups > 1 else 1,
        "BLOCK_T": block_t,
        "ALONE": alone,
        "num_warps": max(1, columns // 512),
        "enable_fp_fusion": False,
    }
    programs = min(triton.cdiv(tokens, block_t), MAX_PROGRAMS)
    return 1 if alone and counted else programs, plan


def route(
    logits_TE: Tensor,
    bias_E: Tensor | None = None,
    *,
    top_k: int,
    scoring: str = "softmax",
    renormalize: bool = True,
    n_group: int = 1,
    topk_group: int = 1,
    scale: float = 1.0,
    counters: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids (T, K) int32, weights (T, K) fp32 and counts (E,) int32, from one kernel.

    Batches larger than two blocks (4 rows at E = 256) also fill the counts with zeros first, by a
    memset. Semantics as in `routing_ref.route_ref`.

    Args:
        logits_TE: fp32, fp16 or bf16; neighbouring experts contiguous, rows any distance apart.
        bias_E: fp32, contiguous, for `scoring="sigmoid"`; the choice is made on score + bias.
        counters: int32, contiguous; the counts are added to its first E numbers.

    Raises:
        ValueError: the experts of a row are not contiguous, or a bias without sigmoid scoring.
    """
    tokens, experts = logits_TE.shape
    _check(logits_TE, bias_E, scoring)
    ids_TK = logits_TE.new_empty((tokens, top_k), dtype=torch.int32)
    weights_TK = logits_TE.new_empty((tokens, top_k), dtype=torch.float32)
    if not tokens:
        return ids_TK, weights_TK, logits_TE.new_zeros((experts,), dtype=torch.int32)
    programs, plan = plan_route(
        tokens,
        experts,
        top_k=top_k,
        scoring=scoring,
        renormalize=renormalize,
        n_group=n_group,
        topk_group=topk_group,
    )
    make = logits_TE.new_empty if plan["ALONE"] else logits_TE.new_zeros
    counts_E = make((experts,), dtype=torch.int32)
    launch(
        route_kernel,
        programs,
        logits_TE,
        bias_E,
        ids_TK,
        weights_TK,
        counts_E,
        tokens,
        logits_TE.stride(0),
        scale,
        counters_ptr=counters,
        **plan,
    )
    return ids_TK, weights_TK, counts_E


def choose_experts(
    logits_TE: Tensor,
    bias_E: Tensor | None = None,
    *,
    weights_dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
    **rule: Any,
) -> tuple[Tensor, Tensor]:
    """`route` without counts: ids (T, K) int32 and weights (T, K), always one launch.

    On sm_90 and up it starts while the launch before still runs, and waits for it on the device.

    Args:
        logits_TE, bias_E, scale: as for `route`.
        weights_dtype: what the weights are rounded to.
        rule: as for `plan_route`.

    Raises:
        ValueError: as for `route`.
    """
    tokens, experts = logits_TE.shape
    _check(logits_TE, bias_E, rule["scoring"])
    ids_TK = logits_TE.new_empty((tokens, rule["top_k"]), dtype=torch.int32)
    weights_TK = logits_TE.new_empty((tokens, rule["top_k"]), dtype=weights_dtype)
    if tokens:
        programs, plan = plan_route(tokens, experts, counted=False, **rule)
        pdl = logits_TE.is_cuda and torch.cuda.get_device_capability(logits_TE.device) >= (9, 0)
        route_kernel[(programs,)](
            logits_TE,
            bias_E,
            ids_TK,
            weights_TK,
            None,
            tokens,
            logits_TE.stride(0),
            scale,
            **plan,
            **({"PDL": True, "launch_pdl": True} if pdl else {}),
        )
    return ids_TK, weights_TK


def _check(logits_TE: Tensor, bias_E: Tensor | None, scoring: str) -> None:
    if logits_TE.stride(1) != 1 and logits_TE.shape[1] > 1:
        raise ValueError(
            f"route needs logits whose last stride is 1, got strides {logits_TE.stride()}: "
            "call .contiguous() first"
        )
    if bias_E is not None and scoring != "sigmoid":
        raise ValueError(f"route takes a bias with scoring='sigmoid' only, got {scoring!r}")


def _aot_case(name: str, dtype: str, tokens: int, experts: int, top_k: int, **how: Any) -> AotCase:
    flags = ("quick", "bias", "counted", "pdl")
    quick, bias, counted, pdl = (how.pop(flag, False) for flag in flags)
    rule: dict[str, Any] = {"scoring": "softmax", "renormalize": True, "n_group": 1}
    rule |= {"topk_group": 1} | how
    _, plan = plan_route(tokens, experts, top_k=top_k, counted=not pdl, **rule)
    options = {name: plan.pop(name) for name in ("num_warps", "enable_fp_fusion")}
    weights = dtype if pdl else "fp32"
    signature = {"logits_ptr": f"*{dtype}", "ids_ptr": "*i32", "weights_ptr": f"*{weights}"}
    signature |= {"tokens": "i32", "row_stride": "i32", "scale": "fp32"}
    for pointer, kind, there in (
        ("bias_ptr", "*fp32", bias), ("counters_ptr", "*i32", counted),
        ("counts_ptr", "*i32", not pdl),
    ):  # fmt: skip
        if there:
            signature[pointer] = kind
        else:
            plan[pointer] = None
    return AotCase(
        name=f"route/{name}-t{tokens}",
        fn=route_kernel,
        signature=signature,
        constexprs=plan | {"PDL": pdl},
        options=options | ({"launch_pdl": True} if pdl else {}),
        archs=(90, 100) if pdl else (80, 90, 100),
        aligned=("row_stride",) if experts % 16 == 0 else (),
        quick=quick,
    )


def aot_cases() -> list[AotCase]:
    """The routers of known models, the extremes of E and K, and groups that need padding."""
    deepseek: dict[str, Any] = {"scoring": "sigmoid", "bias": True, "n_group": 8, "topk_group": 4}
    odd: dict[str, Any] = deepseek | {"n_group": 68, "topk_group": 34}
    qwen: dict[str, Any] = {"renormalize": False}
    return [
        _aot_case("mixtral", "bf16", 1, 8, 2),
        _aot_case("mixtral", "bf16", 8192, 8, 2),
        _aot_case("qwen3", "bf16", 8192, 128, 8),
        _aot_case("qwen2", "bf16", 8192, 60, 4, **qwen),
        _aot_case("deepseek-v3", "fp32", 1, 256, 8, quick=True, **deepseek),
        _aot_case("deepseek-v3", "fp32", 8192, 256, 8, quick=True, **deepseek),
        _aot_case("chosen", "bf16", 1, 128, 8, quick=True, pdl=True),
        _aot_case("chosen", "bf16", 128, 8, 2, pdl=True),
        _aot_case("chosen", "fp32", 8192, 256, 8, pdl=True, **deepseek),
        _aot_case("counted", "fp32", 8192, 256, 8, quick=True, counted=True, **deepseek),
        _aot_case("gpt-oss", "bf16", 8192, 128, 4, scoring="topk_softmax"),
        _aot_case("sigmoid", "fp32", 8192, 256, 8, scoring="sigmoid"),
        _aot_case("largest", "bf16", 1, 1024, 64, quick=True, **qwen),
        _aot_case("largest", "fp32", 8192, 1024, 64, quick=True, **qwen),
        _aot_case("odd-groups", "bf16", 8192, 1020, 64, quick=True, **odd),
    ]
