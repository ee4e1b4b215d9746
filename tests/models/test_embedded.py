"""The embedded model as shipped: shape and size, that it has learnt, that its record agrees."""

from __future__ import annotations

import hashlib
import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import moesaic
from moesaic.models import byte_windows, heldout_path, load_model, model_path, read_config

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = 24 * 1024


def bits(text: bytes, *, shuffle: bool = False) -> float:
    """Bits per byte of the embedded model on `text`, perhaps with its experts exchanged."""
    model = load_model(experts_impl=partial(moesaic.moe, impl="reference"))
    if shuffle:
        for block in model.blocks:
            block.gate.weight.data = block.gate.weight.data.roll(1, 0)
    total = 0.0
    with torch.inference_mode():
        for ids, targets in byte_windows(text, model.config.context):
            total += float(F.cross_entropy(model(ids[None])[0], targets, reduction="sum"))
    return total / math.log(2) / len(text)


@pytest.fixture(scope="module")
def final() -> dict[str, float]:
    lines = (ROOT / "docs" / "model_training.jsonl").read_text(encoding="utf-8").splitlines()
    last: dict[str, float] = json.loads(lines[-1])
    return last


def test_shape_and_size() -> None:
    config = read_config(model_path())
    assert config.num_layers >= 4
    assert config.num_experts >= 16
    assert config.top_k == 2
    assert config.shared_from_layer < config.num_layers
    assert model_path().stat().st_size <= 8_000_000


def test_heldout_text_is_the_listed_one() -> None:
    listing = json.loads(heldout_path().with_suffix(".json").read_text(encoding="utf-8"))
    text = heldout_path().read_bytes()
    text.decode("utf-8")
    assert hashlib.sha256(text).hexdigest() == listing["sha256"]
    assert 200_000 <= len(text) <= 400_000


def test_it_has_learnt(final: dict[str, float]) -> None:
    goal = 0.85 * final["trigram_bpb"]
    assert final["heldout_bpb"] <= goal
    middle = heldout_path().read_bytes()[100_000 : 100_000 + SAMPLE]
    learnt = bits(middle)
    assert learnt <= goal
    assert bits(middle, shuffle=True) > learnt + 0.1, "the router's choice must matter"


def test_no_expert_is_dead(final: dict[str, list[list[float]]]) -> None:
    for layer, shares in enumerate(final["expert_shares"]):
        assert len(shares) == read_config(model_path()).num_experts
        assert math.isclose(sum(shares), 1.0, abs_tol=1e-3)
        assert min(shares) > 0.0, f"layer {layer} has an expert that no byte is routed to"


def test_the_card_states_the_logged_number(final: dict[str, float]) -> None:
    card = (ROOT / "docs" / "model.md").read_text(encoding="utf-8")
    assert f"**{final['heldout_bpb']:.3f}**" in card
