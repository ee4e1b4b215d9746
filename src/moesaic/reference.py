"""The whole-layer oracle: plain torch, any float dtype up to fp64, differentiable, slow, obvious.

    T tokens · H hidden width · I intermediate width · E experts · K top-k · R rows of one expert

Every faster implementation is measured against this file, on the same hidden states, ids and
weights. It visits the experts one after the other, like transformers' eager path, but rounds
nowhere except where its compute dtype does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .kernels.activation import activate_ref, pointwise_ref
from .types import ExpertSpec, ExpertWeights


def expert_reference(rows_RH: Tensor, e: int, weights: ExpertWeights, spec: ExpertSpec) -> Tensor:
    """Output rows (R, H) of expert `e`, computed in the dtype of `rows_RH`."""

    def linear(x: Tensor, name: str) -> Tensor:
        matrix = weights.named()[name][e].to(x.dtype)
        y = x @ (matrix if spec.transposed else matrix.T)
        bias = weights.named().get(f"{name}_bias")
        return y if bias is None else y + bias[e].to(x.dtype)

    if spec.layers == 3:
        first = pointwise_ref(linear(rows_RH, "up"), spec.activation, spec.alpha)
        second = pointwise_ref(linear(first, "mid"), spec.activation, spec.alpha)
        return linear(second, "down")
    act_RI = activate_ref(
        linear(rows_RH, "up"),
        activation=spec.activation,
        gated=spec.gated,
        interleaved=spec.interleaved,
        limit=spec.limit,
        alpha=spec.alpha,
        up_offset=spec.up_offset,
    )
    return linear(act_RI, "down")


def moe_reference(
    hidden_TH: Tensor,
    topk_ids_TK: Tensor,
    topk_weights_TK: Tensor,
    weights: ExpertWeights,
    spec: ExpertSpec,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The layer's output (T, H) in `dtype` (default: that of `hidden_TH`), experts one by one.

    Slots whose id equals `spec.num_experts` belong to nobody here and add nothing.
    """
    compute = dtype or hidden_TH.dtype
    hidden_TH = hidden_TH.to(compute)
    out_TH = torch.zeros_like(hidden_TH)
    for e in range(spec.num_experts):
        tokens_R, slots_R = torch.where(topk_ids_TK == e)
        if tokens_R.numel() == 0:
            continue
        y_RH = expert_reference(hidden_TH[tokens_R], e, weights, spec)
        scale_R = topk_weights_TK[tokens_R, slots_R].to(compute)
        out_TH = out_TH.index_add(0, tokens_R, y_RH * scale_R[:, None])
    return out_TH
