"""Stable row sort: which slots go to each expert, in slot order, with no atomics and no host sync.

    T tokens · K top-k · S = T*K slots · E experts

A slot is one (token, choice) pair, ``slot = t * K + k``. An id outside ``[0, E)`` is of nobody: its
slot gets position -1 and no row.

>>> rows = sort_rows_ref(torch.tensor([[2, 0], [0, 3], [2, 1]]), num_experts=3)  # 3: of nobody
>>> rows.order_S.tolist(), rows.offsets_E1.tolist()
([1, 2, 5, 0, 4, 0], [0, 2, 3, 5])
>>> rows.position_S.tolist()
[3, 0, 1, -1, 4, 2]
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .device import registers
from .launching import launch
from .taskmap import HEIGHTS, lanes, write_task_map

MAX_EXPERTS = 1024
MAX_SLOTS = 2**30
ONE_LAUNCH_SLOTS = 4096
WIDE = {"num_warps": 8, "enable_fp_fusion": True, **registers(96, (3, 7))}
"""Options of the sorting kernels."""
SMALL = {"ROWS": 8, "CHUNK": 512}
SCAN = {"CHUNKS": 128, "EXPERTS": 32}


class RowSort(NamedTuple):
    """Slots sorted by expert, then by slot; every tensor int32, on the device."""

    order_S: Tensor
    """Slot at each sorted position; 0 at and beyond `offsets_E1[E]`."""
    position_S: Tensor
    """Sorted position of each slot; -1 where the slot is of nobody."""
    offsets_E1: Tensor
    """First position of each expert; the last is the number of live rows."""


def sort_rows_ref(topk_ids_TK: Tensor, num_experts: int) -> RowSort:
    """The torch twin of `sort_rows`."""
    ids_S = topk_ids_TK.reshape(-1).long()
    ids_S = torch.where((ids_S < 0) | (ids_S >= num_experts), num_experts, ids_S)
    order_S = torch.sort(ids_S, stable=True).indices
    counts = torch.bincount(ids_S, minlength=num_experts + 1)[:num_experts]
    offsets_E1 = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    live = torch.arange(ids_S.numel(), device=ids_S.device) < offsets_E1[-1]
    position_S = torch.empty_like(order_S)
    position_S[order_S] = torch.where(live, torch.arange(len(live), device=live.device), -1)
    columns = (order_S * live, position_S, offsets_E1)
    return RowSort(*(column.to(torch.int32) for column in columns))


def _check_ids(topk_ids_TK: Tensor, num_experts: int) -> Tensor:
    if topk_ids_TK.dim() != 2 or topk_ids_TK.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            "topk_ids must be int32|int64 of shape (T, K), "
            f"got {topk_ids_TK.dtype} of shape {tuple(topk_ids_TK.shape)}"
        )
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise ValueError(f"num_experts must be in [1, {MAX_EXPERTS}], got {num_experts}")
    if topk_ids_TK.numel() > MAX_SLOTS:
        raise ValueError(
            f"T * K must be at most {MAX_SLOTS}, got {topk_ids_TK.numel()}; "
            "split the batch into chunks of tokens"
        )
    return topk_ids_TK.contiguous()


def sort_rows(topk_ids_TK: Tensor, num_experts: int) -> RowSort:
    """Sort the slots of `topk_ids_TK` by expert, stably; one launch up to 4096 slots, else three.

    Args:
        topk_ids_TK: int32 or int64 (T, K), T may be 0; ids outside [0, E) are of nobody.
        num_experts: E, in [1, 1024].

    Raises:
        ValueError: ids of another dtype or rank, or a size out of range.
    """
    return launch_sort(topk_ids_TK, num_experts, None, HEIGHTS, "index")


def chunk_size(slots: int) -> int:
    """Slots that one program of the three-launch sort takes: enough programs to fill a GPU."""
    return 512 if slots <= 131072 else 1024


def launch_sort(
    topk_ids_TK: Tensor,
    num_experts: int,
    table: Tensor | None,
    heights: tuple[int, ...],
    order: str,
    counters: Tensor | None = None,
    pdl: bool = False,
) -> RowSort:
    """Sort, and write the task map of the experts into `table` when there is one.

    counters: (3, E) int32, contiguous; the rows of each expert are added to its second line, the
        tiles of the map to its third.
    pdl: launches start while the one before still runs, and wait for it on the device.
    """
    ids_TK = _check_ids(topk_ids_TK, num_experts)
    slots, device = ids_TK.numel(), ids_TK.device
    rows = RowSort(
        torch.empty(slots, dtype=torch.int32, device=device),
        torch.empty(slots, dtype=torch.int32, device=device),
        torch.empty(num_experts + 1, dtype=torch.int32, device=device),
    )
    stride = 0 if table is None else table.stride(0)
    named = "" if table is None else order
    constants = {"ORDER": named, "HEIGHTS": heights, "E_POW2": lanes(num_experts)}
    outputs = (*rows, rows.offsets_E1 if table is None else table)
    overlap: dict[str, Any] = {"PDL": True, "launch_pdl": True} if pdl else {}
    if slots <= ONE_LAUNCH_SLOTS:
        launch(
            sort_small_kernel,
            1 + triton.cdiv(slots, SMALL["ROWS"]),
            ids_TK, *outputs, slots, num_experts, stride,
            **constants, **SMALL, COUNT=512 if slots <= 512 else 2048, counters_ptr=counters,
            **overlap, **WIDE,
        )  # fmt: skip
        return rows
    chunk = chunk_size(slots)
    chunks = triton.cdiv(slots, chunk)
    hist = torch.empty((chunks + 1, num_experts), dtype=torch.int32, device=device)
    count_chunks_kernel[(chunks,)](
        ids_TK, hist, slots, num_experts, E_POW2=constants["E_POW2"], CHUNK=chunk, num_warps=4,
        enable_fp_fusion=True, **overlap,
    )  # fmt: skip
    scan_chunks_kernel[(triton.cdiv(num_experts, SCAN["EXPERTS"]),)](
        hist, chunks, num_experts, **SCAN, num_warps=4, enable_fp_fusion=True, **overlap
    )
    scatter_chunks_kernel[(1 + chunks,)](
        ids_TK, hist, *outputs, slots, num_experts, chunks, stride,
        **constants, CHUNK=chunk, counters_ptr=counters, **overlap, **WIDE,
    )  # fmt: skip
    return rows


@triton.jit
def load_ids(ids_ptr, slot, slots, experts):
    """Ids at `slot` as int32, `experts` where the slot is of nobody or beyond the last."""
    ids = tl.load(ids_ptr + slot, mask=slot < slots, other=-1)
    return tl.where((ids >= 0) & (ids < experts), ids, experts).to(tl.int32)


@triton.jit
def write_offsets(
    counts_E,
    offsets_ptr,
    table_ptr,
    experts,
    stride,
    ORDER: tl.constexpr,
    HEIGHTS: tl.constexpr,
    E_POW2: tl.constexpr,
    counters_ptr=None,
):
    """Write the prefix of `counts_E` and, unless ORDER is empty, the task map of the experts.

    counters_ptr: int32 (3, E) or None; counts are added to line 1, the tiles of the map to line 2.
    """
    e = tl.arange(0, E_POW2)
    end_E = tl.cumsum(counts_E, axis=0)
    tl.store(offsets_ptr + e + 1, end_E, mask=e < experts)
    tl.store(offsets_ptr, 0)
    tiles_ptr = None
    if counters_ptr is not None:
        rows_ptr = counters_ptr + experts + e
        tl.atomic_add(rows_ptr, counts_E, (e < experts) & (counts_E > 0), sem="relaxed")
        tiles_ptr = counters_ptr + 2 * experts
    if ORDER != "":
        start_E = end_E - counts_E
        write_task_map(
            start_E, counts_E, table_ptr, experts, stride, HEIGHTS, ORDER, E_POW2, tiles_ptr
        )


@triton.jit
def sort_small_kernel(
    ids_ptr,
    order_ptr,
    position_ptr,
    offsets_ptr,
    table_ptr,
    slots,
    experts,
    stride,
    ORDER: tl.constexpr,
    HEIGHTS: tl.constexpr,
    E_POW2: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    COUNT: tl.constexpr,
    counters_ptr=None,
    PDL: tl.constexpr = False,
):
    """Program 0 counts, COUNT slots at a time, and writes offsets and map; others place ROWS slots.

    A slot's position is the number of slots whose (id, slot) is smaller, so no program waits for
    another: ids [2, 0, 0, 3, 2, 1] of 3 experts have positions [3, 0, 1, -1, 4, 2], order
    [1, 2, 5, 0, 4, 0] and offsets [0, 2, 3, 5].

    ids_ptr: int32|int64 (S,). order_ptr, position_ptr: int32 (S,). offsets_ptr: int32 (E + 1,).
    table_ptr: int32 (6, stride), see `write_task_map`. counters_ptr: see `write_offsets`.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    program = tl.program_id(0)
    if program == 0:
        counts_E = tl.zeros((E_POW2,), tl.int32)
        for first in range(0, slots, COUNT):
            ids_C = load_ids(ids_ptr, first + tl.arange(0, COUNT), slots, experts)
            counts_E += tl.histogram(ids_C % E_POW2, E_POW2, mask=ids_C < experts)
        write_offsets(
            counts_E, offsets_ptr, table_ptr, experts, stride, ORDER, HEIGHTS, E_POW2, counters_ptr
        )
    else:
        slot_R = (program - 1) * ROWS + tl.arange(0, ROWS)
        id_R = load_ids(ids_ptr, slot_R, slots, experts)
        key_R = id_R * slots + slot_R
        smaller_RC = tl.zeros((ROWS, CHUNK), tl.int32)
        live_C = tl.zeros((CHUNK,), tl.int32)
        id_C = load_ids(ids_ptr, tl.arange(0, CHUNK), slots, experts)
        for first in range(0, slots, CHUNK):
            slot_C = first + tl.arange(0, CHUNK)
            next_C = load_ids(ids_ptr, slot_C + CHUNK, slots, experts)
            key_C = id_C * slots + slot_C
            smaller_RC += (key_C[None, :] < key_R[:, None]).to(tl.int32)
            live_C += (id_C < experts).to(tl.int32)
            id_C = next_C
        place_R = tl.sum(smaller_RC, axis=1)
        write_places(
            slot_R, id_R, place_R, tl.sum(live_C, axis=0), order_ptr, position_ptr, slots, experts
        )


