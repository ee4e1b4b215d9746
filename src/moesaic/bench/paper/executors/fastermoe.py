"""FasterMoE-style, re-implemented: count, scatter into expert order, a GEMM per expert, gather.

    T tokens · H hidden width · K top-k · S = T*K routed rows

After FasterMoE (He et al., PPoPP 2022) on one GPU: counts are read by the host, rows are scattered
once, every expert writes its piece of one buffer, one batched product applies the scores.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ....types import ExpertWeights
from ...workloads import Model
from ..executor import (
    Executor,
    ExpertRows,
    Rows,
    combine_slots,
    expert_forward,
    layer_of,
    sort_slots,
)


def fastermoe_rows(model: Model, weights: ExpertWeights) -> Rows:
    """Rows in expert order, one expert after the other, after one read of the counts."""
    spec = model.spec()
    expert = expert_forward(weights, spec)

    def rows(hidden_TH: Tensor, ids_TK: Tensor) -> ExpertRows:
        slots = sort_slots(ids_TK)
        counts = slots.ids_S.bincount(minlength=spec.num_experts)
        x_SH = hidden_TH[slots.order_S // ids_TK.shape[1]]
        out_SH = torch.empty_like(x_SH)
        start = 0
        for e, count in enumerate(counts.tolist()):
            if count:
                expert(x_SH[start : start + count], e, out=out_SH[start : start + count])
                start += count
        return ExpertRows(out_SH, slots.position_TK)

    return rows


EXECUTOR = Executor(
    name="fastermoe-style",
    label="FasterMoE-style (re-implemented)",
    about="count, scatter, a GEMM per expert and layer, gather and one batched product",
    build=layer_of(fastermoe_rows),
    exact=layer_of(fastermoe_rows, combine_slots),
    host_counts=True,
    order=20,
)
