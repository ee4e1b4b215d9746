"""All three products of a layer with ReLU in one launch, by tiles as tall as their rows.

    S routed rows · T tokens · E experts · H hidden width · I intermediate width
    BM most rows of a tile (to 128 + REST) · BN weight rows (128 or 256) · BK depth of a stage
    NB stages · N entries of the task map

Three launches leave SMs idle three times: where tiles do not divide by the SMs, and while one
drains and the next looks up its work. Here every program draws tiles from one counter, first those
of the up-projection, then the middle's, then the down-projection's. Its loader asks for the weights
of a tile while the one before is multiplied, and waits with the rows until the entry's counter says
that all tiles of the product before are written. Whoever waits holds no tile that others wait for,
and waits for tiles that were drawn before its own, so no program need run beside another.

Weights stand on the wide side of wgmma, rows on the narrow one: a task's rows are cut evenly into
as few tiles as BM allows, and a tile is multiplied at the least of a few heights that holds its
rows. Tiles of 256 weight rows are halved between two warpgroups, to move fewest bytes to the SMs.
Tiles of 128 are given to the two in turn, so that one writes while the other multiplies, for short
depths. A warp of its own counts what was written: it, not a warpgroup, waits until writes have
reached the L2. Order of the K chain and rounding are those of the other tiles: the bits are the
same.
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

from .operands import Chain, draw

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
def _hear(p, i):
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
def _taken(p, i):
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
def _load(p, up_n, mid_n, down_n):
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


@gluon.jit
def _put(p, y, PART: gl.constexpr, COUNT: gl.constexpr, base, width, row, left, at, col):
    """Round (64, COUNT) and write 64 columns of its live rows, 64 rows at a time; `at` rows into
    the tile."""
    if COUNT > 64:
        upper, lower = y.reshape(64, 2, COUNT // 2).permute(0, 2, 1).split()
        _put(p, upper, PART, COUNT // 2, base, width, row, left, at, col)
        _put(p, lower, PART, COUNT // 2, base, width, row, left, at + COUNT // 2, col)
    else:
        OL: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
        piece = p.c_bufs.index(PART).slice(0, COUNT, dim=0)
        barrier()
        piece.store(y.to(base.dtype.element_ty).permute(1, 0))
        barrier()
        tile = piece.load(OL)
        r = at + gl.arange(0, COUNT, layout=gl.SliceLayout(1, OL))
        column = col + gl.arange(0, 64, layout=gl.SliceLayout(0, OL))
        to = base + (row + r).to(gl.int64)[:, None] * width + column[None, :]
        gl.store(to, tile, mask=(r < left)[:, None] & (column < width)[None, :])


@gluon.jit
def _write(p, acc, bias, PART: gl.constexpr, COUNT: gl.constexpr, base, low, width, row, left, at,
           col):  # fmt: skip
    """Add the bias to (128, COUNT), put zeros for what is below `low`, and write it."""
    wide = gl.convert_layout(bias.to(gl.float32), gl.SliceLayout(1, acc.type.layout))
    acc += wide[:, None]
    y = gl.where(acc < low, 0.0, acc)
    first, second = y.reshape(2, 64, COUNT).permute(1, 2, 0).split()
    _put(p, first, PART, COUNT, base, width, row, left, at, col)
    _put(p, second, PART, COUNT, base, width, row, left, at, col + 64)


@gluon.jit
def _multiply(p, c, row, left, n, e, PART: gl.constexpr, A: gl.constexpr, B: gl.constexpr):
    """128 weight rows of a tile by its A + B rows: one in-order K chain an element."""
    FIRST: gl.constexpr = SLAB * PART if p.BN > SLAB else 0
    product = n // PRODUCT
    depth = gl.where(left == 0, 0, gl.where(product == 0, p.hidden, p.inner))
    width = gl.where(product == 2, p.hidden, p.inner)
    col = (n % PRODUCT) * p.BN + FIRST
    LA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, A, 16])
    biases = p.up_bias_ptr
    if product == 1:
        biases = p.mid_bias_ptr
    if product == 2:
        biases = p.down_bias_ptr
    column = col + gl.arange(0, SLAB, layout=gl.SliceLayout(1, LA))
    at = biases + e.to(gl.int64) * width + column
    bias = gl.load(at, mask=column < width, other=0.0)
    acc0 = gl.zeros((SLAB, A), gl.float32, layout=LA)
    if B > 0:
        LB: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, B, 16])
        acc1 = gl.zeros((SLAB, B), gl.float32, layout=LB)
    for k in range(0, depth, p.BK):
        i = c % p.NB
        mbarrier.wait(p.full.index(i), (c // p.NB) & 1)
        fence_async_shared()
        w = p.b_bufs.index(i).reshape([p.BN, p.BK]).slice(FIRST, SLAB, dim=0)
        x = p.a_bufs.index(i).slice(0, A, dim=0).permute((1, 0))
        acc0 = warpgroup_mma(w, x, acc0, is_async=True)
        if B > 0:
            if A < SLAB:
                x = p.a_bufs.index(i).slice(A, B, dim=0).permute((1, 0))
            else:
                x = p.rest_bufs.index(i).slice(0, B, dim=0).permute((1, 0))
            acc1 = warpgroup_mma(w, x, acc1, is_async=True)
            acc0, acc1 = warpgroup_mma_wait(2, (acc0, acc1))
        else:
            acc0 = warpgroup_mma_wait(1, (acc0,))
        mbarrier.arrive(p.empty.index((c + p.NB - 1) % p.NB), count=1, pred=k > 0)
        c += 1
    if B > 0:
        acc0, acc1 = warpgroup_mma_wait(0, (acc0, acc1))
    else:
        acc0 = warpgroup_mma_wait(0, (acc0,))
    mbarrier.arrive(p.empty.index((c + p.NB - 1) % p.NB), count=1, pred=left > 0)
    base = p.first_ptr
    if product == 1:
        base = p.second_ptr
    if product == 2:
        base = p.out_ptr
    low = gl.where(product < 2, 0.0, -float("inf"))
    _write(p, acc0, bias, PART, A, base, low, width, row, left, 0, col)
    if B > 0:
        _write(p, acc1, bias, PART, B, base, low, width, row, left, A, col)


@gluon.jit
def _consume(p, PART: gl.constexpr):
    """One warpgroup: its half of every tile, or every second tile, announced where another product
    waits for it."""
    i = p.hidden * 0
    if p.BN == SLAB:
        i += PART
    # A first round without rows, while the first tile is on its way: its instructions are.
    left = i * 0
    c, row, n, e = left, left, left, left
    height = left + p.BM
    while height > 0:
        if height <= 64:
            if p.BM > 64:
                _multiply(p, c, row, left, n, e, PART, 64, 0)
            elif height <= 32:
                _multiply(p, c, row, left, n, e, PART, 32, 0)
            else:
                _multiply(p, c, row, left, n, e, PART, 64, 0)
        elif p.BM > 96:
            if height <= SLAB:
                _multiply(p, c, row, left, n, e, PART, 128, 0)
            elif p.BM > SLAB + 16:
                if height <= SLAB + 16:
                    _multiply(p, c, row, left, n, e, PART, 128, 16)
                else:
                    _multiply(p, c, row, left, n, e, PART, 128, 32)
            elif p.BM > SLAB:
                _multiply(p, c, row, left, n, e, PART, 128, 16)
        elif p.BM > 64:
            _multiply(p, c, row, left, n, e, PART, 64, 32)
        if left > 0:
            barrier()
            mbarrier.arrive(p.written.index(i % QUEUE), count=1)
            i += 1 if p.BN > SLAB else 2
        c, row, left, n, e, _ = _hear(p, i)
        if left > 0:
            _taken(p, i)
        height = left


@gluon.jit
def _tell(p):
    """One warp: counts written tiles at their entry, so that no warpgroup waits until its writes
    have reached the L2."""
    EACH: gl.constexpr = 2 if p.BN > SLAB else 1
    i = p.hidden * 0
    _, _, left, n, _, j = _hear(p, i)
    while left > 0:
        mbarrier.wait(p.written.index(i % QUEUE), (i // QUEUE) & 1)
        if n < 2 * PRODUCT:
            gl.atomic_add(p.done_ptr + j, EACH, sem="release")
        _taken(p, i)
        i += 1
        _, _, left, n, _, j = _hear(p, i)


@gluon.jit
def _low(p):
    _consume(p, 0)


@gluon.jit
def _high(p):
    _consume(p, 1)


@gluon.jit(do_not_specialize=["up_n", "mid_n", "down_n", "top_k"])
def chain_kernel(
    x, order_ptr, up_desc, mid_desc, down_desc, first_ptr, second_ptr, out_ptr,
    up_bias_ptr, mid_bias_ptr, down_bias_ptr,
    tile_end_ptr, task_ptr, row_start_ptr, rows_ptr, done_ptr, ticket_ptr,
    hidden, inner, up_n, mid_n, down_n, top_k,
    N: gl.constexpr, LANES: gl.constexpr, BM: gl.constexpr, REST: gl.constexpr, BN: gl.constexpr,
    BK: gl.constexpr, NB: gl.constexpr, PDL: gl.constexpr, SPLIT: gl.constexpr,
    CREG: gl.constexpr, LREG: gl.constexpr,
):  # fmt: skip
    """out[row] = act(act(x[token of row] @ up[e].T) @ mid[e].T) @ down[e].T, biases added.

    x: (T, H). order_ptr: int32 (S,) slot of each sorted row, token = slot // top_k. up_desc:
    (E, I, H), mid_desc: (E, I, I), down_desc: (E, H, I), box (1, BN, BK). first_ptr, second_ptr:
    (S, I), out_ptr: (S, H). Biases (E, I), (E, I) and (E, H). The task map's arrays
    are (N,) int32; done_ptr: int32 (N,), BM for every entry that has rows; ticket_ptr: one zero,
    put back at the end. up_n, mid_n, down_n: column tiles. SPLIT: row tiles of the last product for
    each of the others.
    """
    A: gl.constexpr = gl.NVMMASharedLayout.get_default_for([128, BK], up_desc.dtype)
    R: gl.constexpr = gl.NVMMASharedLayout.get_default_for([REST, BK], up_desc.dtype)
    C: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 64], up_desc.dtype)
    a_bufs = gl.allocate_shared_memory(up_desc.dtype, [NB, 128, BK], A)
    rest_bufs = gl.allocate_shared_memory(up_desc.dtype, [NB, REST, BK], R)
    b_bufs = gl.allocate_shared_memory(
        up_desc.dtype, [NB] + up_desc.block_type.shape, up_desc.layout
    )
    c_bufs = gl.allocate_shared_memory(up_desc.dtype, [2, 64, 64], C)
    full = gl.allocate_shared_memory(gl.int64, [NB, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [NB, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NB):
        mbarrier.init(full.index(i), count=129)
        mbarrier.init(empty.index(i), count=2 if BN > SLAB else 1)
    ready = gl.allocate_shared_memory(gl.int64, [QUEUE, 1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [QUEUE, 1], mbarrier.MBarrierLayout())
    written = gl.allocate_shared_memory(gl.int64, [QUEUE, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(QUEUE):
        mbarrier.init(ready.index(i), count=129)
        mbarrier.init(taken.index(i), count=288 if BN > SLAB else 160)
        mbarrier.init(written.index(i), count=2 if BN > SLAB else 1)
    fence_async_shared()
    notes = gl.allocate_shared_memory(
        gl.int32, [6 * QUEUE, 1], gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    )
    p = Chain(
        x, order_ptr, up_desc, mid_desc, down_desc, first_ptr, second_ptr, out_ptr,
        up_bias_ptr, mid_bias_ptr, down_bias_ptr, tile_end_ptr, task_ptr, row_start_ptr, rows_ptr,
        done_ptr, ticket_ptr, a_bufs, rest_bufs, b_bufs, c_bufs, notes, ready, taken, written, full,
        empty, hidden, inner, top_k, N, LANES, BM, REST, BN, BK, NB, PDL, SPLIT,
    )  # fmt: skip
    gl.warp_specialize(
        [(_low, (p,)), (_high, (p,)), (_load, (p, up_n, mid_n, down_n)), (_tell, (p,))],
        [4, 4, 1],
        [CREG, LREG, 24],
    )