@triton.jit
def write_places(slot, ids, place, live, order_ptr, position_ptr, slots, experts):
    """Write where each slot goes, and 0 at the positions of this range that no slot has."""
    owned = ids < experts
    tl.store(position_ptr + slot, tl.where(owned, place, -1), mask=slot < slots)
    tl.store(order_ptr + place, slot, mask=owned)
    tl.store(order_ptr + slot, 0, mask=(slot >= live) & (slot < slots))


@triton.jit
def count_chunks_kernel(
    ids_ptr, hist_ptr, slots, experts, E_POW2: tl.constexpr, CHUNK: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """Count the ids of each chunk of CHUNK slots.

    ids_ptr: int32|int64 (S,). hist_ptr: int32 (chunks + 1, E), the last row untouched.
    Ids [2, 0, 0, 3, 2, 1] in chunks of 4, 3 experts: rows [2, 0, 1] and [0, 1, 1].
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    chunk = tl.program_id(0)
    e = tl.arange(0, E_POW2)
    ids_C = load_ids(ids_ptr, chunk * CHUNK + tl.arange(0, CHUNK), slots, experts)
    counts_E = tl.histogram(ids_C % E_POW2, E_POW2, mask=ids_C < experts)
    tl.store(hist_ptr + chunk * experts + e, counts_E, mask=e < experts)


@triton.jit
def scan_chunks_kernel(
    hist_ptr,
    chunks,
    experts,
    CHUNKS: tl.constexpr,
    EXPERTS: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """Turn each column of the histogram into its exclusive prefix, the total in the last row.

    hist_ptr: int32 (chunks + 1, E). Rows [2, 0, 1], [0, 1, 1] become
    [0, 0, 0], [2, 0, 1] and totals [2, 1, 2].
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    e_1E = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)[None, :]
    before_E = tl.zeros((EXPERTS,), tl.int32)
    for first in range(0, chunks, CHUNKS):
        chunk_C1 = first + tl.arange(0, CHUNKS)[:, None]
        mask_CE = (chunk_C1 < chunks) & (e_1E < experts)
        cell_CE = hist_ptr + chunk_C1 * experts + e_1E
        counts_CE = tl.load(cell_CE, mask=mask_CE, other=0)
        end_CE = tl.cumsum(counts_CE, axis=0) + before_E[None, :]
        tl.store(cell_CE, end_CE - counts_CE, mask=mask_CE)
        before_E += tl.sum(counts_CE, axis=0)
    e = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    tl.store(hist_ptr + chunks * experts + e, before_E, mask=e < experts)


