"""Both products of a layer in one launch: the ring of weights never runs dry between them.

    S routed rows · T tokens · H hidden width · I intermediate width · BW weight rows of a tile
    BT token rows of a tile · BK depth of a stage · NB stages · N entries of the task map

With few rows the time is that of reading weights, and two launches leave the memory idle for some
microseconds while the first drains and the second looks up its work. Here every program draws
tiles from one counter, first those of the up-projection, then those of the down-projection. Its
loader asks for the weights of a down tile while its own and other programs' up tiles are still
multiplied, and waits only with the rows, until the entry's counter says that all its up tiles are
written. An up tile that somebody waits for has been drawn by a running program, which waits for
nobody, so no program need run beside another. Products, order of the K chain and rounding are
those of `decode_kernel`: the bits are the same.
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

from .few import (
    add_counts,
    count_few,
    experts_of,
    join_few,
    join_one,
    load_slots,
    locate_few,
    number_slots,
    slots_few,
)
from .operands import Pair, draw, find, note_slots, read_note, write_note
from .tiles import activate, activate_alone

barrier = getattr(gl, "barrier", None) or gl.thread_barrier
SECOND = gl.constexpr(1 << 20)
"""Added to a note's row tile when it is of the down-projection."""


@gluon.jit
def _lanes(p):
    """What every warp holds of the map.

    The experts of a single token, the numbered slots of few tokens, or the prefixes of tiles.
    """
    L: gl.constexpr = gl.BlockedLayout([p.LANES // 32], [32], [gl.num_warps()], [0])
    lane = gl.arange(0, p.LANES, layout=L)
    if p.ONE:
        return experts_of(p, lane)
    elif p.FEW:
        return load_slots(p)
    else:
        return gl.load(p.tile_end_ptr + lane, mask=lane < p.N, other=0x7FFFFFFF)


@gluon.jit
def _locate(p, held, t, n_tiles):
    """Entry, expert, first row, rows, row tile, row tiles and column tile of tile `t` of a product.

    `held`: from `_lanes`; see `operands.find`.
    """
    if p.ONE:
        j = t // n_tiles
        lane = gl.arange(0, p.LANES, layout=held.type.layout)
        e = gl.sum(gl.where(lane == j, held, 0), axis=0)
        return j, e, j, t * 0 + 1, t * 0, t * 0 + 1, t % n_tiles
    elif p.FEW:
        j = t // n_tiles
        first = locate_few(held, j)
        return j, first >> 8, first, t * 0 + 1, t * 0, t * 0 + 1, t % n_tiles
    else:
        return find(p, held, t, n_tiles)


@gluon.jit
def _settle(p, t, total):
    """The program that drew last, when nobody waits or counts any more, puts the counters back."""
    if t == total + gl.num_programs(0) - 1:
        gl.store(p.ticket_ptr, 0)
        if p.ONE | p.FEW:
            L: gl.constexpr = gl.BlockedLayout([p.LANES // 32], [32], [gl.num_warps()], [0])
            lane = gl.arange(0, p.LANES, layout=L)
            gl.store(p.done_ptr + lane, lane * 0, mask=lane < p.N)


@gluon.jit
def _ask(p, desc, c, e, n, k):
    """Have the weights of one stage brought by TMA, when FLIGHT before it are not on their way."""
    i = c % p.NB
    if p.FLIGHT < p.NB:
        b = c - p.FLIGHT
        mbarrier.wait(p.full.index((b + p.NB) % p.NB), (b // p.NB) & 1, pred=b >= 0)
    mbarrier.wait(p.empty.index(i), ((c // p.NB) & 1) ^ 1)
    mbarrier.expect(p.full.index(i), p.up_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(
        desc, [e, n * (p.BN // 16), 0, 0, k], p.full.index(i), p.b_bufs.index(i)
    )


@gluon.jit
def _bring(p, c, ptrs, live, left):
    """Copy the token rows of one stage, and zeros beyond the `left` columns that there are."""
    i = c % p.NB
    if p.BK > 64:
        BL: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
        live &= (gl.arange(0, p.BK, layout=gl.SliceLayout(0, BL)) < left)[None, :]
    async_copy.async_copy_global_to_shared(p.a_bufs.index(i), ptrs, mask=live)
    async_copy.mbarrier_arrive(p.full.index(i), increment_count=False)


@gluon.jit
def _load_up(p, held, t, c, tiles, n_tiles, total, tasks):
    """Fill the ring for every up tile that this program draws; the first down tile it drew."""
    BL: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    r = gl.arange(0, p.BM, layout=gl.SliceLayout(1, BL))
    cols = gl.arange(0, p.BK, layout=gl.SliceLayout(0, BL))
    # The first weights are asked for before the rows are looked up.
    ahead = gl.minimum(gl.cdiv(p.hidden, p.BK), p.FIRST)
    while t < tiles:
        j, e, row_start, rows, m, _, n = _locate(p, held, t, n_tiles)
        slot = r
        if p.FEW:
            slot = slots_few(p, held, row_start, gl.SliceLayout(1, BL))
            row_start = tasks
        for s in range(0, ahead):
            if s == 0:
                write_note(p, s, row_start, rows, m, n, j)
                note_slots(p, s, slot)
            _ask(p, p.up_desc, s, e, n, s * p.BK)
        if not p.LATE:
            t = draw(p)
        row = m * p.BM + r
        inside = row < rows
        if p.ONE:
            token = row * 0
        elif p.FEW:
            token = slot // p.top_k
            inside = slot >= 0
        else:
            slot = gl.load(p.order_ptr + row_start + row, mask=row < rows, other=0)
            token = slot // p.top_k
        live = inside[:, None] & (cols >= 0)[None, :]
        ptrs = p.x + token.to(gl.int64)[:, None] * p.hidden + cols[None, :]
        for s in range(0, ahead):
            _bring(p, s, ptrs + s * p.BK, live, p.hidden - s * p.BK)
        c += ahead
        for k in range(ahead * p.BK, p.hidden, p.BK):
            i = c % p.NB
            if k == 0:
                mbarrier.wait(p.empty.index(i), ((c // p.NB) & 1) ^ 1)
                write_note(p, i, row_start, rows, m, n, j)
                note_slots(p, i, slot)
            _ask(p, p.up_desc, c, e, n, k)
            _bring(p, c, ptrs + k, live, p.hidden - k)
            c += 1
        ahead = 0
        if p.LATE:
            t = draw(p)
        _settle(p, t, total)
    return t, c


@gluon.jit
def _load_down(p, held, t, c, tiles, n_tiles, up_n_tiles, total, tasks):
    """Fill the ring for every down tile; its weights come before its up tiles are written."""
    BL: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    r = gl.arange(0, p.BM, layout=gl.SliceLayout(1, BL))
    cols = gl.arange(0, p.BK, layout=gl.SliceLayout(0, BL))
    while t < total:
        j, e, row_start, rows, m, m_tiles, n = _locate(p, held, t - tiles, n_tiles)
        slot = row_start + m * p.BM + r
        inside = m * p.BM + r < rows
        if p.FEW:
            slot = slots_few(p, held, row_start, gl.SliceLayout(1, BL))
            inside = slot >= 0
            row_start = tasks
        wanted = m_tiles * up_n_tiles
        if not p.ONE | p.FEW:
            wanted += p.BM
        done = gl.atomic_add(p.done_ptr + j, 0, sem="acquire")
        if p.LATE:
            # While many programs still ask for up weights, those come first.
            drawn = gl.num_programs(0) - gl.num_programs(0) // 4 + tiles
            while (done < wanted) & (gl.atomic_add(p.ticket_ptr, 0, sem="relaxed") < drawn):
                done = gl.atomic_add(p.done_ptr + j, 0, sem="acquire")
        ahead = gl.minimum(gl.cdiv(p.inner, p.BK), p.FIRST)
        if done >= wanted:
            ahead = 0
        for s in range(0, ahead):
            i = (c + s) % p.NB
            if s == 0:
                mbarrier.wait(p.empty.index(i), (((c + s) // p.NB) & 1) ^ 1)
                write_note(p, i, row_start, rows, m + SECOND, n, j)
                note_slots(p, i, slot)
            _ask(p, p.down_desc, c + s, e, n, s * p.BK)
        while done < wanted:
            done = gl.atomic_add(p.done_ptr + j, 0, sem="acquire")
        t = draw(p)
        live = inside[:, None] & (cols >= 0)[None, :]
        ptrs = p.act_ptr + slot.to(gl.int64)[:, None] * p.inner + cols[None, :]
        for s in range(0, ahead):
            _bring(p, c + s, ptrs + s * p.BK, live, p.inner - s * p.BK)
        c += ahead
        for k in range(ahead * p.BK, p.inner, p.BK):
            i = c % p.NB
            if k == 0:
                mbarrier.wait(p.empty.index(i), ((c // p.NB) & 1) ^ 1)
                write_note(p, i, row_start, rows, m + SECOND, n, j)
                note_slots(p, i, slot)
            _ask(p, p.down_desc, c, e, n, k)
            _bring(p, c, ptrs + k, live, p.inner - k)
            c += 1
        _settle(p, t, total)
    return t, c


@gluon.jit
def _load(p, up_n_tiles, down_n_tiles):
    """Four warps: draw tiles, bring their weights and rows."""
    if p.PDL:
        gdc_wait()
        gdc_launch_dependents()
    # Loads first: they run while the draw is on its way.
    held = _lanes(p)
    t = draw(p)
    if p.FEW:
        held = number_slots(p, held)
    if p.COUNT:
        add_counts(p, held)
    row_tiles = t * 0 + p.N
    if p.FEW:
        row_tiles = count_few(held)
    elif not p.ONE:
        # Entries beyond the last that has rows repeat the total.
        inside = gl.where(held == 0x7FFFFFFF, 0, held)
        row_tiles = gl.max(inside, axis=0)
    tiles = row_tiles * up_n_tiles
    total = tiles + row_tiles * down_n_tiles
    _settle(p, t, total)
    c = t * 0
    t, c = _load_up(p, held, t, c, tiles, up_n_tiles, total, row_tiles)
    t, c = _load_down(p, held, t, c, tiles, down_n_tiles, up_n_tiles, total, row_tiles)
    i = c % p.NB
    mbarrier.wait(p.empty.index(i), ((c // p.NB) & 1) ^ 1)
    write_note(p, i, 0, 0, 0, 0, 0)
    mbarrier.arrive(p.full.index(i), count=1)
    async_copy.mbarrier_arrive(p.full.index(i), increment_count=False)


@gluon.jit
def _chain(p, c, depth):
    """One in-order K chain: the transposed product (BN, BM) of a tile; the ring's next stage."""
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, p.BM, 16])
    acc = gl.zeros((p.BN, p.BM), gl.float32, layout=L)
    for k in range(0, depth, p.BK):
        i = c % p.NB
        mbarrier.wait(p.full.index(i), (c // p.NB) & 1)
        fence_async_shared()
        w = p.b_bufs.index(i).reshape([p.BN, p.BK])
        x = p.a_bufs.index(i).permute((1, 0))
        acc = warpgroup_mma(w, x, acc, is_async=True)
        acc = warpgroup_mma_wait(1, (acc,))
        mbarrier.arrive(p.empty.index((c + p.NB - 1) % p.NB), count=1, pred=k > 0)
        c += 1
    acc = warpgroup_mma_wait(0, (acc,))
    mbarrier.arrive(p.empty.index((c + p.NB - 1) % p.NB), count=1)
    return acc, c


@gluon.constexpr_function
def _out_layout(BM, COLS):
    """Registers of an output tile (BM, COLS): rows contiguous over the lanes."""
    per = 8 if BM * COLS >= 1024 else BM * COLS // 128
    across = COLS // per if COLS // per < 32 else 32
    return gl.BlockedLayout([1, per], [32 // across, across], [4, 1], [1, 0])


@gluon.jit
def _rows(p, c, row_start, rows, row, COLS: gl.constexpr):
    """Where the rows of a tile go, whose note is that of stage `c`; -1: nowhere."""
    L: gl.constexpr = gl.SliceLayout(1, _out_layout(p.BM, COLS))
    if p.FEW:
        return p.slots.index(c % p.NB).load(L)
    else:
        r = row + gl.arange(0, p.BM, layout=L)
        return gl.where(r < rows, row_start + r, -1)


@gluon.jit
def _put(p, y, c_buf, base, width, row, col, COLS: gl.constexpr):
    """Round a transposed tile (COLS, BM) and write its live rows, COLS columns from `col` on."""
    OL: gl.constexpr = _out_layout(p.BM, COLS)
    c_buf.store(y.to(base.dtype.element_ty).permute(1, 0))
    barrier()
    tile = c_buf.load(OL)
    column = col + gl.arange(0, COLS, layout=gl.SliceLayout(0, OL))
    at = base + row.to(gl.int64)[:, None] * width + column[None, :]
    gl.store(at, tile, mask=(row >= 0)[:, None] & (column < width)[None, :])


@gluon.jit
def _multiply(p, up_buf, down_buf):
    """One warpgroup: every up tile, activated and announced, then every down tile."""
    COLS: gl.constexpr = p.BN // 2 if p.GATED else p.BN
    row_start, rows, m, n, j = read_note(p, 0)
    c = rows * 0
    while (rows > 0) & (m < SECOND):
        to = _rows(p, c, row_start, rows, m * p.BM, COLS)
        acc, c = _chain(p, c, p.hidden)
        if p.GATED:
            g, u = acc.reshape(p.BN // 16, 2, 8, p.BM).permute(0, 2, 3, 1).split()
            y = activate(g, u, p.ACTIVATION, p.HAS_LIMIT, p.limit, p.alpha, p.up_offset)
            y = y.reshape(COLS, p.BM)
        else:
            y = activate_alone(acc, p.ACTIVATION, p.HAS_LIMIT, p.limit, p.alpha)
        _put(p, y, up_buf, p.act_ptr, p.inner, to, n * COLS, COLS)
        barrier()
        gl.atomic_add(p.done_ptr + j, 1, sem="release")
        row_start, rows, m, n, j = read_note(p, c)
    while rows > 0:
        to = _rows(p, c, row_start, rows, (m - SECOND) * p.BM, p.BN)
        acc, c = _chain(p, c, p.inner)
        _put(p, acc, down_buf, p.out_ptr, p.hidden, to, n * p.BN, p.BN)
        barrier()
        if p.SUM & p.FEW:
            join_few(p, n, row_start)
        elif p.SUM:
            join_one(p, n)
        row_start, rows, m, n, j = read_note(p, c)


@gluon.jit(do_not_specialize=["up_n_tiles", "down_n_tiles", "top_k", "experts"])
def pair_kernel(
    x, order_ptr, up_desc, down_desc, act_ptr, out_ptr,
    tile_end_ptr, task_ptr, row_start_ptr, rows_ptr, done_ptr, ticket_ptr, joined_ptr,
    weights_ptr, sum_ptr, counters_ptr, hidden, inner, up_n_tiles, down_n_tiles, top_k, experts,
    limit, alpha, up_offset, N: gl.constexpr, LANES: gl.constexpr, ONE: gl.constexpr,
    FEW: gl.constexpr, TOP_K: gl.constexpr, SUM: gl.constexpr, COUNT: gl.constexpr,
    GATED: gl.constexpr, ACTIVATION: gl.constexpr, HAS_LIMIT: gl.constexpr, BM: gl.constexpr,
    BN: gl.constexpr, BK: gl.constexpr, NB: gl.constexpr, PDL: gl.constexpr, LATE: gl.constexpr,
    FLIGHT: gl.constexpr, FIRST: gl.constexpr, LREG: gl.constexpr,
):  # fmt: skip
    """out[row] = act(x[token of row] @ up[e].T) @ down[e].T for the rows of every task.

    x: (T, H). order_ptr: int32 (S,) slot of each sorted row, token = slot // top_k. up_desc:
    (E, I/8, 2, 8, H) box (1, BN/16, 2, 8, BK), the middle strides those of gate and up when GATED,
    else (E, I/16, 2, 8, H) in order; down_desc: (E, H/16, 2, 8, I) in order, same box. act_ptr:
    (S, I), out_ptr: (S, H). The task map's arrays are (N,) int32. done_ptr: int32 (N,), BM for
    every entry that has rows; ticket_ptr: one zero. ONE: a single token, whose N slots are tasks
    of a row; FEW: tokens of TOP_K slots, N in all, whose tasks are found here, see `few`, with rows
    kept by slot. Of both task_ptr is int32 or int64 ids and done_ptr (N,) zeros, put back at the
    end. SUM: of one or few tokens, also sum_ptr (T, H) = the rows weighted by weights_ptr (N,) and
    summed in slot order, counted by joined_ptr, a zero for each BN columns of H, put back at the
    end. COUNT: of these tokens, rows and tiles of each expert are added to counters_ptr (3, E).
    LATE: a tile is drawn when all loads of the one before are asked for, and a down tile whose rows
    are not there asks for its weights when three in four of the last up tiles have been. FLIGHT:
    stages of a program that may be on their way at once, NB at most: more make no byte come sooner,
    and all that is written waits behind them. FIRST, FLIGHT at most: weights that are asked for
    before their rows, which wait behind them too.
    """
    A: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, BK], up_desc.dtype)
    COLS: gl.constexpr = BN // 2 if GATED else BN
    a_bufs = gl.allocate_shared_memory(up_desc.dtype, [NB, BM, BK], A)
    b_bufs = gl.allocate_shared_memory(
        up_desc.dtype, [NB] + up_desc.block_type.shape, up_desc.layout
    )
    up_buf = gl.allocate_shared_memory(
        up_desc.dtype, [BM, COLS], gl.NVMMASharedLayout.get_default_for([BM, COLS], up_desc.dtype)
    )
    down_buf = gl.allocate_shared_memory(
        up_desc.dtype, [BM, BN], gl.NVMMASharedLayout.get_default_for([BM, BN], up_desc.dtype)
    )
    full = gl.allocate_shared_memory(gl.int64, [NB, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [NB, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NB):
        mbarrier.init(full.index(i), count=129)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    notes = gl.allocate_shared_memory(
        gl.int32, [5 * NB, 1], gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    )
    slots = notes
    if FEW:
        slots = gl.allocate_shared_memory(
            gl.int32, [NB, BM], gl.SwizzledSharedLayout(1, 1, 1, order=[0])
        )
    p = Pair(
        x, order_ptr, act_ptr, out_ptr, up_desc, down_desc, tile_end_ptr, task_ptr,
        row_start_ptr, rows_ptr, done_ptr, ticket_ptr, joined_ptr, weights_ptr, sum_ptr,
        counters_ptr, a_bufs, b_bufs, notes, slots, full, empty, hidden, inner, top_k,
        experts, limit, alpha, up_offset, N, LANES, ONE, FEW, TOP_K, SUM, COUNT, GATED, ACTIVATION,
        HAS_LIMIT, BM, BN, BK, NB, PDL, LATE, FLIGHT, FIRST,
    )  # fmt: skip
    gl.warp_specialize(
        [(_multiply, (p, up_buf, down_buf)), (_load, (p, up_n_tiles, down_n_tiles))], [4], [LREG]
    )
