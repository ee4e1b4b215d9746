"""A causal language model of transformers from a local directory, with its tokenizer.

Nothing is downloaded and nothing is executed that came with the model: weights must be safetensors,
`trust_remote_code` is off.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..integrations.attach import LayerState, attach, detach

LONGEST = 2048


@dataclass(frozen=True)
class Pretrained:
    """A loaded model in eval mode, its tokenizer, and the MoE layers that moesaic can run."""

    name: str
    model: Any
    tokenizer: Any
    layers: tuple[LayerState, ...]

    @property
    def context(self) -> int:
        """Positions that a window of text may have: the model's, at most 2048."""
        config = self.model.config.get_text_config()
        return min(int(getattr(config, "max_position_embeddings", LONGEST)), LONGEST)

    @property
    def vocabulary(self) -> int:
        """Width of the logits."""
        return int(self.model.config.get_text_config().vocab_size)

    @property
    def num_experts(self) -> int:
        """E, the largest of the layers."""
        return max(layer.spec.num_experts for layer in self.layers if layer.spec)

    @property
    def top_k(self) -> int:
        """K."""
        return int(self.layers[0].top_k or 1)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of token ids."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text

    @property
    def start(self) -> int:
        """The token that precedes a text: the beginning or the end of one, else token 0."""
        for name in ("bos_token_id", "eos_token_id"):
            found = getattr(self.tokenizer, name, None)
            if found is not None:
                return int(found)
        return 0


def _check(path: Path) -> None:
    """Raise when a directory cannot hold a model that is read here."""
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"{path}: holds no config.json; give a directory that save_pretrained wrote"
        )
    if not any(path.glob("*.safetensors")):
        raise FileNotFoundError(
            f"{path}: holds no *.safetensors; weights in other files are not read, convert them "
            "with save_pretrained"
        )
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise FileNotFoundError(f"{path}: holds no tokenizer.json; save the tokenizer there too")


def load_pretrained(
    path: str | os.PathLike[str], *, dtype: torch.dtype, device: torch.device
) -> Pretrained:
    """The model and the tokenizer of a directory.

    Raises:
        OSError: a file is missing or unreadable.
        ValueError: the model is none that moesaic can run; says why.
        ImportError: transformers is missing.
    """
    where = Path(path)
    _check(where)
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ImportError(
            f"{where}: needs transformers ({error}); pip install 'moesaic[transformers]'"
        ) from error
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
        model = AutoModelForCausalLM.from_pretrained(
            where, dtype=dtype, use_safetensors=True, experts_implementation="eager", **options
        )
    except (KeyError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{where}: transformers cannot load it ({error})") from error
    model = model.to(device).requires_grad_(False).eval()
    layers = attach(model, fuse_routers="never").layers
    detach(model)
    return Pretrained(where.resolve().name, model, tokenizer, layers)
