"""What the kernels that write into other GPUs share: regions of symmetric memory, tiles, signals.

A *region* is one allocation a rank, with the same layout on every rank; a kernel finds the others'
by their addresses. To signal is to add to the peer's flag with release semantics after a barrier of
the program: of a turn's UNITS of arrival every program of the sender brings its share, block 0 the
remainder, so sender and receiver need not agree on the number of programs. Flags only grow (and
wrap); `seen` holds what was already waited for. A wait that lasts too long writes the peer into the
status, which travels with every later signal.

    C rows of a chunk · R rows in flight · G ranks · K top-k · J slots a received row may have

>>> region = Region.of(ranks=2, bound=4, top_k=2, width=1, in_words=4, back_words=4)
>>> region.rows_at, region.back_at, region.num_bytes
(1024, 1152, 1280)
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import globaltimer

UNITS = tl.constexpr(1 << 10)
STRIDE = tl.constexpr(32)  # words from one flag to the next: flags share no cache line
NAN_WORD = tl.constexpr(0x7FC07FC0)  # NaN as fp32, and as two of bf16 or fp16
ALIGN = 128


def _aligned(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


class Region(NamedTuple):
    """Byte offsets inside the symmetric allocation of a rank, the same on every rank."""

    ids_at: int
    choice_at: int
    rows_at: int
    back_at: int
    num_bytes: int
    back_words: int

    @staticmethod
    def of(
        *, ranks: int, bound: int, top_k: int, width: int, in_words: int, back_words: int
    ) -> Region:
        """Offsets for `bound` tokens a rank: flags and status, ids, choices, rows, back."""
        flags = _aligned(4 * STRIDE.value * (2 * ranks + 1))
        tags = _aligned(4 * ranks * bound * width)
        rows = _aligned(4 * ranks * bound * in_words)
        back = _aligned(4 * bound * top_k * back_words)
        at = (flags, flags + tags, flags + 2 * tags, flags + 2 * tags + rows)
        return Region(*at, at[-1] + back, back_words)


class Tile(NamedTuple):
    """How a push is cut: programs a peer, programs for the own rows, and what one moves at a time.

    An item is `chunk` tokens (or slots) by `slice` words; items go round the programs. `rows` by
    `block` words are in flight at once. With `rows < chunk` a slice is a whole row, every program
    has one run of tokens, and those to be moved are gathered first, out of `chunk` at a time.
    """

    blocks: int
    own: int
    chunk: int
    rows: int
    slice: int
    block: int
    warps: int


def _own_programs(ranks: int, programs: int) -> int:
    """Programs for the rows that stay: half a peer's share, and enough to be done with the links.

    Of 32 programs on 2 H200s 8 copied 41 GB/s each, so that rows that stayed at home, as many as
    crossed, took longer than a link of 365 GB/s.
    """
    if ranks == 1:
        return programs
    enough = min(triton.cdiv(10, ranks - 1), programs // 3)
    own = max(programs // (2 * ranks), enough)
    return max(1, min(own, programs - (ranks - 1)))


def plan_push(rows: int, words: int, ranks: int, programs: int, *, deep: bool = True) -> Tile:
    """Tiles for `rows` candidates a peer on at most `programs` programs (one an SM).

    Four shapes: parts of single rows, half rows, rows, and rows gathered from many candidates.
    `deep`: few programs may have 128 KB each in registers; for sm_80 compilers spill some of it.
    """
    own = _own_programs(ranks, programs)
    blocks = min((programs - own) // max(1, ranks - 1), UNITS.value)
    block = min(512, triton.next_power_of_2(words))
    whole = triton.cdiv(words, block) * block
    few = programs <= 64
    if rows > (1024 if few else 2048):
        blocks = max(1, blocks)
        chunk = min(256, max(64, triton.next_power_of_2(triton.cdiv(rows, blocks))))
        # Few programs need more bytes in flight each: measured on 2 H200s, 32 programs.
        wide = few or chunk == 64
        moved = (32 if deep else 16, block) if wide else (16, min(256, block))
        return Tile(blocks, own, chunk, moved[0], whole, moved[1], 16)
    if rows > 256:
        chunk, width = 16, whole
    elif rows > 8:
        chunk, width = 8, triton.cdiv(whole // block, 2) * block
    else:
        chunk, width = 4, block
    items = triton.cdiv(rows, chunk) * triton.cdiv(words, width)
    return Tile(max(1, min(blocks, items)), min(own, items), chunk, chunk, width, block, 8)


class Window(NamedTuple):
    """The symmetric memory of one rank and what its kernels need to find the others'."""

    base_G: Tensor
    """int64, on the device: address of every rank's region."""
    seen_2G: Tensor
    """int32: units waited for, of dispatches and of combines."""
    region: Region
    rank: int
    top_k: int
    width: int
    local: int
    timeout_us: int

    @property
    def ranks(self) -> int:
        """G."""
        return self.base_G.numel()

    def flags_at(self, which: int) -> int:
        """Where the flags of dispatches (0) or combines (1) lie; 2: the status."""
        return int(4 * STRIDE.value * which * self.ranks)

    def timed(self) -> bool:
        """Whether there is a clock: on a GPU, not in the interpreter."""
        return self.base_G.device.type == "cuda"


