"""The router from hidden states in one launch: its product, scores, top-k and weights.

The product runs over pieces of SPLIT columns: each piece is one chain of tensor-core steps in
order, and the sums of the pieces are added in order. Where pieces are so few that the SMs would
stand idle, every piece is a program of its own, and the program that finishes last in a block of
tokens adds them up and chooses. With many tokens a program does all pieces of its block. Both give
the same bits, so a token's logits, and with them its experts, do not depend on the batch around it.

    T tokens · H hidden width · E experts · K top-k

    logits, ids, weights = route_hidden(hidden_TH, weight_EH, top_k=8, scoring="softmax")

The torch twin is `route_hidden_ref`. `ops` uses this kernel for the routers for which it is faster
than torch's product and `routing.choose_experts`: those of few experts.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .aot import AotCase
from .device import registers
from .routing import plan_route
from .routing_ref import route_ref
from .routing_triton import experts_of, write_routes
from .tickets import MAX_BLOCKS, Tickets

SPLIT = 256
TILE = {"BLOCK_H": 128, "SPLIT": SPLIT}
LARGEST_H = 16384
SPREAD_PROGRAMS = (1056, 2112)
"""Programs up to which pieces are spread, in blocks of 16 tokens and of 64."""
DTYPES = (torch.bfloat16, torch.float16)


@triton.jit
def _piece(
    x_ptr,
    w_ptr,
    total_TE,
    live_T,
    live_E,
    first,
    HIDDEN: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """`total_TE` plus the product over the columns from `first` to `first + SPLIT`."""
    acc_TE = tl.zeros(total_TE.shape, tl.float32)
    lane_H = tl.arange(0, BLOCK_H)
    for start in range(0, SPLIT, BLOCK_H):
        column_H = first + start + lane_H
        inside_H = column_H < HIDDEN
        x_TH = tl.load(x_ptr + column_H[None, :], live_T[:, None] & inside_H[None, :], other=0.0)
        w_HE = tl.load(w_ptr + column_H[:, None], inside_H[:, None] & live_E[None, :], other=0.0)
        acc_TE = tl.dot(x_TH, w_HE, acc_TE)
    return total_TE + acc_TE


@triton.jit
def _store_logits(total_TE, at_TE, live_TE, expert_E, real_E, linear_ptr, logits_ptr):
    """Round sums, with the bias of the product if any, to logits, store them, give them back."""
    if linear_ptr is not None:
        total_TE += tl.load(linear_ptr + expert_E, real_E, other=0.0).to(tl.float32)[None, :]
    logit_TE = total_TE.to(logits_ptr.dtype.element_ty)
    tl.store(logits_ptr + at_TE, logit_TE, live_TE)
    return logit_TE.to(tl.float32)


@triton.jit(do_not_specialize=["tokens"])
def router_kernel(
    hidden_ptr,
    weight_ptr,
    linear_ptr,
    bias_ptr,
    logits_ptr,
    ids_ptr,
    weights_ptr,
    pieces_ptr,
    tickets_ptr,
    tokens,
    scale,
    TOP_K: tl.constexpr,
    SCORING: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS_PAD: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_H: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    SPREAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """A block of BLOCK_T tokens per program, or per group of programs that SPREAD its pieces.

    hidden_ptr: (T, HIDDEN) and weight_ptr: (E, HIDDEN), row-major, both bf16 or fp16,
    E = GROUPS * GROUP. linear_ptr: (E,), added to the product, or None. bias_ptr: (E,) fp32, added
    to the scores for the choice alone, or None. logits_ptr: (T, E), any float dtype. ids_ptr:
    (T, TOP_K) int32. weights_ptr: (T, TOP_K), any float dtype. pieces_ptr: (pieces, T, E) fp32 and
    tickets_ptr: int32 zeros, one a block, left as zeros, where SPREAD, else None. ROWS: rows that
    are chosen for at once.

    Example: hidden [[1, 2]], weight [[1, 0], [0, 1], [1, 1]], TOP_K 2, renormalised softmax: logits
    [[1, 2, 3]], ids [[2, 1]], weights [[0.73106, 0.26894]].
    """
    experts: tl.constexpr = GROUPS * GROUP
    tiles: tl.constexpr = (experts + BLOCK_E - 1) // BLOCK_E
    pieces: tl.constexpr = (HIDDEN + SPLIT - 1) // SPLIT
    parts: tl.constexpr = tiles * pieces if SPREAD else 1
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    block = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    token_T = block * BLOCK_T + tl.arange(0, BLOCK_T)
    live_T = token_T < tokens
    x_ptr = hidden_ptr + token_T.to(tl.int64)[:, None] * HIDDEN
    lane_E = tl.arange(0, BLOCK_E)
    chosen_now = True
    if SPREAD:
        piece = part % pieces
        tile_E = part // pieces * BLOCK_E + lane_E
        total_TE = _piece(
            x_ptr,
            weight_ptr + tile_E[None, :] * HIDDEN,
            tl.zeros([BLOCK_T, BLOCK_E], tl.float32),
            live_T,
            tile_E < experts,
            piece * SPLIT,
            HIDDEN,
            SPLIT,
            BLOCK_H,
        )
        row_T1 = (piece * tokens + token_T).to(tl.int64)[:, None]
        live_TE = live_T[:, None] & (tile_E < experts)[None, :]
        tl.store(pieces_ptr + row_T1 * experts + tile_E[None, :], total_TE, live_TE)
        # Every lane's sums before the ticket; who draws the last one sees all of them.
        tl.debug_barrier()
        chosen_now = tl.atomic_add(tickets_ptr + block, 1, sem="acq_rel") == parts - 1
        if chosen_now:
            tl.store(tickets_ptr + block, 0)
    else:
        for tile in range(tiles):
            tile_E = tile * BLOCK_E + lane_E
            total_TE = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
            for piece in range(pieces):
                total_TE = _piece(
                    x_ptr,
                    weight_ptr + tile_E[None, :] * HIDDEN,
                    total_TE,
                    live_T,
                    tile_E < experts,
                    piece * SPLIT,
                    HIDDEN,
                    SPLIT,
                    BLOCK_H,
                )
            at_TE = token_T.to(tl.int64)[:, None] * experts + tile_E[None, :]
            live_TE = live_T[:, None] & (tile_E < experts)[None, :]
            _store_logits(
                total_TE, at_TE, live_TE, tile_E, tile_E < experts, linear_ptr, logits_ptr
            )
        tl.debug_barrier()
    if chosen_now:
        column_E = tl.arange(0, GROUPS_PAD * GROUP_PAD)
        expert_E, real_E = experts_of(column_E, GROUPS, GROUP, GROUPS_PAD, GROUP_PAD)
        for first in range(0, tl.minimum(BLOCK_T, tokens - block * BLOCK_T), ROWS):
            token_R = block * BLOCK_T + first + tl.arange(0, ROWS)
            row_R1 = token_R.to(tl.int64)[:, None]
            live_RE = (token_R < tokens)[:, None] & real_E[None, :]
            at_RE = row_R1 * experts + expert_E[None, :]
            if SPREAD:
                sum_RE = tl.zeros([ROWS, GROUPS_PAD * GROUP_PAD], tl.float32)
                for piece in range(pieces):
                    from_ptr = pieces_ptr + piece * tokens * experts
                    sum_RE += tl.load(from_ptr + at_RE, live_RE, other=0.0, cache_modifier=".cg")
                logit_RE = _store_logits(
                    sum_RE, at_RE, live_RE, expert_E, real_E, linear_ptr, logits_ptr
                )
            else:
                logit_RE = tl.load(logits_ptr + at_RE, live_RE, other=0.0).to(tl.float32)
            write_routes(
                logit_RE,
                row_R1,
                live_RE,
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
                ROWS,
            )


def refusal(hidden_TH: Tensor, weight_EH: Tensor) -> str | None:
    """Why the product cannot run here, or None: the tensor cores take bf16 and fp16 in order."""
    if hidden_TH.dtype != weight_EH.dtype or hidden_TH.dtype not in DTYPES:
        return f"hidden states are {hidden_TH.dtype}, the router's weight is {weight_EH.dtype}"
    experts, hidden = weight_EH.shape
    if hidden % 16 or hidden > LARGEST_H or experts > 1024:
        limits = f"H must be a multiple of 16 up to {LARGEST_H} and E at most 1024"
        return f"{limits}, got H={hidden} and E={experts}"
    return None


def plan_router(
    tokens: int, experts: int, hidden: int, **rule: Any
) -> tuple[int, int, dict[str, Any]]:
    """Programs, blocks of tokens, and constants and options of a launch for tokens > 0.

    `rule`: as for `plan_route`.
    """
    _, plan = plan_route(tokens, experts, **rule)
    for name in ("ALONE", "BLOCK_T", "num_warps"):
        del plan[name]
    columns = plan["GROUPS_PAD"] * plan["GROUP_PAD"]
    block_e = min(32, max(16, triton.next_power_of_2(experts)))
    parts = triton.cdiv(experts, block_e) * triton.cdiv(hidden, SPLIT)
    for block_t, most in zip((16, 64), SPREAD_PROGRAMS, strict=True):
        blocks = triton.cdiv(tokens, block_t)
        if blocks * parts <= most and blocks <= MAX_BLOCKS:
            rows = 1 if tokens == 1 else max(1, min(block_t, 2048 // columns))
            tile = {"BLOCK_T": block_t, "BLOCK_E": block_e, "ROWS": rows, "SPREAD": True}
            options = {"num_warps": 4, "num_stages": 3, **registers(255, (3, 8))}
            return blocks * parts, blocks, plan | TILE | tile | options
    rows = max(1, min(64, 2048 // columns))
    block_e = min(128, max(16, triton.next_power_of_2(experts)))
    tile = {"BLOCK_T": 64, "BLOCK_E": block_e, "ROWS": rows, "SPREAD": False, "BLOCK_H": 64}
    options = {"num_warps": 8, "num_stages": 3, **registers(224, (3, 7))}
    return blocks, blocks, plan | TILE | tile | options


@lru_cache(maxsize=64)
def _tickets(device: torch.device) -> Tickets:
    return Tickets(device)


def route_hidden(
    hidden_TH: Tensor,
    weight_EH: Tensor,
    linear_bias_E: Tensor | None = None,
    bias_E: Tensor | None = None,
    *,
    top_k: int,
    scoring: str = "softmax",
    renormalize: bool = True,
    n_group: int = 1,
    topk_group: int = 1,
    scale: float = 1.0,
    logits_dtype: torch.dtype | None = None,
    weights_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (T, E), ids (T, K) int32 and weights (T, K), from one kernel.

    Args:
        hidden_TH, weight_EH: bf16 or fp16, H a multiple of 16; see `refusal`.
        linear_bias_E: added to the product, of any float dtype.
        bias_E: fp32, for `scoring="sigmoid"`; the choice is made on score + bias.
        logits_dtype: what sums are rounded to before anything else; None: that of `hidden_TH`.
        weights_dtype: what the weights are rounded to.

    Raises:
        ValueError: what `refusal` says, or a bias without sigmoid scoring.
    """
    if problem := refusal(hidden_TH, weight_EH):
        raise ValueError(f"route_hidden: {problem}")
    if bias_E is not None and scoring != "sigmoid":
        raise ValueError(f"route takes a bias with scoring='sigmoid' only, got {scoring!r}")
    (tokens, hidden), experts = hidden_TH.shape, weight_EH.shape[0]
    logits_TE = hidden_TH.new_empty((tokens, experts), dtype=logits_dtype or hidden_TH.dtype)
    ids_TK = hidden_TH.new_empty((tokens, top_k), dtype=torch.int32)
    weights_TK = hidden_TH.new_empty((tokens, top_k), dtype=weights_dtype)
    if not tokens:
        return logits_TE, ids_TK, weights_TK
    rule = {"scoring": scoring, "renormalize": renormalize, "n_group": n_group}
    programs, blocks, plan = plan_router(
        tokens, experts, hidden, top_k=top_k, topk_group=topk_group, **rule
    )
    pieces = tickets = None
    if plan["SPREAD"]:
        shape = (triton.cdiv(hidden, SPLIT), tokens, experts)
        pieces = hidden_TH.new_empty(shape, dtype=torch.float32)
        tickets = _tickets(hidden_TH.device).take(blocks)
    overlap = hidden_TH.is_cuda and torch.cuda.get_device_capability(hidden_TH.device) >= (9, 0)
    router_kernel[(programs,)](
        hidden_TH.contiguous(),
        weight_EH.contiguous(),
        linear_bias_E,
        bias_E,
        logits_TE,
        ids_TK,
        weights_TK,
        pieces,
        tickets,
        tokens,
        scale,
        HIDDEN=hidden,
        PDL=overlap,
        **plan,
        **({"launch_pdl": True} if overlap else {}),
    )
    return logits_TE, ids_TK, weights_TK


