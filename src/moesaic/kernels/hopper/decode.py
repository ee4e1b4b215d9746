"""Grouped GEMM for few rows per expert: weights on the wide side of wgmma, tokens on the narrow.

    S routed rows · T tokens · E experts · C columns of the product · K its depth
    BW weight rows (64 or 128) · BT token rows (16..128) · BK depth of a stage · NB stages

With a handful of rows per expert the work is reading weights, so the tile is a slab of BW weight
rows by BT tokens (the product is computed transposed; products commute and the K chain is the same,
so the bits are those of the prefill kernel). One warpgroup multiplies; the loader keeps NB stages
of weights in flight, and runs on into the next tile while the last one is written.
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

from .pipeline import Stage, bias_of, column_tile, load_gathered, load_rows, read_note
from .tiles import Work, activate, activate_alone, store_ragged


@gluon.jit
def _multiply(p, work):
    """One warpgroup: the transposed product (BW, BT) of every tile, written as rows."""
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, p.BM, 16])
    COLS: gl.constexpr = p.BN // 2 if p.GATED else p.BN
    c_buf = p.c_bufs.index(0)
    row_start, rows, m, n = read_note(p, 0)
    c = rows * 0
    while rows > 0:
        acc = gl.zeros((p.BN, p.BM), gl.float32, layout=L)
        for k in range(0, p.K, p.BK):
            i = c % p.NB
            mbarrier.wait(p.full.index(i), (c // p.NB) & 1)
            if p.GATHER:
                fence_async_shared()
            w = p.b_bufs.index(i).reshape([p.BN, p.BK])
            x = p.a_bufs.index(i).permute((1, 0))
            acc = warpgroup_mma(w, x, acc, is_async=True)
            acc = warpgroup_mma_wait(1, (acc,))
            mbarrier.arrive(p.empty.index((c + p.NB - 1) % p.NB), count=1, pred=k > 0)
            c += 1
        acc = warpgroup_mma_wait(0, (acc,))
        mbarrier.arrive(p.empty.index((c + p.NB - 1) % p.NB), count=1)
        if p.GATED:
            g, u = acc.reshape(p.BN // 16, 2, 8, p.BM).permute(0, 2, 3, 1).split()
            y = activate(g, u, p.ACTIVATION, p.HAS_LIMIT, p.limit, p.alpha, p.up_offset)
            y = y.reshape(COLS, p.BM)
        else:
            if p.HAS_BIAS:
                column = gl.arange(0, p.BN, layout=gl.SliceLayout(1, L))
                acc += bias_of(p, n, column_tile(p, n) * COLS, column)[:, None]
            y = activate_alone(acc, p.ACTIVATION, p.HAS_LIMIT, p.limit, p.alpha)
        tma.store_wait(0)
        c_buf.reshape([p.BM, COLS]).store(y.to(p.out_desc.dtype).permute(1, 0))
        fence_async_shared()
        store_ragged(p.out_desc, c_buf, row_start, rows, m * p.BM, column_tile(p, n) * COLS)
        row_start, rows, m, n = read_note(p, c)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["experts", "n_tiles", "top_k"])
def decode_kernel(
    x, order_ptr, w_desc, out_desc,
    tile_end_ptr, task_ptr, row_start_ptr, rows_ptr, total_ptr, ticket_ptr,
    bias_ptr, K, cols, experts, n_tiles, top_k, limit, alpha, up_offset,
    N: gl.constexpr, LANES: gl.constexpr, GROUP_M: gl.constexpr, DYNAMIC: gl.constexpr,
    GATED: gl.constexpr, GATHER: gl.constexpr, ACTIVATION: gl.constexpr,
    HAS_LIMIT: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    BK: gl.constexpr, NB: gl.constexpr, PDL: gl.constexpr, HAS_BIAS: gl.constexpr,
    LREG: gl.constexpr,
):  # fmt: skip
    """out[row] = act(x[row] @ w[e].T) for the rows of every task, BM rows and BN weights a tile.

    Pointers and descriptors as in `prefill_kernel`, except: x, when a descriptor, has box (BM, BK);
    out_desc has box (1, 1, BM, BN / 2 if GATED else BN).
    """
    A: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, BK], w_desc.dtype)
    a_bufs = gl.allocate_shared_memory(w_desc.dtype, [NB, BM, BK], A)
    b_bufs = gl.allocate_shared_memory(w_desc.dtype, [NB] + w_desc.block_type.shape, w_desc.layout)
    c_bufs = gl.allocate_shared_memory(
        out_desc.dtype, [1] + out_desc.block_type.shape, out_desc.layout
    )
    full = gl.allocate_shared_memory(gl.int64, [NB, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [NB, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NB):
        mbarrier.init(full.index(i), count=129 if GATHER else 33)
        mbarrier.init(empty.index(i), count=1)
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
        gl.warp_specialize([(_multiply, (p, work)), (load_gathered, (p, work))], [4], [LREG])
    else:
        gl.warp_specialize([(_multiply, (p, work)), (load_rows, (p, work))], [1], [LREG])
