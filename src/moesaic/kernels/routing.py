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

from .aot import AotCase
from .routing_ref import route_ref

__all__ = ["aot_cases", "plan_route", "route", "route_kernel", "route_ref"]

NEVER = tl.constexpr(-(2**31))
LARGEST = tl.constexpr(2.0**126)
LOG2E = tl.constexpr(1.4426950216293335)
LOG2E_LOW = tl.constexpr(1.9259629911266175e-08)
LN2 = tl.constexpr(0.6931471805599453)
MAX_PROGRAMS = 2112


@triton.jit
def _finite(x):
    """`x` within +-2**126, NaN as the least: sums and differences of two stay finite."""
    x = tl.where(x == x, x, -LARGEST)
    return tl.minimum(tl.maximum(x, -LARGEST), LARGEST)


@triton.jit
def _key(x):
    """An int32 that orders as the fp32 `x` does, -0 and 0 equal; above NEVER for all but NaN."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _unkey(key):
    """The fp32 value that `_key` was made from."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _exp(x):
    """exp(x) of x <= 0 to about one ulp: 2**t, times what t lost in rounding."""
    x = tl.minimum(tl.maximum(x, -200.0), 0.0)
    t = x * LOG2E
    lost = tl.fma(x, LOG2E_LOW, tl.fma(x, LOG2E, -t))
    power = tl.exp2(t)
    return tl.fma(power, lost * LN2, power)


@triton.jit
def _sigmoid(x):
    z = _exp(-tl.abs(x))
    s = tl.div_rn(tl.where(x < 0, z, 1.0), 1.0 + z)
    return tl.where(s < 1.1754943508222875e-38, 0.0, s)


@triton.jit
def _lowest(key, index, PAST: tl.constexpr, AXIS: tl.constexpr):
    """The largest key along AXIS and the lowest index that holds it."""
    best = tl.max(key, AXIS)
    at = tl.min(tl.where(key == tl.expand_dims(best, AXIS), index, PAST), AXIS)
    return best, at


@triton.jit
def _mask_groups(
    key_TE,
    BLOCK_T: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS_PAD: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
):
    """`key_TE` with NEVER outside the TOPK_GROUP groups of most worth (the sum of two best)."""
    key = tl.reshape(key_TE, [BLOCK_T, GROUPS_PAD, GROUP_PAD])
    member = tl.arange(0, GROUP_PAD)[None, None, :]
    group = tl.arange(0, GROUPS_PAD)[None, :]
    best, at = _lowest(key, member, GROUP_PAD, 2)
    worth = _unkey(best)
    if GROUP > 1:
        second = tl.max(tl.where(member == at[:, :, None], NEVER, key), 2)
        worth += _unkey(second)
    left = tl.where(group < GROUPS, _key(worth), NEVER)
    keep = tl.zeros([BLOCK_T, GROUPS_PAD], tl.int32)
    for _ in range(TOPK_GROUP):
        _, chosen = _lowest(left, group, GROUPS_PAD, 1)
        hit = group == chosen[:, None]
        keep = tl.where(hit, 1, keep)
        left = tl.where(hit, NEVER, left)
    key = tl.where(keep[:, :, None] != 0, key, NEVER)
    return tl.reshape(key, [BLOCK_T, GROUPS_PAD * GROUP_PAD])


