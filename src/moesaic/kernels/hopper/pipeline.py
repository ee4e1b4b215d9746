"""The ring that feeds the tensor cores: what the partitions share, and the two loaders.

    BM token rows of a tile · BN weight rows · BK depth of a stage · NB stages · K whole depth

A loader fills stage i when `empty[i]` says that every consumer is done with it, and consumers read
it when `full[i]` says that all bytes have landed. With the first stage of a tile the loader also
leaves a note of where the tile is, so consumers look nothing up. Weights always come by TMA. Token
rows come by cp.async through the slot order (the up-projection reads tokens where they lie) or,
already sorted, by TMA.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.language.core import _aggregate as aggregate
from triton.language.core import base_value
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .tiles import load_weight, locate, next_tile, store_ragged, tile_count


@aggregate
class Stage:
    """Everything the partitions share: operands, shared memory, barriers and the tile shape."""

    x: base_value
    order_ptr: gl.tensor
    w_desc: tma.tensor_descriptor
    out_desc: tma.tensor_descriptor
    a_bufs: gl.shared_memory_descriptor
    b_bufs: gl.shared_memory_descriptor
    c_bufs: gl.shared_memory_descriptor
    notes: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    K: gl.tensor
    top_k: gl.tensor
    limit: gl.tensor
    alpha: gl.tensor
    up_offset: gl.tensor
    GATED: gl.constexpr
    GATHER: gl.constexpr
    ACTIVATION: gl.constexpr
    HAS_LIMIT: gl.constexpr
    BM: gl.constexpr
    BN: gl.constexpr
    BK: gl.constexpr
    NB: gl.constexpr
    PDL: gl.constexpr
    bias_ptr: gl.tensor
    cols: gl.tensor
    experts: gl.tensor
    HAS_BIAS: gl.constexpr

    @gluon.constexpr_function
    def __init__(
        self, x, order_ptr, w_desc, out_desc, a_bufs, b_bufs, c_bufs, notes, full, empty, K, top_k,
        limit, alpha, up_offset, GATED, GATHER, ACTIVATION, HAS_LIMIT, BM, BN, BK, NB, PDL,
        bias_ptr=None, cols=None, experts=None, HAS_BIAS=False,
    ):  # fmt: skip
        self.x = x
        self.order_ptr = order_ptr
        self.w_desc = w_desc
        self.out_desc = out_desc
        self.a_bufs = a_bufs
        self.b_bufs = b_bufs
        self.c_bufs = c_bufs
        self.notes = notes
        self.full = full
        self.empty = empty
        self.K = K
        self.top_k = top_k
        self.limit = limit
        self.alpha = alpha
        self.up_offset = up_offset
        self.GATED = gl.constexpr(GATED)
        self.GATHER = gl.constexpr(GATHER)
        self.ACTIVATION = gl.constexpr(ACTIVATION)
        self.HAS_LIMIT = gl.constexpr(HAS_LIMIT)
        self.BM = gl.constexpr(BM)
        self.BN = gl.constexpr(BN)
        self.BK = gl.constexpr(BK)
        self.NB = gl.constexpr(NB)
        self.PDL = gl.constexpr(PDL)
        self.bias_ptr = order_ptr if bias_ptr is None else bias_ptr
        self.cols = top_k if cols is None else cols
        self.experts = top_k if experts is None else experts
        self.HAS_BIAS = gl.constexpr(HAS_BIAS)


@gluon.jit
def begin(p):
    """Wait for the launch before this one where its output is needed at once.

    A chain of launches overlaps: each lets the next one start as soon as its own inputs are there.
    "wait": the task map comes from the launch before. "prefetch": only the rows do, the map is
    older, because that launch waited for it before it let this one start.
    """
    if p.PDL == "wait":
        gdc_wait()
    if p.PDL != "off":
        gdc_launch_dependents()


@gluon.jit
def with_expert(p, e, n):
    """Column tile `n` as a note holds it: the expert above it where its bias is needed.

    Experts that there are not (a lone token's slot of nobody) share one number.
    """
    if p.HAS_BIAS:
        return n | (gl.where((e >= 0) & (e < p.experts), e, -1) << 16)
    else:
        return n


@gluon.jit
def column_tile(p, n):
    """The column tile in the last number of a note."""
    if p.HAS_BIAS:
        return n & 0xFFFF
    else:
        return n


@gluon.jit
def bias_of(p, n, col, column):
    """Bias of the columns `col + column` for the expert in a note's last number, in fp32; zero for
    no expert."""
    at = col + column
    e = n >> 16
    row = p.bias_ptr + e.to(gl.int64) * p.cols
    return gl.load(row + at, mask=(at < p.cols) & (e >= 0), other=0.0).to(gl.float32)


@gluon.jit
def add_bias(p, x, n, col):
    """Rows `x` plus the bias of the columns from `col` on; `x` itself where there is none."""
    if p.HAS_BIAS:
        column = gl.arange(0, x.shape[1], layout=gl.SliceLayout(0, x.type.layout))
        return x + bias_of(p, n, col, column)[None, :]
    else:
        return x


@gluon.jit
def _write_note(p, stage, row_start, rows, m, n):
    """Leave where the tile is beside its first stage: four numbers."""
    L: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    p.notes.index(4 * stage).store(gl.full([1], row_start, gl.int32, layout=L))
    p.notes.index(4 * stage + 1).store(gl.full([1], rows, gl.int32, layout=L))
    p.notes.index(4 * stage + 2).store(gl.full([1], m, gl.int32, layout=L))
    p.notes.index(4 * stage + 3).store(gl.full([1], n, gl.int32, layout=L))


@gluon.jit
def read_note(p, c):
    """Wait for stage `c` of the ring and read its note: first row, rows, row and column tile (see
    `column_tile`).

    A tile without rows is the end of the work.
    """
    L: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    stage = c % p.NB
    mbarrier.wait(p.full.index(stage), (c // p.NB) & 1)
    row_start = gl.max(p.notes.index(4 * stage).load(L), axis=0)
    rows = gl.max(p.notes.index(4 * stage + 1).load(L), axis=0)
    m = gl.max(p.notes.index(4 * stage + 2).load(L), axis=0)
    n = gl.max(p.notes.index(4 * stage + 3).load(L), axis=0)
    return row_start, rows, m, n


@gluon.jit
def load_gathered(p, work):
    """Four warps: weights by TMA, token rows by cp.async, both on the full barrier of a stage."""
    BL: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    begin(p)
    r = gl.arange(0, p.BM, layout=gl.SliceLayout(1, BL))
    cols = gl.arange(0, p.BK, layout=gl.SliceLayout(0, BL))
    tiles = tile_count(work)
    t = gl.program_id(0)
    c = t * 0
    while t < tiles:
        e, row_start, rows, m, n = locate(t, work)
        t = next_tile(t, tiles, work)
        row = m * p.BM + r
        slot = gl.load(p.order_ptr + row_start + row, mask=row < rows, other=0)
        live = (row < rows)[:, None] & (cols >= 0)[None, :]
        ptrs = p.x + (slot // p.top_k).to(gl.int64)[:, None] * p.K + cols[None, :]
        for k in range(0, p.K, p.BK):
            i = c % p.NB
            mbarrier.wait(p.empty.index(i), ((c // p.NB) & 1) ^ 1)
            if k == 0:
                _write_note(p, i, row_start, rows, m, with_expert(p, e, n))
            mbarrier.expect(p.full.index(i), p.w_desc.block_type.nbytes)
            load_weight(p.w_desc, e, n, k, p.full.index(i), p.b_bufs.index(i), True, p.GATED, p.BN)
            async_copy.async_copy_global_to_shared(p.a_bufs.index(i), ptrs + k, mask=live)
            async_copy.mbarrier_arrive(p.full.index(i), increment_count=False)
            c += 1
    if work.DYNAMIC and gl.program_id(0) >= tiles:
        next_tile(t, tiles, work)
    i = c % p.NB
    mbarrier.wait(p.empty.index(i), ((c // p.NB) & 1) ^ 1)
    _write_note(p, i, 0, 0, 0, 0)
    mbarrier.arrive(p.full.index(i), count=1)
    async_copy.mbarrier_arrive(p.full.index(i), increment_count=False)


@gluon.jit
def _fetch_first_weights(p, work, tiles):
    """Start the weights of the ring's first stages; how many stages were started."""
    BYTES: gl.constexpr = p.w_desc.block_type.nbytes + p.x.block_type.nbytes
    t = gl.program_id(0)
    started = gl.minimum(gl.cdiv(p.K, p.BK), p.NB)
    if t < tiles:
        e, row_start, rows, m, n = locate(t, work)
        _write_note(p, 0, row_start, rows, m, with_expert(p, e, n))
        for i in range(0, started):
            mbarrier.expect(p.full.index(i), BYTES)
            load_weight(
                p.w_desc, e, n, i * p.BK, p.full.index(i), p.b_bufs.index(i), True, p.GATED, p.BN
            )
    return started


@gluon.jit
def load_rows(p, work):
    """One warp: weights and sorted rows by TMA; rows past a task's end belong to its neighbour.

    All lanes write the notes, so all arrive: one arrival after a barrier of the warp orders as
    much, but race checkers follow only what the arriving lane wrote. It takes no time.
    """
    BYTES: gl.constexpr = p.w_desc.block_type.nbytes + p.x.block_type.nbytes
    begin(p)
    tiles = tile_count(work)
    t = gl.program_id(0)
    c = t * 0
    started = t * 0
    if p.PDL == "prefetch":
        started = _fetch_first_weights(p, work, tiles)
        gdc_wait()
    while t < tiles:
        e, row_start, rows, m, n = locate(t, work)
        t = next_tile(t, tiles, work)
        for k in range(0, p.K, p.BK):
            i = c % p.NB
            full = p.full.index(i)
            mbarrier.wait(p.empty.index(i), ((c // p.NB) & 1) ^ 1)
            fresh = c >= started
            if (k == 0) & fresh:
                _write_note(p, i, row_start, rows, m, with_expert(p, e, n))
            mbarrier.expect(full, BYTES, pred=fresh)
            load_weight(p.w_desc, e, n, k, full, p.b_bufs.index(i), fresh, p.GATED, p.BN)
            tma.async_copy_global_to_shared(p.x, [row_start + m * p.BM, k], full, p.a_bufs.index(i))
            async_copy.mbarrier_arrive(full, increment_count=False)
            c += 1
    if work.DYNAMIC and gl.program_id(0) >= tiles:
        next_tile(t, tiles, work)
    i = c % p.NB
    mbarrier.wait(p.empty.index(i), ((c // p.NB) & 1) ^ 1)
    _write_note(p, i, 0, 0, 0, 0)
    mbarrier.arrive(p.full.index(i), count=1)
    async_copy.mbarrier_arrive(p.full.index(i), increment_count=False)


@gluon.jit
def put_piece(p, y, c_buf, row_start, rows, row, col):
    """Round 64 rows by 64 columns, stage them in shared memory and send them off.

    At most one earlier store may still read shared memory: callers alternate two buffers.
    """
    tma.store_wait(1)
    c_buf.reshape([64, 64]).store(y.to(p.out_desc.dtype))
    fence_async_shared()
    store_ragged(p.out_desc, c_buf, row_start, rows, row, col)
