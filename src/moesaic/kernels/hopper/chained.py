"""All three products of a layer in one launch, by tiles as tall as their rows.

    S routed rows · T tokens · E experts · H hidden width · I intermediate width
    BM most rows of a tile (to 128 + REST) · BN weight rows (128 or 256) · BK depth of a stage
    NB stages · N entries of the task map

Three launches leave SMs idle three times: where tiles do not divide by the SMs, and while one
drains and the next looks up its work. Here every program draws tiles from one counter, first those
of the up-projection, then the middle's, then the down-projection's. Its loader asks for the weights
of a tile while the one before is multiplied, and waits with the rows until the entry's counter says
that all tiles of the product before are written. Whoever waits holds no tile that others wait for,
and waits for tiles that were drawn before its own, so no program need run beside another.

Weights stand on the wide side of wgmma, half of them in each of two warpgroups, and rows on the
narrow one: a task's rows are cut evenly into as few tiles as BM allows, and a tile is multiplied at
the least of 32, 64, 128 and 128 + 16, 32 or 64 rows that hold its own. With a hundred rows and more
an expert the time is that of moving operands from the L2 cache to the SMs, so tiles of 256 weight
rows, which read their rows half as often, win. Order of the K chain and rounding are those of the
other tiles: the bits are the same.
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

from .operands import Chain
from .tiles import activate_alone

barrier = getattr(gl, "barrier", None) or gl.thread_barrier
STEP = gl.constexpr(16)
PRODUCT = gl.constexpr(1 << 20)
"""A note's column tile has the number of the product above it."""


@gluon.jit
def _write_note(p, stage, row, left, n, e, j):
    """Leave where the tile is beside its first stage: first row, rows, column tile and product,
    expert, entry."""
    L: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    p.notes.index(5 * stage).store(gl.full([1], row, gl.int32, layout=L))
    p.notes.index(5 * stage + 1).store(gl.full([1], left, gl.int32, layout=L))
    p.notes.index(5 * stage + 2).store(gl.full([1], n, gl.int32, layout=L))
    p.notes.index(5 * stage + 3).store(gl.full([1], e, gl.int32, layout=L))
    p.notes.index(5 * stage + 4).store(gl.full([1], j, gl.int32, layout=L))


