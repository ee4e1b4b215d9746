"""Static batching: any ragged set of tasks becomes one launch of fixed size.

`taskmap` turns sizes into tiles, `sorting` turns routing into sizes; `batch_rows` does both for a
mixture of experts in the fewest launches.

    T tokens · K top-k · S = T*K slots · E experts · N tasks · B tiles

>>> rows, task_map = batch_rows_ref(torch.tensor([[2, 0], [0, 2], [2, 0]]), num_experts=3)
>>> rows.order_S.tolist(), rows.offsets_E1.tolist()
([1, 2, 5, 0, 3, 4], [0, 3, 3, 6])
>>> task_map.task_N.tolist(), task_map.total_2.tolist()  # expert 1 is empty
([0, 2, 0], [2, 2])
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .sorting import RowSort, launch_sort, sort_rows, sort_rows_ref
from .taskmap import (
    HEIGHTS,
    Order,
    TaskMap,
    build_task_map,
    build_task_map_ref,
    check_policy,
    find_task,
    find_task_ref,
    new_task_map,
    tile_capacity,
    tile_height,
)

__all__ = [
    "HEIGHTS",
    "Order",
    "RowSort",
    "TaskMap",
    "batch_rows",
    "batch_rows_ref",
    "build_task_map",
    "build_task_map_ref",
    "find_task",
    "find_task_ref",
    "sort_rows",
    "sort_rows_ref",
    "tile_capacity",
    "tile_height",
]


def batch_rows(
    topk_ids_TK: Tensor,
    num_experts: int,
    *,
    heights: Sequence[int] = HEIGHTS,
    order: Order = "index",
    counters: Tensor | None = None,
    pdl: bool = False,
) -> tuple[RowSort, TaskMap]:
    """Sort the slots by expert and map the experts' tiles; one launch up to 4096 slots, else three.

    Args:
        topk_ids_TK: int32 or int64 (T, K), T may be 0; ids outside [0, E) are of nobody.
        num_experts: E, in [1, 1024].
        heights: tile heights to choose from, ascending.
        order: which expert gets the first tiles; see `taskmap`.
        counters: (3, E) int32, contiguous; each expert's rows and tiles are added to lines 1 and 2.
        pdl: launches start while the one before still runs and wait for it on the device (sm_90
            and up).

    Raises:
        ValueError: ids of another dtype or rank, a size out of range, heights not ascending, or an
            unknown order.
    """
    heights = check_policy(heights, order)
    table, task_map = new_task_map(num_experts, topk_ids_TK.device)
    rows = launch_sort(topk_ids_TK, num_experts, table, heights, order, counters, pdl)
    return rows, task_map


def batch_rows_ref(
    topk_ids_TK: Tensor,
    num_experts: int,
    *,
    heights: Sequence[int] = HEIGHTS,
    order: Order = "index",
) -> tuple[RowSort, TaskMap]:
    """The torch twin of `batch_rows`: the slots sorted by expert and the map of their tiles."""
    rows = sort_rows_ref(topk_ids_TK, num_experts)
    return rows, build_task_map_ref(rows.offsets_E1, heights=heights, order=order)
