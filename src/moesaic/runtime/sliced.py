"""Executors of a layer under a plan: an SM budget for all of it, or groups of experts side by side.

    T tokens · H hidden width · E experts · K top-k · S = T*K routed rows · G groups

`run_budgeted` is the layer with its persistent launches held to a number of SMs. `SlicedExperts`
gives every slice group a stream (and so, with green contexts, SMs of its own): each group sorts the
slots of its own experts, multiplies them, and writes rows; one combine then sums all groups' rows
in top-k slot order. A row's bits depend on its expert and its token alone, and the sum is the same
sum, so the output has the bits of the unsliced layer under any grouping, plan and number of SMs.

Everything runs on the device without a host sync, so a call can be captured; on a CPU, where there
are no slices, `SlicedExperts` runs the groups one after the other with the same result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..dispatch import Impl, choose_impl
from ..functional import moe
from ..ops import ungated
from ..types import ExpertSpec, ExpertWeights
from .seats import Seat

EPILOGUE = ("activation", "gated", "limit", "alpha", "up_offset")


def arithmetic_of(spec: ExpertSpec) -> dict[str, Any]:
    """What happens between the products, as the kernels take it."""
    return {name: getattr(spec, name) for name in EPILOGUE}


def run_budgeted(
    hidden_TH: Tensor,
    topk_ids_TK: Tensor,
    topk_weights_TK: Tensor,
    weights: ExpertWeights,
    spec: ExpertSpec,
    *,
    num_sms: int | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """`moe`, without gradients, its products held to `num_sms` SMs (None: no limit).

    Raises:
        ValueError: `num_sms` is not positive.
        RuntimeError: `impl` cannot run here; or a budget is asked for where nothing obeys one.
    """
    with torch.no_grad():
        return moe(
            hidden_TH, topk_ids_TK, topk_weights_TK, weights, spec, impl=impl, num_sms=num_sms
        )


def group_ids(groups: Sequence[Sequence[int]], num_experts: int) -> Tensor:
    """Which ids each group sees, int32 (G, E + 1): the expert's own, -1 for those of others.

    Raises:
        ValueError: the groups are not a partition of the experts.

    >>> group_ids([[1], [0, 2]], 3).tolist()
    [[-1, 1, -1], [0, -1, 2]]
    """
    flat = sorted(expert for group in groups for expert in group)
    if flat != list(range(num_experts)):
        raise ValueError(
            f"groups must hold each of the {num_experts} experts once, got {[*map(list, groups)]}"
        )
    table_GE = torch.full((len(groups), num_experts), -1, dtype=torch.int32)
    for g, group in enumerate(groups):
        table_GE[g, list(group)] = torch.tensor(list(group), dtype=torch.int32)
    return table_GE


class SlicedExperts:
    """The experts of one layer in groups, each on a seat of its own.

    Args:
        weights: of the layer; without gradients.
        spec: of the layer.
        groups: expert ids of each group; together every expert once.
        seats: one per group: its SMs and its stream. None: everything on the current stream.
        impl: as in `moe`; on a GPU "hopper" or "triton".

    Raises:
        ValueError: groups are no partition, or seats do not match them.
        RuntimeError: `impl` cannot run here.
    """

    def __init__(
        self,
        weights: ExpertWeights,
        spec: ExpertSpec,
        groups: Sequence[Sequence[int]],
        seats: Sequence[Seat] | None = None,
        *,
        impl: Impl = "auto",
    ) -> None:
        device, dtype = weights.up.device, weights.up.dtype
        self.weights, self.spec = weights, spec
        self.impl = choose_impl(impl, device, dtype, spec)
        if self.impl == "reference":
            raise RuntimeError("impl='reference' has no rows to slice; use impl='auto'")
        self._ids_GE = group_ids(groups, spec.num_experts).to(device)
        self.seats = tuple(seats or (Seat(sms=0),) * len(groups))
        if len(self.seats) != len(groups):
            raise ValueError(f"{len(groups)} groups need as many seats, got {len(self.seats)}")

    def __call__(
        self,
        hidden_TH: Tensor,
        topk_ids_TK: Tensor,
        topk_weights_TK: Tensor,
        *,
        ids_GE: Tensor | None = None,
    ) -> Tensor:
        """The layer's output (T, H), with the bits of `moe`; arguments as there.

        `ids_GE`: as `group_ids` gives it, on the device, instead of the groups' own for this call.
        """
        with torch.no_grad():
            if hidden_TH.shape[0] == 0:
                return torch.empty_like(hidden_TH)
            ids_GTK = (self._ids_GE if ids_GE is None else ids_GE)[:, topk_ids_TK.long()]
            if hidden_TH.device.type != "cuda":
                return self._in_turn(hidden_TH, ids_GTK, topk_weights_TK)
            return self._side_by_side(hidden_TH, ids_GTK, topk_weights_TK)

    def _in_turn(self, hidden_TH: Tensor, ids_GTK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        """Unrounded rows of one group after the other, then the sum in slot order."""
        from ..kernels.cpu import combine_cpu, experts_cpu

        tokens, top_k = topk_weights_TK.shape
        named: dict[str, Any] = dict(self.weights.named())
        rows_SH = torch.zeros(tokens * top_k, hidden_TH.shape[1])
        for ids_TK in ids_GTK:
            slot_R = (ids_TK.reshape(-1) >= 0).nonzero()[:, 0]
            ids_R1 = ids_TK.reshape(-1)[slot_R, None]
            if not slot_R.numel():
                continue
            rows_SH[slot_R] = experts_cpu(
                hidden_TH[slot_R // top_k], ids_R1, torch.ones(ids_R1.shape), **named,
                **arithmetic_of(self.spec), interleaved=self.spec.interleaved,
                transposed=self.spec.transposed, out_dtype=torch.float32,
            )  # fmt: skip
        slots_S = torch.arange(tokens * top_k)
        return combine_cpu(rows_SH, slots_S, topk_weights_TK).to(hidden_TH.dtype)

    def _side_by_side(self, hidden_TH: Tensor, ids_GTK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        """Every group on its stream into its part of the rows, then one combine of all parts."""
        from ..kernels.combine import combine

        slots, here = topk_weights_TK.numel(), torch.cuda.current_stream()
        rows_GSH = hidden_TH.new_empty((len(self.seats), slots, hidden_TH.shape[1]))
        positions = []
        for g, seat in enumerate(self.seats):
            stream = seat.stream or here
            stream.wait_stream(here)
            with torch.cuda.stream(stream):
                position_S = self._rows(hidden_TH, ids_GTK[g], rows_GSH[g], seat.sms or None)
                positions.append(torch.where(position_S >= 0, position_S + g * slots, -1))
        for seat, position_S in zip(self.seats, positions, strict=True):
            here.wait_stream(seat.stream or here)
            if seat.stream is not None and not torch.cuda.is_current_stream_capturing():
                position_S.record_stream(here)
        position_TK = torch.stack(positions).amax(0).view_as(topk_weights_TK)
        return combine(rows_GSH.flatten(0, 1), position_TK, topk_weights_TK.contiguous())

    def _rows(
        self, hidden_TH: Tensor, ids_TK: Tensor, rows_SH: Tensor, num_sms: int | None
    ) -> Tensor:
        """Write the rows of one group's slots, sorted; gives each slot's row, -1 for the others."""
        if self.impl == "hopper":
            return self._rows_hopper(hidden_TH, ids_TK, rows_SH, num_sms)
        from ..kernels.experts import rows_triton

        named: dict[str, Any] = dict(self.weights.named())
        return rows_triton(
            hidden_TH, ids_TK, **named, **arithmetic_of(self.spec), out=rows_SH, num_sms=num_sms,
            interleaved=self.spec.interleaved, transposed=self.spec.transposed,
        )  # fmt: skip

    def _rows_hopper(
        self, hidden_TH: Tensor, ids_TK: Tensor, rows_SH: Tensor, num_sms: int | None
    ) -> Tensor:
        if self.spec.layers == 3 or self.spec.bias:
            from ..kernels.hopper.mlp import rows_mlp

            named: dict[str, Any] = dict(self.weights.named())
            return rows_mlp(
                hidden_TH, ids_TK, **named, **ungated(self.spec), num_sms=num_sms, out=rows_SH
            )[1]
        from ..kernels.batching import batch_rows
        from ..kernels.device import sm_count
        from ..kernels.hopper.experts import choose, products

        up, down = self.weights.up, self.weights.down
        budget = num_sms or sm_count(hidden_TH.device)
        tokens, top_k = max(2, ids_TK.shape[0]), ids_TK.shape[1]
        config = choose(tokens, top_k, up.shape[0], up.shape[1], budget)
        sort, tasks = batch_rows(
            ids_TK,
            up.shape[0],
            heights=(config.up.bm,),
            order=config.order,  # type: ignore[arg-type]
        )
        products(
            hidden_TH, sort.order_S, tasks, top_k=top_k, up=up, down=down,
            **arithmetic_of(self.spec), num_sms=budget, config=config, out=rows_SH,
        )  # fmt: skip
        return sort.position_S
