"""The torch twin of the fused router, importable without Triton.

    T tokens · E experts · K top-k · G groups

>>> ids, weights, counts = route_ref(torch.tensor([[0.0, 2.0, 2.0, 1.0]]), top_k=2)
>>> ids.tolist(), counts.tolist()
([[1, 2]], [0, 1, 1, 0])
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST, TINY = 2.0**126, 2.0**-126


def _finite(x: Tensor) -> Tensor:
    """`x` in fp32 within +-2**126, NaN as the least: sums and differences of two stay finite."""
    x = x.float()
    return torch.where(torch.isnan(x), -LARGEST, x.clamp(-LARGEST, LARGEST))


def _sigmoid(logits: Tensor) -> Tensor:
    """Scores in [0, 1]; those below 2**-126 are zero, as devices that flush denormals have it."""
    scores = logits.sigmoid()
    return torch.where(scores < TINY, 0.0, scores)


def _topk_lowest_id(scores_TE: Tensor, top_k: int) -> Tensor:
    """Ids (T, K) of the largest scores, best first, ties to the lowest id."""
    return torch.sort(scores_TE, dim=-1, descending=True, stable=True).indices[:, :top_k]


def _mask_groups(choice_TE: Tensor, n_group: int, topk_group: int) -> Tensor:
    """`choice_TE` with -inf outside the best groups; a group is worth its two best scores."""
    tokens, experts = choice_TE.shape
    grouped = choice_TE.view(tokens, n_group, experts // n_group)
    worth_TG = grouped.topk(min(2, experts // n_group), dim=-1).values.sum(-1)
    best = _topk_lowest_id(worth_TG, topk_group)
    keep_TG = torch.zeros_like(worth_TG, dtype=torch.bool).scatter_(1, best, True)
    return grouped.masked_fill(~keep_TG[..., None], float("-inf")).view(tokens, experts)


def route_ref(
    logits_TE: Tensor,
    bias_E: Tensor | None = None,
    *,
    top_k: int,
    scoring: str = "softmax",
    renormalize: bool = True,
    n_group: int = 1,
    topk_group: int = 1,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids (T, K) int32, weights (T, K) fp32 and counts (E,) int32 of logits (T, E), in fp32.

    Whatever comes in, ids are in range and distinct and weights are finite: logits are clamped to
    +-2**126 and NaN counts as -inf, so a row of one such value alone takes the lowest ids with
    equal weights. Sigmoid scores below 2**-126 count as zero, and a row whose
    chosen scores are all zero is renormalised to 1/K each. Softmax that is renormalised is the
    softmax of the K chosen logits, which is the same but for rounding.
    """
    logits = _finite(logits_TE)
    choice_TE = logits
    if scoring == "sigmoid":
        scores_TE = _sigmoid(logits)
        choice_TE = scores_TE if bias_E is None else _finite(scores_TE + bias_E)
    if n_group > 1:
        choice_TE = _mask_groups(choice_TE, n_group, topk_group)
    ids_TK = _topk_lowest_id(choice_TE, top_k)
    weights_TK = weigh_ref(logits, ids_TK, scoring=scoring, renormalize=renormalize, scale=scale)
    counts_E = torch.bincount(ids_TK.flatten(), minlength=logits.shape[1]).to(torch.int32)
    return ids_TK.to(torch.int32), weights_TK, counts_E


def weigh_ref(
    logits_TE: Tensor, ids_TK: Tensor, *, scoring: str, renormalize: bool, scale: float
) -> Tensor:
    """Weights (T, K) fp32 of chosen ids, differentiable in the logits; always finite."""
    logits = _finite(logits_TE)
    if scoring == "sigmoid":
        weights_TK = _sigmoid(logits).gather(1, ids_TK)
        if renormalize:
            total_T1 = weights_TK.sum(-1, keepdim=True)
            some_T1 = torch.where(total_T1 == 0, 1.0, total_T1)
            weights_TK = torch.where(total_T1 == 0, 1 / ids_TK.shape[1], weights_TK / some_T1)
    elif scoring == "topk_softmax" or renormalize:
        weights_TK = logits.gather(1, ids_TK).softmax(-1)
    else:
        weights_TK = logits.softmax(-1).gather(1, ids_TK)
    return weights_TK * scale
