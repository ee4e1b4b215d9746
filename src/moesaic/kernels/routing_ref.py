"""The torch twin of the fused router, importable without Triton.

    T tokens · E experts · K top-k · G groups

>>> ids, weights, counts = route_ref(torch.tensor([[0.0, 2.0, 2.0, 1.0]]), top_k=2)
>>> ids.tolist(), counts.tolist()
([[1, 2]], [0, 1, 1, 0])
"""

from __future__ import annotations

import torch
from torch import Tensor


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

    NaN logits count as -inf, so an id is in range whatever comes in.
    """
    logits = logits_TE.float()
    logits = torch.where(torch.isnan(logits), float("-inf"), logits)
    if scoring == "sigmoid":
        scores_TE = logits.sigmoid()
        choice_TE = scores_TE if bias_E is None else scores_TE + bias_E
    else:
        scores_TE = logits.softmax(-1) if scoring == "softmax" else logits
        choice_TE = logits
    if n_group > 1:
        choice_TE = _mask_groups(choice_TE, n_group, topk_group)
    ids_TK = _topk_lowest_id(choice_TE, top_k)
    weights_TK = scores_TE.gather(1, ids_TK)
    if scoring == "topk_softmax":
        weights_TK = weights_TK.softmax(-1)
    elif renormalize:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    counts_E = torch.bincount(ids_TK.flatten(), minlength=logits.shape[1]).to(torch.int32)
    return ids_TK.to(torch.int32), weights_TK * scale, counts_E
