"""Grouped GEMM for many rows per expert, by tiles trimmed to their rows: 256 weight rows by any.

    S routed rows · T tokens · E experts · C columns of the product · K its depth
    BM most rows of a tile (a multiple of 16, to 192) · BN = 256 weight rows · BK depth of a stage
    NB stages of shared memory · BOX rows of one load

Rows that experts get differ, and a tile of fixed height pays for rows that it has not. Here a
task's rows are shared out evenly over as few tiles as BM allows, in steps of 16, and a tile costs
what it has: weights stand on the 64-wide side of wgmma, rows on the one that grows in eights (see
`wgmma`). With 256 weight rows a tile of 176 rows also asks L2 for a fifth less than one of 128 by
256 and shared memory for no more than the tensor cores can wait for.

One persistent launch walks the tiles. The loader fills a ring of NB stages with weights and rows:
sorted rows by TMA (one warp), or those of tokens by cp.async through the slot order (four). Two
consumer warpgroups take half of a tile's weight rows each; one may run ahead of the other by the
length of the ring, which hides most of the writing: transposed through shared memory, by ragged TMA
stores in pieces of 32 rows by 64 columns.

Weights are seen as in `tall`. Products, order of the K chain and rounding are those of the others.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.language.extra.cuda import gdc_wait

from .operands import read_note, write_note
from .pipeline import Stage, begin
from .tiles import (
    Work,
    activate,
    activate_alone,
    load_weight,
    locate,
    next_tile,
    store_ragged,
    tile_count,
)
from .wgmma import multiply, start_of

BOX = gl.constexpr(16)
STEP = gl.constexpr(16)
PIECE_BYTES = gl.constexpr(32 * 64 * 2)


@gluon.constexpr_function
def heights(BM):
    """How tall a tile can be multiplied."""
    return tuple(range(16, BM + 1, 16))


@gluon.constexpr_function
def staged(BM, NB):
    """Pieces of 32 rows that each warpgroup can have under way to memory: what the ring leaves."""
    return min(4, (227 * 1024 - 1024 - NB * (BM + 256) * 128) // (2 * PIECE_BYTES.value))


@gluon.jit
def _span(rows, m, BM: gl.constexpr):
    """First row and rows of row tile `m` of a task: shared out evenly, in steps of 16.

    With 300 rows and BM 192: two tiles, (0, 160) and (160, 140).
    """
    steps = gl.cdiv(rows, STEP)
    tiles = gl.cdiv(rows, BM)
    base = steps // tiles
    extra = steps - base * tiles
    first = (m * base + gl.minimum(m, extra)) * STEP
    count = gl.where(m < extra, base + 1, base) * STEP
    return first, gl.minimum(count, rows - first)


@gluon.jit
def _end(p, c):
    """Tell the consumers in stage `c` that there are no more tiles."""
    i = c % p.NB
    mbarrier.wait(p.empty.index(i), ((c // p.NB) & 1) ^ 1)
    write_note(p, i, 0, 0, 0, 0, 0)
    mbarrier.arrive(p.full.index(i), count=1)
    async_copy.mbarrier_arrive(p.full.index(i), increment_count=False)


@gluon.jit
def load_sorted(p, work):
    """One warp: weights and sorted rows by TMA; rows past a tile's end belong to its neighbour."""
    begin(p)
    tiles = tile_count(work)
    t = gl.program_id(0)
    c = t * 0
    BOXES: gl.constexpr = p.BM // BOX
    if p.PDL == "prefetch":
        gdc_wait()
    while t < tiles:
        e, row_start, rows, m, n = locate(t, work)
        t = next_tile(t, tiles, work)
        first, count = _span(rows, m, p.BM)
        boxes = gl.cdiv(count, BOX)
        for k in range(0, p.K, p.BK):
            i = c % p.NB
            full = p.full.index(i)
            mbarrier.wait(p.empty.index(i), ((c // p.NB) & 1) ^ 1)
            if k == 0:
                write_note(p, i, row_start, first + count, first, n, count)
            for some in gl.static_range(1, BOXES + 1):
                mbarrier.expect(
                    full,
                    p.w_desc.block_type.nbytes + some * p.x.block_type.nbytes,
                    pred=boxes == some,
                )
            load_weight(p.w_desc, e, n, k, full, p.b_bufs.index(i), True, p.GATED, p.BN)
            for box in range(0, boxes):
                tma.async_copy_global_to_shared(
                    p.x,
                    [row_start + first + box * BOX, k],
                    full,
                    p.a_bufs.index(i * BOXES + box),
                )
            async_copy.mbarrier_arrive(full, increment_count=False)
            c += 1
    if work.DYNAMIC and gl.program_id(0) >= tiles:
        next_tile(t, tiles, work)
    _end(p, c)


@gluon.jit
def _tokens(p, row_start, first, count, FIRST: gl.constexpr):
    """Where the tokens of BOX rows of a tile begin, in eights of numbers; 0 for no row."""
    BL: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    row = FIRST + gl.arange(0, BOX, layout=gl.SliceLayout(1, BL))
    slot = gl.load(p.order_ptr + row_start + first + row, mask=row < count, other=0)
    return slot // p.top_k * (p.K // 8)


@gluon.jit
def _copy(p, buf, token, count, k, FIRST: gl.constexpr):
    """Copy one stage of BOX tokens to shared memory, where the tile has any of them."""
    if count > FIRST:
        BL: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
        row = FIRST + gl.arange(0, BOX, layout=gl.SliceLayout(1, BL))
        column = gl.arange(0, p.BK, layout=gl.SliceLayout(0, BL))
        ptrs = p.x + k + (token.to(gl.int64) * 8)[:, None] + column[None, :]
        live = (row < count)[:, None] & (column >= 0)[None, :]
        async_copy.async_copy_global_to_shared(buf, ptrs, mask=live)


@gluon.jit
def load_tokens(p, work):
    """Four warps: weights by TMA, token rows by cp.async, both on the full barrier of a stage."""
    begin(p)
    tiles = tile_count(work)
    t = gl.program_id(0)
    c = t * 0
    BOXES: gl.constexpr = p.BM // BOX
    while t < tiles:
        e, row_start, rows, m, n = locate(t, work)
        t = next_tile(t, tiles, work)
        first, count = _span(rows, m, p.BM)
        tokens = ()
        for box in gl.static_range(BOXES):
            tokens += (_tokens(p, row_start, first, count, box * BOX),)  # type: ignore[assignment]
        for k in range(0, p.K, p.BK):
            i = c % p.NB
            full = p.full.index(i)
            mbarrier.wait(p.empty.index(i), ((c // p.NB) & 1) ^ 1)
            if k == 0:
                write_note(p, i, row_start, first + count, first, n, count)
            mbarrier.expect(full, p.w_desc.block_type.nbytes)
            load_weight(p.w_desc, e, n, k, full, p.b_bufs.index(i), True, p.GATED, p.BN)
            for box in gl.static_range(BOXES):
                _copy(p, p.a_bufs.index(i * BOXES + box), tokens[box], count, k, box * BOX)
            async_copy.mbarrier_arrive(full, increment_count=False)
            c += 1
    if work.DYNAMIC and gl.program_id(0) >= tiles:
        next_tile(t, tiles, work)
    _end(p, c)


@gluon.jit
def _chain(p, c, rows_at, weights_at, N: gl.constexpr, L: gl.constexpr):
    """N rows through the whole depth: one in-order K chain per element; the ring's next stage."""
    TYPE: gl.constexpr = "bf16" if p.w_desc.dtype == gl.bfloat16 else "f16"
    zero = gl.zeros((64, 64), gl.float32, layout=L)
    if p.BM > 128:
        acc = (zero, zero, zero, zero, zero, zero)
    else:
        acc = (zero, zero, zero, zero)  # type: ignore[assignment]
    for _ in range(0, p.K, p.BK):
        i = c % p.NB
        mbarrier.wait(p.full.index(i), (c // p.NB) & 1)
        if p.GATHER:
            fence_async_shared()
        acc = multiply(acc, weights_at + i * (p.BN * 8), rows_at + i * (p.BM * 8), N, TYPE)
        mbarrier.arrive(p.empty.index(i), count=1)
        c += 1
    return c, acc


@gluon.jit
def _chain_of(
    p, c, rows_at, weights_at, count, L: gl.constexpr, HEIGHTS: gl.constexpr, AT: gl.constexpr
):
    """`_chain` with the least of HEIGHTS, from AT on, that holds `count` rows."""
    if len(HEIGHTS) == AT + 1:
        return _chain(p, c, rows_at, weights_at, HEIGHTS[AT], L)
    else:
        if count <= HEIGHTS[AT]:
            c, acc = _chain(p, c, rows_at, weights_at, HEIGHTS[AT], L)
        else:
            c, acc = _chain_of(p, c, rows_at, weights_at, count, L, HEIGHTS, AT + 1)
        return c, acc


@gluon.jit
def _put_piece(p, y, PART: gl.constexpr, puts, row_start, end, row, col):
    """Turn 64 columns by 32 rows over in shared memory and send them off."""
    CB: gl.constexpr = staged(p.BM, p.NB)
    tma.store_wait(CB - 1)
    buf = p.c_bufs.index(CB * PART + puts % CB)
    buf.reshape([32, 64]).store(y.permute(1, 0))
    fence_async_shared()
    store_ragged(p.out_desc, buf, row_start, end, row, col)


@gluon.jit
def _put_columns(p, y, PART: gl.constexpr, puts, row_start, end, row, col):
    """Round 64 columns by 64 rows and store what there is of them; the count of pieces sent."""
    left, right = y.to(p.out_desc.dtype).reshape(64, 2, 32).permute(0, 2, 1).split()
    _put_piece(p, left, PART, puts, row_start, end, row, col)
    puts += 1
    if row + 32 < end:
        _put_piece(p, right, PART, puts, row_start, end, row + 32, col)
        puts += 1
    return puts


@gluon.jit
def _activated(p, x):
    """32 activated columns of 64 weight rows: eight of the gate, then eight of up, and so on."""
    g, u = x.reshape(4, 2, 8, 64).permute(0, 2, 3, 1).split()
    return activate(g, u, p.ACTIVATION, p.HAS_LIMIT, p.limit, p.alpha, p.up_offset).reshape(32, 64)


@gluon.jit
def _put(p, low, high, PART: gl.constexpr, puts, row_start, end, row, n):
    """Activate and store 64 rows of this warpgroup's 128 weight rows; the count of pieces sent."""
    if p.GATED:
        y = gl.join(_activated(p, low), _activated(p, high)).permute(2, 0, 1).reshape(64, 64)
        return _put_columns(p, y, PART, puts, row_start, end, row, n * (p.BN // 2) + PART * 64)
    else:
        col = n * p.BN + PART * 128
        low = activate_alone(low, p.ACTIVATION, p.HAS_LIMIT, p.limit, p.alpha)
        high = activate_alone(high, p.ACTIVATION, p.HAS_LIMIT, p.limit, p.alpha)
        puts = _put_columns(p, low, PART, puts, row_start, end, row, col)
        return _put_columns(p, high, PART, puts, row_start, end, row, col + 64)


@gluon.jit
def _pass_by(p, c):
    """Give the stages of a tile back unread."""
    for _ in range(0, p.K, p.BK):
        mbarrier.wait(p.full.index(c % p.NB), (c // p.NB) & 1)
        mbarrier.arrive(p.empty.index(c % p.NB), count=1)
        c += 1
    return c


@gluon.jit
def _consume(p, rows_at, weights_at, PART: gl.constexpr):
    """One warpgroup: its half of the weight rows of every tile, where the weight has them."""
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    row_start, end, first, n, count = read_note(p, 0)
    c = count * 0
    puts = count * 0
    weights_at += PART * (128 * 8)
    weight_rows = p.cols * 2 if p.GATED else p.cols
    while count > 0:
        if n * p.BN + PART * 128 >= weight_rows:
            c = _pass_by(p, c)
        else:
            c, acc = _chain_of(p, c, rows_at, weights_at, count, L, heights(p.BM), 0)
            PIECES: gl.constexpr = len(acc) // 2
            puts = _put(p, acc[0], acc[PIECES], PART, puts, row_start, end, first, n)
            if count > 64:
                puts = _put(p, acc[1], acc[PIECES + 1], PART, puts, row_start, end, first + 64, n)
            if PIECES > 2:  # noqa: SIM102
                if count > 128:
                    puts = _put(p, acc[2], acc[5], PART, puts, row_start, end, first + 128, n)
        row_start, end, first, n, count = read_note(p, c)
    tma.store_wait(0)


@gluon.jit
def _consume_low(p, rows_at, weights_at):
    _consume(p, rows_at, weights_at, 0)


@gluon.jit
def _consume_high(p, rows_at, weights_at):
    _consume(p, rows_at, weights_at, 1)


@gluon.jit(do_not_specialize=["experts", "n_tiles", "top_k"])
def trim_kernel(
    x, order_ptr, w_desc, out_desc,
    tile_end_ptr, task_ptr, row_start_ptr, rows_ptr, total_ptr, ticket_ptr,
    bias_ptr, K, cols, experts, n_tiles, top_k, limit, alpha, up_offset,
    N: gl.constexpr, LANES: gl.constexpr, GROUP_M: gl.constexpr, DYNAMIC: gl.constexpr,
    GATED: gl.constexpr, GATHER: gl.constexpr, ACTIVATION: gl.constexpr,
    HAS_LIMIT: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    BK: gl.constexpr, NB: gl.constexpr, PDL: gl.constexpr, HAS_BIAS: gl.constexpr,
    CREG: gl.constexpr, LREG: gl.constexpr,
):  # fmt: skip
    """out[row] = act(x[row] @ w[e].T) for the rows of every task, up to BM rows a tile.

    x: pointer to (T, K) token rows when GATHER, else a TMA descriptor of the sorted rows (S, K)
    with box (BOX, BK). order_ptr: int32 (S,) slot of each sorted row, token = slot // top_k.
    w_desc: (E, C/16, 2, 8, K) box (1, BN/16, 2, 8, BK) when GATED, else (E, C, K) box (1, BN, BK).
    out_desc: ragged store descriptor of (S, columns), box (1, 1, 32, 64). The task map's arrays
    are (N,) int32, total_ptr (2,), ticket_ptr one zero when DYNAMIC. bias_ptr: not read, HAS_BIAS
    is False.

    A task of 300 rows and BM 192: tiles of 160 rows and of 140, multiplied at 160 and at 144; a
    weight of 320 rows has two column tiles, and the second half of the second is passed by.
    """
    A: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BOX, BK], w_desc.dtype)
    a_bufs = gl.allocate_shared_memory(w_desc.dtype, [NB * (BM // BOX), BOX, BK], A)
    b_bufs = gl.allocate_shared_memory(w_desc.dtype, [NB] + w_desc.block_type.shape, w_desc.layout)
    c_bufs = gl.allocate_shared_memory(
        out_desc.dtype, [2 * staged(BM, NB)] + out_desc.block_type.shape, out_desc.layout
    )
    full = gl.allocate_shared_memory(gl.int64, [NB, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [NB, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NB):
        mbarrier.init(full.index(i), count=129 if GATHER else 33)
        mbarrier.init(empty.index(i), count=2)
    rows_at = start_of(a_bufs.index(0), 17)
    weights_at = start_of(b_bufs.index(0).reshape([BN, BK]), 23)
    fence_async_shared()
    notes = gl.allocate_shared_memory(
        gl.int32, [5 * NB, 1], gl.SwizzledSharedLayout(1, 1, 1, order=[0])
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
            [
                (_consume_low, (p, rows_at, weights_at)),
                (_consume_high, (p, rows_at, weights_at)),
                (load_tokens, (p, work)),
            ],
            [4, 4],
            [CREG, LREG],
        )
    else:
        gl.warp_specialize(
            [
                (_consume_low, (p, rows_at, weights_at)),
                (_consume_high, (p, rows_at, weights_at)),
                (load_sorted, (p, work)),
            ],
            [4, 1],
            [CREG, LREG],
        )