@triton.jit
def _choose(
    key_TE, expert_E, score_TE, BY_KEY: tl.constexpr, SOFT: tl.constexpr, TOP_K: tl.constexpr
):
    """Slot of every expert (TOP_K where not chosen), the best key, and the sum over chosen scores.

    The sum runs in slot order over ``exp(logit - best logit)`` (SOFT), over the values of the keys
    (BY_KEY), or over `score_TE`.
    """
    past: tl.constexpr = 1 << 20
    slot_TE = tl.full(key_TE.shape, TOP_K, tl.int32)
    top_T = tl.max(key_TE, 1)
    total_T = tl.zeros(top_T.shape, tl.float32)
    for k in range(TOP_K):
        best_T, at_T = _lowest(key_TE, expert_E[None, :], past, 1)
        hit_TE = expert_E[None, :] == at_T[:, None]
        slot_TE = tl.where(hit_TE, k, slot_TE)
        key_TE = tl.where(hit_TE, NEVER, key_TE)
        if SOFT:
            total_T += _exp(_unkey(best_T) - _unkey(top_T))
        elif BY_KEY:
            total_T += _unkey(best_T)
        else:
            bits_TE = tl.where(hit_TE, score_TE.to(tl.int32, bitcast=True), 0)
            total_T += tl.max(bits_TE, 1).to(tl.float32, bitcast=True)
    return slot_TE, top_T, total_T


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
):
    """BLOCK_T rows at a time, the programs striding over the batch; E = GROUPS * GROUP.

    logits_ptr: (T, E) fp32 | fp16 | bf16, rows `row_stride` elements apart. bias_ptr: (E,) fp32 or
    None. ids_ptr: (T, TOP_K) int32. weights_ptr: (T, TOP_K) fp32. counts_ptr: (E,) int32, zeros,
    or anything if the one program is ALONE. Column c of a tile is expert
    ``c // GROUP_PAD * GROUP + c % GROUP_PAD``. counters_ptr: (E,) int32 to which the counts are
    added, or None.

    Example: logits [[0, 2, 2, 1], [5, nan, 1, 1]], TOP_K 2, renormalised softmax: ids
    [[1, 2], [0, 2]], weights [[0.5, 0.5], [0.98201, 0.01799]], counts [1, 1, 2, 0].
    """
    columns: tl.constexpr = GROUPS_PAD * GROUP_PAD
    over_all: tl.constexpr = SCORING == "softmax" and not RENORMALIZE
    column_E = tl.arange(0, columns)
    expert_E = column_E
    real_E = column_E < GROUPS * GROUP
    if GROUP != GROUP_PAD and GROUPS > 1:
        expert_E = column_E // GROUP_PAD * GROUP + column_E % GROUP_PAD
        real_E = (column_E % GROUP_PAD < GROUP) & (column_E // GROUP_PAD < GROUPS)
    seen_TE = tl.zeros([BLOCK_T, columns], tl.int32)
    for block in range(tl.program_id(0), tl.cdiv(tokens, BLOCK_T), tl.num_programs(0)):
        token_T = block * BLOCK_T + tl.arange(0, BLOCK_T)
        live_TE = (token_T < tokens)[:, None] & real_E[None, :]
        row_T1 = token_T.to(tl.int64)[:, None]
        at_TE = logits_ptr + row_T1 * row_stride + expert_E[None, :]
        logit_TE = _finite(tl.load(at_TE, live_TE, other=0.0).to(tl.float32))
        score_TE = logit_TE
        if SCORING == "sigmoid":
            score_TE = _sigmoid(logit_TE)
        choice_TE = score_TE
        if bias_ptr is not None:
            bias_E = tl.load(bias_ptr + expert_E, real_E, other=0.0)
            choice_TE = _finite(score_TE + bias_E[None, :])
        key_TE = tl.where(real_E[None, :], _key(choice_TE), NEVER)
        if GROUPS > 1:
            key_TE = _mask_groups(key_TE, BLOCK_T, GROUPS, GROUP, GROUPS_PAD, GROUP_PAD, TOPK_GROUP)
        slot_TE, top_T, total_T = _choose(
            key_TE, expert_E, score_TE, bias_ptr is None, SCORING != "sigmoid", TOP_K
        )
        if SCORING != "sigmoid":
            base_T = _unkey(top_T)
            if over_all:
                base_T = _unkey(tl.max(tl.where(real_E[None, :], _key(logit_TE), NEVER), 1))
            score_TE = _exp(logit_TE - base_T[:, None])
            if over_all:
                fixed_TE = (score_TE * 1099511627776.0).to(tl.int64)
                sum_T = tl.sum(tl.where(real_E[None, :], fixed_TE, 0), 1)
                total_T = sum_T.to(tl.float32) * 9.094947017729282e-13
            score_TE = score_TE * tl.div_rn(1.0, total_T)[:, None]
        elif RENORMALIZE:
            inverse_T = tl.div_rn(1.0, tl.where(total_T > 0, total_T, 1.0 * TOP_K))
            score_TE = tl.where(total_T[:, None] > 0, score_TE, 1.0) * inverse_T[:, None]
        chosen_TE = live_TE & (slot_TE < TOP_K)
        out_TE = row_T1 * TOP_K + slot_TE
        tl.store(ids_ptr + out_TE, tl.broadcast_to(expert_E[None, :], out_TE.shape), chosen_TE)
        tl.store(weights_ptr + out_TE, score_TE * scale, chosen_TE)
        seen_TE += chosen_TE.to(tl.int32)
    count_E = tl.sum(seen_TE, 0)
    if counters_ptr is not None:
        tl.atomic_add(counters_ptr + expert_E, count_E, real_E & (count_E > 0), sem="relaxed")
    if ALONE:
        tl.store(counts_ptr + expert_E, count_E, real_E)
    else:
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
) -> tuple[int, dict[str, Any]]:
    """Programs, and constants and options, of a launch for tokens > 0.

    A program is one warp (rows never cross warps) up to 512 columns, padding included. It is
    alone, and then counts are stored rather than added, when the batch is one or two blocks.
    """
    groups = n_group if topk_group < n_group else 1
    group = experts // groups
    groups_pad, group_pad = triton.next_power_of_2(groups), triton.next_power_of_2(group)
    columns = groups_pad * group_pad
    block_t = max(1, min(32, 512 // columns))
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
    return 1 if alone else min(triton.cdiv(tokens, block_t), MAX_PROGRAMS), plan


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
    if logits_TE.stride(1) != 1 and experts > 1:
        raise ValueError(
            f"route needs logits whose last stride is 1, got strides {logits_TE.stride()}: "
            "call .contiguous() first"
        )
    if bias_E is not None and scoring != "sigmoid":
        raise ValueError(f"route takes a bias with scoring='sigmoid' only, got {scoring!r}")
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
    route_kernel[(programs,)](
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


def _aot_case(name: str, dtype: str, tokens: int, experts: int, top_k: int, **how: Any) -> AotCase:
    quick, bias, counted = (how.pop(flag, False) for flag in ("quick", "bias", "counted"))
    rule: dict[str, Any] = {"scoring": "softmax", "renormalize": True, "n_group": 1}
    rule |= {"topk_group": 1} | how
    _, plan = plan_route(tokens, experts, top_k=top_k, **rule)
    options = {name: plan.pop(name) for name in ("num_warps", "enable_fp_fusion")}
    signature = {"logits_ptr": f"*{dtype}", "ids_ptr": "*i32", "weights_ptr": "*fp32"}
    signature |= {"counts_ptr": "*i32", "tokens": "i32", "row_stride": "i32", "scale": "fp32"}
    for pointer, kind, there in (("bias_ptr", "*fp32", bias), ("counters_ptr", "*i32", counted)):
        if there:
            signature[pointer] = kind
        else:
            plan[pointer] = None
    return AotCase(
        name=f"route/{name}-t{tokens}",
        fn=route_kernel,
        signature=signature,
        constexprs=plan,
        options=options,
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
        _aot_case("counted", "fp32", 8192, 256, 8, quick=True, counted=True, **deepseek),
        _aot_case("gpt-oss", "bf16", 8192, 128, 4, scoring="topk_softmax"),
        _aot_case("sigmoid", "fp32", 8192, 256, 8, scoring="sigmoid"),
        _aot_case("largest", "bf16", 1, 1024, 64, quick=True, **qwen),
        _aot_case("largest", "fp32", 8192, 1024, 64, quick=True, **qwen),
        _aot_case("odd-groups", "bf16", 8192, 1020, 64, quick=True, **odd),
    ]
