"""Layers of experts run one by one: any `nn.Module` per expert, and how the calls are laid out.

    T tokens · H hidden width · E experts · K top-k · S = T*K routed rows

Every executor here sorts the routed rows by expert (stable), reads the counts on the host, calls
each expert that has rows on its contiguous rows, and combines the outputs in slot order in fp32
with one rounding. They differ in how an expert is called and in nothing else, so their bits agree.
They exist for comparison, and for experts that are no matrices that a kernel knows: the layer of
`moesaic.moe` runs all experts in one launch and never waits for the host.

>>> experts = [torch.nn.Linear(8, 8, bias=False) for _ in range(4)]
>>> ids_TK, weights_TK = torch.tensor([[0, 3], [3, 1]]), torch.full((2, 2), 0.5)
>>> with torch.no_grad():
...     SequentialExperts(experts)(torch.randn(2, 8), ids_TK, weights_TK).shape
torch.Size([2, 8])
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.activation import activate_ref, pointwise_ref
from ..types import ExpertSpec, ExpertWeights
from .streams import Lanes, open_lanes

Expert = Callable[[Tensor], Tensor]


class Executor(Protocol):
    """Tokens through their experts, weighted and summed in slot order: the output (T, H)."""

    def __call__(self, hidden_TH: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        """The output (T, H), in the dtype of `hidden_TH`."""


class HostRows(NamedTuple):
    """Rows sorted by expert: the token of each, where each slot's row is, expert -> row range."""

    token_S: Tensor
    position_TK: Tensor
    ranges: list[tuple[int, int, int]]


def host_rows(topk_ids_TK: Tensor, num_experts: int) -> HostRows:
    """Sort slots by expert and read the counts: waits for the device. Ids must lie in [0, E)."""
    flat_S = topk_ids_TK.reshape(-1).long()
    order_S = flat_S.argsort(stable=True)
    position_S = torch.empty_like(order_S)
    position_S[order_S] = torch.arange(order_S.numel(), device=order_S.device)
    ranges, start = [], 0
    for expert, count in enumerate(flat_S.bincount(minlength=num_experts).tolist()):
        if count:
            ranges.append((expert, start, start + count))
        start += count
    top_k = topk_ids_TK.shape[1]
    return HostRows(order_S // top_k, position_S.view_as(topk_ids_TK), ranges)


def combine_rows(rows_SH: Tensor, position_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """The weighted sum of each token's rows, in slot order in fp32, rounded once: (T, H)."""
    if rows_SH.device.type == "cuda":
        from ..kernels.combine import combine

        return combine(rows_SH, position_TK, weights_TK.contiguous())
    out_TH = torch.zeros(position_TK.shape[0], rows_SH.shape[1], dtype=torch.float32)
    for position_T, weight_T in zip(position_TK.unbind(1), weights_TK.unbind(1), strict=True):
        out_TH = out_TH + weight_T.float()[:, None] * rows_SH[position_T].float()
    return out_TH.to(rows_SH.dtype)


class DenseExpert(nn.Module):
    """One expert of a layer as torch products, on views of the layer's weights.

    Args:
        spec: arithmetic and layouts of the layer.
        weights: those of all experts.
        expert: which one.
    """

    def __init__(self, spec: ExpertSpec, weights: ExpertWeights, expert: int) -> None:
        super().__init__()
        self.spec = spec
        for name, tensor in weights.named().items():
            self.register_buffer(name, tensor[expert].detach(), persistent=False)

    def _linear(self, rows: Tensor, name: str) -> Tensor:
        matrix: Tensor = getattr(self, name)
        bias: Tensor | None = getattr(self, f"{name}_bias", None)
        return F.linear(rows, matrix.T if self.spec.transposed else matrix, bias)

    def forward(self, rows: Tensor) -> Tensor:
        """Rows (N, H) through the expert: (N, H)."""
        s = self.spec
        if s.layers == 3:
            first = pointwise_ref(self._linear(rows, "up"), s.activation, s.alpha)
            second = pointwise_ref(self._linear(first, "mid"), s.activation, s.alpha)
            return self._linear(second, "down")
        product = self._linear(rows, "up")
        if s.gated and s.activation == "silu" and not (s.interleaved or s.limit or s.up_offset):
            gate, up = product.chunk(2, dim=-1)
            act = F.silu(gate) if s.alpha == 1.0 else gate * torch.sigmoid(s.alpha * gate)
            return self._linear(act * up, "down")
        act = activate_ref(
            product,
            activation=s.activation,
            gated=s.gated,
            interleaved=s.interleaved,
            limit=s.limit,
            alpha=s.alpha,
            up_offset=s.up_offset,
        )
        return self._linear(act, "down")


def dense_experts(spec: ExpertSpec, weights: ExpertWeights) -> list[nn.Module]:
    """Every expert of a layer as a module of its own; the weights are shared, not copied."""
    return [DenseExpert(spec, weights, expert) for expert in range(spec.num_experts)]


class SequentialExperts:
    """Expert after expert on the current stream: what the other executors are compared with."""

    def __init__(self, experts: Sequence[Expert]) -> None:
        self.experts = list(experts)

    def __call__(self, hidden_TH: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        """The output (T, H)."""
        rows = host_rows(topk_ids_TK, len(self.experts))
        given_SH, rows_SH = row_buffers(hidden_TH, rows)
        for expert, start, end in rows.ranges:
            rows_SH[start:end] = self.experts[expert](given_SH[start:end])
        return combine_rows(rows_SH, rows.position_TK, topk_weights_TK)


def row_buffers(hidden_TH: Tensor, rows: HostRows) -> tuple[Tensor, Tensor]:
    """The sorted input rows (S, H), and as much room for the experts' outputs."""
    given_SH = hidden_TH[rows.token_S]
    return given_SH, torch.empty_like(given_SH)


class StreamedExperts:
    """The paper's per-expert streams, for comparison only: each expert on a stream of its own.

    Args:
        experts: any function of rows (N, H).
        lanes: the streams; made for the device at the first call when None. torch has 32 of them,
            more experts share.
    """

    def __init__(self, experts: Sequence[Expert], *, lanes: Lanes | None = None) -> None:
        self.experts = list(experts)
        self._lanes = lanes

    def __call__(self, hidden_TH: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        """The output (T, H)."""
        rows = host_rows(topk_ids_TK, len(self.experts))
        given_SH, rows_SH = row_buffers(hidden_TH, rows)
        if self._lanes is None:
            self._lanes = open_lanes(hidden_TH.device, min(32, len(self.experts)), "expert")
        lanes = self._lanes
        used = dict.fromkeys(expert % len(lanes) for expert, _, _ in rows.ranges)
        with lanes.fork(used):
            for expert, start, end in rows.ranges:
                with lanes.on(expert % len(lanes)):
                    rows_SH[start:end] = self.experts[expert](given_SH[start:end])
        return combine_rows(rows_SH, rows.position_TK, topk_weights_TK)


def _registry() -> Iterator[tuple[str, Callable[[Sequence[nn.Module]], Executor]]]:
    from .expert_graphs import ExpertGraphs

    yield "sequential", SequentialExperts
    yield "per-expert-streams", StreamedExperts
    yield "per-expert-graphs", ExpertGraphs


def make_executor(name: str, experts: Sequence[nn.Module]) -> Executor:
    """An executor by name, with its default settings.

    Raises:
        ValueError: there is none of that name.
    """
    known = dict(_registry())
    if name not in known:
        raise ValueError(f"an executor must be one of {sorted(known)}, got {name!r}")
    return known[name](experts)
