"""How one row of logits becomes experts and weights, in Triton: shared by the kernels of routers.

No reduction's order can show in the result: see `routing`.

    T tokens · E experts · K top-k · G groups
"""

from __future__ import annotations

import triton
import triton.language as tl

NEVER = tl.constexpr(-(2**31))
LARGEST = tl.constexpr(2.0**126)
LOG2E = tl.constexpr(1.4426950216293335)
LOG2E_LOW = tl.constexpr(1.9259629911266175e-08)
LN2 = tl.constexpr(0.6931471805599453)


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


@triton.jit
def experts_of(
    column_E,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS_PAD: tl.constexpr,
    GROUP_PAD: tl.constexpr,
):
    """The expert of each column of a padded tile, and whether there is one."""
    expert_E = column_E
    real_E = column_E < GROUPS * GROUP
    if GROUP != GROUP_PAD and GROUPS > 1:
        expert_E = column_E // GROUP_PAD * GROUP + column_E % GROUP_PAD
        real_E = (column_E % GROUP_PAD < GROUP) & (column_E // GROUP_PAD < GROUPS)
    return expert_E, real_E


@triton.jit
def write_routes(
    logit_TE,
    row_T1,
    live_TE,
    expert_E,
    real_E,
    bias_ptr,
    ids_ptr,
    weights_ptr,
    scale,
    TOP_K: tl.constexpr,
    SCORING: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_PAD: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Choose the experts of rows of fp32 logits, write ids and weights, and say who was chosen."""
    over_all: tl.constexpr = SCORING == "softmax" and not RENORMALIZE
    logit_TE = _finite(logit_TE)
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
    weight_TE = (score_TE * scale).to(weights_ptr.dtype.element_ty)
    tl.store(weights_ptr + out_TE, weight_TE, chosen_TE)
    return chosen_TE
