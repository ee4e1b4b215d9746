"""What an executor really computed, told by the executor itself.

    T tokens · H hidden width · I intermediate width · E experts · K top-k

The routing says which rows should be computed. To know which ones were, the same executor gets the
same ids and shapes once more with *witness weights*: expert e turns the witness input into a
single 1 in column e, and every slot weighs 1. The output (T, H) then holds, for each token and
expert, how often that expert computed that token, as exact integers in fp32, fp16 and bf16: a
dropped, doubled or misrouted row changes a digit. The executor's own bookkeeping is not asked.

Worked example, 2 tokens, 3 experts, ids [[0, 2], [2, 1]]: an executor that drops the last slot
answers [[1, 0, 1], [0, 0, 1]]; 3 rows computed of 4 routed, 1 wrong.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels.activation import activate_ref
from ..models.byte_lm import ExpertsFn
from ..types import ExpertSpec, ExpertWeights
from .facts import Rows

# silu(32) is 32 exactly in every float dtype: exp(-32) vanishes beside 1.
GATE, UP = 32.0, 1.0 / 32.0


@lru_cache(maxsize=8)
def witness_weights(spec: ExpertSpec, dtype: torch.dtype, device: torch.device) -> ExpertWeights:
    """Weights of `spec` whose expert e maps the first unit vector to the unit vector e.

    Raises:
        ValueError: the spec is no plain gated silu expert, or has more experts than columns.
    """
    plain = spec.gated and spec.activation == "silu" and spec.alpha == 1.0 and spec.layers == 2
    if not plain or spec.interleaved or spec.transposed or spec.bias or spec.limit is not None:
        raise ValueError(f"the witness needs plain gated silu experts, got {spec}")
    if spec.num_experts > spec.hidden_size:
        raise ValueError(
            f"the witness needs at most hidden_size={spec.hidden_size} experts, "
            f"got {spec.num_experts}"
        )
    shapes = spec.weight_shapes()
    up = torch.zeros(shapes["up"], dtype=dtype, device=device)
    down = torch.zeros(shapes["down"], dtype=dtype, device=device)
    up[:, 0, 0], up[:, spec.intermediate_size, 0] = GATE, UP
    experts = torch.arange(spec.num_experts, device=device)
    down[experts, experts, 0] = 1.0
    return ExpertWeights(up=up, down=down)


@lru_cache(maxsize=8)
def unit_weights(spec: ExpertSpec, dtype: torch.dtype, device: torch.device) -> ExpertWeights:
    """Weights of any two-layer `spec` whose expert e maps the first unit vector to unit vector e.

    What the activation makes of the chosen inputs is divided out again by the last product, so the
    output is 1 but for a rounding.

    Raises:
        ValueError: the spec has three layers, or more experts than columns.
    """
    if spec.layers != 2 or spec.num_experts > spec.hidden_size:
        raise ValueError(f"the witness needs two layers and E <= H, got {spec}")
    high = GATE if spec.activation in ("silu", "gelu", "gelu_tanh") else 1.0
    gate = min(high, spec.limit) if spec.limit is not None else high
    pair = torch.tensor([[gate, UP]] if spec.gated else [[gate]], dtype=torch.float64)
    made = activate_ref(
        pair, activation=spec.activation, gated=spec.gated, interleaved=spec.interleaved,
        limit=spec.limit, alpha=spec.alpha, up_offset=spec.up_offset,
    )  # fmt: skip
    named = {k: torch.zeros(v, dtype=dtype) for k, v in spec.weight_shapes().items()}
    up, down = named["up"], named["down"]
    up_EUH = up.transpose(1, 2) if spec.transposed else up
    down_EHI = down.transpose(1, 2) if spec.transposed else down
    up_EUH[:, 0, 0] = gate
    if spec.gated:
        up_EUH[:, 1 if spec.interleaved else spec.intermediate_size, 0] = UP
    experts = torch.arange(spec.num_experts)
    down_EHI[experts, experts, 0] = 1.0 / float(made[0, 0])
    return ExpertWeights(**{k: v.to(device) for k, v in named.items()})


def count_rows(
    experts: ExpertsFn, topk_ids_TK: Tensor, spec: ExpertSpec, dtype: torch.dtype
) -> Rows:
    """Run `experts` on the witness weights and compare with the ids, token by token.

    Args:
        experts: the executor under test.
        topk_ids_TK: ids as the router gave them.
        spec: the layer's experts; the witness has the same shapes.
        dtype: the dtype of the layer's hidden states.
    """
    tokens, top_k = topk_ids_TK.shape
    device = topk_ids_TK.device
    hidden_TH = torch.zeros(tokens, spec.hidden_size, dtype=dtype, device=device)
    hidden_TH[:, 0] = 1.0
    ones_TK = torch.ones(tokens, top_k, dtype=torch.float32, device=device)
    weights = witness_weights(spec, dtype, device)
    seen_TH = experts(hidden_TH, topk_ids_TK, ones_TK, weights, spec).double()
    expected_TE = F.one_hot(topk_ids_TK.long(), spec.num_experts).sum(1).double()
    wrong = (seen_TH[:, : spec.num_experts] != expected_TE).sum()
    wrong = wrong + (seen_TH[:, spec.num_experts :] != 0).sum()
    computed = int(seen_TH.nan_to_num(0.0).sum().round())
    return Rows(routed=tokens * top_k, computed=computed, wrong=int(wrong))
