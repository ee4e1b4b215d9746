"""Routing and experts that train fast: no loop over experts, no host read, gathers both ways.

    T tokens · H hidden width · E experts · K top-k · P rows, grouped by expert and padded to GROUP

Each expert's rows are contiguous and start at a multiple of GROUP, so that one grouped product
serves all experts; padding rows are zero and belong to some expert, hence give zero and get zero
gradient. The moves between tokens and rows are permutations, so their backward is a gather too: no
atomics. Equal to `moesaic.reference.moe_reference` within rounding.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moesaic import ExpertSpec, ExpertWeights, RouterSpec, Routing

GROUP = 16


class Layout(NamedTuple):
    """Where each slot's row lies: row (T, K), slot of each row (P,) or S for padding, ends (E,)."""

    row_TK: Tensor
    slot_P: Tensor
    ends_E: Tensor


def layout(topk_ids_TK: Tensor, num_experts: int) -> Layout:
    """The padded grouping by expert of the slots, of a size that does not depend on the routing.

    >>> layout(torch.tensor([[1], [0], [1]]), 2).row_TK.flatten().tolist()
    [16, 0, 17]
    """
    ids_S = topk_ids_TK.flatten().long()
    slots = ids_S.numel()
    rows = (slots + GROUP - 1) // GROUP * GROUP + num_experts * GROUP
    order_S = torch.argsort(ids_S, stable=True)
    experts_E = torch.arange(num_experts, device=ids_S.device)
    counts_E = (ids_S[:, None] == experts_E).sum(0)
    padded_E = (counts_E + GROUP - 1) // GROUP * GROUP
    shift_E = (padded_E.cumsum(0) - padded_E) - (counts_E.cumsum(0) - counts_E)
    row_sorted_S = torch.arange(slots, device=ids_S.device) + shift_E[ids_S[order_S]]
    row_S = torch.empty_like(ids_S).scatter_(0, order_S, row_sorted_S)
    slot_P = torch.full((rows,), slots, device=ids_S.device).scatter_(0, row_sorted_S, order_S)
    ends_E = padded_E.cumsum(0).to(torch.int32)
    ends_E = torch.where(experts_E == num_experts - 1, rows, ends_E).to(torch.int32)
    return Layout(row_S.view_as(topk_ids_TK), slot_P, ends_E)


class _Spread(torch.autograd.Function):
    """Tokens (T, H) to rows (P, H); padding rows are zero."""

    @staticmethod
    def forward(ctx: Any, hidden_TH: Tensor, row_TK: Tensor, slot_P: Tensor) -> Tensor:
        ctx.save_for_backward(row_TK)
        zero = hidden_TH.new_zeros(1, hidden_TH.shape[1])
        return torch.cat((hidden_TH, zero))[slot_P // row_TK.shape[1]]

    @staticmethod
    def backward(ctx: Any, grad_PH: Tensor) -> tuple[Tensor, None, None]:
        (row_TK,) = ctx.saved_tensors
        return grad_PH[row_TK].sum(1), None, None


class _Gather(torch.autograd.Function):
    """Rows (P, H) to slots (T, K, H)."""

    @staticmethod
    def forward(ctx: Any, rows_PH: Tensor, row_TK: Tensor, slot_P: Tensor) -> Tensor:
        ctx.save_for_backward(slot_P)
        return rows_PH[row_TK]

    @staticmethod
    def backward(ctx: Any, grad_TKH: Tensor) -> tuple[Tensor, None, None]:
        (slot_P,) = ctx.saved_tensors
        flat_SH = grad_TKH.flatten(0, 1)
        return torch.cat((flat_SH, flat_SH.new_zeros(1, flat_SH.shape[1])))[slot_P], None, None


def grouped_product(rows_PH: Tensor, weight_EUH: Tensor, ends_E: Tensor) -> Tensor:
    """Each expert's rows times its matrix, transposed: (P, U). One launch on a GPU."""
    if rows_PH.is_cuda:
        return F.grouped_mm(rows_PH, weight_EUH.transpose(1, 2), offs=ends_E)
    starts = [0, *ends_E.tolist()]
    pieces = [rows_PH[a:b] @ w.T for a, b, w in zip(starts, starts[1:], weight_EUH, strict=False)]
    return torch.cat(pieces)


def grouped_experts(
    hidden_TH: Tensor,
    topk_ids_TK: Tensor,
    topk_weights_TK: Tensor,
    weights: ExpertWeights,
    spec: ExpertSpec,
) -> Tensor:
    """The experts' output (T, H), differentiable in everything; bf16 products on a GPU."""
    compute = torch.bfloat16 if hidden_TH.is_cuda else hidden_TH.dtype
    where = layout(topk_ids_TK, spec.num_experts)
    with torch.autocast(hidden_TH.device.type, enabled=False):
        rows_PH = _Spread.apply(hidden_TH.to(compute), where.row_TK, where.slot_P)
        product_PU = grouped_product(rows_PH, weights.up.to(compute), where.ends_E)
        gate, up = product_PU.chunk(2, dim=-1)
        out_PH = grouped_product(F.silu(gate) * up, weights.down.to(compute), where.ends_E)
        out_TKH = _Gather.apply(out_PH, where.row_TK, where.slot_P)
        scaled_TKH = out_TKH.float() * topk_weights_TK[..., None]
    return scaled_TKH.sum(1).to(hidden_TH.dtype)


class BalancedRouter:
    """Softmax top-k routing that remembers what the load-balancing loss needs.

    The loss of a layer is ``E * sum_e f_e P_e`` (Fedus et al. 2021, section 2.2), f being the share
    of the slots and P the mean probability: 1 when balanced.
    """

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.counts: list[Tensor] = []

    def __call__(self, logits_TE: Tensor, spec: RouterSpec) -> Routing:
        """The routing, its weights differentiable in the logits."""
        probabilities_TE = logits_TE.float().softmax(-1)
        left_TE, ids = probabilities_TE.detach(), []
        for _ in range(spec.top_k):
            best_T1 = left_TE.argmax(-1, keepdim=True)
            ids.append(best_T1)
            left_TE = left_TE.scatter(1, best_T1, -1.0)
        ids_TK = torch.cat(ids, 1)
        weights_TK = probabilities_TE.gather(1, ids_TK)
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        experts_E = torch.arange(spec.num_experts, device=ids_TK.device)
        counts_E = (ids_TK.flatten()[:, None] == experts_E).sum(0)
        share_E = counts_E / ids_TK.numel()
        self.losses.append(spec.num_experts * (share_E * probabilities_TE.mean(0)).sum())
        self.counts.append(counts_E)
        return Routing(ids_TK, weights_TK, counts_E)

    def take(self) -> tuple[Tensor, Tensor]:
        """The mean loss and the counts (L, E) of the layers since the last call."""
        loss, counts_LE = torch.stack(self.losses).mean(), torch.stack(self.counts)
        self.losses, self.counts = [], []
        return loss, counts_LE
