"""A door on a stream: what is queued behind it waits while its SMs are wanted by somebody else.

A launch of one small program that sleeps until nobody wants the SMs, or until the tiles that the
launch behind it would help with are all drawn. It takes no shared memory, so the launches of
whoever uses the SMs fit beside it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aot import AotCase

LEAVE = 1 << 22
"""As in `hopper.tiles`: what a leave adds to the counter of tiles."""


@triton.jit
def door_kernel(wanted_ptr, counter_ptr, total_ptr, n_tiles, LEAVE: tl.constexpr):
    """Wait while wanted[0] is not 0 and fewer than total[1] * n_tiles tiles are drawn.

    wanted_ptr: int32 (1,). counter_ptr: int32 (2,), its first number counts tiles drawn in its
    lower bits, and leaves in units of LEAVE. total_ptr: int32 (2,), the second is the number of row
    tiles. With total [3, 4], n_tiles 2 and wanted 1 it ends at counter 8, or 8 + LEAVE, not at 7.
    """
    tiles = tl.load(total_ptr + 1) * n_tiles
    wanted = tl.load(wanted_ptr, volatile=True)
    drawn = tl.load(counter_ptr, volatile=True) % LEAVE
    while (wanted != 0) & (drawn < tiles):
        tl.inline_asm_elementwise(
            "nanosleep.u32 500; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )
        wanted = tl.load(wanted_ptr, volatile=True)
        drawn = tl.load(counter_ptr, volatile=True) % LEAVE


def wait_at_door(wanted_1: Tensor, counter_2: Tensor, total_2: Tensor, n_tiles: int) -> None:
    """Queue a door on the current stream; arguments as in `door_kernel`."""
    with torch.cuda.device(counter_2.device):
        door_kernel[(1,)](wanted_1, counter_2, total_2, n_tiles, LEAVE=LEAVE, num_warps=1)


def wait_at_door_ref(wanted_1: Tensor, counter_2: Tensor, total_2: Tensor, n_tiles: int) -> bool:
    """Whether a door is open.

    >>> total = torch.tensor([3, 4])
    >>> [wait_at_door_ref(torch.ones(1), torch.tensor([n, 9]), total, 2) for n in (7, 8)]
    [False, True]
    """
    drawn = int(counter_2[0]) % LEAVE
    return int(wanted_1) == 0 or drawn >= int(total_2[1]) * n_tiles


def aot_cases() -> list[AotCase]:
    """The one kernel; it must sleep, not spin."""
    return [
        AotCase(
            name="door",
            fn=door_kernel,
            signature={
                "wanted_ptr": "*i32", "counter_ptr": "*i32", "total_ptr": "*i32", "n_tiles": "i32",
            },
            constexprs={"LEAVE": LEAVE},
            options={"num_warps": 1},
            ptx={arch: ("nanosleep", "ld.volatile.global") for arch in (80, 90, 100)},
        )
    ]  # fmt: skip
