"""Grouped GEMM for many rows per expert: tall tiles that read each weight once for many rows.

    S routed rows · T tokens · E experts · C columns of the product · K its depth
    unit: 64 rows · BM most rows of a tile (a multiple of 64, to 384) · BN = 128 weight rows
    BK depth of a stage · NB stages of shared memory

A task's rows are cut into as few tiles as BM allows, all of nearly the same number of units, so a
task of 300 rows is one tile of five units: its weights come from memory once, and a short tail
costs its own units instead of a tile. One persistent launch walks the tiles. The loader partition
fills a ring of NB stages with weights and sorted rows, both by TMA: gathering this many rows a
stage by cp.async was slower than a copy of them made beforehand. Two consumer warpgroups take the
units in turn, up to three each, and write them by ragged TMA stores; one may run ahead of the other
by the length of the ring.

A gated weight is seen as (E, I/8, 2, 8, H): eight gate rows, then the eight up rows that belong to
them, so both halves of a pair sit in one thread and the activation needs no exchange.
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
from triton.language.extra.cuda import gdc_wait

from .pipeline import Stage, add_bias, begin, column_tile, put_piece, with_expert
from .tiles import (
    Work,
    activate,
    activate_alone,
    draw_shared,
    load_weight,
    locate,
    next_tile,
    tile_count,
)

UNIT = gl.constexpr(64)


@gluon.jit
def _span(rows, m, BM: gl.constexpr):
    """First unit and number of units of row tile `m` of a task: units shared out evenly.

    With 300 rows and BM 192: five units in two tiles, (0, 3) and (3, 2).
    """
    units = gl.cdiv(rows, UNIT)
    tiles = gl.cdiv(rows, BM)
    base = units // tiles
    extra = units - base * tiles
    first = m * base + gl.minimum(m, extra)
    count = gl.where(m < extra, base + 1, base)
    return first, count


@gluon.jit
def _write_note(p, stage, row_start, rows, first, units, n):
    """Leave what a tile is beside its first stage: five numbers."""
    L: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    p.notes.index(5 * stage).store(gl.full([1], row_start, gl.int32, layout=L))
    p.notes.index(5 * stage + 1).store(gl.full([1], rows, gl.int32, layout=L))
    p.notes.index(5 * stage + 2).store(gl.full([1], first, gl.int32, layout=L))
    p.notes.index(5 * stage + 3).store(gl.full([1], units, gl.int32, layout=L))
    p.notes.index(5 * stage + 4).store(gl.full([1], n, gl.int32, layout=L))


@gluon.jit
def _read_note(p, c):
    """Wait for stage `c` of the ring and read its note; a tile without units ends the work."""
    L: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    stage = c % p.NB
    mbarrier.wait(p.full.index(stage), (c // p.NB) & 1)
    row_start = gl.max(p.notes.index(5 * stage).load(L), axis=0)
    rows = gl.max(p.notes.index(5 * stage + 1).load(L), axis=0)
    first = gl.max(p.notes.index(5 * stage + 2).load(L), axis=0)
    units = gl.max(p.notes.index(5 * stage + 3).load(L), axis=0)
    n = gl.max(p.notes.index(5 * stage + 4).load(L), axis=0)
    return row_start, rows, first, units, n


@gluon.jit
def _load_tile(p, c, e, row_start, rows, m, n):
    """All stages of a tile, from stage `c` of the ring on; the stage after them."""
    first, units = _span(rows, m, p.BM)
    row = row_start + first * UNIT
    for k in range(0, p.K, p.BK):
        i = c % p.NB
        full = p.full.index(i)
        mbarrier.wait(p.empty.index(i), ((c // p.NB) & 1) ^ 1)
        if k == 0:
            _write_note(p, i, row_start, rows, first, units, with_expert(p, e, n))
        for some in gl.static_range(1, p.BM // UNIT + 1):
            mbarrier.expect(
                full,
                p.w_desc.block_type.nbytes + some * p.x.block_type.nbytes,
                pred=units == some,
            )
        load_weight(p.w_desc, e, n, k, full, p.b_bufs.index(i), True, p.GATED, p.BN)
        for unit in range(0, units):
            tma.async_copy_global_to_shared(
                p.x, [row + unit * UNIT, k], full, p.a_bufs.index(i * (p.BM // UNIT) + unit)
            )
        async_copy.mbarrier_arrive(full, increment_count=False)
        c += 1
    return c


@gluon.jit
def _end(p, c):
    """Tell the consumers in stage `c` that there are no more tiles."""
    i = c % p.NB
    mbarrier.wait(p.empty.index(i), ((c // p.NB) & 1) ^ 1)
    _write_note(p, i, 0, 0, 0, 0, 0)
    mbarrier.arrive(p.full.index(i), count=1)
    async_copy.mbarrier_arrive(p.full.index(i), increment_count=False)


@gluon.jit
def load_rows_tall(p, work):
    """One warp: weights and sorted rows by TMA; rows past a task's end belong to its neighbour."""
    begin(p)
    tiles = tile_count(work)
    t = gl.program_id(0)
    c = t * 0
    if p.PDL == "prefetch":
        gdc_wait()
    while t < tiles:
        e, row_start, rows, m, n = locate(t, work)
        t = next_tile(t, tiles, work)
        c = _load_tile(p, c, e, row_start, rows, m, n)
    if work.DYNAMIC and gl.program_id(0) >= tiles:
        next_tile(t, tiles, work)
    _end(p, c)


