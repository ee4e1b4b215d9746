"""The rings of the Hopper kernels under ConSan, Triton's own concurrency sanitizer.

ConSan compiles into a kernel a model of what TMA, wgmma, cp.async and mbarriers order, which
racecheck does not see, and asserts at every access to shared memory. One product on one kind of
tile a process, rings of two stages under a depth of four or two, several tiles a program.

ConSan of Triton 3.6 counts no arrival for `async_copy.mbarrier_arrive`, and tells of a deadlock
where there is none: `copies_kernel` shows it, with and without that arrival. So the loaders, which
use it, are replaced by ones that wait for their copies and arrive once (`sanitize_faults.waiting`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import sanitize_faults as faults
import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

TILES = {"decode": (16, 64, 2), "prefill": (128, 256, 2), "tall": (64, 128, 2)}


@gluon.jit
def copies_kernel(x_ptr, out_ptr, WAIT: gl.constexpr):
    """out[i] = x[i] for 128 numbers, by way of shared memory.

    WAIT: the threads wait for their copies and one arrives; else each thread's copy arrives.
    """
    L: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    at = gl.arange(0, 128, layout=L)
    held = gl.allocate_shared_memory(
        gl.float32, [128], gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    )  # fmt: skip
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar, count=1 if WAIT else 128)
    async_copy.async_copy_global_to_shared(held, x_ptr + at)
    if WAIT:
        async_copy.commit_group()
        async_copy.wait_group(0)
        mbarrier.arrive(bar, count=1)
    else:
        async_copy.mbarrier_arrive(bar, increment_count=False)
    mbarrier.wait(bar, 0)
    gl.store(out_ptr + at, held.load(L))


def _allocate() -> None:
    triton.set_allocator(
        lambda size, alignment, stream: torch.zeros(size, device="cuda", dtype=torch.int8)
    )


def run_copies(wait: bool) -> None:
    """`copies_kernel`, its result checked.

    Raises:
        RuntimeError: a number was lost.
    """
    _allocate()
    x = torch.rand(128, device="cuda")
    out = torch.zeros_like(x)
    copies_kernel[(1,)](x, out, WAIT=wait, num_warps=4)
    if not torch.equal(x, out):
        raise RuntimeError("copies_kernel lost a number")
    sys.stdout.write("ran copies\n")


def run_ring(kind: str, gather: bool) -> None:
    """One product on tiles of `kind`, its result checked.

    Raises:
        RuntimeError: it is wrong.
    """
    from moesaic.kernels.hopper.launch import (
        HopperConfig,
        grouped_mm_hopper,
        grouped_mm_hopper_ref,
    )
    from moesaic.kernels.taskmap import build_task_map_ref

    _allocate()
    tile = HopperConfig(kind, *TILES[kind])  # type: ignore[arg-type]
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=generator).bfloat16()

    ids = torch.rand(50, 3, device="cuda", generator=generator).topk(2, 1).indices.flatten()
    ends = [0, *ids.bincount(minlength=3).cumsum(0).tolist()]
    offsets = torch.tensor(ends, dtype=torch.int32)
    built = build_task_map_ref(offsets, heights=(tile.bm,))
    tasks = type(built)(*(array.cuda() for array in built))
    order = ids.argsort(stable=True).int() if gather else None
    x = normal(50 if gather else 100, 256)
    weight = normal(3, 256 if gather else 128, 256) / 16
    how = {"top_k": 2, "gated": True, "activation": "silu"} if gather else {}
    out = torch.full((100, 128), torch.nan, device="cuda").bfloat16()
    grouped_mm_hopper(x, weight, tasks, out, config=tile, num_sms=2, order_S=order, **how)  # type: ignore[arg-type]
    want = grouped_mm_hopper_ref(x, weight, tasks, order_S=order, **how).float()  # type: ignore[arg-type]
    if not float((out - want).norm() / want.norm()) < 1e-2:
        raise RuntimeError(f"{tile}: the result is wrong")
    sys.stdout.write(f"ran {kind}\n")


def waiting_ring(kind: str, gather: bool) -> None:
    """A product whose loader waits for its copies."""
    faults.install(faults.waiting())
    run_ring(kind, gather)


def planted_ring() -> None:
    """Sorted rows on a decode tile whose stages are given back before they are read."""
    faults.plant_ring()
    run_ring("decode", False)


JOBS: dict[str, Callable[[], None]] = {
    "ring_decode": lambda: waiting_ring("decode", False),
    "ring_prefill": lambda: waiting_ring("prefill", False),
    "ring_tall": lambda: waiting_ring("tall", False),
    "ring_decode_gathered": lambda: waiting_ring("decode", True),
    "ring_prefill_gathered": lambda: waiting_ring("prefill", True),
    "copies_waited": lambda: run_copies(True),
    "copies_arriving": lambda: run_copies(False),
    "plant_ring": planted_ring,
}
