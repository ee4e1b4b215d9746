"""The whole Triton layer against the fp64 oracle, and its bits against all that must not show."""

from __future__ import annotations

import pytest
import torch
from layer_cases import ROUTINGS, SPECS, draw, draw_ids, draw_layer

from moesaic.kernels.experts import experts_triton
from moesaic.kernels.tune import Config, GemmConfig
from moesaic.reference import moe_reference
from moesaic.types import ExpertSpec, ExpertWeights

SMALL = GemmConfig(block_n=16, block_k=16, num_stages=2, group_m=2)
CONFIG = Config((16,), SMALL, SMALL, SMALL)


def run(hidden, ids, weights_TK, weights: ExpertWeights, spec: ExpertSpec, **options):
    """`experts_triton` with the arithmetic of `spec`."""
    options.setdefault("config", CONFIG)
    return experts_triton(
        hidden, ids, weights_TK, **weights.named(),
        activation=spec.activation, gated=spec.gated, interleaved=spec.interleaved,
        transposed=spec.transposed, limit=spec.limit, alpha=spec.alpha, up_offset=spec.up_offset,
        **options,
    )  # fmt: skip


def tokens_of(device, dtype, *, tokens, hidden, experts=4, top_k=2, routing="uniform"):
    """Hidden states, ids and fp32 weights that sum to one."""
    ids = draw_ids(routing, tokens, top_k, experts).to(device)
    share = torch.rand(tokens, top_k, generator=torch.Generator().manual_seed(5)).softmax(-1)
    return draw(tokens, hidden, device=device, dtype=dtype, seed=7), ids, share.to(device)


def check(actual, hidden, ids, share, weights, spec) -> None:
    """Compare with the oracle in fp64."""
    expected = moe_reference(hidden, ids, share, weights, spec, dtype=torch.float64)
    tolerance = {torch.float32: 3e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}[actual.dtype]
    scale = float(expected.abs().max()) or 1.0
    torch.testing.assert_close(actual.double() / scale, expected / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize("swap", [0, 64], ids=["plain", "swap"])
@pytest.mark.parametrize("kind", SPECS)
def test_every_expert_against_fp64(kernel_device, poisoned_empty, kind, swap) -> None:
    spec, weights = draw_layer(kind, 4, 40, 24, kernel_device, torch.float16)
    inputs = tokens_of(kernel_device, torch.float16, tokens=11, hidden=40)
    cut = SMALL._replace(swap_up_to=swap)
    check(run(*inputs, weights, spec, config=Config((16,), cut, cut, cut)), *inputs, weights, spec)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_routing(kernel_device, poisoned_empty, routing, dtype) -> None:
    if dtype == torch.bfloat16 and kernel_device.type == "cpu":
        pytest.skip("Triton's interpreter multiplies bf16 wrongly")
    spec, weights = draw_layer("swiglu", 6, 24, 16, kernel_device, dtype)
    inputs = tokens_of(
        kernel_device, dtype, tokens=37, hidden=24, experts=6, top_k=3, routing=routing
    )
    config = CONFIG._replace(heights=(16, 32), order="mixed")
    check(run(*inputs, weights, spec, config=config), *inputs, weights, spec)


def test_the_heuristics_own_choice(kernel_device, poisoned_empty) -> None:
    for tokens in (1, 40):
        spec, weights = draw_layer("swiglu", 4, 64, 32, kernel_device, torch.float32)
        inputs = tokens_of(kernel_device, torch.float32, tokens=tokens, hidden=64)
        check(run(*inputs, weights, spec, config=None), *inputs, weights, spec)


def test_no_tokens_and_strided_tokens(kernel_device) -> None:
    spec, weights = draw_layer("swiglu", 4, 24, 16, kernel_device, torch.float32)
    hidden, ids, share = tokens_of(kernel_device, torch.float32, tokens=5, hidden=24)
    assert run(hidden[:0], ids[:0], share[:0], weights, spec).shape == (0, 24)
    wide = torch.cat([hidden, hidden], dim=1)[:, :24]
    expected = run(hidden, ids, share, weights, spec)
    assert torch.equal(run(wide, ids.long(), share, weights, spec), expected)


@pytest.mark.parametrize("kind", ["swiglu", "mlp3"])
def test_bits_do_not_show_batch_position_repetition_or_budget(kernel_device, kind) -> None:
    dtype = torch.float16
    spec, weights = draw_layer(kind, 4, 40, 24, kernel_device, dtype)
    hidden, ids, share = tokens_of(kernel_device, dtype, tokens=23, hidden=40, routing="skewed")
    whole = run(hidden, ids, share, weights, spec)
    assert torch.equal(run(hidden, ids, share, weights, spec), whole)
    assert torch.equal(run(hidden, ids, share, weights, spec, num_sms=2), whole)
    back = torch.arange(22, -1, -1, device=kernel_device)
    turned = run(hidden[back], ids[back], share[back], weights, spec)
    assert torch.equal(turned[back], whole)
    some = slice(6, 9)
    assert torch.equal(run(hidden[some], ids[some], share[some], weights, spec), whole[some])
    tall = Config((32,), SMALL._replace(swap_up_to=32), SMALL._replace(block_n=32), SMALL)
    assert torch.equal(run(hidden, ids, share, weights, spec, config=tall), whole)
    assert not torch.equal(turned, whole)


def test_slots_of_nobody_add_nothing(kernel_device, poisoned_empty) -> None:
    spec, weights = draw_layer("swiglu", 4, 24, 16, kernel_device, torch.float32)
    hidden, ids, share = tokens_of(kernel_device, torch.float32, tokens=6, hidden=24)
    ids[:3] = 4
    out = run(hidden, ids, share, weights, spec)
    assert out[:3].abs().max() == 0
    assert torch.equal(out[3:], run(hidden[3:], ids[3:], share[3:], weights, spec))


def test_fused_needs_three_layers(kernel_device) -> None:
    spec, weights = draw_layer("swiglu", 4, 24, 16, kernel_device, torch.float32)
    inputs = tokens_of(kernel_device, torch.float32, tokens=2, hidden=24)
    with pytest.raises(ValueError, match="three-layer"):
        run(*inputs, weights, spec, fused=True)