@triton.jit
def pointer_at(base_ptr, rank, at, TYPE: tl.constexpr):
    """A pointer `at` bytes into the region of a rank; `at` is a multiple of 16."""
    address = tl.load(base_ptr + rank) + at
    return tl.multiple_of(address.to(tl.pointer_type(TYPE)), 16)


@triton.jit
def peer_of(program, rank, blocks, G: tl.constexpr):
    """Peer and block of a program: the others first, in the order that follows the own rank."""
    others = (G - 1) * blocks
    next_rank = (rank + 1 + program % max(G - 1, 1)) % G
    is_other = program < others
    peer = tl.where(is_other, next_rank, rank)
    return peer, tl.where(is_other, program // max(G - 1, 1), program - others)


@triton.jit
def turns(block, blocks, rows, SLICES: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr):
    """The items of a program: first, end and step of a loop, and the end of its rows.

    Items are numbered by chunk and slice and go round the programs; of 10 rows in chunks of 4 by 1
    slice, program 0 of 2 does items 0 and 2, program 1 item 1. Gathered chunks hold other numbers
    of rows that move, and few of them divide badly, so there an item is its first row: program 0
    does rows 0 to 5 in chunks at 0 and 4, program 1 rows 5 to 10 in chunks at 5 and 9.
    """
    if ROWS == CHUNK:
        return block, tl.cdiv(rows, CHUNK) * SLICES, blocks, rows
    else:
        run = tl.cdiv(rows, blocks)
        end = tl.minimum((block + 1) * run, rows)
        return block * run, end, CHUNK + 0 * run, end


@triton.jit
def first_row(item, SLICES: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr):
    """The first row of an item of `turns`."""
    if ROWS == CHUNK:
        return item // SLICES * CHUNK
    else:
        tl.static_assert(SLICES == 1, "gathered rows are whole")
        return item


@triton.jit
def move_tile(
    src_ptr, dst_ptr, from_R, to_R, live_R, first,
    WORDS: tl.constexpr, SLICE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copy words [first, first + SLICE) of the live rows from_R of src to rows to_R of dst.

    A block is on its way here while the one before it is stored: few programs else wait for one or
    the other, and cannot fill a link.
    """
    live_R1 = live_R[:, None]
    whole: tl.constexpr = WORDS % SLICE == 0
    word_1W = first + tl.arange(0, BLOCK)[None, :]
    src = src_ptr + from_R.to(tl.int64)[:, None] * WORDS + word_1W
    dst = dst_ptr + to_R.to(tl.int64)[:, None] * WORDS + word_1W
    live = live_R1 if whole else live_R1 & (word_1W < WORDS)
    value = tl.load(src, mask=live)
    for _ in range(BLOCK, SLICE, BLOCK):
        src += BLOCK
        word_1W += BLOCK
        next_live = live_R1 if whole else live_R1 & (word_1W < WORDS)
        following = tl.load(src, mask=next_live)
        tl.store(dst, value, mask=live)
        dst += BLOCK
        value, live = following, next_live
    tl.store(dst, value, mask=live)


@triton.jit
def move_rows(
    src_ptr, dst_ptr, from_C, to_C, need_C, first,
    WORDS: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
    SLICE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copy the rows needed of a chunk; where they are sparse, ROWS of them at a time.

    Rows 0, 2, 3 of 4 needed, ROWS = 2: tiles of rows (0, 2) and (3, none).
    """
    if ROWS == CHUNK:
        move_tile(src_ptr, dst_ptr, from_C, to_C, need_C, first, WORDS, SLICE, BLOCK)
    else:
        lane_C = tl.arange(0, CHUNK)
        order_C = tl.sort(tl.where(need_C, lane_C, lane_C + CHUNK)) % CHUNK
        count = tl.sum(need_C.to(tl.int32), axis=0)
        for done in range(0, count, ROWS):
            at_R = done + tl.arange(0, ROWS)
            lane_R = tl.gather(order_C, tl.minimum(at_R, CHUNK - 1), 0)
            from_R, to_R = tl.gather(from_C, lane_R, 0), tl.gather(to_C, lane_R, 0)
            move_tile(
                src_ptr, dst_ptr, from_R, to_R, at_R < count, first, WORDS, SLICE, BLOCK
            )  # fmt: skip


@triton.jit
def signal(base_ptr, peer, rank, block, blocks, flags_at, status_at):
    """Tell the peer that this program's stores are done, and of a failure seen here before."""
    failed = tl.load(pointer_at(base_ptr, rank, status_at, tl.int32), volatile=True)
    if failed != 0:
        tl.store(pointer_at(base_ptr, peer, status_at, tl.int32), failed)
    share = UNITS // blocks
    units = tl.where(block == 0, UNITS - (blocks - 1) * share, share)
    flag_ptr = pointer_at(base_ptr, peer, flags_at, tl.int32) + rank * STRIDE
    tl.debug_barrier()
    tl.atomic_add(flag_ptr, units, sem="release", scope="sys")


@triton.jit
def wait(base_ptr, rank, peer, seen_ptr, flags_at, status_at, timeout_us, TIMED: tl.constexpr):
    """Wait until the peer's UNITS of this turn are here; returns the status, 0 when all is well.

    Without TIMED (the interpreter has no clock) `timeout_us` counts polls.
    """
    status_ptr = pointer_at(base_ptr, rank, status_at, tl.int32)
    flag_ptr = pointer_at(base_ptr, rank, flags_at, tl.int32) + peer * STRIDE
    target = tl.load(seen_ptr + peer) + UNITS
    patience = tl.where(tl.load(status_ptr, volatile=True) == 0, timeout_us, 0).to(tl.int64)
    waited = tl.zeros((), tl.int64)
    start = tl.zeros((), tl.int64)
    if TIMED:
        start = globaltimer().to(tl.int64)
    value = tl.load(flag_ptr, volatile=True)
    while (value - target < 0) & (waited < patience):
        if TIMED:
            waited = (globaltimer().to(tl.int64) - start) // 1000
        else:
            waited += 1
        value = tl.load(flag_ptr, volatile=True)
    tl.atomic_add(flag_ptr, 0, sem="acquire", scope="sys")
    if value - target < 0:
        tl.store(status_ptr, peer + 1)
    tl.store(seen_ptr + peer, target)
    tl.debug_barrier()
    return tl.load(status_ptr, volatile=True)


@triton.jit
def spoil(back_ptr, words):
    """Fill the rows that came back with NaN."""
    for first in range(0, words, 1024):
        at = first + tl.arange(0, 1024)
        tl.store(back_ptr + at, tl.full((1024,), NAN_WORD, tl.int32), mask=at < words)
