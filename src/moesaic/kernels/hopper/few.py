"""Tasks of few tokens, found by every program of a launch for itself: no sort goes before it.

    T tokens · K top-k · N = T*K slots, at most 128 · BM token rows of a tile

A slot's rank counts the slots before it that chose the same expert. Those whose rank is a multiple
of BM lead a task of up to BM rows, the slots of the ranks that follow; tasks are numbered in the
order of their leaders. Rows are kept by slot, not sorted, and ids outside [0, E) are one expert
whose weights lie outside the tensor: zeros, which the sum leaves out.

>>> few_tasks([7, 2, 7, 7, 5], 8, 2)  # of ranks 0 0 1 2 0
[(7, [0, 2]), (2, [1]), (7, [3]), (5, [4])]
"""

from __future__ import annotations

from collections.abc import Sequence

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

MAX_SLOTS = 128
"""More would not fit a key's low byte beside their expert, nor a program's registers."""
NOBODY = gl.constexpr(0x7FFFFFFF)


def few_tasks(ids_S: Sequence[int], experts: int, bm: int) -> list[tuple[int, list[int]]]:
    """The expert, -1 for nobody, and the slots of each task, in the order of their numbers."""
    tasks: list[tuple[int, list[int]]] = []
    last: dict[int, list[int]] = {}
    for slot, chosen in enumerate(ids_S):
        expert = chosen if 0 <= chosen < experts else -1
        if len(last.get(expert, ())) in (0, bm):
            last[expert] = []
            tasks.append((expert, last[expert]))
        last[expert].append(slot)
    return tasks


