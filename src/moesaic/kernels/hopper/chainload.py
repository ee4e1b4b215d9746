"""The loading side of `chained`: tiles are drawn, announced to the warpgroups, and brought.

BM most rows of a tile (to 128 + REST) · BN weight rows (128 or 256) · BK depth of a stage
NB stages · N entries of the task map
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .operands import draw

barrier = getattr(gl, "barrier", None) or gl.thread_barrier
STEP = gl.constexpr(16)
SLAB = gl.constexpr(128)
QUEUE = gl.constexpr(4)
"""Tiles whose place in the ring is known before they are multiplied."""
PRODUCT = gl.constexpr(1 << 20)
"""A note's column tile has the number of the product above it."""


@gluon.jit
def _announce(p, i, c, row, left, n, e, j):
    """Tell of tile `i` of this program: first stage, first row, rows, column tile and product,
    expert, entry. A tile without rows ends the work."""
    L: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    q = i % QUEUE
    mbarrier.wait(p.taken.index(q), ((i // QUEUE) & 1) ^ 1)
    p.notes.index(6 * q).store(gl.full([1], c, gl.int32, layout=L))
    p.notes.index(6 * q + 1).store(gl.full([1], row, gl.int32, layout=L))
    p.notes.index(6 * q + 2).store(gl.full([1], left, gl.int32, layout=L))
    p.notes.index(6 * q + 3).store(gl.full([1], n, gl.int32, layout=L))
    p.notes.index(6 * q + 4).store(gl.full([1], e, gl.int32, layout=L))
    p.notes.index(6 * q + 5).store(gl.full([1], j, gl.int32, layout=L))
    barrier()
    mbarrier.arrive(p.ready.index(q), count=1)
    async_copy.mbarrier_arrive(p.ready.index(q), increment_count=False)


@gluon.jit
def _note(p, q, what: gl.constexpr):
    L: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return gl.max(p.notes.index(6 * q + what).load(L), axis=0)


@gluon.jit
def hear(p, i):
    """Wait until tile `i` of this program is announced; what was, in the order of `_announce`."""
    q = i % QUEUE
    mbarrier.wait(p.ready.index(q), (i // QUEUE) & 1)
    c = _note(p, q, 0)
    row = _note(p, q, 1)
    left = _note(p, q, 2)
    n = _note(p, q, 3)
    e = _note(p, q, 4)
    j = _note(p, q, 5)
    return c, row, left, n, e, j


@gluon.jit
def taken(p, i):
    """Every lane says that it needs the note of tile `i` no more."""
    async_copy.mbarrier_arrive(p.taken.index(i % QUEUE), increment_count=False)


@gluon.jit
def _ask(p, desc, c, e, n, k):
    """Have the weights of one stage brought by TMA."""
    i = c % p.NB
    mbarrier.wait(p.empty.index(i), ((c // p.NB) & 1) ^ 1)
    mbarrier.expect(p.full.index(i), p.up_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, [e, n * p.BN, k], p.full.index(i), p.b_bufs.index(i))


@gluon.jit
def _ask_of(p, product, c, e, n, k):
    """`_ask` of the weights of product 0, 1 or 2."""
    if product == 0:
        _ask(p, p.up_desc, c, e, n, k)
    elif product == 1:
        _ask(p, p.mid_desc, c, e, n, k)
    else:
        _ask(p, p.down_desc, c, e, n, k)


@gluon.jit
def _rows_at(
    p, base, row, left, width, SORTED: gl.constexpr, FIRST: gl.constexpr, COUNT: gl.constexpr
):
    """Addresses of COUNT rows of a tile from FIRST on, and which of them there are."""
    BL: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    cols = gl.arange(0, p.BK, layout=gl.SliceLayout(0, BL))
    r = FIRST + gl.arange(0, COUNT, layout=gl.SliceLayout(1, BL))
    at = row + r
    if not SORTED:
        at = gl.load(p.order_ptr + at, mask=r < left, other=0) // p.top_k
    live = (r < left)[:, None] & (cols >= 0)[None, :]
    return base + at.to(gl.int64)[:, None] * width + cols[None, :], live


@gluon.jit
def _begin(p, i, c, product, j, e, row, left, n):
    """Announce tile `i` of this program; ask for weights of the first as far as the ring goes."""
    _announce(p, i, c, row, left, n + product * PRODUCT, e, j)
    ahead = c * 0
    if c == 0:
        ahead = gl.minimum(gl.cdiv(gl.where(product == 0, p.hidden, p.inner), p.BK), p.NB)
        for s in range(0, ahead):
            _ask_of(p, product, s, e, n, s * p.BK)
    return ahead


@gluon.jit
def _load_tile(
    p, c, ahead, product, j, e, row, left, n, base, width, wanted, SORTED: gl.constexpr
):  # fmt: skip
    """Weights but for `ahead` stages, and rows of a tile, as soon as `wanted` is counted."""
    if SORTED:
        done = gl.atomic_add(p.done_ptr + j, 0, sem="acquire")
        if done < wanted:
            if c > 0:
                ahead = gl.minimum(gl.cdiv(width, p.BK), p.NB)
                for s in range(0, ahead):
                    _ask_of(p, product, c + s, e, n, s * p.BK)
            while done < wanted:
                done = gl.atomic_add(p.done_ptr + j, 0, sem="acquire")
    ptrs, live = _rows_at(p, base, row, left, width, SORTED, 0, SLAB)
    rest, live_rest = _rows_at(p, base, row, left, width, SORTED, SLAB, p.REST)
    for k in range(0, width, p.BK):
        if k >= ahead * p.BK:
            _ask_of(p, product, c, e, n, k)
        stage = c % p.NB
        async_copy.async_copy_global_to_shared(p.a_bufs.index(stage), ptrs + k, mask=live)
        if left > SLAB:
            async_copy.async_copy_global_to_shared(
                p.rest_bufs.index(stage), rest + k, mask=live_rest
            )
        async_copy.mbarrier_arrive(p.full.index(stage), increment_count=False)
        c += 1
    return c


@gluon.jit
def _locate(p, end, t, first_mid, first_down, up_n, mid_n, down_n):
    """Product, entry, expert, first row, rows and column tile of tile `t`, and what the entry's
    counter must have come to before its rows may be read.

    The row tiles of an entry that meet the same weights are neighbours.
    """
    EACH: gl.constexpr = 2 if p.BN > SLAB else 1
    product = (t >= first_mid).to(gl.int32) + (t >= first_down).to(gl.int32)
    n_tiles = gl.where(product == 0, up_n, gl.where(product == 1, mid_n, down_n))
    begin = gl.where(product == 0, 0, gl.where(product == 1, first_mid, first_down))
    split = gl.where(product == 2, p.SPLIT, 1)
    q = t - begin
    per = n_tiles * split
    passed = end <= q // per
    j = gl.minimum(gl.sum(passed.to(gl.int32), axis=0), p.N - 1)
    before = gl.max(gl.where(passed, end, 0), axis=0)
    m_tiles = gl.min(gl.where(passed, 0x7FFFFFFF, end), axis=0) - before
    e = gl.load(p.task_ptr + j)
    row_start = gl.load(p.row_start_ptr + j)
    rows = gl.load(p.rows_ptr + j)
    q -= before * per
    parts = m_tiles * split
    height = gl.cdiv(gl.cdiv(rows, parts), STEP) * STEP
    first = (q % parts) * height
    left = gl.minimum(rows - first, height)
    wanted = p.BM + EACH * m_tiles * gl.where(product == 2, up_n + mid_n, up_n)
    return product, j, e, row_start + first, left, q // parts, wanted


@gluon.jit
def _draw_later(p, left):
    """Draw a tile when the place of the one before is known. Nobody then has two tiles of the first
    product while another, begun at the same time, waits for one of them."""
    return gl.atomic_add(p.ticket_ptr, 1, mask=left > -0x40000000, sem="relaxed")


@gluon.jit
def load(p, up_n, mid_n, down_n):
    """Four warps: draw tiles, bring their weights and rows.

    A tile is looked up while the one before is brought, and drawn while the one before that is.
    """
    if p.PDL:
        gdc_wait()
        gdc_launch_dependents()
    L: gl.constexpr = gl.BlockedLayout([p.LANES // 32], [32], [gl.num_warps()], [0])
    lane = gl.arange(0, p.LANES, layout=L)
    end = gl.load(p.tile_end_ptr + lane, mask=lane < p.N, other=0x7FFFFFFF)
    t = draw(p)
    row_tiles = gl.max(gl.where(end == 0x7FFFFFFF, 0, end), axis=0)
    first_mid = row_tiles * up_n
    first_down = first_mid + row_tiles * mid_n
    total = first_down + row_tiles * down_n * p.SPLIT
    last = total + 2 * gl.num_programs(0) - 1
    product, j, e, row, left, n, wanted = _locate(
        p, end, t, first_mid, first_down, up_n, mid_n, down_n
    )
    after = _draw_later(p, left)
    i = t * 0
    c = t * 0
    drawn = gl.maximum(t, after)
    while t < total:
        ahead = c * 0
        if left > 0:
            ahead = _begin(p, i, c, product, j, e, row, left, n)
        t = after
        after = _draw_later(p, left)
        drawn = after
        product_, j_, e_, row_, left_, n_, wanted_ = _locate(
            p, end, t, first_mid, first_down, up_n, mid_n, down_n
        )
        if left > 0:
            if product == 0:
                c = _load_tile(p, c, ahead, 0, j, e, row, left, n, p.x, p.hidden, wanted, False)
            else:
                base = p.first_ptr
                if product == 2:
                    base = p.second_ptr
                c = _load_tile(
                    p, c, ahead, product, j, e, row, left, n, base, p.inner, wanted, True
                )
            i += 1
        product, j, e, row, left, n, wanted = product_, j_, e_, row_, left_, n_, wanted_
    if drawn == last:
        gl.store(p.ticket_ptr, 0)
    _announce(p, i, 0, 0, 0, 0, 0, 0)
    if p.BN == SLAB:
        _announce(p, i + 1, 0, 0, 0, 0, 0, 0)