@triton.jit
def scatter_chunks_kernel(
    ids_ptr,
    hist_ptr,
    order_ptr,
    position_ptr,
    offsets_ptr,
    table_ptr,
    slots,
    experts,
    chunks,
    stride,
    ORDER: tl.constexpr,
    HEIGHTS: tl.constexpr,
    E_POW2: tl.constexpr,
    CHUNK: tl.constexpr,
    counters_ptr=None,
    PDL: tl.constexpr = False,
):
    """Program 0 writes offsets and map; each other program sorts and places one chunk of slots.

    Inside a chunk the slots are sorted by (id, slot): sorted lane p of expert e goes to
    ``p + offset[e] + rows of e in earlier chunks - lanes of smaller ids in this chunk``, so an
    expert's rows are written side by side. With prefix rows [0, 0, 0], [2, 0, 1] and totals
    [2, 1, 2], ids [2, 0, 0, 3 | 2, 1] go to positions [3, 0, 1, -1 | 4, 2].

    Pointers as in `sort_small_kernel`; hist_ptr: int32 (chunks + 1, E), see `scan_chunks_kernel`.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    program = tl.program_id(0)
    e = tl.arange(0, E_POW2)
    counts_E = tl.load(hist_ptr + chunks * experts + e, mask=e < experts, other=0)
    if program == 0:
        write_offsets(
            counts_E, offsets_ptr, table_ptr, experts, stride, ORDER, HEIGHTS, E_POW2, counters_ptr
        )
    else:
        lane_C = tl.arange(0, CHUNK)
        first = (program - 1) * CHUNK
        ids_C = load_ids(ids_ptr, first + lane_C, slots, experts)
        here_E = tl.histogram(ids_C % E_POW2, E_POW2, mask=ids_C < experts)
        before_E = tl.load(hist_ptr + (program - 1) * experts + e, mask=e < experts, other=0)
        shift_E = tl.cumsum(counts_E - here_E, axis=0) - counts_E + here_E + before_E
        sorted_C = tl.sort(ids_C * CHUNK + lane_C)
        id_C = sorted_C // CHUNK
        place_C = lane_C + tl.gather(shift_E, id_C % E_POW2, axis=0)
        live = tl.sum(counts_E, axis=0)
        slot_C = first + sorted_C % CHUNK
        write_places(slot_C, id_C, place_C, live, order_ptr, position_ptr, slots, experts)


def aot_cases() -> list[Any]:
    """The kernels of this module for ahead-of-time compilation."""
    from .aot import AotCase

    outs = ("order_ptr", "position_ptr", "offsets_ptr", "table_ptr")
    pointers = dict.fromkeys(outs, "*i32")
    sizes = dict.fromkeys(("slots", "experts", "stride"), "i32")
    more = {"chunks": "i32"}
    uncounted: dict[str, Any] = {"counters_ptr": None, "PDL": False}
    cases = []
    for width, order in ((32, "index"), (256, "mixed"), (1024, "large_first"), (1024, "")):
        constants = {"ORDER": order, "HEIGHTS": HEIGHTS, "E_POW2": width}
        tag = f"{order or 'rows'}-{width}"
        cases += [
            AotCase(
                name=f"sorting/small{count}-{tag}",
                fn=sort_small_kernel,
                signature={"ids_ptr": "*i32", **pointers, **sizes},
                constexprs={**constants, **SMALL, "COUNT": count, **uncounted},
                options=WIDE,
                quick=width == 256 and count == 512,
            )
            for count in (512, 2048)
        ]
        cases += [
            AotCase(
                name=f"sorting/scatter{chunk}-{tag}",
                fn=scatter_chunks_kernel,
                signature={"ids_ptr": "*i64", "hist_ptr": "*i32", **pointers, **sizes} | more,
                constexprs={**constants, "CHUNK": chunk, **uncounted},
                options=WIDE,
                quick=width == 256 and chunk == 512,
            )
            for chunk in (512, 1024)
        ]
        cases.append(
            AotCase(
                name=f"sorting/count-{tag}",
                fn=count_chunks_kernel,
                signature={"ids_ptr": "*i64", "hist_ptr": "*i32", "slots": "i32", "experts": "i32"},
                constexprs={"E_POW2": width, "CHUNK": min(1024, max(512, width)), "PDL": False},
                options={"num_warps": 4, "enable_fp_fusion": True},
                quick=width == 256,
            )
        )
    constants = {"ORDER": "mixed", "HEIGHTS": HEIGHTS, "E_POW2": 256}
    counted: dict[str, Any] = {"options": {"num_warps": 8, "enable_fp_fusion": True}}
    given = {"ids_ptr": "*i32", **pointers, **sizes, "counters_ptr": "*i32"}
    cases += [
        AotCase(
            name="sorting/small-counted",
            fn=sort_small_kernel,
            signature=given,
            constexprs={**constants, **SMALL, "COUNT": 512, "PDL": True},
            options=counted["options"] | {"launch_pdl": True},
            archs=(90, 100),
            ptx={90: ("griddepcontrol.wait",)},
        ),
        AotCase(
            name="sorting/scatter-counted",
            fn=scatter_chunks_kernel,
            signature={**given, "hist_ptr": "*i32", **more},
            constexprs={**constants, "CHUNK": 512, "PDL": True},
            options=counted["options"] | {"launch_pdl": True},
            archs=(90, 100),
            ptx={90: ("griddepcontrol.wait",)},
        ),
    ]
    scan: dict[str, Any] = {
        "fn": scan_chunks_kernel,
        "signature": {"hist_ptr": "*i32", "chunks": "i32", "experts": "i32"},
    }
    options: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": True}
    cases += [
        AotCase(name="sorting/scan", constexprs=SCAN | {"PDL": False}, options=options, **scan),
        AotCase(
            name="sorting/scan-overlapped",
            constexprs=SCAN | {"PDL": True},
            options=options | {"launch_pdl": True},
            archs=(90, 100),
            ptx={90: ("griddepcontrol.wait",)},
            **scan,
        ),
    ]
    return cases