@gluon.constexpr_function
def grid_layout(LANES):
    """Slots over the lanes of every warp, 16 others over the warps."""
    return gl.BlockedLayout([LANES // 32, 4], [32, 1], [1, 4], [1, 0])


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def experts_of(p, slot):
    """The expert of each slot, -1 where it is nobody's."""
    e = gl.load(p.task_ptr + slot, mask=slot < p.N, other=-1)
    # Compared as they are: the low half of a 64-bit id may look like an expert's.
    return gl.where((e >= 0) & (e < p.experts), e, -1).to(gl.int32)


@gluon.jit
def load_slots(p):
    """The expert of every slot."""
    G: gl.constexpr = grid_layout(p.LANES)
    return experts_of(p, gl.arange(0, p.LANES, layout=gl.SliceLayout(1, G)))


@gluon.jit
def number_slots(p, mine):
    """Of each slot the key, expert * 256 + rank, and the number of the task it leads, or -1.

    `mine`: from `load_slots`, whose lines the loads here find near.
    """
    G: gl.constexpr = grid_layout(p.LANES)
    lane = gl.arange(0, p.LANES, layout=gl.SliceLayout(1, G))
    other = gl.arange(0, 16, layout=gl.SliceLayout(0, G))
    same = gl.zeros([p.LANES, 16], gl.int32, layout=G)
    for first in range(0, p.N, 16):
        theirs = experts_of(p, first + other)
        before = (first + other)[None, :] < lane[:, None]
        same += (before & (theirs[None, :] == mine[:, None])).to(gl.int32)
    rank = gl.sum(same, axis=1)
    leads = ((lane < p.N) & (rank % p.BM == 0)).to(gl.int32)
    S: gl.constexpr = gl.BlockedLayout([p.LANES // 32], [32], [4], [0])
    number = gl.associative_scan(gl.convert_layout(leads, S), 0, _add)
    number = gl.convert_layout(number, gl.SliceLayout(1, G))
    key = gl.where(lane < p.N, (mine << 8) | rank, NOBODY)
    return key, gl.where(leads > 0, number - 1, -1)


@gluon.jit
def count_few(held):
    """How many tasks there are."""
    return gl.max(held[1], axis=0) + 1


@gluon.jit
def add_counts(p, held):
    """Add each expert's rows and tiles to lines 1 and 2 of the counters (3, E), by one program."""
    if p.FEW:
        e = gl.where(held[0] == NOBODY, -1, held[0] >> 8)
        leads = held[1] >= 0
    else:
        lane = gl.arange(0, p.LANES, layout=held.type.layout)
        e = gl.where(lane < p.N, held, -1)
        leads = lane < p.N
    known = (e >= 0) & (e < p.experts) & (gl.program_id(0) == 0)
    rows = p.counters_ptr + p.experts + e
    gl.atomic_add(rows, known.to(gl.int32), mask=known, sem="relaxed")
    gl.atomic_add(rows + p.experts, leads.to(gl.int32), mask=known & leads, sem="relaxed")


@gluon.jit
def locate_few(held, j):
    """The key of the slot that leads task `j`."""
    return gl.sum(gl.where(held[1] == j, held[0], 0), axis=0)


@gluon.jit
def slots_few(p, held, first, LAYOUT: gl.constexpr):
    """The slots (BM,) of the task whose leader has the key `first`; -1 past its rows."""
    G: gl.constexpr = grid_layout(p.LANES)
    lane = gl.arange(0, p.LANES, layout=gl.SliceLayout(1, G))
    row = gl.arange(0, p.BM, layout=gl.SliceLayout(0, G))
    found = held[0][:, None] == (first + row)[None, :]
    slot = gl.sum(gl.where(found, lane[:, None] + 1, 0), axis=0) - 1
    return gl.convert_layout(slot, LAYOUT)


@gluon.jit
def _plain(OP: gl.constexpr, x, y):
    """x OP y, rounded on its own: never part of a fused multiply-add."""
    return gl.inline_asm_elementwise(
        OP + ".rn.f32 $0, $1, $2;", "=f,f,f", [x, y], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def join_one(p, n):
    """The weighted sum over the N slots of a token, as `combine` computes it.

    Done for BN columns by the program that wrote the last of their N rows.
    """
    joined = p.joined_ptr + n
    if gl.atomic_add(joined, 1, sem="acq_rel") == p.N - 1:
        gl.store(joined, 0)
        L: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
        column = n * p.BN + gl.arange(0, p.BN, layout=L)
        inside = column < p.hidden
        acc = gl.zeros([p.BN], gl.float32, layout=L)
        for slot in gl.static_range(p.N):
            weight = gl.load(p.weights_ptr + slot + column * 0).to(gl.float32)
            at = p.out_ptr + slot * p.hidden + column
            value = gl.load(at, mask=inside, other=0.0, cache_modifier=".cg").to(gl.float32)
            acc = _plain("add", acc, _plain("mul", weight, value))
        gl.store(p.sum_ptr + column, acc.to(p.sum_ptr.dtype.element_ty), mask=inside)


@gluon.jit
def join_few(p, n, tasks):
    """Every token's weighted sum over its slots, as `combine` computes it, of BN columns.

    Done by the program that wrote the last of the tasks' tiles of these columns.
    """
    joined = p.joined_ptr + n
    if gl.atomic_add(joined, 1, sem="acq_rel") == tasks - 1:
        gl.store(joined, 0)
        ACROSS: gl.constexpr = p.BN // 8
        L: gl.constexpr = gl.BlockedLayout([1, 8], [32 // ACROSS, ACROSS], [4, 1], [1, 0])
        column = n * p.BN + gl.arange(0, p.BN, layout=gl.SliceLayout(0, L))
        inside = (column < p.hidden)[None, :]
        ROWS: gl.constexpr = 128 // ACROSS
        for start in range(0, p.N // p.TOP_K, ROWS):
            token = start + gl.arange(0, ROWS, layout=gl.SliceLayout(1, L))
            here = (token * p.TOP_K < p.N)[:, None] & inside
            acc = gl.zeros([ROWS, p.BN], gl.float32, layout=L)
            for k in gl.static_range(p.TOP_K):
                # Nobody's rows are there too, of no weights: no load waits for another.
                slot = token * p.TOP_K + k
                weight = gl.load(p.weights_ptr + slot, mask=slot < p.N, other=0.0).to(gl.float32)
                owned = experts_of(p, slot) >= 0
                weight = gl.where(owned, weight, 0.0)
                at = p.out_ptr + slot[:, None] * p.hidden + column[None, :]
                value = gl.load(at, mask=here, other=0.0, cache_modifier=".cg").to(gl.float32)
                value = gl.where(owned[:, None], value, 0.0)
                acc = _plain("add", acc, _plain("mul", weight[:, None], value))
            at = p.sum_ptr + token[:, None] * p.hidden + column[None, :]
            gl.store(at, acc.to(p.sum_ptr.dtype.element_ty), mask=here)
