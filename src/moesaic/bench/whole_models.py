"""Whole transformers models with random weights on the device, and the steps that are timed.

    B batch · N tokens of a sequence · H hidden width · L positions of the static cache

A step is transformers' own code from token ids to the logits of the last position: embedding, every
decoder layer, the norm, the head. The decoder layer is compiled once (`fullgraph=True`) and reused
for all layers, which differ in their weights alone; the whole step is then captured into one CUDA
graph. Of a decode step every slot of the static cache is filled, so that no mask is needed and
attention runs its fastest kernel: B sequences, L - 1 tokens of context and the new one.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

CONTEXT = 512
TUNED: dict[str, bool | int | str | Callable[..., Any]] = {"coordinate_descent_tuning": True}
COMMON = {
    "vocab_size": 32000, "num_attention_heads": 32, "max_position_embeddings": 32768,
    "attention_dropout": 0.0,
}  # fmt: skip
# Sizes as published with the models.
CONFIGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Qwen3-30B-A3B": ("qwen3_moe", "Qwen3Moe", COMMON | {
        "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 48, "head_dim": 128,
        "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8,
        "moe_intermediate_size": 768, "norm_topk_prob": True, "decoder_sparse_step": 1,
    }),
    "Mixtral-8x7B": ("mixtral", "Mixtral", COMMON | {
        "hidden_size": 4096, "num_hidden_layers": 32, "head_dim": 128, "num_key_value_heads": 8,
        "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 14336,
        "sliding_window": None,
    }),
}  # fmt: skip


class FixedCache:
    """One layer's static cache, all slots filled: a step overwrites the last of them."""

    def __init__(self, keys: Tensor, values: Tensor, place: Tensor) -> None:
        self.keys, self.values, self.place = keys, values, place

    def update(self, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        """Write the new positions and give back the whole, as transformers' caches do."""
        self.keys.index_copy_(2, self.place, key)
        self.values.index_copy_(2, self.place, value)
        return self.keys, self.values


def random_model(name: str, device: torch.device, layers: int | None = None, **sizes: Any) -> Any:
    """The causal language model of a name in bf16 with normal weights, made on the device.

    Args:
        layers: so many decoder layers instead of all.
        sizes: other values of the configuration.
    """
    from importlib import import_module

    from transformers.initialization import no_init_weights

    package, prefix, values = CONFIGS[name]
    values = values | sizes | ({} if layers is None else {"num_hidden_layers": layers})
    module = f"transformers.models.{package}"
    config = getattr(import_module(f"{module}.configuration_{package}"), f"{prefix}Config")(
        **values
    )
    model_class = getattr(import_module(f"{module}.modeling_{package}"), f"{prefix}ForCausalLM")
    with torch.device(device), no_init_weights():
        model = model_class._from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa", experts_implementation="eager"
        )
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.fill_(1.0)
        else:
            parameter.data.normal_(std=0.02, generator=generator)
    for layer in model.model.layers:
        layer.self_attn.layer_idx = 0  # every layer has a cache of its own, and one compiled form
    return model.requires_grad_(False).eval()


@contextmanager
def without_moe(model: Any) -> Iterator[None]:
    """The model with every MoE block replaced by the identity: what is left of a step."""
    blocks = [(layer, layer.mlp) for layer in model.model.layers]
    for layer, _ in blocks:
        layer.mlp = nn.Identity()
    try:
        yield
    finally:
        for layer, block in blocks:
            layer.mlp = block


@dataclass
class Step:
    """One forward of a whole model at a batch and a length, its caches and its inputs.

    `forward` is the decoder layer's, compiled or not; `any_batch`: one compiled form is to serve
    every batch but that of one sequence.
    """

    model: Any
    ids_BN: Tensor
    positions_1N: Tensor
    caches: list[FixedCache]
    forward: Callable[..., Tensor]
    any_batch: bool = True

    def __call__(self) -> Tensor:
        """Logits of the last position, (B, vocabulary)."""
        inner = self.model.model
        hidden_BNH: Tensor = inner.embed_tokens(self.ids_BN)
        rotary = inner.rotary_emb(hidden_BNH, position_ids=self.positions_1N)
        for layer, cache in zip(inner.layers, self.caches, strict=True):
            if self.any_batch:
                torch._dynamo.maybe_mark_dynamic(hidden_BNH, 0)
            hidden_BNH = self.forward(
                layer,
                hidden_BNH,
                attention_mask=None,
                position_ids=self.positions_1N,
                past_key_values=cache,
                position_embeddings=rotary,
            )
        logits: Tensor = self.model.lm_head(inner.norm(hidden_BNH[:, -1]))
        return logits


def make_step(
    model: Any, batch: int, length: int, context: int, forward: Callable[..., Tensor], seed: int,
    any_batch: bool = True,
) -> Step:  # fmt: skip
    """A step of B sequences of N new tokens that fill a cache of `context` positions."""
    config, weight = model.config, model.lm_head.weight
    device, dtype = weight.device, weight.dtype
    generator = torch.Generator(device).manual_seed(seed)
    shape = (batch, config.num_key_value_heads, context, config.head_dim)
    place = torch.arange(context - length, context, device=device)
    caches = []
    for _ in model.model.layers:
        keys, values = (torch.empty(shape, device=device, dtype=dtype) for _ in range(2))
        for tensor in (keys, values):
            tensor.normal_(generator=generator)
            if any_batch:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        caches.append(FixedCache(keys, values, place))
    ids_BN = torch.randint(
        3, config.vocab_size, (batch, length), device=device, generator=generator
    )
    return Step(model, ids_BN, place[None], caches, forward, any_batch)


def layer_forward(model: Any, backend: str | None, tuned: bool = False) -> Callable[..., Tensor]:
    """The decoder layer's forward, compiled once for every layer.

    Args:
        backend: of torch.compile; None: the forward as it is.
        tuned: Inductor tunes every kernel that it writes, for fixed shapes, and writes products of
            one row itself, fused with what is around them, the look-up of experts too.
    """
    forward: Callable[..., Tensor] = type(model.model.layers[0]).forward
    if backend is None:
        return forward
    if tuned and backend == "inductor":
        return torch.compile(forward, fullgraph=True, dynamic=False, options=TUNED)
    return torch.compile(forward, fullgraph=True, backend=backend)


def moe_inputs(step: Step) -> list[Tensor]:
    """What every MoE block of an uncompiled step is given."""
    found: list[Tensor] = []
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].clone()))
        for layer in step.model.model.layers
    ]
    try:
        step()
    finally:
        for hook in hooks:
            hook.remove()
    return found


def moe_blocks(model: Any, inputs: list[Tensor]) -> Callable[[], list[Tensor]]:
    """Every MoE block of the model, one after the other, on given inputs."""
    blocks = [layer.mlp for layer in model.model.layers]
    return lambda: [block(hidden) for block, hidden in zip(blocks, inputs, strict=True)]


def typical_error(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest, over blocks, of the median token's relative difference.

    A token whose router had a near tie may take another expert and differs by much, in
    transformers' own implementations too; it does not move the median.
    """
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        difference_T = (a.double() - b.double()).flatten(0, -2).norm(dim=-1)
        relative = float((difference_T / b.double().flatten(0, -2).norm(dim=-1)).median())
        worst = max(worst, relative if relative == relative else float("inf"))
    return worst


def tidy(device: torch.device) -> None:
    """Give memory that nothing uses back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
