"""Whole layers of co-location: what a decode step computes, against the same in plain torch."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from moesaic.bench.colocation_counters import stack_bytes
from moesaic.bench.stacks import Stack, Tenant
from moesaic.bench.whole_layers import EPSILON, ROPE_BASE, Heads, WholeLayer
from moesaic.bench.workloads import Model, make_weights

MODEL, HEADS, TOKENS = Model("tiny", 4, 2, 64, 128), Heads(4, 2, 16, context=6), 3


def attention(layer: WholeLayer, hidden_TH: torch.Tensor) -> torch.Tensor:
    """Heads one by one, positions as rotations of neighbouring pairs."""
    queries, keys, values = (hidden_TH @ layer.qkv_1UH[0].T).split([64, 32, 32], dim=1)
    angle_D2 = 5 * ROPE_BASE ** (-torch.arange(0, 16, 2) / 16)
    rotation = torch.block_diag(
        *(torch.tensor([[math.cos(a), math.sin(a)], [-math.sin(a), math.cos(a)]]) for a in angle_D2)
    )
    mixed = []
    for t in range(TOKENS):
        for head in range(4):
            group = head // 2
            query = queries[t].view(4, 16)[head] @ rotation
            key_LD, value_LD = (
                layer.keys_TGLD[t, group].clone(),
                layer.values_TGLD[t, group].clone(),
            )
            key_LD[-1] = keys[t].view(2, 16)[group] @ rotation
            value_LD[-1] = values[t].view(2, 16)[group]
            mixed.append((key_LD @ query / 4).softmax(0) @ value_LD)
    return torch.stack(mixed).view(TOKENS, 64) @ layer.out_1HU[0].T


def experts(layer: WholeLayer, hidden_TH: torch.Tensor) -> torch.Tensor:
    """Experts one by one, weights of the softmax over the two chosen."""
    out_TH = torch.zeros_like(hidden_TH)
    for t, hidden in enumerate(hidden_TH):
        logits, ids = (layer.gate_1EH[0, :4] @ hidden).topk(2)
        for weight, e in zip(logits.softmax(0), ids, strict=True):
            gate, up = (layer.experts.up[e] @ hidden).chunk(2)
            out_TH[t] += weight * (layer.experts.down[e] @ (F.silu(gate) * up))
    return out_TH


def test_a_layer_is_what_plain_torch_says() -> None:
    generator = torch.Generator().manual_seed(1)
    weights = make_weights(MODEL.spec(), dtype=torch.float32, generator=generator)
    layer = WholeLayer(MODEL, HEADS, TOKENS, weights, torch.float32, generator)
    hidden_TH = torch.randn(TOKENS, 64, generator=generator)
    first_TH = hidden_TH / 3
    found = sum(layer(first_TH, hidden_TH - first_TH))
    behind_TH = hidden_TH + attention(layer, F.rms_norm(hidden_TH, (64,), eps=EPSILON))
    expected = behind_TH + experts(layer, F.rms_norm(behind_TH, (64,), eps=EPSILON))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, behind_TH, atol=1e-2)


def test_a_stack_of_whole_layers_repeats_and_counts_its_bytes() -> None:
    device = torch.device("cpu")
    whole, bare = (
        Stack(Tenant(MODEL, 1, 2, 2, heads), device, torch.float32, 0, "auto")
        for heads in (HEADS, None)
    )
    first, second = whole.forward(0, None), whole.forward(1, None)
    assert torch.equal(first, whole.forward(0, None)) and not torch.equal(first, second)
    dense = 2 * 4 * (128 * 64 + 64 * 64 + 64 * 64 + 2 * 2 * 6 * 16)
    assert stack_bytes(whole) - stack_bytes(bare) == dense


@pytest.mark.gpu
def test_a_budget_of_sms_keeps_the_bits_of_whole_layers() -> None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    model = Model("small", 32, 8, 1024, 512)
    tenant = Tenant(model, 1, 2, 1, Heads(16, 8, 64))
    stack = Stack(tenant, torch.device("cuda", 0), torch.bfloat16, 0, "auto")
    whole = stack.forward(0, None).clone()
    assert whole.isfinite().all()
    for num_sms in (132, 48, 8):
        assert torch.equal(stack.forward(0, num_sms), whole)
