"""The sequential baseline: transformers' eager experts loop, operation for operation.

    T tokens · H hidden width · E experts · K top-k · R rows of one expert

It exists so that a machine without transformers can still compare with it; a test holds it
bit-equal to transformers' own class. It is written as that class is.

>>> import torch
>>> spec = ExpertSpec(num_experts=2, hidden_size=8, intermediate_size=8)
>>> weights = ExpertWeights(up=torch.ones(2, 16, 8), down=torch.ones(2, 8, 8))
>>> ids, scale = torch.tensor([[1]]), torch.tensor([[0.5]])
>>> eager_experts(torch.zeros(1, 8), ids, scale, weights, spec).sum().item()
0.0
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..types import ExpertSpec, ExpertWeights


def eager_experts(
    hidden_TH: Tensor,
    topk_ids_TK: Tensor,
    topk_weights_TK: Tensor,
    weights: ExpertWeights,
    spec: ExpertSpec,
) -> Tensor:
    """The output (T, H) of gated-silu experts, one after the other, as transformers' eager path.

    Args:
        hidden_TH: fp32, fp16 or bf16.
        topk_ids_TK: int32 or int64.
        topk_weights_TK: any float dtype; the product takes the promoted dtype, as there.
        weights: `up` (E, 2I, H) and `down` (E, H, I).
        spec: plain gated silu experts.

    Raises:
        ValueError: the spec asks for anything but plain gated silu experts.
    """
    plain = ExpertSpec(
        num_experts=spec.num_experts,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
    )
    if spec != plain:
        raise ValueError(
            f"the eager baseline needs plain gated silu experts, {plain}, got {spec}; "
            "use impl='reference' of moesaic.moe"
        )
    final_TH = torch.zeros_like(hidden_TH)
    with torch.no_grad():
        mask = F.one_hot(topk_ids_TK.long(), num_classes=spec.num_experts)
        mask_EKT = mask.permute(2, 1, 0)
        hit = torch.greater(mask_EKT.sum(dim=(-1, -2)), 0).nonzero()
    for row in hit:
        e = row[0]
        slots_R, tokens_R = torch.where(mask_EKT[e])
        gate, up = F.linear(hidden_TH[tokens_R], weights.up[e]).chunk(2, dim=-1)
        current_RH = F.linear(F.silu(gate) * up, weights.down[e])
        current_RH = current_RH * topk_weights_TK[tokens_R, slots_R, None]
        final_TH.index_add_(0, tokens_R, current_RH.to(final_TH.dtype))
    return final_TH
