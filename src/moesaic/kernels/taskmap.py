"""The task map: from a device vector of task sizes to one launch that covers every task with tiles.

A *task* is a run of rows (one expert's rows, one adapter's rows, one segment); a *tile* is what one
program computes: up to `height` consecutive rows of one task. The map is the inclusive prefix of
tiles over the tasks that have rows, so an empty task costs no entry, no tile and no look-up; a
program finds its task by counting the prefixes that its number has passed (`find_task`). Everything
is built on the device, in one launch, at a size that depends on the number of tasks alone: no host
sync, no allocation that depends on the sizes, so a captured graph replays with other sizes.

    N tasks (capacity) · M tasks with rows · B tiles

The height of a task is the smallest of `heights` that holds all its rows, else the largest; hence a
task has one tile unless it has more rows than the largest height, and `tile_capacity` bounds B.

`order` fixes which task gets the first tiles: "index" by id, "large_first" by rows (descending,
ties to the lower id), "mixed" the largest, the smallest, the second largest, ... so that
compute-bound and memory-bound tiles run beside each other.

>>> task_map = build_task_map_ref(torch.tensor([0, 3, 3, 203, 220], dtype=torch.int32))
>>> task_map.task_N.tolist(), task_map.height_N.tolist()  # task 1 is empty
([0, 2, 3, 0], [16, 128, 32, 0])
>>> task_map.tile_end_N.tolist(), task_map.total_2.tolist()  # 1 + 2 + 1 tiles
([1, 3, 4, 4], [3, 4])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
import triton
import triton.language as tl
from torch import Tensor

Order = Literal["index", "large_first", "mixed"]
HEIGHTS = (16, 32, 64, 128)
MAX_TASKS = 4096


class TaskMap(NamedTuple):
    """The table from tile to task; every tensor int32, on the device, entries in policy order.

    Entries at or beyond M (`total_2[0]`) hold the total in `tile_end_N` and 0 elsewhere.
    """

    tile_end_N: Tensor
    """Inclusive prefix of tiles over the tasks that have rows."""
    task_N: Tensor
    """Task id of each entry."""
    row_start_N: Tensor
    """First row of the task."""
    rows_N: Tensor
    """Rows of the task."""
    height_N: Tensor
    """Tile height of the task, one of `heights`."""
    total_2: Tensor
    """[number of tasks that have rows, number of tiles]."""
    tickets_2: Tensor
    """Two zeros: counters from which launches over this map draw their tiles, and then reset."""


def tile_height(rows: int, heights: Sequence[int] = HEIGHTS) -> int:
    """The tile height of a task of `rows` rows: the smallest that holds them all, else the largest.

    >>> [tile_height(rows) for rows in (1, 16, 17, 128, 5000)]
    [16, 16, 32, 128, 128]
    """
    return next((height for height in heights if height >= rows), heights[-1])


def tile_capacity(rows: int, tasks: int, heights: Sequence[int] = HEIGHTS) -> int:
    """The most tiles that any split of `rows` rows over `tasks` tasks can need.

    >>> tile_capacity(rows=4, tasks=128), tile_capacity(rows=1000, tasks=8)
    (4, 15)
    """
    return min(rows, tasks) + rows // max(heights)


def lanes(tasks: int) -> int:
    """The width of a kernel's vector of tasks: a power of two, at least 32.

    >>> lanes(8), lanes(33)
    (32, 64)
    """
    return max(32, 1 << (tasks - 1).bit_length())


def row_clip(tasks: int) -> int:
    """Rows above this count as equal in the order policies (sort keys are 31 bits wide).

    >>> row_clip(256)
    8388607
    """
    return 2**31 // lanes(tasks) - 1


def check_policy(heights: Sequence[int], order: str) -> tuple[int, ...]:
    """`heights` as a tuple.

    Raises:
        ValueError: heights do not ascend or the order is unknown.
    """
    heights = tuple(int(height) for height in heights)
    if not heights or heights[0] < 1 or list(heights) != sorted(set(heights)):
        raise ValueError(f"heights must be positive and ascending, like {HEIGHTS}, got {heights}")
    if order not in get_args(Order):
        raise ValueError(f"order must be one of {', '.join(get_args(Order))}, got {order!r}")
    return heights


def _check_offsets(offsets_N1: Tensor) -> int:
    if offsets_N1.dim() != 1 or offsets_N1.dtype != torch.int32 or not offsets_N1.is_contiguous():
        raise ValueError(
            "offsets must be a contiguous int32 vector of shape (N + 1,), "
            f"got {offsets_N1.dtype} of shape {tuple(offsets_N1.shape)}"
        )
    tasks = offsets_N1.numel() - 1
    if not 1 <= tasks <= MAX_TASKS:
        raise ValueError(f"the number of tasks must be in [1, {MAX_TASKS}], got {tasks}")
    return tasks


def _policy_ids(rows_N: Tensor, order: str) -> Tensor:
    """Ids of the tasks in policy order, those without rows last."""
    tasks = rows_N.numel()
    if order == "index":
        return torch.sort((rows_N == 0).int(), stable=True).indices
    by_rows = torch.sort(rows_N.clamp(max=row_clip(tasks)), descending=True, stable=True).indices
    if order == "large_first":
        return by_rows
    entry = torch.arange(tasks, device=rows_N.device)
    filled = (rows_N > 0).sum()
    rank = torch.where(entry % 2 == 0, entry // 2, filled - 1 - entry // 2)
    return by_rows[torch.where(entry < filled, rank, entry)]


def build_task_map_ref(
    offsets_N1: Tensor, *, heights: Sequence[int] = HEIGHTS, order: Order = "index"
) -> TaskMap:
    """The torch twin of `build_task_map`."""
    heights = check_policy(heights, order)
    _check_offsets(offsets_N1)
    ids_N = _policy_ids(offsets_N1.diff(), order)
    rows_N = offsets_N1.diff()[ids_N]
    table = torch.tensor(heights, device=offsets_N1.device)
    level = torch.searchsorted(table, rows_N.long()).clamp(max=len(heights) - 1)
    height_N = table[level] * (rows_N > 0)
    tiles_N = (rows_N + height_N - 1) // height_N.clamp(min=1) * (rows_N > 0)
    tile_end_N = tiles_N.cumsum(0)
    used = rows_N > 0
    total_2 = torch.stack([used.sum(), tile_end_N[-1]])
    starts_N = offsets_N1[:-1][ids_N] * used
    tickets_2 = torch.zeros_like(total_2)
    columns = (tile_end_N, ids_N * used, starts_N, rows_N, height_N, total_2, tickets_2)
    return TaskMap(*(column.to(torch.int32) for column in columns))


def new_task_map(tasks: int, device: torch.device) -> tuple[Tensor, TaskMap]:
    """An unwritten table (6, stride) and the map whose tensors are its rows, 16-byte aligned."""
    table = torch.empty((6, -(-tasks // 4) * 4), dtype=torch.int32, device=device)
    columns = (*table[:5, :tasks].unbind(0), table[5, :2], table[5, 2:4])
    return table, TaskMap(*columns)


def build_task_map(
    offsets_N1: Tensor, *, heights: Sequence[int] = HEIGHTS, order: Order = "index"
) -> TaskMap:
    """The tiles of N tasks whose rows are `offsets_N1[n]` to `offsets_N1[n + 1]`; one launch.

    Args:
        offsets_N1: int32 (N + 1,), ascending, N in [1, 4096].
        heights: tile heights to choose from, ascending.
        order: which task gets the first tiles; see the head of this module.

    Raises:
        ValueError: offsets of another dtype or shape, heights not ascending, or an unknown order.
    """
    heights = check_policy(heights, order)
    tasks = _check_offsets(offsets_N1)
    table, task_map = new_task_map(tasks, offsets_N1.device)
    task_map_kernel[(1,)](
        offsets_N1,
        table,
        tasks,
        table.stride(0),
        HEIGHTS=heights,
        ORDER=order,
        N_POW2=lanes(tasks),
        num_warps=4 if tasks <= 512 else 8,
        enable_fp_fusion=True,
    )
    return task_map


@triton.jit
def task_map_kernel(
    offsets_ptr,
    table_ptr,
    tasks,
    stride,
    HEIGHTS: tl.constexpr,
    ORDER: tl.constexpr,
    N_POW2: tl.constexpr,
):
    """Write the task map of `tasks` offsets, in one program.

    offsets_ptr: int32 (N + 1,). table_ptr: int32 (6, stride); rows as `write_task_map` says.
    offsets [0, 3, 3, 203, 220], heights (16, 32, 64, 128), order "index" write
    tile_end [1, 3, 4, 4], task [0, 2, 3, 0], row_start [0, 3, 203, 0], rows [3, 200, 17, 0],
    height [16, 128, 32, 0] and total [3, 4].
    """
    n = tl.arange(0, N_POW2)
    start_N = tl.load(offsets_ptr + n, mask=n < tasks, other=0)
    end_N = tl.load(offsets_ptr + n + 1, mask=n < tasks, other=0)
    write_task_map(start_N, end_N - start_N, table_ptr, tasks, stride, HEIGHTS, ORDER, N_POW2)


@triton.jit
def policy_ids(rows_N, filled, ORDER: tl.constexpr, N_POW2: tl.constexpr):
    """Task ids in policy order, those without rows last; rows [3, 0, 200, 17] -> [2, 3, 0, 1].

    Large first: one sort of keys whose high bits are the rows and whose low bits prefer low ids.
    Mixed reads that order at ranks 0, M - 1, 1, M - 2, ...: [2, 0, 3, 1].
    """
    n = tl.arange(0, N_POW2)
    CLIP: tl.constexpr = 2147483648 // N_POW2 - 1
    key_N = tl.minimum(rows_N, CLIP) * N_POW2 + (N_POW2 - 1 - n)
    task_N = N_POW2 - 1 - tl.sort(key_N, descending=True) % N_POW2
    if ORDER == "mixed":
        rank_N = tl.where(n % 2 == 0, n // 2, filled - 1 - n // 2)
        task_N = tl.gather(task_N, tl.where(n < filled, rank_N, n), axis=0)
    return task_N


@triton.jit
def write_task_map(
    start_N,
    rows_N,
    table_ptr,
    tasks,
    stride,
    HEIGHTS: tl.constexpr,
    ORDER: tl.constexpr,
    N_POW2: tl.constexpr,
    tiles_ptr=None,
):
    """Write the map of tasks held in registers; lanes at and beyond `tasks` have no rows.

    table_ptr: int32 (6, stride), rows tile_end, task, row_start, rows, height, [M, tiles, 0, 0].
    tiles_ptr: int32 (tasks,) to which each task's tiles are added, or None.
    """
    n = tl.arange(0, N_POW2)
    filled = tl.sum((rows_N > 0).to(tl.int32), axis=0)
    if ORDER == "index":
        task_N = n
        entry_N = tl.cumsum((rows_N > 0).to(tl.int32), axis=0) - 1
    else:
        task_N = policy_ids(rows_N, filled, ORDER, N_POW2)
        start_N = tl.gather(start_N, task_N, axis=0)
        rows_N = tl.gather(rows_N, task_N, axis=0)
        entry_N = n
    LEVELS: tl.constexpr = len(HEIGHTS)
    height_N = tl.full((N_POW2,), HEIGHTS[LEVELS - 1], tl.int32)
    tiles_N = tl.cdiv(rows_N, HEIGHTS[LEVELS - 1])
    for level in tl.static_range(1, LEVELS):
        fits_N = rows_N <= HEIGHTS[LEVELS - 1 - level]
        height_N = tl.where(fits_N, HEIGHTS[LEVELS - 1 - level], height_N)
        tiles_N = tl.where(fits_N, (rows_N > 0).to(tl.int32), tiles_N)
    tile_end_N = tl.cumsum(tiles_N, axis=0)
    total = tl.sum(tiles_N, axis=0)
    used_N = rows_N > 0
    if tiles_ptr is not None:
        tl.atomic_add(tiles_ptr + task_N, tiles_N, mask=used_N, sem="relaxed")
    tl.store(table_ptr + entry_N, tile_end_N, mask=used_N)
    tl.store(table_ptr + stride + entry_N, task_N, mask=used_N)
    tl.store(table_ptr + 2 * stride + entry_N, start_N, mask=used_N)
    tl.store(table_ptr + 3 * stride + entry_N, rows_N, mask=used_N)
    tl.store(table_ptr + 4 * stride + entry_N, height_N, mask=used_N)
    tail_N = (n >= filled) & (n < tasks)
    tl.store(table_ptr + n, total, mask=tail_N)
    for row in tl.static_range(1, 5):
        tl.store(table_ptr + row * stride + n, 0, mask=tail_N)
    tl.store(table_ptr + 5 * stride, filled)
    tl.store(table_ptr + 5 * stride + 1, total)
    tl.store(table_ptr + 5 * stride + 2, 0)
    tl.store(table_ptr + 5 * stride + 3, 0)


def find_task_ref(tile_end_N: Tensor, tiles_B: Tensor) -> tuple[Tensor, Tensor]:
    """The torch twin of `find_task` for many tiles: their entries (B,) and tiles in the task (B,).

    >>> entry_B, tile_B = find_task_ref(torch.tensor([1, 3, 4, 4]), torch.arange(5))
    >>> entry_B.tolist(), tile_B.tolist()
    ([0, 1, 1, 2, 4], [0, 0, 1, 0, 0])
    """
    entry_B = (tile_end_N[None, :] <= tiles_B[:, None]).sum(1)
    before = torch.cat([tile_end_N.new_zeros(1), tile_end_N])
    return entry_B, tiles_B - before[entry_B]


@triton.jit
def find_task(tile_end_ptr, tile, N: tl.constexpr, N_POW2: tl.constexpr):
    """The entry whose tiles include `tile`, and the tile's number within its task.

    tile_end_ptr: int32 (N,), `TaskMap.tile_end_N`. N_POW2: the power of two at or above N.
    With tile_end = [1, 3, 4, 4]: tile 0 -> (0, 0), tile 2 -> (1, 1), tile 3 -> (2, 0). A tile at or
    beyond the total gives an entry at or beyond `total_2[0]`: there is nothing to do for it.
    """
    n = tl.arange(0, N_POW2)
    end_N = tl.load(tile_end_ptr + n, mask=n < N, other=2147483647)
    entry = tl.sum((end_N <= tile).to(tl.int32), axis=0)
    before = tl.load(tile_end_ptr + entry - 1, mask=entry > 0, other=0)
    return entry, tile - before


def aot_cases() -> list[Any]:
    """The kernels of this module for ahead-of-time compilation."""
    from .aot import AotCase

    signature = {"offsets_ptr": "*i32", "table_ptr": "*i32", "tasks": "i32", "stride": "i32"}
    return [
        AotCase(
            name=f"taskmap/{order}-{width}",
            fn=task_map_kernel,
            signature=signature,
            constexprs={"HEIGHTS": HEIGHTS, "ORDER": order, "N_POW2": width},
            options={"num_warps": 4 if width <= 512 else 8, "enable_fp_fusion": True},
            quick=width == 256,
        )
        for order in get_args(Order)
        for width in (32, 256, 1024, 4096)
    ]
