"""One MoE layer over the ranks of a group: its experts live where a placement says.

    dispatch ─► local experts ─► combine ─► weighted sum

The answer has the bits of one process, whatever the number of ranks, the backend and the placement
(wire="fp8" excepted). Every rank calls the layer equally often; a rank without tokens passes none.

    T tokens of this rank · K top-k · H hidden width · E experts · L experts of this rank · G ranks

>>> layer = ExpertParallel(spec, placement, weights, top_k=2, group=dist.group.WORLD)
>>> layer(hidden_TH, topk_ids_TK, topk_weights_TK).shape
torch.Size([T, H])
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..dispatch import Impl
from ..functional import route
from ..types import ExpertSpec, ExpertWeights, RouterSpec
from ..validate import check_inputs, check_weights
from .backends import Options, choose_backend, group_of, make_exchange
from .counting import add_rows
from .exchange.base import Exchange, ExpertRows, Received, combine, dispatch, seat_of
from .placement import Placement, contiguous
from .rows import Share, expert_rows, row_dtype, weigh
from .wire import pack_fp8, unpack_fp8

__all__ = [
    "ExpertParallel",
    "ExpertParallelMoE",
    "Options",
    "Step",
    "choose_backend",
    "take_experts",
]


def take_experts(
    weights: ExpertWeights, placement: Placement, *, layer: int, rank: int
) -> ExpertWeights:
    """The weights of the experts that `rank` holds, copied from those of all experts."""
    own = list(placement.hosted(layer)[rank])
    return ExpertWeights(**{name: t[own].contiguous() for name, t in weights.named().items()})


class Step(NamedTuple):
    """A layer between two of its steps: what the next one needs."""

    handle: Any
    topk_weights_TK: Tensor
    bound: int
    dtype: torch.dtype


class ExpertParallel(nn.Module):
    """The experts of one layer over a group of ranks; inference only.

    Args:
        spec: of the whole layer, all E experts.
        placement: expert -> ranks; None: contiguous over the group.
        weights: of this rank's experts in the order of `placement.hosted`, see `take_experts`.
        top_k: K.
        layer: which layer of the placement.
        group: a process group or a one-dimensional mesh; None: one process.
        options: backend, capacity, SM budget, nodes, wire format.
        like: a layer of the same shape whose exchange, and its buffers, this one shares.
        impl: implementation of the experts, see `moe`.

    Raises:
        ValueError: the weights are not those of the placement, or the options do not fit.
    """

    def __init__(
        self,
        spec: ExpertSpec,
        placement: Placement | None,
        weights: ExpertWeights | None,
        *,
        top_k: int,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        layer: int = 0,
        group: dist.ProcessGroup | DeviceMesh | None = None,
        options: Options | None = None,
        impl: Impl = "auto",
        like: ExpertParallel | None = None,
    ) -> None:
        super().__init__()
        group = group_of(group)
        self.options: Options = options or (like.options if like else Options())
        rank = 0 if group is None else dist.get_rank(group)
        ranks = 1 if group is None else dist.get_world_size(group)
        placement = placement or contiguous(spec.num_experts, ranks, layer + 1)
        placement.must_fit(ranks=ranks, num_experts=spec.num_experts)
        self.spec, self.placement, self.impl, self.top_k = spec, placement, impl, top_k
        self.layer = layer
        if weights is not None:
            first = next(iter(weights.named().values()))
            dtype, device = first.dtype, first.device
        self.seat = seat_of(placement, layer, rank=rank, device=device)
        held = len(placement.hosted(layer)[rank])
        if (weights is None) != (held == 0):
            raise ValueError(f"rank {rank} holds {held} experts of layer {layer}, got {weights}")
        self.local_spec = replace(spec, num_experts=held) if held else None
        self.weights = weights
        if weights is not None and self.local_spec is not None:
            sample_TH = torch.empty((0, spec.hidden_size), dtype=dtype, device=device)
            check_weights(weights, self.local_spec, sample_TH)
        self.shape = (spec.hidden_size, dtype, top_k)
        self.recent: deque[int] = deque(maxlen=256)
        self.counting = False
        self.counts_E: Tensor | None = None
        if like is not None:
            if like.shape != self.shape:
                raise ValueError(f"layers of an exchange must agree: {like.shape}, {self.shape}")
            self.exchange: Exchange = like.exchange.at(self.seat)
            return
        self.exchange = make_exchange(
            self.seat, group, self.options, top_k=top_k, hidden=spec.hidden_size, dtype=dtype
        )

    def follow(self, placement: Placement) -> None:
        """Send by another placement of the same experts, between steps; graphs stay valid.

        Which replica serves which source may change; which experts this rank holds may not. Every
        rank must follow the same placement before the next step.

        Raises:
            ValueError: the experts of this rank would be others.
        """
        rank = self.seat.rank
        placement.must_fit(ranks=self.seat.ranks, num_experts=self.spec.num_experts)
        new = seat_of(placement, self.layer, rank=rank, device=self.seat.place_E.device)
        held = (self.placement.hosted(self.layer), placement.hosted(self.layer))
        if held[0] != held[1]:
            raise ValueError("the experts of a rank differ in this placement; make the layer again")
        self.seat.place_E.copy_(new.place_E)
        self.placement = placement

    def pack(self, hidden_TH: Tensor) -> Tensor:
        """Rows as they cross."""
        return pack_fp8(hidden_TH) if self.options.wire == "fp8" else hidden_TH

    def compute(self, received: Received, bound: int, dtype: torch.dtype) -> ExpertRows:
        """The local experts on what was received; `bound`: the most tokens that any rank sent."""
        rows_RH = received.rows_RH
        if self.options.wire == "fp8":
            rows_RH = unpack_fp8(rows_RH, self.spec.hidden_size, dtype)
        if self.weights is None or self.local_spec is None:
            back = row_dtype(dtype, rows_RH.device)
            empty_XH = rows_RH.new_empty((1, self.spec.hidden_size), dtype=back)
            return ExpertRows(empty_XH, torch.full_like(received.ids_RJ, -1))
        return expert_rows(
            rows_RH,
            received.ids_RJ,
            self.weights,
            self.local_spec,
            share=Share.of(bound, self.top_k, self.seat.ranks),
            impl=self.impl,
            num_sms=self.options.expert_sms,
        )

    def forward(
        self,
        hidden_TH: Tensor,
        topk_ids_TK: Tensor,
        topk_weights_TK: Tensor,
        *,
        bound: int | None = None,
    ) -> Tensor:
        """This rank's tokens through their experts: (T, H).

        Args:
            hidden_TH: fp32, fp16 or bf16.
            topk_ids_TK: int32 or int64, values in [0, E).
            topk_weights_TK: fp32 or the dtype of `hidden_TH`.
            bound: the most tokens that any rank brings, the same number on every rank; None: the
                capacity where the backend has one.

        Raises:
            TypeError, ValueError: see `validate.check_moe`; more tokens than `bound`.
            RuntimeError: a gradient is asked for.
        """
        check_inputs(hidden_TH, topk_ids_TK, topk_weights_TK, self.spec)
        tensors = (hidden_TH, topk_weights_TK)
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            raise RuntimeError("expert parallelism has no gradients; call under torch.no_grad()")
        bound = self._noted(bound, topk_ids_TK)
        outs = [
            self._round(hidden_TH[part], topk_ids_TK[part], topk_weights_TK[part], bound)
            for part in self.exchange.parts(hidden_TH.shape[0], bound)
        ]
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def count(self, on: bool = True) -> None:
        """From now on count this rank's rows for every expert, from 0; see `counting`.

        Off until asked for. Graphs captured while it is on count at every replay, others never.
        """
        self.counting = on
        if self.counts_E is not None:
            self.counts_E.zero_()  # the same memory, as graphs hold its address
        elif on:
            device = self.seat.place_E.device
            self.counts_E = torch.zeros(self.spec.num_experts, dtype=torch.int64, device=device)

    def _noted(self, bound: int | None, topk_ids_TK: Tensor) -> int:
        """The bound of a call, noted for `refit`, its rows for `counting`."""
        bound = self.options.capacity if bound is None else bound
        self.recent.append(bound)
        if self.counting and self.counts_E is not None:
            add_rows(self.counts_E, topk_ids_TK)
        return bound

    def refit(self, headroom: float = 1.25) -> int:
        """Size the buffers by the bounds of the last calls, between steps; their bytes.

        Every rank at once; bounds are the same on all, so all choose the same size. A larger batch
        takes more rounds and loses nothing. Layers that share an exchange share the new buffers,
        and graphs captured before are stale. 0 where a backend has no buffers.

        Args:
            headroom: times the largest of the last 256 bounds, see `fitting_capacity`.

        Raises:
            RuntimeError: a rank did not come in time.
        """
        resize = getattr(self.exchange, "resize", None)
        if resize is None:
            return 0
        from .exchange.symmetric import fitting_capacity

        wanted = fitting_capacity(self.recent, headroom=headroom)
        if self.recent and wanted != self.exchange.capacity:  # type: ignore[attr-defined]
            resize(wanted)
        num_bytes: int = self.exchange.num_bytes  # type: ignore[attr-defined]
        return num_bytes

    def _round(self, hidden_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, bound: int) -> Tensor:
        received = dispatch(self.exchange, self.pack(hidden_TH), ids_TK, bound=bound)
        rows = self.compute(received, bound, hidden_TH.dtype)
        return weigh(combine(self.exchange, rows, received.handle), weights_TK, hidden_TH.dtype)

    def begin(
        self,
        hidden_TH: Tensor,
        topk_ids_TK: Tensor,
        topk_weights_TK: Tensor,
        *,
        bound: int | None = None,
    ) -> Step:
        """First seam: send the tokens; other work may run before `experts`. One round only."""
        bound = self._noted(bound, topk_ids_TK)
        handle = self.exchange.send(self.pack(hidden_TH), topk_ids_TK, bound=bound)
        return Step(handle, topk_weights_TK, bound, hidden_TH.dtype)

    def experts(self, step: Step) -> Step:
        """Second seam: receive, compute, send back; other work may run before `end`."""
        received = self.exchange.receive(step.handle)
        rows = self.compute(received, step.bound, step.dtype)
        self.exchange.send_back(rows, step.handle)
        return step

    def end(self, step: Step) -> Tensor:
        """Last seam: receive what came back and sum it: (T, H)."""
        returned = self.exchange.receive_back(step.handle)
        return weigh(returned, step.topk_weights_TK, step.dtype)


class ExpertParallelMoE(nn.Module):
    """A MoE layer with its router on every rank and its experts spread: hidden (..., H) in and out.

    Args:
        router: how logits become a choice.
        gate_EH: the router's weight, the same on every rank.
        experts: the spread experts.
        bias_E: fp32 correction bias of a sigmoid router.
    """

    def __init__(
        self,
        router: RouterSpec,
        gate_EH: Tensor,
        experts: ExpertParallel,
        *,
        bias_E: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.router, self.experts = router, experts
        self.gate = nn.Parameter(gate_EH, requires_grad=False)
        self.register_buffer("bias_E", bias_E)

    def forward(self, hidden_states: Tensor, *, bound: int | None = None) -> Tensor:
        """The layer's output, same shape and dtype as `hidden_states`."""
        hidden_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits_TE = nn.functional.linear(hidden_TH, self.gate)
        routing = route(logits_TE, self.router, bias_E=self.bias_E)  # type: ignore[arg-type]
        out_TH: Tensor = self.experts(
            hidden_TH, routing.topk_ids_TK, routing.topk_weights_TK, bound=bound
        )
        return out_TH.view_as(hidden_states)
