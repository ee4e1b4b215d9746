"""Packed weights: what they hold, what they refuse, and how a layer keeps and drops them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import moesaic
from moesaic import ExpertSpec, ExpertWeights, MoE, PackedWeights, RouterSpec

SPEC = ExpertSpec(num_experts=4, hidden_size=64, intermediate_size=96)
Inputs = tuple[Tensor, Tensor, Tensor]


def make() -> tuple[ExpertWeights, PackedWeights, Inputs]:
    generator = torch.Generator().manual_seed(0)
    up, down = (torch.randn(shape, generator=generator) for shape in SPEC.weight_shapes().values())
    weights = ExpertWeights(up=up, down=down)
    inputs = torch.randn(5, 64, generator=generator), torch.arange(5)[:, None] % 4, torch.ones(5, 1)
    return weights, moesaic.pack(weights, SPEC), inputs


def make_layer() -> tuple[MoE, Tensor]:
    torch.manual_seed(0)
    layer = MoE(RouterSpec(num_experts=4, top_k=2), SPEC).eval()
    layer.experts.pack_()
    return layer, torch.randn(7, 64)


def test_memory_is_that_of_the_weights_and_padding() -> None:
    weights, packed, _ = make()
    size = weights.up.nbytes + weights.down.nbytes
    assert size <= packed.num_bytes <= size + 2 * 4 * 3 * 4096
    half = ExpertWeights(up=weights.up.bfloat16(), down=weights.down.bfloat16())
    assert moesaic.pack(half, SPEC).num_bytes < packed.num_bytes


@pytest.mark.parametrize("change", ["in place", "other memory"])
def test_changed_weights_are_refused(change: str) -> None:
    weights, packed, inputs = make()
    moesaic.moe(*inputs, packed, SPEC)
    if change == "in place":
        weights.down[1, 2, 3] += 1
    else:
        weights.down.data = weights.down.clone()
    with pytest.raises(RuntimeError, match="changed after they were packed; pack them again"):
        moesaic.moe(*inputs, packed, SPEC)


def test_what_packed_weights_refuse() -> None:
    weights, packed, (hidden, ids, share) = make()
    other = ExpertSpec(num_experts=4, hidden_size=64, intermediate_size=96, activation="gelu")
    with pytest.raises(ValueError, match=r"packed for .*pack them for it"):
        moesaic.moe(hidden, ids, share, packed, other)
    with pytest.raises(RuntimeError, match=r"impl='cpu', got 'reference'; pass their \.plain"):
        moesaic.moe(hidden, ids, share, packed, SPEC, impl="reference")
    with pytest.raises(TypeError, match="dtype of hidden"):
        moesaic.moe(hidden.bfloat16(), ids, share, packed, SPEC)
    with pytest.raises(ValueError, match="must have shape"):
        moesaic.pack(weights, ExpertSpec(num_experts=4, hidden_size=64, intermediate_size=64))
    with pytest.raises(ValueError, match="only weights on the CPU can be packed, got meta"):
        moesaic.pack(ExpertWeights(up=weights.up.to("meta"), down=weights.down.to("meta")), SPEC)
    hidden.requires_grad_()
    with pytest.raises(RuntimeError, match=r"no gradients; call under torch\.no_grad\(\)"):
        moesaic.moe(hidden, ids, share, packed, SPEC)
    with torch.no_grad():
        assert torch.equal(
            moesaic.moe(hidden, ids, share, packed, SPEC),
            moesaic.moe(hidden, ids, share, weights, SPEC),
        )


def test_inference_tensors() -> None:
    weights, _, inputs = make()
    with torch.inference_mode():
        held = ExpertWeights(up=weights.up.clone(), down=weights.down.clone())
        packed = moesaic.pack(held, SPEC)
        assert torch.equal(moesaic.moe(*inputs, packed, SPEC), moesaic.moe(*inputs, weights, SPEC))


def test_compiled_code_breaks_the_graph_and_says_so() -> None:
    _, packed, inputs = make()

    def layer(hidden: Tensor, ids: Tensor, share: Tensor) -> Tensor:
        return moesaic.moe(hidden * 2, ids, share, packed, SPEC) + 1

    whole = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="compile with the plain ones"):
        whole(*inputs)
    torch.compiler.reset()
    assert torch.equal(torch.compile(layer, backend="aot_eager")(*inputs), layer(*inputs))


def test_a_layer_packs_for_inference_only() -> None:
    layer, x = make_layer()
    names, experts = layer.state_dict().keys(), layer.experts
    with pytest.raises(RuntimeError, match="no gradients"):
        layer(x)
    with torch.no_grad():
        packed_out = layer(x)
        assert experts.unpack_().packed is None
        assert torch.equal(layer(x), packed_out)
    assert layer.state_dict().keys() == names
    layer.train()
    with pytest.raises(RuntimeError, match=r"call \.eval\(\) first"):
        experts.pack_()


@torch.no_grad()
def test_a_layer_drops_a_pack_that_would_be_stale() -> None:
    layer, x = make_layer()
    experts, other = layer.experts, MoE(RouterSpec(num_experts=4, top_k=2), SPEC).eval()
    assert copy.deepcopy(layer).experts.packed is None
    layer.load_state_dict(other.state_dict())
    assert experts.packed is None
    assert torch.equal(layer(x), other(x))
    experts.pack_()
    assert layer.eval().experts.packed is not None
    layer.train()
    assert experts.packed is None
    layer.eval().experts.pack_()
    layer.bfloat16()
    assert experts.packed is None
    experts.pack_()
    experts.down_proj.mul_(2)
    with pytest.raises(RuntimeError, match="pack them again"):
        layer(x.bfloat16())
    experts.pack_()
    experts.down_proj = torch.nn.Parameter(experts.down_proj.clone())
    with pytest.raises(RuntimeError, match="replaced after it was packed"):
        layer(x.bfloat16())