@gluon.jit
def _load_rows_shared(p, work, GUEST: gl.constexpr):
    """As `load_rows_tall`, of a map that several launches share.

    The next tile is drawn when this one's last stage is under way, not ahead of it, so that a guest
    gives its SM back a tile sooner; the stages in flight hide the draw.
    """
    begin(p)
    tiles = tile_count(work)
    t = tiles * 0
    c = tiles * 0
    # One draw, inside the loop: of an atomic before a loop ptxas 12.8 makes a branch after which
    # the warp does not come together again, and the loop's uniform instructions are then illegal.
    while t < tiles:
        t = draw_shared(p.order_ptr, tiles, work, GUEST)
        if t < tiles:
            e, row_start, rows, m, n = locate(t, work)
            c = _load_tile(p, c, e, row_start, rows, m, n)
    _end(p, c)


@gluon.jit
def load_rows_owner(p, work):
    """The loader of the launch that ends when every tile is drawn."""
    _load_rows_shared(p, work, False)


@gluon.jit
def load_rows_guest(p, work):
    """The loader of a launch that helps while nobody wants its SMs."""
    _load_rows_shared(p, work, True)


@gluon.jit
def _put_unit(p, acc, PART: gl.constexpr, puts, row_start, rows, row, n):
    """Activate and store one unit (64, 128), in pieces of 64 columns; the count of pieces sent."""
    if p.GATED:
        g, u = acc.reshape(64, 8, 2, 8).permute(0, 1, 3, 2).split()
        y = activate(g, u, p.ACTIVATION, p.HAS_LIMIT, p.limit, p.alpha, p.up_offset)
        c_buf = p.c_bufs.index(2 * PART + (puts & 1))
        put_piece(p, y.reshape(64, 64), c_buf, row_start, rows, row, n * 64)
        return puts + 1
    else:
        col = column_tile(p, n) * 128
        acc = add_bias(p, acc, n, col)
        y = activate_alone(acc, p.ACTIVATION, p.HAS_LIMIT, p.limit, p.alpha)
        left, right = y.reshape(64, 2, 64).permute(0, 2, 1).split()
        put_piece(p, left, p.c_bufs.index(2 * PART), row_start, rows, row, col)
        put_piece(p, right, p.c_bufs.index(2 * PART + 1), row_start, rows, row, col + 64)
        return puts


