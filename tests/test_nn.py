"""The layer as a module: transformers' layouts, safetensors round trips, gradients, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moesaic import ExpertSpec, MoE, RouterSpec, nn

ROUTER = RouterSpec(num_experts=8, top_k=2)
KINDS = {
    "mixtral": (ROUTER, ExpertSpec(num_experts=8, hidden_size=32, intermediate_size=48)),
    "gpt-oss": (
        RouterSpec(num_experts=8, top_k=2, scoring="topk_softmax"),
        ExpertSpec(
            num_experts=8,
            hidden_size=32,
            intermediate_size=48,
            bias=True,
            interleaved=True,
            transposed=True,
            limit=7.0,
            alpha=1.702,
            up_offset=1.0,
        ),
    ),
    "deepseek": (
        RouterSpec(num_experts=8, top_k=2, scoring="sigmoid", n_group=4, topk_group=2, scale=2.5),
        ExpertSpec(num_experts=8, hidden_size=32, intermediate_size=48),
    ),
    "relu2": (
        ROUTER,
        ExpertSpec(
            num_experts=8, hidden_size=32, intermediate_size=48, gated=False, activation="relu2"
        ),
    ),
    "three layers": (
        ROUTER,
        ExpertSpec(
            num_experts=8,
            hidden_size=32,
            intermediate_size=48,
            gated=False,
            layers=3,
            bias=True,
            activation="relu",
        ),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_safetensors_round_trip(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer, other = MoE(*KINDS[kind]), MoE(*KINDS[kind])
    x = torch.randn(3, 5, 32)
    assert not torch.equal(layer(x), other(x))
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    other.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    assert torch.equal(layer(x), other(x))


def test_experts_hold_what_transformers_holds() -> None:
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    config = pytest.importorskip("transformers").MixtralConfig(
        hidden_size=32, intermediate_size=48, num_local_experts=8, num_experts_per_tok=2
    )
    config._experts_implementation = "eager"
    theirs = modeling.MixtralExperts(config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.1)
    ours = nn.Experts(KINDS["mixtral"][1])
    ours.load_state_dict(theirs.state_dict())
    hidden, ids = torch.randn(7, 32), torch.randint(0, 8, (7, 2))
    share = torch.rand(7, 2)
    torch.testing.assert_close(ours(hidden, ids, share), theirs(hidden, ids, share))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_reference(kind: str) -> None:
    torch.manual_seed(0)
    router, experts = KINDS[kind]
    fast, slow = MoE(router, experts), MoE(router, experts, impl="reference")
    slow.load_state_dict(fast.state_dict())
    grads = []
    for layer in (fast, slow):
        x = torch.randn(9, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        layer(x).square().sum().backward()
        grads.append([x.grad, *(p.grad for p in layer.parameters())])
    for mine, theirs in zip(*grads, strict=True):
        assert mine is not None
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert any(g.abs().max() > 0 for g in grads[0])


def test_router_and_experts_must_agree() -> None:
    with pytest.raises(ValueError, match="same num_experts, got 8 and 4"):
        MoE(ROUTER, ExpertSpec(num_experts=4, hidden_size=32, intermediate_size=48))
