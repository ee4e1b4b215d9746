"""A model small enough to run in milliseconds, and a text for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moesaic.models import ByteLMConfig, ByteMoELM, save_model

CONFIG = ByteLMConfig(
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    num_experts=8,
    top_k=2,
    expert_width=8,
    shared_width=8,
    shared_from_layer=1,
    context=32,
)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with logits that differ."""
    model = ByteMoELM(CONFIG)
    model.reset_parameters(0)
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(1))
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    save_model(model, path)
    return path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """1003 bytes with characters of one to four bytes."""
    path = tmp_path / "text.txt"
    line = "Grüße, 世界 🧩 and plain words.\n".encode()
    path.write_bytes((line * (1003 // len(line))).ljust(1003, b"."))
    return path
