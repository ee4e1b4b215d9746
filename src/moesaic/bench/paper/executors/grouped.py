"""Three torch `grouped_mm` with transformers' dispatch: sort, gather, multiply, sum over slots.

    T tokens · H hidden width · E experts · K top-k · S = T*K routed rows

The dispatch of transformers' `grouped_mm` experts, which have no three-layer form, in its leanest
shape; no host sync, so a graph can hold it. The strongest thing that torch alone offers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ....types import ExpertWeights
from ...baselines import torch_grouped_mm
from ...workloads import Model
from ..executor import GROUPED, Executor, ExpertRows, Rows, combine_slots, layer_of, sort_slots


def grouped_rows(model: Model, weights: ExpertWeights) -> Rows:
    """The same products as `baselines.torch_grouped_mm`, stopped before its sum over slots."""
    named = weights.named()
    experts_E = torch.arange(model.num_experts, device=weights.up.device)

    def rows(hidden_TH: Tensor, ids_TK: Tensor) -> ExpertRows:
        slots = sort_slots(ids_TK)
        offsets_E = torch.searchsorted(slots.ids_S, experts_E, right=True, out_int32=True)
        x = hidden_TH[slots.order_S // ids_TK.shape[1]]
        for name in ("up", "mid", "down"):
            x = F.grouped_mm(x, named[name].transpose(-2, -1), offs=offsets_E)
            x = x.add_(named[f"{name}_bias"][slots.ids_S])
            x = x if name == "down" else x.relu_()
        return ExpertRows(x, slots.position_TK)

    return rows


EXECUTOR = Executor(
    name=GROUPED,
    label="torch grouped_mm",
    about="sort, gather, three torch grouped_mm, gather and one batched product",
    build=torch_grouped_mm,
    exact=layer_of(grouped_rows, combine_slots),
    order=30,
)
