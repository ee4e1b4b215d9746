"""Publish counters: one launch a step copies every layer's counters into a ring in host memory.

The ring is pinned host memory that the device writes and the host only reads, so nobody waits for
anybody. Every number goes there beside the number of its publication, in one word of 8 bytes that
arrives whole: the host takes a slot for complete when all of its words are of one publication, so
that the device need order nothing, and one that is being written again shows it
(`runtime.counters`). How many steps there were is kept in device memory, by each program for
itself: a launch captured in a CUDA graph goes on to the next slot at every replay. Counters only
ever grow (modulo 2**32), so that a slot that nobody read loses detail but no count.

    L layers · E experts · R slots · W numbers of a slot, 4 of the step and 3 * E of each layer

The torch twin is `publish_ref.publish_ref`, in a file of its own because the CPU must not need
Triton.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait, globaltimer

from .aot import AotCase
from .launching import launch, recorded
from .publish_ref import HEAD

BLOCK = 1024


def new_table(counters: Sequence[Tensor]) -> Tensor:
    """Where the counters are and go, (L, 3) int64: address, first word in a slot, numbers."""
    lines, first = [], HEAD
    for tensor in counters:
        lines.append([tensor.data_ptr(), first, tensor.numel()])
        first += tensor.numel()
    return torch.tensor(lines, dtype=torch.int64).to(counters[0].device)


def publish(
    table: Tensor,
    ring: Tensor,
    state: Tensor,
    *,
    every: int = 1,
    steps: int = 1,
    clock: bool = True,
    pdl: bool = False,
) -> None:
    """Count `steps` steps and, when they complete `every` of them, fill the next slot.

    Args:
        table: of `new_table`; the counters must live as long as launches, replays included.
        ring: of `publish_ref.new_ring`, pinned. state: of `publish_ref.new_state`.
        clock: write the device's clock; only a GPU has one.
        pdl: start while the launch before still runs and wait for it on the device (sm_90 and up).
    """
    overlap = {"PDL": True, "launch_pdl": True} if pdl else {}
    launch(
        publish_kernel,
        table.shape[0],
        table,
        ring,
        state,
        ring.shape[0],
        ring.shape[1],
        every,
        steps,
        BLOCK=BLOCK,
        CLOCK=clock,
        num_warps=4,
        enable_fp_fusion=True,
        **overlap,
    )


def again(
    table: Tensor, ring: Tensor, state: Tensor, *, every: int, pdl: bool
) -> Callable[[int], None]:
    """`publish` of `every` steps, to be made again on a stream at a fraction of the host's time.

    The first such publication is made here, on the current stream. The result takes the handle of a
    stream of the same device, the current one. Where Triton's launcher cannot be left out, it is
    used.
    """
    from .hopper.raw import RawLaunch, Unsupported, check

    how: dict[str, Any] = {"every": every, "steps": every, "pdl": pdl}
    with recorded() as recording:
        publish(table, ring, state, **how)
    cells: list[ctypes.c_uint64] = []

    def cell_of(_: str, tensor: Tensor) -> int:
        cells.append(ctypes.c_uint64(tensor.data_ptr()))
        return ctypes.addressof(cells[-1])

    def no_map(name: str, *_: object) -> Any:
        raise Unsupported(f"{name} is no pointer")

    try:
        raw = RawLaunch(recording.launches[0], cell_of, no_map)
    except Unsupported:
        return lambda _: publish(table, ring, state, **how)

    def run(stream: int, kept: Any = (cells, table, ring, state)) -> None:
        raw.config.stream = stream
        check(raw.go())

    return run


@triton.jit
def _word(number, value):
    """The number of the publication above 32 bits of a value."""
    return (number << 32) | (value.to(tl.int64) & 0xFFFFFFFF)


@triton.jit
def publish_kernel(
    table_ptr,
    ring_ptr,
    state_ptr,
    slots,
    width,
    every,
    steps,
    BLOCK: tl.constexpr,
    CLOCK: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """One program a layer copies its counters; the first also writes time and steps.

    table_ptr: int64 (L, 3), see `new_table`. ring_ptr: int64 (slots, width), in host memory, see
    `publish_ref.new_ring`. state_ptr: int64 (L, 2), of each program: steps, publications.

    Example: with counters [[5, 1], [5, 1], [2, 1]], 1 step more, state [[3, 3]] and 2 slots, slot
    1 becomes time 0, 0, steps 4, 0, numbers 5, 1, 5, 1, 2, 1, each 4 << 32 more, and the state
    [[4, 4]].
    """
    program = tl.program_id(0)
    counters_ptr = tl.load(table_ptr + 3 * program).to(tl.pointer_type(tl.int32))
    start = tl.load(table_ptr + 3 * program + 1)
    numbers = tl.load(table_ptr + 3 * program + 2)
    if PDL:
        gdc_wait()
    before = tl.load(state_ptr + 2 * program)
    number = tl.load(state_ptr + 2 * program + 1) + 1
    now = before + steps
    due = now // every > before // every
    slot_ptr = ring_ptr + ((number - 1) % slots) * width
    if due:
        for first in range(0, numbers, BLOCK):
            at = first + tl.arange(0, BLOCK)
            value = tl.load(counters_ptr + at, at < numbers)
            tl.store(slot_ptr + start + at, _word(number, value), at < numbers)
        if program == 0:
            tl.store(slot_ptr + 2, _word(number, now))
            tl.store(slot_ptr + 3, _word(number, now >> 32))
            time = now * 0
            if CLOCK:
                time = globaltimer()
            tl.store(slot_ptr, _word(number, time))
            tl.store(slot_ptr + 1, _word(number, time >> 32))
    # Every lane must have read the state before one writes it.
    tl.debug_barrier()
    tl.store(state_ptr + 2 * program, now)
    if due:
        tl.store(state_ptr + 2 * program + 1, number)


@triton.jit
def clock_kernel(out_ptr):
    """Write the clock of the device, in ns, to out_ptr: int64 (1,)."""
    tl.store(out_ptr, globaltimer())


def device_clock_ns(device: torch.device) -> int:
    """What the clock of a GPU shows now, in ns; waits for the device."""
    out = torch.zeros(1, dtype=torch.int64, device=device)
    clock_kernel[(1,)](out, num_warps=1, enable_fp_fusion=True)
    return int(out)


def aot_cases() -> list[AotCase]:
    """The kernels of this module for ahead-of-time compilation, overlapping ones from sm_90 on."""
    pointers = dict.fromkeys(("table_ptr", "ring_ptr", "state_ptr"), "*i64")
    options: dict[str, Any] = {"enable_fp_fusion": True}
    counters = AotCase(
        name="publish/counters",
        fn=publish_kernel,
        signature={**pointers, **dict.fromkeys(("slots", "width", "every", "steps"), "i32")},
        constexprs={"BLOCK": BLOCK, "CLOCK": True, "PDL": False},
        options={"num_warps": 4, **options},
        ptx={90: ("st.global.b64",)},
    )
    overlapping = replace(
        counters,
        name="publish/pdl",
        archs=(90, 100),
        constexprs={**counters.constexprs, "PDL": True},
        options={**counters.options, "launch_pdl": True},
        ptx={90: ("st.global.b64", "griddepcontrol.wait")},
    )
    clock = AotCase(
        name="publish/clock",
        fn=clock_kernel,
        signature={"out_ptr": "*i64"},
        options={"num_warps": 1, **options},
    )
    return [counters, overlapping, clock]
