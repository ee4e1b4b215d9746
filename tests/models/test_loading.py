"""Model files: the bits come back, and every damaged file is refused in one line with a remedy."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from moesaic.models import (
    ByteLMConfig,
    ByteMoELM,
    eager_experts,
    load_model,
    read_config,
    save_model,
)

CONFIG = ByteLMConfig(
    hidden_size=16, num_layers=2, num_heads=2, num_experts=4, expert_width=8, shared_width=8
)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, ByteMoELM]:
    model = ByteMoELM(CONFIG, experts_impl=eager_experts)
    model.reset_parameters(1)
    path = tmp_path / "m.safetensors"
    save_model(model, path, notes={"trained_on": "nothing"})
    return path, model


def rewrite(
    path: Path, *, drop: str = "", add: dict[str, torch.Tensor] | None = None, **meta: str
) -> None:
    """The same file with tensors dropped or added and metadata changed."""
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if name != drop]  # noqa: SIM118
        tensors = {name: file.get_tensor(name) for name in names}
        metadata = {**file.metadata(), **meta}
    save_file(tensors | (add or {}), path, metadata=metadata)


def test_what_was_saved_comes_back(saved: tuple[Path, ByteMoELM]) -> None:
    path, model = saved
    loaded = load_model(path, dtype=torch.bfloat16, experts_impl=eager_experts)
    assert loaded.config == CONFIG == read_config(path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.to(torch.bfloat16)), name
    assert not any(p.requires_grad for p in loaded.parameters())
    assert [p.name for p in path.parent.iterdir()] == [path.name], "no partial file is left"


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_truncated(saved: tuple[Path, ByteMoELM], keep: int) -> None:
    path, _ = saved
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"not a complete safetensors file.*again"):
        load_model(path)


def test_missing_file_and_other_content(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no such file"):
        load_model(tmp_path / "none.safetensors")
    (tmp_path / "text").write_text("hello, I am no model at all")
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        load_model(tmp_path / "text")


def test_wrong_tensors(saved: tuple[Path, ByteMoELM]) -> None:
    path, _ = saved
    good = path.read_bytes()
    cases = [
        ({"drop": "norm.weight"}, r"missing \['norm.weight'\]"),
        ({"add": {"extra": torch.zeros(1)}}, r"unexpected \['extra'\]"),
        ({"add": {"norm.weight": torch.ones(17)}}, r"norm.weight must be .*\(16,\).*\(17,\)"),
        ({"add": {"norm.weight": torch.ones(16).long()}}, "float tensor.*int64"),
        ({"add": {"norm.weight": torch.full((16,), float("nan"))}}, "NaN or infinity"),
    ]
    for change, message in cases:
        path.write_bytes(good)
        rewrite(path, **change)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=message) as caught:
            load_model(path)
        assert "\n" not in str(caught.value)


def test_wrong_metadata(saved: tuple[Path, ByteMoELM]) -> None:
    path, _ = saved
    good, config = path.read_bytes(), asdict(CONFIG)
    cases = [
        ({"format": "other"}, "metadata 'format' must be"),
        ({"config": "{"}, "not JSON"),
        ({"config": "[]"}, "exactly"),
        ({"config": json.dumps({**config, "unknown": 1})}, "exactly"),
        ({"config": json.dumps({**config, "num_layers": "2"})}, "num_layers must be int"),
        ({"config": json.dumps({**config, "num_layers": 10**9})}, "num_layers must be in"),
        ({"config": json.dumps({**config, "top_k": 5})}, "top_k must be in"),
        ({"config": json.dumps({**config, "num_layers": 3})}, "missing.*blocks.2"),
    ]
    for change, message in cases:
        path.write_bytes(good)
        rewrite(path, **change)
        with pytest.raises(ValueError, match=message) as caught:
            load_model(path)
        assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    model = ByteMoELM(CONFIG)
    with pytest.raises(OSError, match=r"none"):
        save_model(model, tmp_path / "none" / "m.safetensors")
    assert list(tmp_path.iterdir()) == []
