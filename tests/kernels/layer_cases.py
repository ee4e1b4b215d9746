"""Inputs for the tests of the expert layer: routings of every shape, layers of every kind.

On a GPU the numbers are normal; in Triton's interpreter, whose products are NumPy's and sum in any
order, they are multiples of 1/4 small enough that fp32 sums are exact, so that a bitwise test still
means that the same terms were added.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.types import ExpertSpec, ExpertWeights

ROUTINGS = ("uniform", "skewed", "one", "empty", "sentinel")


def draw(*shape: int, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Random numbers of about unit size."""
    generator = torch.Generator().manual_seed(seed)
    if device.type == "cuda":
        return torch.randn(*shape, generator=generator).to(device, dtype)
    return (torch.randint(-4, 5, shape, generator=generator) / 4).to(dtype)


def draw_ids(routing: str, tokens: int, top_k: int, experts: int, seed: int = 0) -> Tensor:
    """Distinct expert ids (T, K) int32, on the CPU; "sentinel" puts id E in half of the slots."""
    generator = torch.Generator().manual_seed(seed)
    worth = torch.rand(tokens, experts, generator=generator)
    if routing == "skewed":
        worth += 2.0 / (1 + torch.arange(experts))
    elif routing == "one":
        worth[:, experts // 2] += 9
    elif routing == "empty":
        worth[:, experts // 2 + 1 :] -= 9
    ids_TK = worth.topk(top_k, dim=1).indices.to(torch.int32)
    if routing == "sentinel":
        ids_TK[torch.rand(tokens, top_k, generator=generator) < 0.5] = experts
    return ids_TK


SPECS = {
    "swiglu": dict(),
    "geglu": dict(activation="gelu"),
    "geglu_tanh": dict(activation="gelu_tanh", bias=True),
    "gpt_oss": dict(
        interleaved=True, transposed=True, bias=True, limit=7.0, alpha=1.702, up_offset=1.0
    ),
    "llama4": dict(transposed=True),
    "interleaved": dict(interleaved=True, limit=0.5),
    "relu2": dict(activation="relu2", gated=False),
    "relu2_transposed": dict(activation="relu2", gated=False, transposed=True, bias=True),
    "mlp3": dict(activation="relu", gated=False, layers=3, bias=True),
    "mlp3_plain": dict(activation="relu", gated=False, layers=3),
}


def draw_layer(
    kind: str,
    experts: int,
    hidden: int,
    intermediate: int,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[ExpertSpec, ExpertWeights]:
    """The spec called `kind` and its weights, scaled to keep activations about unit size."""
    spec = ExpertSpec(
        num_experts=experts, hidden_size=hidden, intermediate_size=intermediate, **SPECS[kind]
    )
    weights = {}
    for seed, (name, shape) in enumerate(sorted(spec.weight_shapes().items())):
        scale = 1.0 if device.type == "cpu" else shape[-1] ** -0.5
        weights[name] = draw(*shape, device=device, dtype=dtype, seed=seed + 1) * scale
    return spec, ExpertWeights(**weights)
