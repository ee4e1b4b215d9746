"""Rows pushed straight into the memory of other GPUs: dispatch and combine without the host.

A push kernel reads what is to be moved, stores it into the peer's region over NVLink and signals;
the last step is to wait for the signals of all peers. Nothing is read on the host, nothing is
allocated, every launch has a fixed shape: a CUDA graph holds it.

    dispatch   token rows  -> rows[source, token] of each rank that has an expert of the token
    combine    expert rows -> back[token, k] of the rank that the token came from

A received row stands at the place of its token, so no rank has to know how many rows others send.
A peer that does not come in time fills `back` with NaN: it shows, it never hangs and never lies.

    T tokens · B bound of tokens, the same on every rank · K top-k · J slots a received row may have
    G ranks · W words of 4 bytes a row · S = G*B*J received slots · X expert rows
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import registers
from .peers import (
    Tile,
    Window,
    first_row,
    move_rows,
    peer_of,
    plan_push,
    pointer_at,
    signal,
    spoil,
    turns,
    wait,
)


@triton.jit(do_not_specialize=["tokens", "bound", "rank", "experts", "blocks", "own"])
def dispatch_kernel(
    rows_ptr,
    ids_ptr,
    place_ptr,
    position_ptr,
    base_ptr,
    seen_ptr,
    tokens,
    bound,
    rank,
    experts,
    blocks,
    own,
    flags_at,
    status_at,
    ids_at,
    choice_at,
    rows_at,
    timeout_us,
    G: tl.constexpr,
    K: tl.constexpr,
    K_POW2: tl.constexpr,
    LOCAL: tl.constexpr,
    WIDTH: tl.constexpr,
    WORDS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    SLICE: tl.constexpr,
    BLOCK: tl.constexpr,
    WAIT: tl.constexpr,
    TIMED: tl.constexpr,
):
    """Push each token once to every rank that has one of its experts, with the ids that it wants.

    rows_ptr: int32 (tokens, WORDS). ids_ptr: int32|int64 (tokens, K), an id outside [0, experts)
    is of nobody. place_ptr: int32 (experts,), ``rank * LOCAL + index there`` of the replica that
    serves this source. position_ptr: int32 (bound, K), gets each slot's row of `back`, its own
    number, or -1 for a slot of nobody. base_ptr: int64 (G,), addresses of the regions.
    seen_ptr: int32 (G,).
    Into the peer's region: rows (G, bound, WORDS); ids (G, bound, WIDTH), the expert's index there
    or -1; choice (G, bound, WIDTH), the k that it was. With WIDTH = K slot k stands at k and choice
    is not written; with less, slots stand side by side.

    Example: 2 ranks with LOCAL = 2, place [0, 1, 2, 3], rank 0, ids [[1, 3], [0, 1]]: rank 0 gets
    tokens 0 and 1 with ids [[1, -1], [0, 1]], rank 1 gets token 0 with [[-1, 1], [-1, -1]].
    """
    peer, block = peer_of(tl.program_id(0), rank, blocks, G)
    my_blocks = tl.where(peer == rank, own, blocks)
    slices: tl.constexpr = (WORDS + SLICE - 1) // SLICE
    k_1K = tl.arange(0, K_POW2)[None, :]
    peer_rows = pointer_at(base_ptr, peer, rows_at, tl.int32)
    peer_ids = pointer_at(base_ptr, peer, ids_at, tl.int32)
    peer_choice = pointer_at(base_ptr, peer, choice_at, tl.int32)
    start, stop, step, end = turns(block, my_blocks, bound, slices, CHUNK, ROWS)
    for item in range(start, stop, step):
        token_C = first_row(item, slices, CHUNK, ROWS) + tl.arange(0, CHUNK)
        slot_CK = token_C.to(tl.int64)[:, None] * K + k_1K
        inside_CK = (token_C < tl.minimum(tokens, end))[:, None] & (k_1K < K)
        ids_CK = tl.load(ids_ptr + slot_CK, mask=inside_CK, other=-1)
        valid_CK = (ids_CK >= 0) & (ids_CK < experts)
        place_CK = tl.load(place_ptr + ids_CK, mask=valid_CK, other=-LOCAL)
        here_CK = (place_CK >= peer * LOCAL) & (place_CK < (peer + 1) * LOCAL)
        to_C = rank * bound + token_C
        if item % slices == 0:
            at_C1 = to_C.to(tl.int64)[:, None] * WIDTH
            local_CK = tl.where(here_CK, place_CK - peer * LOCAL, -1)
            in_bound = (token_C < end)[:, None]
            if WIDTH == K:
                tl.store(peer_ids + at_C1 + k_1K, local_CK, mask=in_bound & (k_1K < K))
            else:
                here = here_CK.to(tl.int32)
                j_CK = tl.cumsum(here, axis=1) - here
                tl.store(peer_ids + at_C1 + j_CK, local_CK, mask=here_CK & in_bound)
                tl.store(peer_choice + at_C1 + j_CK, k_1K + 0 * j_CK, mask=here_CK & in_bound)
                unused = (k_1K >= tl.sum(here, axis=1)[:, None]) & (k_1K < WIDTH)
                tl.store(peer_ids + at_C1 + k_1K, -1 + 0 * j_CK, mask=unused & in_bound)
            if peer == rank:
                position_CK = tl.where(valid_CK, slot_CK, -1).to(tl.int32)
                tl.store(position_ptr + slot_CK, position_CK, mask=inside_CK)
        need_C = tl.max(here_CK.to(tl.int32), axis=1) > 0
        first = item % slices * SLICE
        move_rows(
            rows_ptr, peer_rows, token_C, to_C, need_C, first, WORDS, CHUNK, ROWS, SLICE, BLOCK
        )  # fmt: skip
    signal(base_ptr, peer, rank, block, my_blocks, flags_at, status_at)
    if WAIT:  # noqa: SIM102
        if block == my_blocks - 1:  # the last to start: nobody behind it needs its SM
            wait(base_ptr, rank, peer, seen_ptr, flags_at, status_at, timeout_us, TIMED)


@triton.jit(do_not_specialize=["bound", "rank", "blocks", "own"])
def combine_push_kernel(
    rows_ptr,
    position_ptr,
    base_ptr,
    seen_ptr,
    bound,
    rank,
    blocks,
    own,
    flags_at,
    status_at,
    choice_at,
    back_at,
    timeout_us,
    G: tl.constexpr,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    WORDS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    SLICE: tl.constexpr,
    BLOCK: tl.constexpr,
    WAIT: tl.constexpr,
    TIMED: tl.constexpr,
):
    """Push every expert row to the rank that its token came from, at the place of its slot.

    rows_ptr: int32 (any, WORDS). position_ptr: int32 (G, bound, WIDTH), the row of each received
    slot or negative. Into the peer's region: back (bound, K, WORDS).

    Example: rank 1 of the example above has rows [y], position [[-1, 0], [-1, -1]] from rank 0: it
    writes y to back[0, 1] of rank 0, which is token 0's second choice.
    """
    peer, block = peer_of(tl.program_id(0), rank, blocks, G)
    my_blocks = tl.where(peer == rank, own, blocks)
    slices: tl.constexpr = (WORDS + SLICE - 1) // SLICE
    peer_back = pointer_at(base_ptr, peer, back_at, tl.int32)
    choice_ptr = pointer_at(base_ptr, rank, choice_at, tl.int32)
    slots = bound * WIDTH
    start, stop, step, end = turns(block, my_blocks, slots, slices, CHUNK, ROWS)
    for item in range(start, stop, step):
        slot_C = first_row(item, slices, CHUNK, ROWS) + tl.arange(0, CHUNK)
        at_C = peer.to(tl.int64) * slots + slot_C
        row_C = tl.load(position_ptr + at_C, mask=slot_C < end, other=-1)
        need_C = row_C >= 0
        if WIDTH == K:
            to_C = slot_C
        else:
            choice_C = tl.load(choice_ptr + at_C, mask=need_C, other=0)
            to_C = slot_C // WIDTH * K + choice_C
        first = item % slices * SLICE
        move_rows(
            rows_ptr, peer_back, row_C, to_C, need_C, first, WORDS, CHUNK, ROWS, SLICE, BLOCK
        )  # fmt: skip
    signal(base_ptr, peer, rank, block, my_blocks, flags_at, status_at)
    if WAIT:  # noqa: SIM102
        if block == my_blocks - 1:  # the last to start: nobody behind it needs its SM
            bad = wait(base_ptr, rank, peer, seen_ptr, flags_at, status_at, timeout_us, TIMED)
            if bad != 0:
                spoil(pointer_at(base_ptr, rank, back_at, tl.int32), bound * K * WORDS)


@triton.jit(do_not_specialize=["rank", "spoiled"])
def wait_kernel(
    base_ptr,
    seen_ptr,
    rank,
    spoiled,
    flags_at,
    status_at,
    back_at,
    timeout_us,
    TIMED: tl.constexpr,
):
    """Wait for one peer a program; the second half of a push without WAIT.

    base_ptr, seen_ptr: as in `dispatch_kernel`. `spoiled` words of back become NaN on a failure:
    with seen [0, 0] and flags [UNITS, UNITS] both programs return at once, seen is then those.
    """
    peer = tl.program_id(0)
    bad = wait(base_ptr, rank, peer, seen_ptr, flags_at, status_at, timeout_us, TIMED)
    if bad != 0:
        spoil(pointer_at(base_ptr, rank, back_at, tl.int32), spoiled)


def _options(tile: Tile, timed: bool, wait_too: bool) -> dict[str, Any]:
    return {
        "CHUNK": tile.chunk,
        "ROWS": tile.rows,
        "SLICE": tile.slice,
        "BLOCK": tile.block,
        "WAIT": wait_too,
        "TIMED": timed,
        "num_warps": tile.warps,
        **registers(min(255, 2048 // tile.warps), (3, 9)),
    }


def _grid(tile: Tile, ranks: int) -> tuple[int]:
    return ((ranks - 1) * tile.blocks + tile.own,)


def push_tokens(
    window: Window,
    rows_TW: Tensor,
    ids_TK: Tensor,
    place_E: Tensor,
    position_BK: Tensor,
    *,
    bound: int,
    tile: Tile,
    wait_too: bool = True,
) -> None:
    """Launch `dispatch_kernel`: rows as int32 words (T, W), T at most `bound`."""
    dispatch_kernel[_grid(tile, window.ranks)](
        rows_TW,
        ids_TK,
        place_E,
        position_BK,
        window.base_G,
        window.seen_2G[0],
        rows_TW.shape[0],
        bound,
        window.rank,
        place_E.numel(),
        tile.blocks,
        tile.own,
        window.flags_at(0),
        window.flags_at(2),
        window.region.ids_at,
        window.region.choice_at,
        window.region.rows_at,
        window.timeout_us,
        G=window.ranks,
        K=window.top_k,
        K_POW2=triton.next_power_of_2(window.top_k),
        LOCAL=window.local,
        WIDTH=window.width,
        WORDS=rows_TW.shape[1],
        **_options(tile, window.timed(), wait_too),
    )


def push_rows(
    window: Window,
    rows_XW: Tensor,
    position_S: Tensor,
    *,
    bound: int,
    tile: Tile,
    wait_too: bool = True,
) -> None:
    """Launch `combine_push_kernel`: rows as int32 words, position int32 (G * bound * J,)."""
    combine_push_kernel[_grid(tile, window.ranks)](
        rows_XW,
        position_S,
        window.base_G,
        window.seen_2G[1],
        bound,
        window.rank,
        tile.blocks,
        tile.own,
        window.flags_at(1),
        window.flags_at(2),
        window.region.choice_at,
        window.region.back_at,
        window.timeout_us,
        G=window.ranks,
        K=window.top_k,
        WIDTH=window.width,
        WORDS=rows_XW.shape[1],
        **_options(tile, window.timed(), wait_too),
    )


def wait_for(window: Window, which: int, spoiled: int = 0) -> None:
    """Launch `wait_kernel` for dispatches (0) or combines (1)."""
    wait_kernel[(window.ranks,)](
        window.base_G,
        window.seen_2G[which],
        window.rank,
        spoiled,
        window.flags_at(which),
        window.flags_at(2),
        window.region.back_at,
        window.timeout_us,
        TIMED=window.timed(),
        num_warps=4,
    )


def push_tokens_ref(
    ids_GTK: Sequence[Tensor], place_GE: Tensor, rank: int, *, bound: int, local: int, width: int
) -> tuple[Tensor, Tensor]:
    """The torch twin of `dispatch_kernel`: what every rank's ids put into the region of `rank`.

    Returns ids and choice, each int32 (G, bound, J), -1 where there is none; a token's row is sent
    where its first id is not -1, or with J = K where any is not.
    """
    top_k = ids_GTK[0].shape[1]
    ids_GBJ = torch.full((len(ids_GTK), bound, width), -1, dtype=torch.int32)
    choice_GBJ = ids_GBJ.clone()
    for source, ids_TK in enumerate(ids_GTK):
        for token, ids in enumerate(ids_TK.tolist()):
            wanted = [
                (k, place - rank * local)
                for k, expert in enumerate(ids)
                if 0 <= expert < place_GE.shape[1]
                and (place := int(place_GE[source, expert])) // local == rank
            ]
            for j, (k, index) in enumerate(wanted):
                at = (source, token, k if width == top_k else j)
                ids_GBJ[at], choice_GBJ[at] = index, k
    return ids_GBJ, choice_GBJ


def push_rows_ref(
    rows_GXW: Sequence[Tensor],
    position_GGBJ: Sequence[Tensor],
    choice_GGBJ: Sequence[Tensor],
    rank: int,
    *,
    top_k: int,
) -> Tensor:
    """The torch twin of `combine_push_kernel`: back (B, K, W) of `rank`, zeros where none came."""
    bound, words = position_GGBJ[0].shape[1], rows_GXW[0].shape[1]
    back_BKW = rows_GXW[0].new_zeros((bound, top_k, words))
    for rows_XW, position_GBJ, choice_GBJ in zip(rows_GXW, position_GGBJ, choice_GGBJ, strict=True):
        for token, j in (position_GBJ[rank] >= 0).nonzero().tolist():
            row = rows_XW[position_GBJ[rank, token, j]]
            back_BKW[token, choice_GBJ[rank, token, j]] = row
    return back_BKW


def aot_cases() -> list[Any]:
    """4 ranks, bf16 rows of 7168 and 2048: a token, a batch, a prefill; one expert a rank."""
    from .aot import AotCase

    cases = []
    every = (80, 90, 100)
    pushes = (
        (1, 3584, 8, 8, 64, 132, every, False),
        (128, 3584, 1, 1, 1, 132, every, False),
        (8192, 3584, 8, 8, 64, 132, every, False),
        (8192, 1024, 8, 1, 1, 132, every, True),
        (8192, 1024, 8, 4, 4, 132, every, False),
        (4096, 3584, 8, 8, 8, 132, every, False),
        (8192, 3584, 8, 8, 64, 32, (90, 100), False),
        (8192, 3584, 8, 8, 64, 32, (80,), False),
    )
    at = dict.fromkeys(("flags_at", "status_at", "choice_at"), "i32")
    for bound, words, top_k, width, local, programs, archs, quick in pushes:
        tile = plan_push(bound, words, 4, programs, deep=archs != (80,))
        options = _options(tile, True, True)
        launch = {name: options.pop(name) for name in ("num_warps", "maxnreg") if name in options}
        shape = {"G": 4, "K": top_k, "WIDTH": width, "WORDS": words} | options
        name = f"t{bound}-w{words}-k{top_k}-j{width}-p{programs}" + "-sm80" * (archs == (80,))
        pointers = {"rows_ptr": "*i32", "base_ptr": "*i64", "seen_ptr": "*i32"}
        sizes = dict.fromkeys(("bound", "rank", "blocks", "own", "timeout_us"), "i32")
        common: dict[str, Any] = {"options": launch, "quick": quick, "archs": archs}
        accesses = ("ld.global.v4.b32", "st.global.v4.b32", ".sys.release.add.u32")
        wide = dict.fromkeys((80, 90, 100), accesses)
        cases.append(
            AotCase(
                name=f"push/dispatch-{name}",
                fn=dispatch_kernel,
                signature=pointers
                | dict.fromkeys(("ids_ptr", "place_ptr", "position_ptr"), "*i32")
                | {"tokens": "i32", "experts": "i32", "ids_at": "i32", "rows_at": "i64"}
                | sizes | at,
                constexprs=shape | {"K_POW2": triton.next_power_of_2(top_k), "LOCAL": local},
                aligned=("flags_at", "status_at", "choice_at", "ids_at", "rows_at"),
                ptx=wide,
                **common,
            )
        )  # fmt: skip
        cases.append(
            AotCase(
                name=f"push/combine-{name}",
                fn=combine_push_kernel,
                signature=pointers | {"position_ptr": "*i32"} | sizes | at | {"back_at": "i64"},
                constexprs=shape,
                aligned=("flags_at", "status_at", "choice_at", "back_at"),
                ptx=wide,
                **common,
            )
        )
    cases.append(
        AotCase(
            name="push/wait",
            fn=wait_kernel,
            signature={"base_ptr": "*i64", "seen_ptr": "*i32", "back_at": "i64"}
            | dict.fromkeys(("rank", "spoiled", "flags_at", "status_at", "timeout_us"), "i32"),
            constexprs={"TIMED": True},
            options={"num_warps": 4},
        )
    )
    return cases