@gluon.jit
def _multiply(p, c, puts, PART: gl.constexpr, COUNT: gl.constexpr, row_start, rows, first, n):
    """COUNT units of one warpgroup through the whole depth; one in-order K chain per element."""
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, p.BN, 16])
    UNITS: gl.constexpr = p.BM // UNIT
    acc0 = gl.zeros((UNIT, p.BN), gl.float32, layout=L)
    acc1 = gl.zeros((UNIT, p.BN), gl.float32, layout=L)
    acc2 = gl.zeros((UNIT, p.BN), gl.float32, layout=L)
    for k in range(0, p.K, p.BK):
        i = c % p.NB
        mbarrier.wait(p.full.index(i), (c // p.NB) & 1)
        b = p.b_bufs.index(i).reshape([p.BN, p.BK]).permute((1, 0))
        acc0 = warpgroup_mma(p.a_bufs.index(i * UNITS + PART), b, acc0, is_async=True)
        if COUNT > 1:
            acc1 = warpgroup_mma(p.a_bufs.index(i * UNITS + PART + 2), b, acc1, is_async=True)
        if COUNT > 2:
            acc2 = warpgroup_mma(p.a_bufs.index(i * UNITS + PART + 4), b, acc2, is_async=True)
        if COUNT == 1:
            acc0 = warpgroup_mma_wait(1, (acc0,))
        elif COUNT == 2:
            acc0, acc1 = warpgroup_mma_wait(2, (acc0, acc1))
        else:
            acc0, acc1, acc2 = warpgroup_mma_wait(3, (acc0, acc1, acc2))
        mbarrier.arrive(p.empty.index((c + p.NB - 1) % p.NB), count=1, pred=k > 0)
        c += 1
    if COUNT == 1:
        acc0 = warpgroup_mma_wait(0, (acc0,))
    elif COUNT == 2:
        acc0, acc1 = warpgroup_mma_wait(0, (acc0, acc1))
    else:
        acc0, acc1, acc2 = warpgroup_mma_wait(0, (acc0, acc1, acc2))
    mbarrier.arrive(p.empty.index((c + p.NB - 1) % p.NB), count=1)
    row = (first + PART) * UNIT
    puts = _put_unit(p, acc0, PART, puts, row_start, rows, row, n)
    if COUNT > 1:
        puts = _put_unit(p, acc1, PART, puts, row_start, rows, row + 2 * UNIT, n)
    if COUNT > 2:
        puts = _put_unit(p, acc2, PART, puts, row_start, rows, row + 4 * UNIT, n)
    return c, puts


@gluon.jit
def _pass_by(p, c):
    """Give the stages of a tile back unread."""
    for _ in range(0, p.K, p.BK):
        mbarrier.wait(p.full.index(c % p.NB), (c // p.NB) & 1)
        mbarrier.arrive(p.empty.index(c % p.NB), count=1)
        c += 1
    return c


@gluon.jit
def _consume(p, work, PART: gl.constexpr):
    """One warpgroup: every second unit of every tile, from unit PART on."""
    row_start, rows, first, units, n = _read_note(p, 0)
    c = rows * 0
    puts = rows * 0
    while units > 0:
        mine = (units + 1 - PART) // 2
        if mine == 2:
            c, puts = _multiply(p, c, puts, PART, 2, row_start, rows, first, n)
        elif mine == 1:
            c, puts = _multiply(p, c, puts, PART, 1, row_start, rows, first, n)
        elif mine == 0:
            c = _pass_by(p, c)
        elif p.BM > 256:
            c, puts = _multiply(p, c, puts, PART, 3, row_start, rows, first, n)
        row_start, rows, first, units, n = _read_note(p, c)
    tma.store_wait(0)


@gluon.jit
def _consume_even(p, work):
    _consume(p, work, 0)


@gluon.jit
def _consume_odd(p, work):
    _consume(p, work, 1)


@gluon.jit(do_not_specialize=["experts", "n_tiles", "top_k"])
def tall_kernel(
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

    x: TMA descriptor of the sorted rows (S, K), box (64, BK). GATHER: False. order_ptr: not read;
    of "owner" and "guest" (DYNAMIC) `wanted_ptr` of `draw_shared`, and ticket_ptr as there.
    w_desc: (E, C/16, 2, 8, K) box (1, BN/16, 2, 8, BK) when GATED, else (E, C, K) box (1, BN, BK).
    out_desc: ragged store descriptor of (S, columns), box (1, 1, 64, 64). The task map's arrays
    are (N,) int32, total_ptr (2,), ticket_ptr one zero when DYNAMIC. bias_ptr: (E, cols), added to
    an ungated product before its activation when HAS_BIAS.
    """
    A: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BK], w_desc.dtype)
    a_bufs = gl.allocate_shared_memory(w_desc.dtype, [NB * (BM // 64), 64, BK], A)
    b_bufs = gl.allocate_shared_memory(w_desc.dtype, [NB] + w_desc.block_type.shape, w_desc.layout)
    c_bufs = gl.allocate_shared_memory(
        out_desc.dtype, [4] + out_desc.block_type.shape, out_desc.layout
    )
    full = gl.allocate_shared_memory(gl.int64, [NB, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [NB, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NB):
        mbarrier.init(full.index(i), count=33)
        mbarrier.init(empty.index(i), count=2)
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
    if DYNAMIC == "owner":
        gl.warp_specialize(
            [(_consume_even, (p, work)), (_consume_odd, (p, work)), (load_rows_owner, (p, work))],
            [4, 1],
            [CREG, LREG],
        )
    elif DYNAMIC == "guest":
        gl.warp_specialize(
            [(_consume_even, (p, work)), (_consume_odd, (p, work)), (load_rows_guest, (p, work))],
            [4, 1],
            [CREG, LREG],
        )
    else:
        gl.warp_specialize(
            [(_consume_even, (p, work)), (_consume_odd, (p, work)), (load_rows_tall, (p, work))],
            [4, 1],
            [CREG, LREG],
        )
