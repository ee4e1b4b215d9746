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
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .chainload import PRODUCT, QUEUE, SLAB, hear, load, taken
from .operands import Chain

barrier = getattr(gl, "barrier", None) or gl.thread_barrier


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
        c, row, left, n, e, _ = hear(p, i)
        if left > 0:
            taken(p, i)
        height = left


@gluon.jit
def _tell(p):
    """One warp: counts written tiles at their entry, so that no warpgroup waits until its writes
    have reached the L2."""
    EACH: gl.constexpr = 2 if p.BN > SLAB else 1
    i = p.hidden * 0
    _, _, left, n, _, j = hear(p, i)
    while left > 0:
        mbarrier.wait(p.written.index(i % QUEUE), (i // QUEUE) & 1)
        if n < 2 * PRODUCT:
            gl.atomic_add(p.done_ptr + j, EACH, sem="release")
        taken(p, i)
        i += 1
        _, _, left, n, _, j = hear(p, i)


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
    took = gl.allocate_shared_memory(gl.int64, [QUEUE, 1], mbarrier.MBarrierLayout())
    written = gl.allocate_shared_memory(gl.int64, [QUEUE, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(QUEUE):
        mbarrier.init(ready.index(i), count=129)
        mbarrier.init(took.index(i), count=288 if BN > SLAB else 160)
        mbarrier.init(written.index(i), count=2 if BN > SLAB else 1)
    fence_async_shared()
    notes = gl.allocate_shared_memory(
        gl.int32, [6 * QUEUE, 1], gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    )
    p = Chain(
        x, order_ptr, up_desc, mid_desc, down_desc, first_ptr, second_ptr, out_ptr,
        up_bias_ptr, mid_bias_ptr, down_bias_ptr, tile_end_ptr, task_ptr, row_start_ptr, rows_ptr,
        done_ptr, ticket_ptr, a_bufs, rest_bufs, b_bufs, c_bufs, notes, ready, took, written, full,
        empty, hidden, inner, top_k, N, LANES, BM, REST, BN, BK, NB, PDL, SPLIT,
    )  # fmt: skip
    gl.warp_specialize(
        [(_low, (p,)), (_high, (p,)), (load, (p, up_n, mid_n, down_n)), (_tell, (p,))],
        [4, 4, 1],
        [CREG, LREG, 24],
    )
