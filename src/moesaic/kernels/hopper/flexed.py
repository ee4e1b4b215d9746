"""Both products of a layer in one launch, by tiles as tall as their rows, for any routing.

    S routed rows · T tokens · H hidden width · I intermediate width · N entries of the task map
    BM most rows of a tile (64 or 128) · BN weight rows (128 or 256) · BK depth of a stage
    NB stages

How many rows an expert will get is not known on the host. Here weights stand on the wide side of
wgmma, and a tile is multiplied at the least of 16, 32, 64, 96 and 128 rows that hold its own, found
when it is drawn: a short tile costs its own rows, and a task of up to BM rows reads its weights
once. Two warpgroups share a tile, half of its weight rows each. Tiles of 256 weight rows halve how
often rows pass from L2 to the SMs, which is what limits tiles of more than 64 rows.

Both products are walked as in `paired`: every program draws tiles from one counter, first those of
the up-projection, then those of the down-projection, whose weights are asked for before the up
tiles of their entry are done. An up tile that somebody waits for has been drawn by a running
program, which waits for nobody. Products, order of the K chain and rounding are those of
`decode_kernel`: the bits are the same.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .flexmap import Layer, settle
from .operands import draw, find, read_note, write_note
from .tiles import activate, activate_alone

barrier = getattr(gl, "barrier", None) or gl.thread_barrier
SECOND = gl.constexpr(1 << 20)
"""Added to a note's column tile when it is of the down-projection."""


