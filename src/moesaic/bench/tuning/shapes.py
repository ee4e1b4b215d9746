"""What is tuned: the layer of a known model, of a transformers configuration, or of given sizes.

A configuration is read as JSON data; nothing of it is executed.

>>> config = {"num_local_experts": 8, "num_experts_per_tok": 2, "hidden_size": 64,
...           "intermediate_size": 96, "model_type": "mixtral"}
>>> model_from(config, "config.json")
Model(name='config.json', num_experts=8, top_k=2, hidden_size=64, intermediate_size=96, \
kind='swiglu', family='mixtral')
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..workloads import MODELS, Model

TOKENS = (1, 4, 16, 64, 128, 512, 1024, 4096, 8192)
DTYPES = ("bfloat16", "float16")
FIELDS: dict[str, tuple[str, ...]] = {
    "num_experts": ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts"),
    "top_k": ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_top_k",
              "moe_k", "moe_topk", "top_k_experts"),
    "hidden_size": ("hidden_size",),
    "intermediate_size": ("moe_intermediate_size", "expert_intermediate_size",
                          "intermediate_size"),
}  # fmt: skip


def model_from(config: Mapping[str, Any], source: str) -> Model:
    """The MoE layer that a transformers configuration describes.

    Raises:
        ValueError: a size is missing or no number above 0; says which names were looked for.
    """
    inner = config.get("text_config")
    fields = inner if isinstance(inner, dict) else config
    sizes: dict[str, int] = {}
    for name, known in FIELDS.items():
        found = next((key for key in known if fields.get(key) is not None), None)
        if found is None:
            raise ValueError(f"{source}: none of {', '.join(known)}; is this a MoE model?")
        if type(fields[found]) is not int or fields[found] < 1:
            raise ValueError(f"{source}: {found} must be a number above 0, got {fields[found]!r}")
        sizes[name] = fields[found]
    family = str(fields.get("model_type") or config.get("model_type") or "unknown")
    kind = "gpt-oss" if family.startswith("gpt_oss") else "swiglu"
    return checked(Model(source, **sizes, kind=kind, family=family))  # type: ignore[arg-type]


def checked(model: Model) -> Model:
    """`model`, whose sizes make a layer.

    Raises:
        ValueError: they do not.
    """
    for name in ("num_experts", "top_k", "hidden_size", "intermediate_size"):
        if getattr(model, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(model, name)}")
    if model.top_k > model.num_experts:
        raise ValueError(f"top-k must be at most E={model.num_experts}, got {model.top_k}")
    if model.hidden_size % 8 or model.intermediate_size % 8:
        raise ValueError(
            "H and I must be multiples of 8, got "
            f"{model.hidden_size} and {model.intermediate_size}; pad with zeros"
        )
    return model


def find_model(
    name: str | None,
    *,
    experts: int | None = None,
    top_k: int | None = None,
    hidden: int | None = None,
    intermediate: int | None = None,
) -> Model:
    """The model asked for: by name, by a directory or config.json, or by its four sizes.

    Raises:
        ValueError: neither or both are given, there is no such model, or its sizes do not fit.
    """
    sizes = (experts, top_k, hidden, intermediate)
    given = [size for size in sizes if size is not None]
    if name is None:
        if len(given) < len(sizes):
            raise ValueError(
                "give a model (a known name, a directory or a config.json) or all of --experts, "
                f"--top-k, --hidden and --intermediate; known: {', '.join(MODELS)}"
            )
        label = "E{}-K{}-H{}-I{}".format(*given)
        e, k, h, i = given
        return checked(Model(label, e, k, h, i, family="sizes"))
    if given:
        raise ValueError("give a model or its sizes, not both")
    if name in MODELS:
        return MODELS[name]
    path = Path(name)
    file = path / "config.json" if path.is_dir() else path
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = ", ".join(MODELS)
        raise ValueError(f"{name!r} is no known model ({known}) and no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(document, dict):
        raise ValueError(f"{file} must hold a JSON object")
    return model_from(document, path.resolve().name if path.is_dir() else file.name)


def token_counts(tokens: Sequence[int]) -> tuple[int, ...]:
    """The token counts to tune, ascending, each once; `TOKENS` when none are given.

    Raises:
        ValueError: one is under 1.
    """
    if any(count < 1 for count in tokens):
        raise ValueError(f"--tokens must be at least 1, got {min(tokens)}")
    return tuple(sorted(set(tokens))) or TOKENS
