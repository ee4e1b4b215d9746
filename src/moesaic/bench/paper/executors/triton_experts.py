"""The paper's "+ Triton kernels": moesaic's kernels, but a launch per expert and layer.

    T tokens · H hidden width · E experts · K top-k · S = T*K routed rows

The same sort, tiles and arithmetic as the static batch; only the task map is taken apart, one entry
a launch, on the device. So there is no host sync, a graph of the whole layer can hold it, and what
it costs against the static batch is what one launch for all experts is worth.
"""

from __future__ import annotations

from torch import Tensor

from ....types import ExpertWeights
from ...baselines import Forward
from ...workloads import Model
from ..executor import Executor
from ..triton_rows import config_of, heights_of, map_entries, mlp_rows, new_buffers
from .static import as_they_are


def build(model: Model, weights: ExpertWeights) -> Forward:
    """The layer as E launches a product; nothing is read by the host."""
    from ....kernels.batching import batch_rows
    from ....kernels.combine import combine

    def forward(hidden_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        config = config_of(model, weights, hidden_TH, ids_TK)
        sort, tasks = batch_rows(ids_TK, model.num_experts, heights=heights_of(config))
        buffers, top_k = new_buffers(model, ids_TK.numel(), hidden_TH), ids_TK.shape[1]
        for entry in map_entries(tasks):
            mlp_rows(hidden_TH, weights, sort, entry, config, top_k=top_k, buffers=buffers)
        return combine(buffers[2], sort.position_S.view(ids_TK.shape), weights_TK)

    return forward


EXECUTOR = Executor(
    name="triton-experts",
    label="Triton kernels, per expert",
    about="moesaic's kernels with a launch per expert and layer, no host sync",
    build=build,
    exact=build,
    ours=True,
    inputs=as_they_are,
    needs="cuda",
    order=50,
)