@gluon.jit
def _read_note(p, c):
    """Wait for stage `c` of the ring and read its note; a tile without rows ends the work."""
    L: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    stage = c % p.NB
    mbarrier.wait(p.full.index(stage), (c // p.NB) & 1)
    row = gl.max(p.notes.index(5 * stage).load(L), axis=0)
    left = gl.max(p.notes.index(5 * stage + 1).load(L), axis=0)
    n = gl.max(p.notes.index(5 * stage + 2).load(L), axis=0)
    e = gl.max(p.notes.index(5 * stage + 3).load(L), axis=0)
    j = gl.max(p.notes.index(5 * stage + 4).load(L), axis=0)
    return row, left, n, e, j


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
def _draw(p):
    """Draw a tile. Every program draws until it fails, so the last draw of all is known."""
    return gl.atomic_add(p.ticket_ptr, 1, sem="relaxed")


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
def _load_tile(p, c, product, j, e, row, left, n, base, width, wanted, SORTED: gl.constexpr):
    """Weights and rows of a tile, the rows as soon as `wanted` is counted; the next tile drawn."""
    ahead = c * 0
    if SORTED:
        done = gl.atomic_add(p.done_ptr + j, 0, sem="acquire")
        if done < wanted:
            ahead = gl.minimum(gl.cdiv(width, p.BK), p.NB)
            for s in range(0, ahead):
                i = (c + s) % p.NB
                if s == 0:
                    mbarrier.wait(p.empty.index(i), (((c + s) // p.NB) & 1) ^ 1)
                    _write_note(p, i, row, left, n + product * PRODUCT, e, j)
                _ask_of(p, product, c + s, e, n, s * p.BK)
            while done < wanted:
                done = gl.atomic_add(p.done_ptr + j, 0, sem="acquire")
    t = _draw(p)
    ptrs, live = _rows_at(p, base, row, left, width, SORTED, 0, 128)
    rest, live_rest = _rows_at(p, base, row, left, width, SORTED, 128, p.REST)
    for k in range(0, width, p.BK):
        i = c % p.NB
        if k >= ahead * p.BK:
            if k == 0:
                mbarrier.wait(p.empty.index(i), ((c // p.NB) & 1) ^ 1)
                _write_note(p, i, row, left, n + product * PRODUCT, e, j)
            _ask_of(p, product, c, e, n, k)
        async_copy.async_copy_global_to_shared(p.a_bufs.index(i), ptrs + k, mask=live)
        if left > 128:
            async_copy.async_copy_global_to_shared(p.rest_bufs.index(i), rest + k, mask=live_rest)
        async_copy.mbarrier_arrive(p.full.index(i), increment_count=False)
        c += 1
    return t, c


@gluon.jit
def _load(p, up_n, mid_n, down_n):
    """Four warps: draw tiles, bring their weights and rows."""
    if p.PDL:
        gdc_wait()
        gdc_launch_dependents()
    t = _draw(p)
    L: gl.constexpr = gl.BlockedLayout([p.LANES // 32], [32], [gl.num_warps()], [0])
    lane = gl.arange(0, p.LANES, layout=L)
    end = gl.load(p.tile_end_ptr + lane, mask=lane < p.N, other=0x7FFFFFFF)
    row_tiles = gl.max(gl.where(end == 0x7FFFFFFF, 0, end), axis=0)
    first_mid = row_tiles * up_n
    first_down = first_mid + row_tiles * mid_n
    total = first_down + row_tiles * down_n * p.SPLIT
    c = t * 0
    while t < total:
        product = (t >= first_mid).to(gl.int32) + (t >= first_down).to(gl.int32)
        n_tiles = gl.where(product == 0, up_n, gl.where(product == 1, mid_n, down_n))
        begin = gl.where(product == 0, 0, gl.where(product == 1, first_mid, first_down))
        split = gl.where(product == 2, p.SPLIT, 1)
        q = t - begin
        per = n_tiles * split
        passed = end <= q // per
        j = gl.sum(passed.to(gl.int32), axis=0)
        before = gl.max(gl.where(passed, end, 0), axis=0)
        m_tiles = gl.min(gl.where(passed, 0x7FFFFFFF, end), axis=0) - before
        e = gl.load(p.task_ptr + j)
        row_start = gl.load(p.row_start_ptr + j)
        rows = gl.load(p.rows_ptr + j)
        q -= before * per
        parts = m_tiles * split
        height = gl.cdiv(gl.cdiv(rows, parts), STEP) * STEP
        first = (q % parts) * height
        n = q // parts
        left = gl.minimum(rows - first, height)
        row = row_start + first
        wanted = p.BM + 2 * m_tiles * gl.where(product == 2, up_n + mid_n, up_n)
        if left <= 0:
            t = _draw(p)
        elif product == 0:
            t, c = _load_tile(p, c, 0, j, e, row, left, n, p.x, p.hidden, wanted, False)
        else:
            base = p.first_ptr
            if product == 2:
                base = p.second_ptr
            t, c = _load_tile(p, c, product, j, e, row, left, n, base, p.inner, wanted, True)
    if t == total + gl.num_programs(0) - 1:
        gl.store(p.ticket_ptr, 0)
    i = c % p.NB
    mbarrier.wait(p.empty.index(i), ((c // p.NB) & 1) ^ 1)
    _write_note(p, i, 0, 0, 0, 0, 0)
    mbarrier.arrive(p.full.index(i), count=1)
    async_copy.mbarrier_arrive(p.full.index(i), increment_count=False)


@gluon.jit
def _put(p, acc, PART: gl.constexpr, COUNT: gl.constexpr, puts, base, width, row, left, at, col):
    """Write COUNT rows (64, COUNT) in pieces of 64 rows by 64 columns; `at` rows into the tile."""
    if COUNT > 64:
        top, bottom = acc.reshape(64, 2, COUNT // 2).permute(0, 2, 1).split()
        puts = _put(p, top, PART, COUNT // 2, puts, base, width, row, left, at, col)
        return _put(p, bottom, PART, COUNT // 2, puts, base, width, row, left, at + COUNT // 2, col)
    else:
        OL: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
        buf = p.c_bufs.index(p.CB * PART + puts % p.CB)
        if COUNT < 64:
            buf = buf.slice(0, COUNT, dim=0)
        if p.CB == 1:
            barrier()
        buf.store(acc.to(base.dtype.element_ty).permute(1, 0))
        barrier()
        tile = buf.load(OL)
        r = at + gl.arange(0, COUNT, layout=gl.SliceLayout(1, OL))
        column = col + gl.arange(0, 64, layout=gl.SliceLayout(0, OL))
        to = base + (row + r).to(gl.int64)[:, None] * width + column[None, :]
        gl.store(to, tile, mask=(r < left)[:, None] & (column < width)[None, :])
        return puts + 1


@gluon.jit
def _write(p, acc, PART: gl.constexpr, COUNT: gl.constexpr, puts, to, width, row, left, at, col, e):
    """Add the bias to (BN / 2, COUNT), activate it if that is wanted, and write it.

    `to`: where rows go, their bias, and whether they are activated.
    """
    HALF: gl.constexpr = p.BN // 2
    base, biases, activated = to
    column = col + gl.arange(0, HALF, layout=gl.SliceLayout(1, acc.type.layout))
    bias = gl.load(biases + e.to(gl.int64) * width + column, mask=column < width, other=0.0)
    acc += bias.to(gl.float32)[:, None]
    y = gl.where(activated, activate_alone(acc, p.ACTIVATION, False, 0.0, 1.0), acc)
    if HALF > 64:
        first, second = y.reshape(2, 64, COUNT).permute(1, 2, 0).split()
        puts = _put(p, first, PART, COUNT, puts, base, width, row, left, at, col)
        return _put(p, second, PART, COUNT, puts, base, width, row, left, at, col + 64)
    else:
        return _put(p, y, PART, COUNT, puts, base, width, row, left, at, col)


@gluon.jit
def _multiply(p, c, puts, PART: gl.constexpr, A: gl.constexpr, B: gl.constexpr, row, left, note, e):
    """Half the weight rows of a tile by its A + B rows: one in-order K chain an element."""
    HALF: gl.constexpr = p.BN // 2
    product = note // PRODUCT
    depth = gl.where(product == 0, p.hidden, p.inner)
    LA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, A, 16])
    acc0 = gl.zeros((HALF, A), gl.float32, layout=LA)
    if B > 0:
        LB: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, B, 16])
        acc1 = gl.zeros((HALF, B), gl.float32, layout=LB)
    for k in range(0, depth, p.BK):
        i = c % p.NB
        mbarrier.wait(p.full.index(i), (c // p.NB) & 1)
        fence_async_shared()
        w = p.b_bufs.index(i).reshape([p.BN, p.BK]).slice(HALF * PART, HALF, dim=0)
        x = p.a_bufs.index(i).slice(0, A, dim=0).permute((1, 0))
        acc0 = warpgroup_mma(w, x, acc0, is_async=True)
        if B > 0:
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
    mbarrier.arrive(p.empty.index((c + p.NB - 1) % p.NB), count=1)
    base = p.first_ptr
    biases = p.up_bias_ptr
    if product == 1:
        base = p.second_ptr
        biases = p.mid_bias_ptr
    if product == 2:
        base = p.out_ptr
        biases = p.down_bias_ptr
    to = (base, biases, product < 2)
    width = gl.where(product == 2, p.hidden, p.inner)
    col = (note % PRODUCT) * p.BN + HALF * PART
    puts = _write(p, acc0, PART, A, puts, to, width, row, left, 0, col, e)
    if B > 0:
        puts = _write(p, acc1, PART, B, puts, to, width, row, left, A, col, e)
    return c, puts


@gluon.jit
def _consume(p, PART: gl.constexpr):
    """One warpgroup: its half of every tile, announced where another product waits for it."""
    row, left, note, e, j = _read_note(p, 0)
    c = left * 0
    puts = left * 0
    while left > 0:
        if left <= 32:
            c, puts = _multiply(p, c, puts, PART, 32, 0, row, left, note, e)
        elif left <= 64:
            c, puts = _multiply(p, c, puts, PART, 64, 0, row, left, note, e)
        elif left <= 128:
            c, puts = _multiply(p, c, puts, PART, 128, 0, row, left, note, e)
        elif left <= 128 + 16:
            c, puts = _multiply(p, c, puts, PART, 128, 16, row, left, note, e)
        elif left <= 128 + 32:
            c, puts = _multiply(p, c, puts, PART, 128, 32, row, left, note, e)
        elif p.REST > 32:
            if left <= 128 + 64:
                c, puts = _multiply(p, c, puts, PART, 128, 64, row, left, note, e)
            elif p.REST > 64:
                c, puts = _multiply(p, c, puts, PART, 128, 128, row, left, note, e)
        if note // PRODUCT < 2:
            barrier()
            gl.atomic_add(p.done_ptr + j, 1, sem="release")
        row, left, note, e, j = _read_note(p, c)


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
    N: gl.constexpr, LANES: gl.constexpr, BM: gl.constexpr, REST: gl.constexpr, CB: gl.constexpr,
    BN: gl.constexpr, BK: gl.constexpr, NB: gl.constexpr, PDL: gl.constexpr, SPLIT: gl.constexpr,
    ACTIVATION: gl.constexpr,
    CREG: gl.constexpr, LREG: gl.constexpr,
):  # fmt: skip
    """out[row] = act(act(x[token of row] @ up[e].T) @ mid[e].T) @ down[e].T, biases added.

    x: (T, H). order_ptr: int32 (S,) slot of each sorted row, token = slot // top_k. up_desc:
    (E, I, H), mid_desc: (E, I, I), down_desc: (E, H, I), box (1, BN, BK). first_ptr, second_ptr:
    (S, I), out_ptr: (S, H). Biases (E, I), (E, I) and (E, H). The task map's arrays
    are (N,) int32; done_ptr: int32 (N,), BM for every entry that has rows; ticket_ptr: one zero,
    put back at the end. up_n, mid_n, down_n: column tiles. SPLIT: row tiles of the last product for
    each of the others. CB: buffers of 64 by 64 through which each warpgroup writes.
    """
    A: gl.constexpr = gl.NVMMASharedLayout.get_default_for([128, BK], up_desc.dtype)
    R: gl.constexpr = gl.NVMMASharedLayout.get_default_for([REST, BK], up_desc.dtype)
    C: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 64], up_desc.dtype)
    a_bufs = gl.allocate_shared_memory(up_desc.dtype, [NB, 128, BK], A)
    rest_bufs = gl.allocate_shared_memory(up_desc.dtype, [NB, REST, BK], R)
    b_bufs = gl.allocate_shared_memory(
        up_desc.dtype, [NB] + up_desc.block_type.shape, up_desc.layout
    )
    c_bufs = gl.allocate_shared_memory(up_desc.dtype, [2 * CB, 64, 64], C)
    full = gl.allocate_shared_memory(gl.int64, [NB, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [NB, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NB):
        mbarrier.init(full.index(i), count=129)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    notes = gl.allocate_shared_memory(
        gl.int32, [5 * NB, 1], gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    )
    p = Chain(
        x, order_ptr, up_desc, mid_desc, down_desc, first_ptr, second_ptr, out_ptr,
        up_bias_ptr, mid_bias_ptr, down_bias_ptr, tile_end_ptr, task_ptr, row_start_ptr, rows_ptr,
        done_ptr, ticket_ptr, a_bufs, rest_bufs, b_bufs, c_bufs, notes, full, empty, hidden, inner,
        top_k, N, LANES, BM, REST, CB, BN, BK, NB, PDL, SPLIT, ACTIVATION,
    )  # fmt: skip
    gl.warp_specialize(
        [(_low, (p,)), (_high, (p,)), (_load, (p, up_n, mid_n, down_n))], [4, 4], [CREG, LREG]
    )
