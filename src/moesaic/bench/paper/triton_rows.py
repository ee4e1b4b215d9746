"""Three-layer expert rows by moesaic's kernels: for all experts in one launch a layer, or apart.

    T tokens · H hidden width · I intermediate width · E experts · K top-k · S = T*K routed rows

The configuration is the one that the layer chooses for the shape on these kernels, so an executor
made of these pieces differs from executor `static-triton` in its launches alone, and from any other
never in bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...types import ExpertWeights
from ..workloads import Model

if TYPE_CHECKING:
    from ...kernels.batching import RowSort, TaskMap
    from ...kernels.tune import Config


def config_of(model: Model, weights: ExpertWeights, hidden_TH: Tensor, ids_TK: Tensor) -> Config:
    """The configuration of the layer's own call."""
    from ...kernels.experts import problem_of
    from ...kernels.tune import choose

    spec = model.spec()
    config = choose(
        problem_of(
            hidden_TH, ids_TK, weights.up, weights.down,
            gated=spec.gated, layers=spec.layers, transposed=spec.transposed,
        )
    )  # fmt: skip
    return config


def compute_capability(device: torch.device) -> int:
    """80, 90, ...; 90 for Triton's interpreter."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def heights_of(config: Config) -> tuple[int, ...]:
    """The tile heights that a task map for `mlp_rows` must have."""
    from ...kernels.tune import FUSED_ROWS

    return (FUSED_ROWS,) if config.fused else config.heights


def mlp_rows(
    x: Tensor,
    weights: ExpertWeights,
    sort: RowSort,
    tasks: TaskMap,
    config: Config,
    *,
    top_k: int,
    buffers: tuple[Tensor, Tensor, Tensor],
) -> Tensor:
    """The rows of `tasks` through their experts, written into the last of `buffers`.

    Args:
        x: tokens (T, H), or rows (S, H) in sorted order when `top_k` is 0.
        sort, tasks: of `batch_rows` with `heights_of(config)`; the map may hold some experts only.
        buffers: (S, I), (S, I), (S, H), dtype of x; `new_buffers` makes them.
    """
    from ...kernels.expert_mlp import expert_mlp
    from ...kernels.grouped_mm import Epilogue, grouped_mm

    w = weights
    if w.mid is None or w.up_bias is None or w.mid_bias is None or w.down_bias is None:
        raise ValueError("mlp_rows needs three-layer experts with biases")
    first_SI, second_SI, out_SH = buffers
    if config.fused:
        biases = (w.up_bias, w.mid_bias, w.down_bias)
        return expert_mlp(
            x, w.up, w.mid, w.down, sort, tasks, top_k=max(1, top_k), biases=biases, out=out_SH,
            arch=compute_capability(x.device),
        )  # fmt: skip
    relu, heights = Epilogue("relu"), config.heights
    grouped_mm(
        x, w.up, sort, tasks, top_k=top_k, heights=heights, bias=w.up_bias, epilogue=relu,
        config=config.up, out=first_SI,
    )  # fmt: skip
    grouped_mm(
        first_SI, w.mid, sort, tasks, top_k=0, heights=heights, bias=w.mid_bias, epilogue=relu,
        config=config.mid, out=second_SI,
    )  # fmt: skip
    return grouped_mm(
        second_SI, w.down, sort, tasks, top_k=0, heights=heights, bias=w.down_bias,
        config=config.down, out=out_SH,
    )  # fmt: skip


def new_buffers(model: Model, rows: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Unwritten buffers for `mlp_rows`."""
    i, h = model.intermediate_size, model.hidden_size
    return like.new_empty((rows, i)), like.new_empty((rows, i)), like.new_empty((rows, h))


def map_entries(tasks: TaskMap) -> list[TaskMap]:
    """A task map taken apart into maps of one entry each, on the device, at most N of them.

    An entry without rows has no tile, so its launch does nothing.

    >>> from moesaic.kernels.batching import build_task_map_ref
    >>> task_map = build_task_map_ref(torch.tensor([0, 3, 3, 203], dtype=torch.int32))
    >>> [(m.task_N.tolist(), m.total_2.tolist()) for m in map_entries(task_map)]
    [([0], [1, 1]), ([2], [1, 2]), ([0], [1, 0])]
    """
    entries = tasks.task_N.numel()
    # Rows of four: every piece begins at 16 bytes, so that one compiled kernel takes them all.
    table = torch.zeros((7, entries, 4), dtype=torch.int32, device=tasks.task_N.device)
    tiles_N = tasks.tile_end_N.diff(prepend=tasks.tile_end_N.new_zeros(1))
    columns = (tiles_N, tasks.task_N, tasks.row_start_N, tasks.rows_N, tasks.height_N)
    table[:5, :, 0] = torch.stack(columns)
    table[5, :, 0] = 1
    table[5, :, 1] = tiles_N
    return [_entry(table[:, n]) for n in range(entries)]


def _entry(table_74: Tensor) -> TaskMap:
    from ...kernels.taskmap import TaskMap

    tile_end, task, row_start, rows, height = (column[:1] for column in table_74[:5])
    return TaskMap(tile_end, task, row_start, rows, height, table_74[5, :2], table_74[6, :2])
