"""The byte language model: causality, one answer over implementations, windows, observation."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import moesaic
from moesaic.models import ByteLMConfig, ByteMoELM, byte_windows, eager_experts
from moesaic.reference import moe_reference

SMALL = ByteLMConfig(
    hidden_size=32, num_layers=2, num_heads=2, num_experts=4, expert_width=16, shared_width=16,
    context=64,
)  # fmt: skip


@pytest.fixture
def model() -> ByteMoELM:
    made = ByteMoELM(SMALL, experts_impl=moe_reference)
    made.reset_parameters(3)
    torch.nn.init.normal_(made.head.weight, std=0.2, generator=torch.Generator().manual_seed(1))
    return made.requires_grad_(False)


def test_a_byte_changes_only_what_follows_it(model: ByteMoELM) -> None:
    ids = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(5))
    changed = ids.clone()
    changed[:, 20] = (changed[:, 20] + 1) % 256
    before, after = model(ids), model(changed)
    assert torch.allclose(before[:, :20], after[:, :20], atol=1e-5)
    assert (before[:, 20:] - after[:, 20:]).abs().amax((0, 2)).min() > 1e-3


def test_positions_matter(model: ByteMoELM) -> None:
    ids = torch.tensor([[5, 9, 7, 7], [9, 5, 7, 7]])
    logits = model(ids)
    assert (logits[0, 3] - logits[1, 3]).abs().max() > 1e-3


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_implementations_agree(model: ByteMoELM, impl: str) -> None:
    ids = torch.randint(0, 256, (2, 64), generator=torch.Generator().manual_seed(6))
    eager = model(ids, experts_impl=eager_experts)
    ours = model(ids, experts_impl=partial(moesaic.moe, impl=impl))
    assert torch.allclose(ours, eager, atol=2e-5)
    without = model(ids, experts_impl=lambda hidden, *_: torch.zeros_like(hidden))
    assert (without - eager).abs().max() > 1e-2, "the experts must have a say"


def test_observer_sees_every_layer_and_every_slot(model: ByteMoELM) -> None:
    seen: list[tuple[int, moesaic.Routing]] = []
    model(torch.zeros(3, 10, dtype=torch.long), observe=lambda *pair: seen.append(pair))
    assert [layer for layer, _ in seen] == [0, 1]
    for _, routing in seen:
        assert int(routing.counts_E.sum()) == routing.topk_ids_TK.numel() == 3 * 10 * 2


def test_shared_expert_starts_where_the_config_says(model: ByteMoELM) -> None:
    names = model.state_dict().keys()
    assert "blocks.1.shared.down.weight" in names
    assert "blocks.0.shared.down.weight" not in names


def test_too_long_a_window_is_refused_with_the_remedy(model: ByteMoELM) -> None:
    with pytest.raises(ValueError, match=r"context=64.*got \(1, 65\).*byte_windows"):
        model(torch.zeros(1, 65, dtype=torch.long))


@pytest.mark.parametrize(("length", "window"), [(1, 8), (8, 8), (9, 8), (100, 7)])
def test_windows_score_every_byte_once_after_its_predecessor(length: int, window: int) -> None:
    data = bytes(i % 251 for i in range(length))
    pairs = byte_windows(data, window)
    assert bytes(torch.cat([t for _, t in pairs]).tolist()) == data
    assert bytes(torch.cat([i for i, _ in pairs]).tolist()) == b"\n" + data[:-1]
    assert byte_windows(b"", window) == []
