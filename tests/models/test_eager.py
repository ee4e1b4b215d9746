"""The sequential baseline has the bits of transformers' own eager experts."""

from __future__ import annotations

import pytest
import torch

from moesaic import ExpertSpec, ExpertWeights
from moesaic.models import eager_experts

SPEC = ExpertSpec(num_experts=8, hidden_size=48, intermediate_size=40)


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, ExpertWeights]:
    """Hidden states, ids (expert 5 gets nothing), fp32 weights and expert weights."""
    g = torch.Generator().manual_seed(11)
    hidden = torch.randn(37, 48, generator=g).to(dtype)
    ids = torch.stack([torch.randperm(7, generator=g)[:3] for _ in range(37)])
    ids = torch.where(ids == 5, 7, ids).to(torch.int32)
    up = (torch.randn(8, 80, 48, generator=g) * 0.2).to(dtype)
    down = (torch.randn(8, 48, 40, generator=g) * 0.2).to(dtype)
    return hidden, ids, torch.rand(37, 3, generator=g), ExpertWeights(up, down)


@pytest.mark.parametrize("weights_follow", [False, True], ids=["fp32-weights", "cast-weights"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_equal_transformers(dtype: torch.dtype, weights_follow: bool) -> None:
    pytest.importorskip("transformers")
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(hidden_size=48, moe_intermediate_size=40, num_experts=8)
    config._experts_implementation = "eager"
    theirs = Qwen3MoeExperts(config).to(dtype)
    hidden, ids, scale, weights = inputs(dtype)
    scale = scale.to(dtype) if weights_follow else scale
    with torch.no_grad():
        theirs.gate_up_proj.copy_(weights.up)
        theirs.down_proj.copy_(weights.down)
        expected = theirs(hidden, ids.long(), scale)
    ours = eager_experts(hidden, ids, scale, weights, SPEC)
    assert ours.dtype == expected.dtype
    assert torch.equal(ours, expected)
    assert not torch.equal(eager_experts(hidden, ids, scale * 1.01, weights, SPEC), expected)


def test_other_experts_are_refused() -> None:
    spec = ExpertSpec(num_experts=8, hidden_size=48, intermediate_size=40, activation="gelu")
    hidden, ids, scale, weights = inputs(torch.float32)
    with pytest.raises(ValueError, match=r"plain gated silu.*reference"):
        eager_experts(hidden, ids, scale, weights, spec)
