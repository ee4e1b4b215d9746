"""Tutel-style, re-implemented: every expert padded to one capacity, batched GEMMs over experts.

    T tokens · H hidden width · E experts · K top-k · C capacity · S = T*K routed rows

After Tutel (Hwang et al., MLSys 2023) on one GPU, with the capacity that drops nothing: the largest
count, read by the host, as Tutel does when the capacity factor is left open.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ....types import ExpertWeights
from ...workloads import Model
from ..executor import Executor, ExpertRows, Rows, combine_slots, layer_of, sort_slots


def tutel_rows(model: Model, weights: ExpertWeights) -> Rows:
    """Rows (E * C, H): three batched products over a padded (E, C, H) buffer."""
    spec, named = model.spec(), weights.named()

    def linear(x_ECI: Tensor, name: str) -> Tensor:
        bias_E1I = named[f"{name}_bias"][:, None, :]
        return torch.baddbmm(bias_E1I, x_ECI, named[name].transpose(1, 2))

    def rows(hidden_TH: Tensor, ids_TK: Tensor) -> ExpertRows:
        slots = sort_slots(ids_TK)
        counts_E = slots.ids_S.bincount(minlength=spec.num_experts)
        capacity = int(counts_E.max())
        first_E = counts_E.cumsum(0) - counts_E
        ids_TK = ids_TK.long()
        position_TK = ids_TK * capacity + slots.position_TK - first_E[ids_TK]
        buffer = hidden_TH.new_zeros(spec.num_experts * capacity, hidden_TH.shape[1])
        buffer[position_TK] = hidden_TH[:, None, :].expand(*ids_TK.shape, -1)
        x_ECH = buffer.view(spec.num_experts, capacity, -1)
        hidden = linear(linear(x_ECH, "up").relu_(), "mid").relu_()
        return ExpertRows(linear(hidden, "down").flatten(0, 1), position_TK)

    return rows


EXECUTOR = Executor(
    name="tutel-style",
    label="Tutel-style (re-implemented)",
    about="experts padded to the largest count, one batched GEMM a layer over all of them",
    build=layer_of(tutel_rows),
    exact=layer_of(tutel_rows, combine_slots),
    host_counts=True,
    order=21,
)
