"""A decoder layer around the experts: what a decode step of a model does besides them.

    T tokens, each of its own sequence · H hidden width · A heads · G heads of keys and values
    D width of a head · L positions of the cache · E experts · U rows of a dense weight

Norm, one product for queries, keys and values, rotary positions, attention over a cache of L
positions (the last of which is written), the product behind it; norm, router, experts; two
residual sums. Dense products are grouped products of a single task, so they obey a budget of SMs
as the experts do, and every launch is the same whatever the seat: equal bits are expected.

>>> from moesaic.bench.workloads import make_weights
>>> heads = Heads(4, 2, 16, context=8)
>>> model = Model("tiny", 4, 2, 64, 64)
>>> generator = torch.Generator().manual_seed(0)
>>> weights = make_weights(model.spec(), dtype=torch.float32, generator=generator)
>>> layer = WholeLayer(model, heads, 3, weights, torch.float32, generator)
>>> layer(torch.randn(3, 64)).shape
torch.Size([3, 64])
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..functional import route
from ..runtime.sliced import run_budgeted
from ..types import ExpertWeights, RouterSpec
from .workloads import Model

LEAST_ROWS = 64
"""Rows of the smallest tile of a dense product: a router of fewer experts is padded to it."""
ROPE_BASE = 10000.0


@dataclass(frozen=True)
class Heads:
    """Attention of a layer: heads, heads of keys and values, their width, positions cached."""

    heads: int
    kv_heads: int
    dim: int
    context: int = 1024


class WholeLayer:
    """One decoder layer on T sequences with weights, cache and positions of its own.

    Args:
        model: gives E, K, H and the experts' spec.
        heads: of its attention.
        tokens: T.
        weights: of its experts.
        dtype, generator: of everything else, made here on the generator's device.
    """

    def __init__(
        self,
        model: Model,
        heads: Heads,
        tokens: int,
        weights: ExpertWeights,
        dtype: torch.dtype,
        generator: torch.Generator,
    ) -> None:
        device, h, a = generator.device, model.hidden_size, heads
        self.model, self.heads, self.experts, self.spec = model, heads, weights, model.spec()
        self.router = RouterSpec(num_experts=model.num_experts, top_k=model.top_k)

        def normal(*shape: int) -> Tensor:
            empty = torch.empty(shape, dtype=dtype, device=device)
            return empty.normal_(0.0, shape[-1] ** -0.5, generator=generator)

        self.qkv_1UH = normal(1, (a.heads + 2 * a.kv_heads) * a.dim, h)
        self.out_1HU = normal(1, h, a.heads * a.dim)
        self.gate_1EH = normal(1, max(LEAST_ROWS, model.num_experts), h)
        self.norms_2H = torch.ones(2, h, dtype=dtype, device=device)
        self.keys_TGLD = normal(tokens, a.kv_heads, a.context, a.dim)
        self.values_TGLD = normal(tokens, a.kv_heads, a.context, a.dim)
        powers = -torch.arange(0, a.dim, 2, device=device) / a.dim
        angle_D2 = (a.context - 1) * ROPE_BASE**powers
        self.turn_D2 = torch.polar(torch.ones_like(angle_D2), angle_D2)
        self._tasks = dense_tasks(tokens, device) if device.type == "cuda" else None

    @property
    def read_elements(self) -> int:
        """Elements of dense weights and of the cache that one pass reads."""
        dense = (self.qkv_1UH, self.out_1HU, self.gate_1EH, self.keys_TGLD, self.values_TGLD)
        return sum(tensor.numel() for tensor in dense)

    def __call__(self, hidden_TH: Tensor, num_sms: int | None = None) -> Tensor:
        """The layer's output (T, H); products held to `num_sms` SMs."""
        hidden_TH = hidden_TH + self._attention(self._norm(hidden_TH, 0), num_sms)
        normed_TH = self._norm(hidden_TH, 1)
        logits_TE = self._dense(normed_TH, self.gate_1EH, num_sms)[:, : self.spec.num_experts]
        routing = route(logits_TE.contiguous(), self.router)
        return hidden_TH + run_budgeted(
            normed_TH, routing.topk_ids_TK, routing.topk_weights_TK, self.experts, self.spec,
            num_sms=num_sms,
        )  # fmt: skip

    def _norm(self, hidden_TH: Tensor, which: int) -> Tensor:
        return F.rms_norm(hidden_TH, (self.spec.hidden_size,), self.norms_2H[which])

    def _attention(self, hidden_TH: Tensor, num_sms: int | None) -> Tensor:
        a, tokens = self.heads, hidden_TH.shape[0]
        turned = (a.heads + a.kv_heads) * a.dim
        qkv_TU = self._dense(hidden_TH, self.qkv_1UH, num_sms)
        pairs = qkv_TU[:, :turned].float().view(tokens, a.heads + a.kv_heads, a.dim // 2, 2)
        qk_TD = torch.view_as_real(torch.view_as_complex(pairs) * self.turn_D2)
        qk_TD = qk_TD.view(tokens, -1, a.dim).to(hidden_TH.dtype)
        self.keys_TGLD[:, :, -1] = qk_TD[:, a.heads :]
        self.values_TGLD[:, :, -1] = qkv_TU[:, turned:].view(tokens, a.kv_heads, a.dim)
        backend = SDPBackend.MATH if self._tasks is None else SDPBackend.FLASH_ATTENTION
        with sdpa_kernel(backend):
            mixed = F.scaled_dot_product_attention(
                qk_TD[:, : a.heads, None], self.keys_TGLD, self.values_TGLD, enable_gqa=True
            )
        return self._dense(mixed.reshape(tokens, -1), self.out_1HU, num_sms)

    def _dense(self, x_TK: Tensor, weight_1UK: Tensor, num_sms: int | None) -> Tensor:
        """``x @ weight.T``."""
        if self._tasks is None:
            return F.linear(x_TK, weight_1UK[0])
        from ..kernels.device import sm_count
        from ..kernels.hopper.launch import HopperConfig, grouped_mm_hopper

        return grouped_mm_hopper(
            x_TK, weight_1UK, self._tasks, x_TK.new_empty((x_TK.shape[0], weight_1UK.shape[1])),
            config=HopperConfig("decode", 16, 64, 8, ctas_per_sm=2),
            num_sms=num_sms or sm_count(x_TK.device), ticket=0,
        )  # fmt: skip


def dense_tasks(tokens: int, device: torch.device) -> Any:
    """The task map of a dense product: one task of all rows."""
    from ..kernels.batching import batch_rows

    ids_T1 = torch.zeros((tokens, 1), dtype=torch.int32, device=device)
    return batch_rows(ids_T1, 1, heights=(16,))[1]
