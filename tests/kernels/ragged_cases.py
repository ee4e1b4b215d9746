"""A checker of task maps, and ragged sizes for the tests of the static-batching framework."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moesaic.kernels.batching import TaskMap, find_task_ref, tile_capacity, tile_height

SIZES = {
    "one task": [37],
    "all to one": [0, 0, 300, 0],
    "empty": [0, 0, 0],
    "skewed": [700, 90, 40, 20, 9, 4, 2, 1, 1, 0, 1],
    "equal": [16] * 33,
    "sparse": [0, 5] * 30,
}


def offsets_of(sizes: Sequence[int], device: str | torch.device = "cpu") -> Tensor:
    """Prefix of sizes, int32 (N + 1,)."""
    prefix_N1 = torch.tensor([0, *sizes]).cumsum(0)
    return prefix_N1.to(device, torch.int32)


def violations(task_map: TaskMap, sizes: Sequence[int], heights: Sequence[int]) -> list[str]:
    """What is wrong with a map: each row lies in exactly one tile, each entry has rows."""
    columns = [column.tolist() for column in task_map]
    tile_end_N, task_N, start_N, rows_N, height_N, (filled, total), tickets_2 = columns
    found = []
    if tickets_2 != [0, 0]:
        found.append(f"the tickets start at {tickets_2}")
    if filled != sum(size > 0 for size in sizes):
        found.append(f"{filled} entries for {sizes}")
    if any(end != total for end in tile_end_N[max(filled - 1, 0) :]):
        found.append("the last entry and the tail do not hold the total")
    if total > tile_capacity(sum(sizes), len(sizes), heights):
        found.append(f"{total} tiles exceed the capacity")
    owner = [task for task, size in enumerate(sizes) for _ in range(size)]
    covered = [0] * len(owner)
    entry_B, tile_B = find_task_ref(task_map.tile_end_N.long(), torch.arange(total))
    for entry, tile in zip(entry_B.tolist(), tile_B.tolist(), strict=True):
        if entry >= filled:
            found.append("a tile below the total has no entry")
            continue
        first, end = tile * height_N[entry], rows_N[entry]
        if first >= end or tile < 0:
            found.append(f"tile {tile} of entry {entry} has no rows")
        for row in range(
            start_N[entry] + first, start_N[entry] + min(first + height_N[entry], end)
        ):
            if not 0 <= row < len(owner) or owner[row] != task_N[entry]:
                found.append(f"row {row} is not of task {task_N[entry]}")
            else:
                covered[row] += 1
    if any(count != 1 for count in covered):
        found.append("a row lies in no tile or in more than one")
    for entry in range(filled):
        if height_N[entry] != tile_height(rows_N[entry], heights):
            found.append(f"entry {entry} has height {height_N[entry]}")
    return found
