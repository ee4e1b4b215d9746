"""Tiny random models of every transformers family that has the experts interface, built offline.

A family's own configuration class gives the defaults; the sizes in `TINY` replace those that it
has, `OWN` adds what a family needs besides.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

TINY: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 16, "intermediate_size": 32,
    "max_position_embeddings": 128,
    "moe_intermediate_size": 24, "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8,
    "num_experts_per_tok": 2, "top_k_experts": 2, "n_group": 2, "topk_group": 1,
    "n_shared_experts": 1, "num_shared_experts": 1, "shared_expert_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16, "shared_intermediate_size": 16,
    "first_k_dense_replace": 0, "num_dense_layers": 0, "moe_layer_start_index": 0,
    "decoder_sparse_step": 1, "moe_layer_interval": 1, "mlp_only_layers": [],
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 16, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 4,
    "sliding_window": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "attention_dropout": 0.0, "router_jitter_noise": 0.0, "output_router_logits": False,
    "routed_scaling_factor": 1.5,
}  # fmt: skip
FULL = {"layer_types": ["full_attention"] * 2}
MIXED = {"layer_types": ["linear_attention", "full_attention"]}
LINEAR = MIXED | {
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}  # fmt: skip
SPARSE = {"mlp_layer_types": ["sparse"] * 2}
OWN: dict[str, dict[str, Any]] = {
    "axk1": {"head_dim": 8},
    "axk2": SPARSE,
    "deepseek_ocr2": SPARSE | {"n_group": None, "topk_group": None, "head_dim": 8},
    "deepseek_v3": {"head_dim": 8},
    "deepseek_v4": {"mlp_layer_types": ["moe"] * 2},
    "ernie4_5_vl_moe": SPARSE | {
        "moe_intermediate_size": [24, 16], "moe_num_experts": 8, "moe_k": 2, "head_dim": 8,
        "rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "mrope_section": [1, 1, 2]},
    },
    "gemma4": {
        "enable_moe_block": True, "layer_types": ["sliding_attention", "full_attention"],
        "vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 8,
    },
    "glm4_moe_lite": SPARSE,
    "glm4v_moe": {
        "head_dim": 8,
        "rope_parameters": {
            "rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5,
            "mrope_section": [1, 1, 0],
        },
    },
    "glm5_next": SPARSE | MIXED | {
        "index_topk": 16, "index_kpool": 4, "linear_head_dim": 8, "linear_num_heads": 4,
        "qk_rope_head_dim": 0, "head_dim": 0, "indexer_types": ["full"] * 2,
    },
    "granitemoehybrid": {
        "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 16,
    } | MIXED,
    "hunyuan_v1_moe": {"moe_topk": 2},
    "hy_v3": SPARSE,
    "hy_v4": SPARSE,
    "jamba": {
        "use_mamba_kernels": False, "mamba_dt_rank": 4, "mamba_d_state": 4,
        "expert_layer_period": 1, "expert_layer_offset": 0, "attn_layer_period": 2,
        "attn_layer_offset": 1,
    },
    "kimi_linear": SPARSE | MIXED | {
        "linear_head_dim": 8, "linear_num_heads": 4, "num_experts_per_token": 2,
        "q_lora_rank": None, "head_dim": 8, "num_expert_group": 2,
    },
    "laguna": SPARSE,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mimo_v2_flash": SPARSE | FULL,
    "mistral4": {
        "head_dim": 8,
        "rope_parameters": {
            "rope_theta": 1e4, "rope_type": "default", "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 64,
        },
    },
    "nemotron_h": {"layers_block_type": ["attention", "moe", "attention", "moe"]},
    "qwen3_5_moe": LINEAR,
    "qwen3_next": LINEAR,
    "qwen4_exp": LINEAR | {
        "hc_count": 2, "hc_lowrank": 8, "indexer_n_heads": 2, "indexer_kv_heads": 1,
        "indexer_head_dim": 16, "indexer_budget": 8, "indexer_compress_ratio": 4,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}  # fmt: skip
MODEL_CLASS: dict[str, str] = {}


@cache
def families() -> tuple[str, ...]:
    """Every family whose code has the decorator of the experts interface, in alphabetical order."""
    import transformers

    root = Path(transformers.__file__).parent / "models"
    return tuple(
        path.parent.name
        for path in sorted(root.glob("*/modeling_*.py"))
        if re.search(r"^@use_experts_implementation", path.read_text("utf-8"), re.MULTILINE)
    )


def _classes(family: str, kind: str) -> dict[str, type]:
    module = import_module(f"transformers.models.{family}.{kind}_{family}")
    found = {n: v for n, v in vars(module).items() if isinstance(v, type)}
    return {n: v for n, v in found.items() if v.__module__ == module.__name__}


def config_class(family: str) -> type:
    """The configuration of the family's language model."""
    configs = {n: c for n, c in _classes(family, "configuration").items() if n.endswith("Config")}
    texts = [c for n, c in configs.items() if n.endswith("TextConfig")]
    if texts:
        return texts[0]
    return next(c for c in configs.values() if getattr(c, "model_type", "") == family)


def model_class(family: str) -> type:
    """The class that gives logits, or the language model under it where there is none."""
    classes = _classes(family, "modeling")
    if family in MODEL_CLASS:
        return classes[MODEL_CLASS[family]]
    for pattern in (r"ForCausalLM$", r"ForTokenClassification$", r"TextModel$"):
        for name, found in classes.items():
            if re.search(pattern, name):
                return found
    raise LookupError(f"{family}: no language model among {sorted(classes)}")


def tiny_config(family: str) -> Any:
    """A small configuration of a family."""
    cls = config_class(family)
    known = set(dir(cls())) | set(getattr(cls, "__dataclass_fields__", ()))
    values = {k: v for k, v in TINY.items() if k in known} | OWN.get(family, {})
    return cls(**values)


def tiny_model(family: str, seed: int = 0) -> nn.Module:
    """A small random model in fp32 and eval mode; every parameter is random, biases too."""
    config = tiny_config(family)
    torch.manual_seed(seed)
    model: nn.Module = model_class(family)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or "bias" in name:
                parameter.normal_(
                    std=0.5 * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1
                )
    return model


def built() -> Iterator[tuple[str, nn.Module | Exception]]:
    """Every family with its model, or what went wrong."""
    for family in families():
        try:
            yield family, tiny_model(family)
        except Exception as error:
            yield family, error


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list whose members hold the experts."""
    name = next(n for n, m in model.named_modules() if "is_concatenated" in vars(m))
    while not isinstance(found := model.get_submodule(name), nn.ModuleList):
        name = name.rpartition(".")[0]
    return found


def layout(model: nn.Module) -> str:
    """The layout group of a model's experts, in words."""
    experts: Any = next(m for m in model.modules() if "is_concatenated" in vars(m))
    words = ["gated" if experts.has_gate else "ungated"]
    if experts.has_gate and type(experts)._apply_gate.__name__ != "_default_apply_gate":
        words.append("own gate")
    words += ["interleaved"] * (not experts.is_concatenated) + ["bias"] * experts.has_bias
    return ", ".join(words + ["transposed"] * experts.is_transposed)
