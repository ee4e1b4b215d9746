"""The shapes behind the model names in benchmarks/results, so that its lines can be read here.

The bench room lies below this one and has the same names with weights and inputs; a test compares.
"""

from __future__ import annotations

from typing import Any

from ..types import ExpertSpec


def _spec(experts: int, hidden: int, width: int, **more: Any) -> ExpertSpec:
    return ExpertSpec(num_experts=experts, hidden_size=hidden, intermediate_size=width, **more)


_RELU3: dict[str, Any] = {"activation": "relu", "gated": False, "layers": 3, "bias": True}
SHAPES: dict[str, tuple[ExpertSpec, int]] = {
    "Mixtral-8x7B": (_spec(8, 4096, 14336), 2),
    "Qwen3-30B-A3B": (_spec(128, 2048, 768), 8),
    "Qwen3-235B-A22B": (_spec(128, 4096, 1536), 8),
    "DeepSeek-V3": (_spec(256, 7168, 2048), 8),
    "OLMoE": (_spec(64, 2048, 1024), 8),
    "paper-small": (_spec(8, 512, 1024, **_RELU3), 2),
    "paper-medium": (_spec(16, 1024, 2048, **_RELU3), 2),
    "paper-large": (_spec(32, 2048, 4096, **_RELU3), 4),
}

_WIDE: dict[str, Any] = {"gated": False, "activation": "gelu"}
# The layers that suite `ep` spreads over GPUs.
SPREAD: dict[str, tuple[ExpertSpec, int]] = {
    "deepseek-v3-256": (_spec(256, 7168, 2048), 8),
    "deepseek-v3-64": (_spec(64, 7168, 2048), 8),
    "deepseek-v3-16": (_spec(16, 7168, 2048), 8),
    "wide-16-k1": (_spec(16, 8192, 32768, **_WIDE), 1),
    "wide-16-k2": (_spec(16, 8192, 32768, **_WIDE), 2),
}
# One expert on each of eight GPUs.
EIGHT: dict[str, tuple[ExpertSpec, int]] = {
    "mixtral-8": (_spec(8, 4096, 14336), 2),
    "deepseek-v3-8-k2": (_spec(8, 7168, 2048), 2),
}
# The models of suite `layer`.
FIELD: dict[str, tuple[ExpertSpec, int]] = {
    name: SHAPES[name]
    for name in ("Qwen3-30B-A3B", "Mixtral-8x7B", "DeepSeek-V3", "Qwen3-235B-A22B", "OLMoE")
} | {"gpt-oss-120b-swiglu": (_spec(128, 2880, 2880), 4)}
