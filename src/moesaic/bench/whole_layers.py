"""A decoder layer around the experts: what a decode step of a model does besides them.

    T tokens, each of its own sequence · H hidden width · A heads · G heads of keys and values
    D width of a head · L positions of the cache · E experts · U rows of a dense weight

Residual sum and norm, one product for queries, keys and values, rotary positions and the cache's
last entry, attention over L positions, the product behind it; sum and norm, router, experts: ten
launches or so. A layer's last sum is made by the next one. Dense products are grouped products of a
single task, so they obey a budget of SMs as the experts do, and every launch is the same whatever
the seat: equal bits are expected.

>>> from moesaic.bench.workloads import make_weights
>>> heads = Heads(4, 2, 16, context=8)
>>> model = Model("tiny", 4, 2, 64, 64)
>>> generator = torch.Generator().manual_seed(0)
>>> weights = make_weights(model.spec(), dtype=torch.float32, generator=generator)
>>> layer = WholeLayer(model, heads, 3, weights, torch.float32, generator)
>>> hidden, behind = layer(torch.randn(3, 64))
>>> hidden.shape, behind.shape
(torch.Size([3, 64]), torch.Size([3, 64]))
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
EPSILON = 1e-6


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
        self.cos_D2, self.sin_D2 = angle_D2.cos(), angle_D2.sin()
        self._tasks = dense_tasks(tokens, device) if device.type == "cuda" else None

    @property
    def read_elements(self) -> int:
        """Elements of dense weights and of the cache that one pass reads."""
        dense = (self.qkv_1UH, self.out_1HU, self.gate_1EH, self.keys_TGLD, self.values_TGLD)
        return sum(tensor.numel() for tensor in dense)

    def __call__(
        self, hidden_TH: Tensor, behind_TH: Tensor | None = None, num_sms: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """What comes before the experts and what they give, both (T, H); their sum is the output.

        Args:
            hidden_TH, behind_TH: what the layer before gave, or the input and nothing.
            num_sms: SMs that products are held to.
        """
        hidden_TH, normed_TH = self._add_norm(hidden_TH, behind_TH, 0)
        mixed_TH = self._attention(normed_TH, num_sms)
        hidden_TH, normed_TH = self._add_norm(hidden_TH, mixed_TH, 1)
        logits_TE = self._dense(normed_TH, self.gate_1EH, num_sms)[:, : self.spec.num_experts]
        routing = route(logits_TE.contiguous(), self.router)
        return hidden_TH, run_budgeted(
            normed_TH, routing.topk_ids_TK, routing.topk_weights_TK, self.experts, self.spec,
            num_sms=num_sms,
        )  # fmt: skip

    def _add_norm(self, x_TH: Tensor, y_TH: Tensor | None, which: int) -> tuple[Tensor, Tensor]:
        from ..kernels.decoding import add_norm, add_norm_ref

        some = add_norm if x_TH.is_cuda else add_norm_ref
        return some(x_TH, y_TH, self.norms_2H[which], EPSILON)

    def _attention(self, hidden_TH: Tensor, num_sms: int | None) -> Tensor:
        from ..kernels.decoding import turn, turn_ref

        a, tokens = self.heads, hidden_TH.shape[0]
        some = turn if hidden_TH.is_cuda else turn_ref
        qkv_TU = self._dense(hidden_TH, self.qkv_1UH, num_sms)
        q_TAD = some(qkv_TU, self.cos_D2, self.sin_D2, self.keys_TGLD, self.values_TGLD)
        # Heads that share keys are positions of one: each key is read once for all of them.
        q_TGRD = q_TAD.view(tokens, a.kv_heads, a.heads // a.kv_heads, a.dim)
        backend = SDPBackend.FLASH_ATTENTION if hidden_TH.is_cuda else SDPBackend.MATH
        with sdpa_kernel(backend):
            mixed = F.scaled_dot_product_attention(q_TGRD, self.keys_TGLD, self.values_TGLD)
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