@gluon.jit
def _ask(p, desc, i, e, n, k, wanted):
    """Have the weights of one stage brought by TMA."""
    mbarrier.expect(p.full.index(i), p.up_desc.block_type.nbytes, pred=wanted)
    tma.async_copy_global_to_shared(
        desc, [e, n * (p.BN // 16), 0, 0, k], p.full.index(i), p.b_bufs.index(i), pred=wanted
    )


@gluon.jit
def _ask_ahead(p, desc, c, ahead, row_start, rows, m, e, n, note_n, j):
    """Have the weights of a tile's first stages brought before its rows are known."""
    for s in range(0, ahead):
        i = (c + s) % p.NB
        mbarrier.wait(p.empty.index(i), (((c + s) // p.NB) & 1) ^ 1)
        if s == 0:
            write_note(p, i, row_start, rows, m, note_n, j)
        _ask(p, desc, i, e, n, s * p.BK, s >= 0)


@gluon.jit
def _pointers(p, base, index, width, first, rows, COUNT: gl.constexpr, SORTED: gl.constexpr):
    """Where COUNT rows begin, and which there are: rows `index`, or the tokens of those slots."""
    BL: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    row = first + gl.arange(0, COUNT, layout=gl.SliceLayout(1, BL))
    cols = gl.arange(0, p.BK, layout=gl.SliceLayout(0, BL))
    if SORTED:
        at = index + row
    else:
        at = gl.load(p.order_ptr + index + row, mask=row < rows, other=0) // p.top_k
    live = (row < rows)[:, None] & (cols >= 0)[None, :]
    return base + at.to(gl.int64)[:, None] * width + cols[None, :], live


@gluon.jit
def _copy(buf, ptrs, k, live, wanted):
    """Copy rows of one stage where any of them is wanted; a copy of none would write zeros."""
    if wanted:
        async_copy.async_copy_global_to_shared(buf, ptrs + k, mask=live)


@gluon.jit
def _fill(
    p, desc, c, ahead, depth, base, row_start, rows, m, e, n, note_n, j, SORTED: gl.constexpr
):
    """All stages of a tile; the weights of the first `ahead` have been asked for."""
    first = m * p.BM
    left = rows - first
    ptrs0, live0 = _pointers(p, base, row_start, depth, first, rows, 16, SORTED)
    ptrs1, live1 = _pointers(p, base, row_start, depth, first + 16, rows, 16, SORTED)
    ptrs2, live2 = _pointers(p, base, row_start, depth, first + 32, rows, 32, SORTED)
    if p.BM > 64:
        ptrs3, live3 = _pointers(p, base, row_start, depth, first + 64, rows, 64, SORTED)
    for k in range(0, depth, p.BK):
        i = c % p.NB
        mbarrier.wait(p.empty.index(i), ((c // p.NB) & 1) ^ 1)
        fresh = k >= ahead * p.BK
        if (k == 0) & fresh:
            write_note(p, i, row_start, rows, m, note_n, j)
        _ask(p, desc, i, e, n, k, fresh)
        buf = p.a_bufs.index(i)
        async_copy.async_copy_global_to_shared(buf.slice(0, 16, dim=0), ptrs0 + k, mask=live0)
        _copy(buf.slice(16, 16, dim=0), ptrs1, k, live1, left > 16)
        _copy(buf.slice(32, 32, dim=0), ptrs2, k, live2, left > 32)
        if p.BM > 64:
            _copy(buf.slice(64, 64, dim=0), ptrs3, k, live3, left > 64)
        async_copy.mbarrier_arrive(p.full.index(i), increment_count=False)
        c += 1
    return c


@gluon.jit
def _load(p, up_n_tiles, down_n_tiles):
    """Four warps: draw tiles, bring their weights and rows; up tiles first, then down tiles."""
    L: gl.constexpr = gl.BlockedLayout([p.LANES // 32], [32], [gl.num_warps()], [0])
    if p.PDL:
        gdc_wait()
        gdc_launch_dependents()
    t = draw(p)
    lane = gl.arange(0, p.LANES, layout=L)
    end = gl.load(p.tile_end_ptr + lane, mask=lane < p.N, other=0x7FFFFFFF)
    # Entries beyond the last that has rows repeat the total.
    row_tiles = gl.max(gl.where(end == 0x7FFFFFFF, 0, end), axis=0)
    tiles = row_tiles * up_n_tiles
    total = tiles + row_tiles * down_n_tiles
    settle(p, t, total)
    c = t * 0
    # The first weights are asked for before the rows are looked up.
    ahead = gl.minimum(gl.cdiv(p.hidden, p.BK), p.FIRST)
    while t < tiles:
        j, e, row_start, rows, m, _, n = find(p, end, t, up_n_tiles)
        _ask_ahead(p, p.up_desc, c, ahead, row_start, rows, m, e, n, n, j)
        t = draw(p)
        c = _fill(p, p.up_desc, c, ahead, p.hidden, p.x, row_start, rows, m, e, n, n, j, False)
        ahead = 0
        settle(p, t, total)
    while t < total:
        j, e, row_start, rows, m, m_tiles, n = find(p, end, t - tiles, down_n_tiles)
        wanted = 2 * m_tiles * up_n_tiles + p.BM
        done = gl.atomic_add(p.done_ptr + j, 0, sem="acquire")
        ahead = gl.minimum(gl.cdiv(p.inner, p.BK), p.FIRST)
        if done >= wanted:
            ahead = 0
        _ask_ahead(p, p.down_desc, c, ahead, row_start, rows, m, e, n, n + SECOND, j)
        while done < wanted:
            done = gl.atomic_add(p.done_ptr + j, 0, sem="acquire")
        t = draw(p)
        c = _fill(
            p, p.down_desc, c, ahead, p.inner, p.act_ptr, row_start, rows, m, e, n, n + SECOND, j,
            True,
        )  # fmt: skip
        settle(p, t, total)
    i = c % p.NB
    mbarrier.wait(p.empty.index(i), ((c // p.NB) & 1) ^ 1)
    write_note(p, i, 0, 0, 0, 0, 0)
    mbarrier.arrive(p.full.index(i), count=1)
    async_copy.mbarrier_arrive(p.full.index(i), increment_count=False)


@gluon.jit
def _chain(p, c, depth, PART: gl.constexpr, A: gl.constexpr, B: gl.constexpr):
    """The transposed products with A and with B rows: one in-order K chain per element.

    B may be 0; then the second is the first.
    """
    HALF: gl.constexpr = p.BN // 2
    LA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, A, 16])
    acc0 = gl.zeros((HALF, A), gl.float32, layout=LA)
    if B > 0:
        LB: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, B, 16])
        acc1 = gl.zeros((HALF, B), gl.float32, layout=LB)
    for k in range(0, depth, p.BK):
        i = c % p.NB
        mbarrier.wait(p.full.index(i), (c // p.NB) & 1)
        fence_async_shared()
        w = p.b_bufs.index(i).reshape([p.BN, p.BK]).slice(PART * HALF, HALF, dim=0)
        x = p.a_bufs.index(i)
        acc0 = warpgroup_mma(w, x.slice(0, A, dim=0).permute((1, 0)), acc0, is_async=True)
        if B > 0:
            acc1 = warpgroup_mma(w, x.slice(A, B, dim=0).permute((1, 0)), acc1, is_async=True)
            acc0, acc1 = warpgroup_mma_wait(2, (acc0, acc1))
        else:
            acc0 = warpgroup_mma_wait(1, (acc0,))
        mbarrier.arrive(p.empty.index((c + p.NB - 1) % p.NB), count=1, pred=k > 0)
        c += 1
    if B > 0:
        acc0, acc1 = warpgroup_mma_wait(0, (acc0, acc1))
    else:
        acc0 = warpgroup_mma_wait(0, (acc0,))
    mbarrier.arrive(p.empty.index((c + p.NB - 1) % p.NB), count=1)
    if B > 0:
        return acc0, acc1
    else:
        return acc0, acc0


@gluon.jit
def _put(p, y, c_buf, ROWS: gl.constexpr, base, width, row_start, rows, row, col):
    """Round the transposed (C, ROWS) and write its live rows, in pieces of at most 64 by 64."""
    COLS: gl.constexpr = y.shape[0]
    if COLS > 64:
        left, right = y.reshape(2, 64, ROWS).permute(1, 2, 0).split()
        _put(p, left, c_buf, ROWS, base, width, row_start, rows, row, col)
        _put(p, right, c_buf, ROWS, base, width, row_start, rows, row, col + 64)
    elif ROWS > 64:
        upper, lower = y.reshape(COLS, 2, ROWS // 2).permute(0, 2, 1).split()
        _put(p, upper, c_buf, ROWS // 2, base, width, row_start, rows, row, col)
        _put(p, lower, c_buf, ROWS // 2, base, width, row_start, rows, row + ROWS // 2, col)
    else:
        OL: gl.constexpr = gl.BlockedLayout([1, 8], [256 // COLS, COLS // 8], [4, 1], [1, 0])
        piece = c_buf.slice(0, ROWS, dim=0)
        barrier()
        piece.store(y.to(base.dtype.element_ty).permute(1, 0))
        barrier()
        tile = piece.load(OL)
        r = row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, OL))
        column = col + gl.arange(0, COLS, layout=gl.SliceLayout(0, OL))
        at = base + (row_start + r).to(gl.int64)[:, None] * width + column[None, :]
        gl.store(at, tile, mask=(r < rows)[:, None] & (column < width)[None, :])


@gluon.jit
def _write(p, acc, bufs, PART: gl.constexpr, ROWS: gl.constexpr, n, row_start, rows, row):
    """Write this half of an up tile, activated, or of a down tile."""
    HALF: gl.constexpr = p.BN // 2
    if n < SECOND:
        if p.GATED:
            g, u = acc.reshape(HALF // 16, 2, 8, ROWS).permute(0, 2, 3, 1).split()
            y = activate(g, u, p.ACTIVATION, p.HAS_LIMIT, p.limit, p.alpha, p.up_offset)
            y = y.reshape(HALF // 2, ROWS)
            col = (2 * n + PART) * (HALF // 2)
        else:
            y = activate_alone(acc, p.ACTIVATION, p.HAS_LIMIT, p.limit, p.alpha)
            col = (2 * n + PART) * HALF
        _put(p, y, bufs[0], ROWS, p.act_ptr, p.inner, row_start, rows, row, col)
    else:
        col = (2 * (n - SECOND) + PART) * HALF
        _put(p, acc, bufs[1], ROWS, p.out_ptr, p.hidden, row_start, rows, row, col)


@gluon.jit
def _multiply(
    p, bufs, c, PART: gl.constexpr, A: gl.constexpr, B: gl.constexpr, row_start, rows, row, n
):
    """This half of a tile of A + B rows, written; the ring's next stage."""
    depth = gl.where(n < SECOND, p.hidden, p.inner)
    acc0, acc1 = _chain(p, c, depth, PART, A, B)
    _write(p, acc0, bufs, PART, A, n, row_start, rows, row)
    if B > 0:
        _write(p, acc1, bufs, PART, B, n, row_start, rows, row + A)
    return c + gl.cdiv(depth, p.BK)


@gluon.jit
def _consume(p, up_bufs, down_bufs, PART: gl.constexpr):
    """One warpgroup: its half of the weight rows of every tile."""
    bufs = (up_bufs.index(PART), down_bufs.index(PART))
    row_start, rows, m, n, j = read_note(p, 0)
    c = rows * 0
    while rows > 0:
        row = m * p.BM
        left = rows - row
        if left <= 16:
            c = _multiply(p, bufs, c, PART, 16, 0, row_start, rows, row, n)
        elif left <= 32:
            c = _multiply(p, bufs, c, PART, 32, 0, row_start, rows, row, n)
        elif (left <= 64) | (p.BM == 64):
            c = _multiply(p, bufs, c, PART, 64, 0, row_start, rows, row, n)
        elif p.BM > 64:
            if left <= 96:
                c = _multiply(p, bufs, c, PART, 64, 32, row_start, rows, row, n)
            else:
                c = _multiply(p, bufs, c, PART, 128, 0, row_start, rows, row, n)
        if n < SECOND:
            barrier()
            gl.atomic_add(p.done_ptr + j, 1, sem="release")
        row_start, rows, m, n, j = read_note(p, c)


@gluon.jit
def _consume_low(p, up_bufs, down_bufs):
    _consume(p, up_bufs, down_bufs, 0)


@gluon.jit
def _consume_high(p, up_bufs, down_bufs):
    _consume(p, up_bufs, down_bufs, 1)


@gluon.jit(do_not_specialize=["up_n_tiles", "down_n_tiles", "top_k"])
def flex_kernel(
    x, order_ptr, up_desc, down_desc, act_ptr, out_ptr,
    tile_end_ptr, task_ptr, row_start_ptr, rows_ptr, done_ptr, ticket_ptr,
    hidden, inner, up_n_tiles, down_n_tiles, top_k, limit, alpha, up_offset,
    N: gl.constexpr, LANES: gl.constexpr, GATED: gl.constexpr,
    ACTIVATION: gl.constexpr, HAS_LIMIT: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    BK: gl.constexpr, NB: gl.constexpr, PDL: gl.constexpr,
    FIRST: gl.constexpr, CREG: gl.constexpr, LREG: gl.constexpr,
):  # fmt: skip
    """out[row] = act(x[token of row] @ up[e].T) @ down[e].T for the rows of every task.

    x: (T, H). order_ptr: int32 (S,) slot of each sorted row, token = slot // top_k. up_desc:
    (E, I/8, 2, 8, H) box (1, BN/16, 2, 8, BK), the middle strides those of gate and up when GATED,
    else (E, I/16, 2, 8, H) in order; down_desc: (E, H/16, 2, 8, I) in order, same box. act_ptr:
    (S, I), out_ptr: (S, H). The task map's arrays are (N,) int32. done_ptr: int32 (N,), BM for
    every entry that has rows; ticket_ptr: one zero, zero again when the launch has ended. FIRST:
    stages whose weights are asked for before their rows, which wait behind them.

    Two experts of 70 and 5 rows, BM = 64, I = 128 and BN = 128 gated: entry 0 has two row tiles, of
    64 and of 6 rows, entry 1 one of 5; three row tiles times two column tiles are six up tiles. A
    down tile of entry 0 waits until its counter has gone from 64 to 64 + 2 * 2 * 2.
    """
    DTYPE: gl.constexpr = up_desc.dtype
    a_bufs = gl.allocate_shared_memory(
        DTYPE, [NB, BM, BK], gl.NVMMASharedLayout.get_default_for([BM, BK], DTYPE)
    )
    b_bufs = gl.allocate_shared_memory(DTYPE, [NB] + up_desc.block_type.shape, up_desc.layout)
    COLS: gl.constexpr = BN // 4 if GATED else 64
    down_bufs = gl.allocate_shared_memory(
        DTYPE, [2, 64, 64], gl.NVMMASharedLayout.get_default_for([64, 64], DTYPE)
    )
    up_bufs = down_bufs
    if COLS < 64:
        up_bufs = gl.allocate_shared_memory(
            DTYPE, [2, 64, COLS], gl.NVMMASharedLayout.get_default_for([64, COLS], DTYPE)
        )
    full = gl.allocate_shared_memory(gl.int64, [NB, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [NB, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NB):
        mbarrier.init(full.index(i), count=129)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    notes = gl.allocate_shared_memory(
        gl.int32, [5 * NB, 1], gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    )
    p = Layer(
        x, order_ptr, act_ptr, out_ptr, up_desc, down_desc, tile_end_ptr, task_ptr, row_start_ptr,
        rows_ptr, done_ptr, ticket_ptr, a_bufs, b_bufs, notes, full, empty, hidden, inner,
        top_k, limit, alpha, up_offset, N, LANES, GATED, ACTIVATION, HAS_LIMIT, BM, BN, BK, NB, PDL,
        FIRST,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (_consume_low, (p, up_bufs, down_bufs)),
            (_consume_high, (p, up_bufs, down_bufs)),
            (_load, (p, up_n_tiles, down_n_tiles)),
        ],
        [4, 4],
        [CREG, LREG],
    )
