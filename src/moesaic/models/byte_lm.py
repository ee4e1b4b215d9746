"""A byte-level causal language model whose feed-forward layers are Mixtures of Experts.

    B windows · N positions · T = B*N tokens · H hidden width · V = 256 bytes · A heads
    D head width · I expert intermediate width · E experts · K top-k · L layers

Pre-norm transformer: RMSNorm, rotary attention with normalised queries and keys, then routed
experts plus (from layer `shared_from_layer` on) one shared expert that every token passes through.
Router and experts are functions that the caller may replace, so the same weights run through any
implementation; what the router decided is handed to `observe`, outside the computation.

>>> model = ByteMoELM(ByteLMConfig(hidden_size=16, num_layers=1, num_heads=2, num_experts=4,
...     expert_width=8, shared_width=8, shared_from_layer=0), experts_impl=eager_experts)
>>> model(torch.zeros(1, 5, dtype=torch.long)).shape
torch.Size([1, 5, 256])
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..functional import moe, route
from ..nn import Experts
from ..types import ExpertSpec, ExpertWeights, RouterSpec, Routing
from .eager import eager_experts

ExpertsFn = Callable[[Tensor, Tensor, Tensor, ExpertWeights, ExpertSpec], Tensor]
RouteFn = Callable[[Tensor, RouterSpec], Routing]
Observer = Callable[[int, Routing], None]

VOCABULARY = 256
START_BYTE = 10
LIMITS = {"hidden_size": 16384, "num_layers": 256, "num_heads": 256, "context": 1 << 20}

__all__ = ["ByteLMConfig", "ByteMoELM", "byte_windows", "eager_experts"]


@dataclass(frozen=True, kw_only=True)
class ByteLMConfig:
    """The shape of the model; stored with the weights.

    Raises:
        ValueError: a width or count is out of range or widths do not divide.
    """

    hidden_size: int = 128
    num_layers: int = 6
    num_heads: int = 4
    num_experts: int = 16
    top_k: int = 2
    expert_width: int = 88
    shared_width: int = 128
    shared_from_layer: int = 1
    context: int = 1024
    rope_base: float = 10000.0

    def __post_init__(self) -> None:
        for name, limit in LIMITS.items():
            if not 1 <= getattr(self, name) <= limit:
                raise ValueError(f"{name} must be in [1, {limit}], got {getattr(self, name)!r}")
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size must be a multiple of 2 * num_heads = {2 * self.num_heads}, "
                f"got {self.hidden_size}"
            )
        if not 0 <= self.shared_from_layer <= self.num_layers:
            raise ValueError(
                f"shared_from_layer must be in [0, num_layers={self.num_layers}], "
                f"got {self.shared_from_layer!r}"
            )
        if not 1 <= self.shared_width <= LIMITS["hidden_size"]:
            raise ValueError(f"shared_width must be positive, got {self.shared_width!r}")
        self.expert_spec()
        self.router_spec()

    def expert_spec(self) -> ExpertSpec:
        """The experts of every layer: gated silu."""
        return ExpertSpec(
            num_experts=self.num_experts,
            hidden_size=self.hidden_size,
            intermediate_size=self.expert_width,
        )

    def router_spec(self) -> RouterSpec:
        """The router of every layer: softmax, top-k, renormalised."""
        return RouterSpec(num_experts=self.num_experts, top_k=self.top_k)


@lru_cache(maxsize=16)
def rotary_tables(
    positions: int, head_width: int, base: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines (N, D/2) in fp32 of rotary embedding (Su et al. 2021, section 3.4)."""
    with torch.inference_mode(False):  # kept, so they must serve autograd later too
        steps = torch.arange(0, head_width, 2, device=device, dtype=torch.float32) / head_width
        angles = torch.arange(positions, device=device, dtype=torch.float32)[:, None] / base**steps
        return angles.cos(), angles.sin()


