"""Grouped GEMM for many rows per expert: 128 x BN tiles, two consumer warpgroups, one loader.

    S routed rows · T tokens · E experts · C columns of the product · K its depth
    BM = 128 rows · BN weight rows · BK depth of a stage · NB stages of shared memory

One persistent launch walks the tiles of the task map. The loader partition fills a ring of NB
stages: weights by TMA and, in the up-projection, token rows by cp.async through the sorted slot
order, so no gathered copy of the tokens exists. Two consumer warpgroups of 64 rows each multiply
and write their own half through shared memory with a ragged TMA store; one may run ahead of the
other by the length of the ring, which hides most of the epilogue.

A gated weight is seen as (E, I/8, 2, 8, H): eight gate rows, then the eight up rows that belong to
them, so both halves of a pair sit in one thread and the activation needs no exchange.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .pipeline import (
    Stage,
    add_bias,
    column_tile,
    load_gathered,
    load_rows,
    put_piece,
    read_note,
)
from .tiles import Work, activate, activate_alone


@gluon.jit
def _halves(x, COLS: gl.constexpr):
    """The left and the right half of the columns of (64, COLS), without moving data."""
    return x.reshape(64, 2, COLS // 2).permute(0, 2, 1).split()


@gluon.jit
def _put_pair(p, x, PART: gl.constexpr, row_start, rows, row, n, col):
    """Store an ungated (64, 128) in two pieces of 64 columns."""
    x = add_bias(p, x, n, col)
    left, right = _halves(activate_alone(x, p.ACTIVATION, p.HAS_LIMIT, p.limit, p.alpha), 128)
    put_piece(p, left, p.c_bufs.index(2 * PART), row_start, rows, row, col)
    put_piece(p, right, p.c_bufs.index(2 * PART + 1), row_start, rows, row, col + 64)


@gluon.jit
def _activated(p, x):
    """64 activated columns of (64, 128): eight of the gate, then the eight of up, and so on."""
    g, u = x.reshape(64, 8, 2, 8).permute(0, 1, 3, 2).split()
    return activate(g, u, p.ACTIVATION, p.HAS_LIMIT, p.limit, p.alpha, p.up_offset).reshape(64, 64)


@gluon.jit
def _epilogue(p, acc, PART: gl.constexpr, row_start, rows, row, n):
    """Activate and store 64 rows in pieces, so that a store runs beside the next piece's work."""
    left, right = _halves(acc, p.BN)
    if p.GATED:
        col = n * (p.BN // 2)
        put_piece(p, _activated(p, left), p.c_bufs.index(2 * PART), row_start, rows, row, col)
        put_piece(
            p, _activated(p, right), p.c_bufs.index(2 * PART + 1), row_start, rows, row, col + 64
        )
    else:
        col = column_tile(p, n) * p.BN
        _put_pair(p, left, PART, row_start, rows, row, n, col)
        _put_pair(p, right, PART, row_start, rows, row, n, col + 128)


@gluon.jit
def _consume(p, work, PART: gl.constexpr):
    """One warpgroup: rows [64 * PART, +64) of every tile; one in-order K chain per element."""
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, p.BN, 16])
    row_start, rows, m, n = read_note(p, 0)
    c = rows * 0
    while rows > 0:
        row = m * p.BM + 64 * PART
        if row < rows:
            acc = gl.zeros((64, p.BN), gl.float32, layout=L)
            for k in range(0, p.K, p.BK):
                i = c % p.NB
                mbarrier.wait(p.full.index(i), (c // p.NB) & 1)
                if p.GATHER:
                    fence_async_shared()
                a = p.a_bufs.index(i).slice(64 * PART, 64, dim=0)
                b = p.b_bufs.index(i).reshape([p.BN, p.BK]).permute((1, 0))
                acc = warpgroup_mma(a, b, acc, is_async=True)
                acc = warpgroup_mma_wait(1, (acc,))
                mbarrier.arrive(p.empty.index((c + p.NB - 1) % p.NB), count=1, pred=k > 0)
                c += 1
            acc = warpgroup_mma_wait(0, (acc,))
            mbarrier.arrive(p.empty.index((c + p.NB - 1) % p.NB), count=1)
            _epilogue(p, acc, PART, row_start, rows, row, n)
        else:
            for _ in range(0, p.K, p.BK):
                mbarrier.wait(p.full.index(c % p.NB), (c // p.NB) & 1)
                mbarrier.arrive(p.empty.index(c % p.NB), count=1)
                c += 1
        row_start, rows, m, n = read_note(p, c)
    tma.store_wait(0)


@gluon.jit
def _consume_low(p, work):
    _consume(p, work, 0)


@gluon.jit
def _consume_high(p, work):
    _consume(p, work, 1)


@gluon.jit(do_not_specialize=["experts", "n_tiles", "top_k"])
def prefill_kernel(
    x, order_ptr, w_desc, out_desc,
    tile_end_ptr, task_ptr, row_start_ptr, rows_ptr, total_ptr, ticket_ptr,
    bias_ptr, K, cols, experts, n_tiles, top_k, limit, alpha, up_offset,
    N: gl.constexpr, LANES: gl.constexpr, GROUP_M: gl.constexpr, DYNAMIC: gl.constexpr,
    GATED: gl.constexpr, GATHER: gl.constexpr, ACTIVATION: gl.constexpr,
    HAS_LIMIT: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    BK: gl.constexpr, NB: gl.constexpr, PDL: gl.constexpr, HAS_BIAS: gl.constexpr,
    CREG: gl.constexpr, LREG: gl.constexpr,
):  # fmt: skip
    """out[row] = act(x[row] @ w[e].T) for the rows of every task, 128 rows and BN columns a tile.

    x: pointer to (T, K) token rows when GATHER, else a TMA descriptor of the sorted rows (S, K)
    with box (BM, BK). order_ptr: int32 (S,) slot of each sorted row, token = slot // top_k.
    w_desc: (E, C/16, 2, 8, K) box (1, BN/16, 2, 8, BK) when GATED, else (E, C, K) box (1, BN, BK).
    out_desc: ragged store descriptor of (S, columns), box (1, 1, 64, 64). The task map's arrays
    are (N,) int32, total_ptr (2,), ticket_ptr one zero when DYNAMIC. bias_ptr: (E, cols), added to
    an ungated product before its activation when HAS_BIAS.
    """
    A: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, BK], w_desc.dtype)
    a_bufs = gl.allocate_shared_memory(w_desc.dtype, [NB, BM, BK], A)
    b_bufs = gl.allocate_shared_memory(w_desc.dtype, [NB] + w_desc.block_type.shape, w_desc.layout)
    c_bufs = gl.allocate_shared_memory(
        out_desc.dtype, [4] + out_desc.block_type.shape, out_desc.layout
    )
    full = gl.allocate_shared_memory(gl.int64, [NB, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [NB, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NB):
        mbarrier.init(full.index(i), count=129 if GATHER else 33)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    notes = gl.allocate_shared_memory(
        gl.int32, [4 * NB, 1], gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    )
    work = Work(
        tile_end_ptr, task_ptr, row_start_ptr, rows_ptr, total_ptr, ticket_ptr, n_tiles,
        N, LANES, GROUP_M, DYNAMIC,
    )  # fmt: skip
    p = Stage(
        x, order_ptr, w_desc, out_desc, a_bufs, b_bufs, c_bufs, notes, full, empty, K, top_k,
        limit, alpha, up_offset, GATED, GATHER, ACTIVATION, HAS_LIMIT, BM, BN, BK, NB, PDL,
        bias_ptr, cols, experts, HAS_BIAS,
    )  # fmt: skip
    if GATHER:
        gl.warp_specialize(
            [(_consume_low, (p, work)), (_consume_high, (p, work)), (load_gathered, (p, work))],
            [4, 4],
            [CREG, LREG],
        )
    else:
        gl.warp_specialize(
            [(_consume_low, (p, work)), (_consume_high, (p, work)), (load_rows, (p, work))],
            [4, 1],
            [CREG, LREG],
        )
