"""The paper's "+ CUDA graphs": its graph manager, one graph per expert, over Triton kernels.

    H hidden width · E experts · R rows of one expert

Experts are modules of moesaic's kernels; `runtime.expert_graphs` captures each by the paper's
heuristics (10 calls, 32 rows, stable shapes). Row counts are padded to buckets, for else hardly a
call would repeat, and rotations run first, so that what can be captured is: the manager at its
best. Its counts stand in the line.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ....runtime.expert_graphs import ExpertGraphs
from ....runtime.graph_rules import GraphConfig, doubling_buckets
from ....types import ExpertWeights
from ...baselines import Forward
from ...workloads import Model
from ..executor import Executor
from ..triton_rows import mlp_rows, new_buffers
from .static import as_they_are

if TYPE_CHECKING:
    from ....kernels.batching import RowSort, TaskMap

MOST_ROWS = 8192
GRAPHS_PER_EXPERT = 8
MEMORY_BYTES = 8 * 2**30


class TritonExpert(nn.Module):
    """One expert of a three-layer model as moesaic's kernels, on views of the layer's weights."""

    def __init__(self, model: Model, weights: ExpertWeights, expert: int) -> None:
        super().__init__()
        self.model = model
        for name, tensor in weights.named().items():
            self.register_buffer(name, tensor[expert : expert + 1], persistent=False)
        self._maps: dict[int, tuple[RowSort, TaskMap]] = {}

    def _map(self, rows: int, heights: tuple[int, ...]) -> tuple[RowSort, TaskMap]:
        """The sort and the task map of `rows` rows of one expert; the first call makes them, which
        is before any capture."""
        from ....kernels.batching import RowSort, build_task_map

        if rows not in self._maps:
            device = self.get_buffer("up").device
            order_R = torch.arange(rows, dtype=torch.int32, device=device)
            offsets_2 = torch.arange(2, dtype=torch.int32, device=device) * rows
            sort = RowSort(order_R, order_R, offsets_2)
            self._maps[rows] = sort, build_task_map(offsets_2, heights=heights)
        return self._maps[rows]

    def forward(self, rows_RH: Tensor) -> Tensor:
        """Rows (R, H) through the expert: (R, H)."""
        from ....kernels.experts import problem_of
        from ....kernels.tune import choose

        weights = ExpertWeights(**dict(self.named_buffers()))
        rows_RH, rows = rows_RH.contiguous(), rows_RH.shape[0]
        one = rows_RH.new_empty((rows, 1), dtype=torch.int32)
        config = choose(
            problem_of(
                rows_RH, one, weights.up, weights.down, gated=False, layers=3, transposed=False
            )
        )
        config = config._replace(fused=False)
        sort, tasks = self._map(rows, config.heights)
        buffers = new_buffers(self.model, rows, rows_RH)
        return mlp_rows(rows_RH, weights, sort, tasks, config, top_k=0, buffers=buffers)


class GraphedLayer:
    """The layer of captured experts; `warm_rotations` are run before it is timed."""

    warm_rotations = 12

    def __init__(self, model: Model, weights: ExpertWeights) -> None:
        experts = [TritonExpert(model, weights, e) for e in range(model.num_experts)]
        config = GraphConfig(
            buckets=doubling_buckets(MOST_ROWS),
            max_graphs=GRAPHS_PER_EXPERT * model.num_experts,
            memory_bytes=MEMORY_BYTES,
        )
        self.layer = ExpertGraphs(experts, config)
        self.called = False

    def __call__(self, hidden_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """The output (T, H)."""
        self.called = True
        return self.layer(hidden_TH, ids_TK, weights_TK)


def state(forward: Forward) -> dict[str, int | float]:
    """Calls of experts by what became of them, and the memory that graphs hold."""
    if not isinstance(forward, GraphedLayer) or not forward.called:
        return {}
    counts = forward.layer.counts()
    names = ("replayed", "captured", "eager", "evicted", "failed", "graphs")
    values: dict[str, int | float] = {name: getattr(counts, name) for name in names}
    weights = sum(t.nbytes for expert in forward.layer.experts for t in expert.buffers())
    sizes = {"held_bytes": counts.held_bytes, "buffer_bytes": counts.buffer_bytes}
    reasons = {"barred": counts.why_eager.get("barred", 0)}
    reasons["few_rows"] = counts.why_eager.get("token count", 0)
    return values | sizes | reasons | {"weight_bytes": weights}


EXECUTOR = Executor(
    name="expert-graphs",
    label="CUDA graphs, per expert",
    about="moesaic's kernels, each expert captured by the paper's heuristics, counts on the host",
    build=GraphedLayer,
    exact=GraphedLayer,
    ours=True,
    host_counts=True,
    inputs=as_they_are,
    needs="cuda",
    order=60,
    state=state,
)