def rotate(x_BAND: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` with its two halves rotated by the angle of their position, in the dtype of `x`."""
    first, second = x_BAND.float().chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x_BAND.dtype)


class Attention(nn.Module):
    """Causal multi-head attention with rotary positions and unit-RMS queries and keys."""

    def __init__(self, config: ByteLMConfig) -> None:
        super().__init__()
        self.heads, self.base = config.num_heads, config.rope_base
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.out = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x_BNH: Tensor) -> Tensor:
        """The attended states, same shape."""
        b, n, h = x_BNH.shape
        width = h // self.heads
        q, k, v = self.qkv(x_BNH).view(b, n, 3, self.heads, width).permute(2, 0, 3, 1, 4)
        cos, sin = rotary_tables(n, width, self.base, x_BNH.device)
        q = rotate(F.rms_norm(q, (width,)), cos, sin).to(v.dtype)
        k = rotate(F.rms_norm(k, (width,)), cos, sin).to(v.dtype)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.out(attended.transpose(1, 2).reshape(b, n, h))
        return out


class SharedExpert(nn.Module):
    """The gated-silu expert that every token passes through."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden_size, 2 * width, bias=False)
        self.down = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x_TH: Tensor) -> Tensor:
        """Output (T, H)."""
        gate, up = self.gate_up(x_TH).chunk(2, dim=-1)
        out: Tensor = self.down(F.silu(gate) * up)
        return out


class Block(nn.Module):
    """Attention, then routed experts and perhaps a shared one, each behind an RMSNorm."""

    def __init__(self, config: ByteLMConfig, index: int) -> None:
        super().__init__()
        self.index, self.router = index, config.router_spec()
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=1e-6)
        self.attention = Attention(config)
        self.moe_norm = nn.RMSNorm(config.hidden_size, eps=1e-6)
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = Experts(config.expert_spec())
        shared = index >= config.shared_from_layer
        self.shared = SharedExpert(config.hidden_size, config.shared_width) if shared else None

    def forward(
        self, x_BNH: Tensor, route_fn: RouteFn, experts_fn: ExpertsFn, observe: Observer | None
    ) -> Tensor:
        """The residual stream after this layer, same shape."""
        x_BNH = x_BNH + self.attention(self.attention_norm(x_BNH))
        hidden_TH = self.moe_norm(x_BNH).reshape(-1, x_BNH.shape[-1])
        routing = route_fn(self.gate(hidden_TH), self.router)
        if observe is not None:
            observe(self.index, routing)
        out_TH = experts_fn(
            hidden_TH,
            routing.topk_ids_TK,
            routing.topk_weights_TK,
            self.experts.weights(),
            self.experts.spec,
        )
        if self.shared is not None:
            out_TH = out_TH + self.shared(hidden_TH)
        return x_BNH + out_TH.view_as(x_BNH)


class ByteMoELM(nn.Module):
    """The language model: bytes in, logits of the next byte out.

    Args:
        config: the shape.
        experts_impl: what computes the routed experts; default `moesaic.moe` with impl="auto".
        route_impl: what routes; default `moesaic.route`.
    """

    def __init__(
        self,
        config: ByteLMConfig,
        *,
        experts_impl: ExpertsFn | None = None,
        route_impl: RouteFn | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.experts_impl: ExpertsFn = experts_impl or moe
        self.route_impl: RouteFn = route_impl or route
        self.embedding = nn.Embedding(VOCABULARY, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=1e-6)
        self.head = nn.Linear(config.hidden_size, VOCABULARY, bias=False)

    def reset_parameters(self, seed: int) -> None:
        """Fresh weights from `seed`: residual branches scaled by 1/sqrt(2L), a head of zeros."""
        generator = torch.Generator(device=self.head.weight.device).manual_seed(seed)
        residual = (2 * self.config.num_layers) ** -0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                nn.init.ones_(parameter)
            elif name == "head.weight":
                nn.init.zeros_(parameter)
            elif name == "embedding.weight":
                nn.init.normal_(parameter, std=0.5, generator=generator)
            else:
                ends_branch = name.endswith(("attention.out.weight", "down_proj", "down.weight"))
                std = parameter.shape[-1] ** -0.5 * (residual if ends_branch else 1.0)
                nn.init.normal_(parameter, std=std, generator=generator)

    def forward(
        self,
        ids_BN: Tensor,
        *,
        experts_impl: ExpertsFn | None = None,
        observe: Observer | None = None,
    ) -> Tensor:
        """Logits (B, N, V) of the byte after each position.

        Args:
            ids_BN: bytes as int64 in [0, 256), at most `config.context` positions.
            experts_impl: replaces the model's own for this call.
            observe: called with (layer, Routing) once a layer, in order.

        Raises:
            ValueError: the ids have a wrong shape or more positions than the context.
        """
        if ids_BN.dim() != 2 or not 1 <= ids_BN.shape[1] <= self.config.context:
            raise ValueError(
                f"ids must have shape (B, N) with 1 <= N <= context={self.config.context}, "
                f"got {tuple(ids_BN.shape)}; cut the text with byte_windows"
            )
        x_BNH = self.embedding(ids_BN)
        for block in self.blocks:
            x_BNH = block(x_BNH, self.route_impl, experts_impl or self.experts_impl, observe)
        logits: Tensor = self.head(self.norm(x_BNH))
        return logits


def byte_windows(data: bytes, window: int) -> list[tuple[Tensor, Tensor]]:
    """(input, target) windows of `data`, int64, every byte a target exactly once.

    An input is its target shifted by one: it starts with the byte before the window (a newline
    before the first). The last window may be shorter.

    >>> [(i.tolist(), t.tolist()) for i, t in byte_windows(b"abc", 2)]
    [([10, 97], [97, 98]), ([98], [99])]
    """
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    stream = torch.frombuffer(bytearray([START_BYTE]) + data, dtype=torch.uint8).long()
    cuts = range(0, len(data), window)
    return [(stream[i : i + window][: len(data) - i], stream[i + 1 : i + 1 + window]) for i in cuts]