def route_hidden_ref(
    hidden_TH: Tensor,
    weight_EH: Tensor,
    linear_bias_E: Tensor | None = None,
    bias_E: Tensor | None = None,
    *,
    logits_dtype: torch.dtype | None = None,
    weights_dtype: torch.dtype = torch.float32,
    **rule: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """The torch twin of `route_hidden`: the product in fp32, in an order of torch's choosing."""
    logits_TE = hidden_TH.float() @ weight_EH.float().T
    if linear_bias_E is not None:
        logits_TE = logits_TE + linear_bias_E.float()
    logits_TE = logits_TE.to(logits_dtype or hidden_TH.dtype)
    ids_TK, weights_TK, _ = route_ref(logits_TE, bias_E, **rule)
    return logits_TE, ids_TK, weights_TK.to(weights_dtype)


def _aot_case(name: str, tokens: int, experts: int, hidden: int, **how: Any) -> AotCase:
    quick, pdl, bias, linear = (how.pop(f, False) for f in ("quick", "pdl", "bias", "linear"))
    rule: dict[str, Any] = {"scoring": "softmax", "renormalize": True, "n_group": 1}
    logits = how.pop("logits", "bf16")
    _, _, plan = plan_router(tokens, experts, hidden, **(rule | {"topk_group": 1} | how))
    known = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")
    options = {k: plan.pop(k) for k in known if k in plan}
    signature = {"hidden_ptr": "*bf16", "weight_ptr": "*bf16", "logits_ptr": f"*{logits}"}
    signature |= {"ids_ptr": "*i32", "weights_ptr": f"*{logits}", "tokens": "i32", "scale": "fp32"}
    spread = plan["SPREAD"]
    for pointer, kind, there in (
        ("linear_ptr", "*bf16", linear), ("bias_ptr", "*fp32", bias),
        ("pieces_ptr", "*fp32", spread), ("tickets_ptr", "*i32", spread),
    ):  # fmt: skip
        if there:
            signature[pointer] = kind
        else:
            plan[pointer] = None
    return AotCase(
        name=f"router/{name}-t{tokens}",
        fn=router_kernel,
        signature=signature,
        constexprs=plan | {"HIDDEN": hidden, "PDL": pdl},
        options=options | ({"launch_pdl": True} if pdl else {}),
        archs=(90, 100) if pdl else (80, 90, 100),
        quick=quick,
    )


def aot_cases() -> list[AotCase]:
    """Routers of known models by one token, some and many, and the largest."""
    deepseek: dict[str, Any] = {"scoring": "sigmoid", "bias": True, "n_group": 8, "topk_group": 4}
    deepseek |= {"logits": "fp32", "top_k": 8}
    return [
        _aot_case("qwen3", 1, 128, 2048, top_k=8, pdl=True, quick=True),
        _aot_case("overlapped", 64, 128, 2048, top_k=8, pdl=True),
        _aot_case("qwen3", 64, 128, 2048, top_k=8, quick=True),
        _aot_case("qwen3", 8192, 128, 2048, top_k=8, pdl=True),
        _aot_case("mixtral", 128, 8, 4096, top_k=2, pdl=True),
        _aot_case("mixtral", 8192, 8, 4096, top_k=2, pdl=True),
        _aot_case("deepseek-v3", 1, 256, 7168, **deepseek),
        _aot_case("deepseek-v3", 256, 256, 7168, **deepseek),
        _aot_case("deepseek-v3", 8192, 256, 7168, quick=True, **deepseek),
        _aot_case("gpt-oss", 16, 128, 2880, top_k=4, scoring="topk_softmax", linear=True),
        _aot_case("largest", 8192, 1024, 8192, top_k=64, renormalize=False),
    ]
