"""What the partitions of `paired` and of `chained` share; draws, places and notes of tiles, which
`flexed` has too.

E experts · H hidden width · I intermediate width · N entries of the task map · NB stages
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.language.core import _aggregate as aggregate


@aggregate
class Pair:
    """What the partitions share: operands, shared memory, barriers, the task map."""

    x: gl.tensor
    order_ptr: gl.tensor
    act_ptr: gl.tensor
    out_ptr: gl.tensor
    up_desc: tma.tensor_descriptor
    down_desc: tma.tensor_descriptor
    tile_end_ptr: gl.tensor
    task_ptr: gl.tensor
    row_start_ptr: gl.tensor
    rows_ptr: gl.tensor
    done_ptr: gl.tensor
    ticket_ptr: gl.tensor
    joined_ptr: gl.tensor
    weights_ptr: gl.tensor
    sum_ptr: gl.tensor
    counters_ptr: gl.tensor
    a_bufs: gl.shared_memory_descriptor
    b_bufs: gl.shared_memory_descriptor
    notes: gl.shared_memory_descriptor
    slots: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    hidden: gl.tensor
    inner: gl.tensor
    top_k: gl.tensor
    experts: gl.tensor
    limit: gl.tensor
    alpha: gl.tensor
    up_offset: gl.tensor
    N: gl.constexpr
    LANES: gl.constexpr
    ONE: gl.constexpr
    FEW: gl.constexpr
    TOP_K: gl.constexpr
    SUM: gl.constexpr
    COUNT: gl.constexpr
    GATED: gl.constexpr
    ACTIVATION: gl.constexpr
    HAS_LIMIT: gl.constexpr
    BM: gl.constexpr
    BN: gl.constexpr
    BK: gl.constexpr
    NB: gl.constexpr
    PDL: gl.constexpr
    LATE: gl.constexpr
    FLIGHT: gl.constexpr
    FIRST: gl.constexpr

    @gluon.constexpr_function
    def __init__(
        self, x, order_ptr, act_ptr, out_ptr, up_desc, down_desc, tile_end_ptr, task_ptr,
        row_start_ptr, rows_ptr, done_ptr, ticket_ptr, joined_ptr, weights_ptr, sum_ptr,
        counters_ptr, a_bufs, b_bufs, notes, slots, full, empty, hidden, inner, top_k,
        experts, limit, alpha, up_offset, N, LANES, ONE, FEW, TOP_K, SUM, COUNT, GATED, ACTIVATION,
        HAS_LIMIT, BM, BN, BK, NB, PDL, LATE, FLIGHT, FIRST,
    ):  # fmt: skip
        self.x = x
        self.order_ptr = order_ptr
        self.act_ptr = act_ptr
        self.out_ptr = out_ptr
        self.up_desc = up_desc
        self.down_desc = down_desc
        self.tile_end_ptr = tile_end_ptr
        self.task_ptr = task_ptr
        self.row_start_ptr = row_start_ptr
        self.rows_ptr = rows_ptr
        self.done_ptr = done_ptr
        self.ticket_ptr = ticket_ptr
        self.joined_ptr = joined_ptr
        self.weights_ptr = weights_ptr
        self.sum_ptr = sum_ptr
        self.counters_ptr = counters_ptr
        self.a_bufs = a_bufs
        self.b_bufs = b_bufs
        self.notes = notes
        self.slots = slots
        self.full = full
        self.empty = empty
        self.hidden = hidden
        self.inner = inner
        self.top_k = top_k
        self.experts = experts
        self.limit = limit
        self.alpha = alpha
        self.up_offset = up_offset
        self.N = gl.constexpr(N)
        self.LANES = gl.constexpr(LANES)
        self.ONE = gl.constexpr(ONE)
        self.FEW = gl.constexpr(FEW)
        self.TOP_K = gl.constexpr(TOP_K)
        self.SUM = gl.constexpr(SUM)
        self.COUNT = gl.constexpr(COUNT)
        self.GATED = gl.constexpr(GATED)
        self.ACTIVATION = gl.constexpr(ACTIVATION)
        self.HAS_LIMIT = gl.constexpr(HAS_LIMIT)
        self.BM = gl.constexpr(BM)
        self.BN = gl.constexpr(BN)
        self.BK = gl.constexpr(BK)
        self.NB = gl.constexpr(NB)
        self.PDL = gl.constexpr(PDL)
        self.LATE = gl.constexpr(LATE)
        self.FLIGHT = gl.constexpr(FLIGHT)
        self.FIRST = gl.constexpr(FIRST)


@gluon.jit
def find(p, end, t, n_tiles):
    """Entry, expert, first row, rows, row tile, row tiles and column tile of tile `t` of a product.

    `end`: the map's prefix of tiles, in every warp. The row tiles of an entry that meet the same
    weights are neighbours.
    """
    passed = end <= t // n_tiles
    j = gl.sum(passed.to(gl.int32), axis=0)
    first = gl.max(gl.where(passed, end, 0), axis=0)
    m_tiles = gl.min(gl.where(passed, 0x7FFFFFFF, end), axis=0) - first
    e = gl.load(p.task_ptr + j)
    row_start = gl.load(p.row_start_ptr + j)
    rows = gl.load(p.rows_ptr + j)
    q = t - first * n_tiles
    return j, e, row_start, rows, q % m_tiles, m_tiles, q // m_tiles


@gluon.jit
def draw(p):
    """Draw a tile. Every program draws until it fails, so the last draw of all is known."""
    return gl.atomic_add(p.ticket_ptr, 1, sem="relaxed")


@gluon.jit
def write_note(p, stage, row_start, rows, m, n, j):
    """Leave where the tile is beside its first stage: five numbers."""
    L: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    p.notes.index(5 * stage).store(gl.full([1], row_start, gl.int32, layout=L))
    p.notes.index(5 * stage + 1).store(gl.full([1], rows, gl.int32, layout=L))
    p.notes.index(5 * stage + 2).store(gl.full([1], m, gl.int32, layout=L))
    p.notes.index(5 * stage + 3).store(gl.full([1], n, gl.int32, layout=L))
    p.notes.index(5 * stage + 4).store(gl.full([1], j, gl.int32, layout=L))


@gluon.jit
def read_note(p, c):
    """Wait for stage `c` of the ring and read its note; a tile without rows ends the work."""
    L: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    stage = c % p.NB
    mbarrier.wait(p.full.index(stage), (c // p.NB) & 1)
    row_start = gl.max(p.notes.index(5 * stage).load(L), axis=0)
    rows = gl.max(p.notes.index(5 * stage + 1).load(L), axis=0)
    m = gl.max(p.notes.index(5 * stage + 2).load(L), axis=0)
    n = gl.max(p.notes.index(5 * stage + 3).load(L), axis=0)
    j = gl.max(p.notes.index(5 * stage + 4).load(L), axis=0)
    return row_start, rows, m, n, j


@gluon.jit
def note_slots(p, stage, slot):
    """Leave the slots of a tile's rows beside its note."""
    if p.FEW:
        p.slots.index(stage).store(slot)


@aggregate
class Chain:
    """What the partitions share: operands, shared memory, barriers, the task map."""

    x: gl.tensor
    order_ptr: gl.tensor
    up_desc: tma.tensor_descriptor
    mid_desc: tma.tensor_descriptor
    down_desc: tma.tensor_descriptor
    first_ptr: gl.tensor
    second_ptr: gl.tensor
    out_ptr: gl.tensor
    up_bias_ptr: gl.tensor
    mid_bias_ptr: gl.tensor
    down_bias_ptr: gl.tensor
    tile_end_ptr: gl.tensor
    task_ptr: gl.tensor
    row_start_ptr: gl.tensor
    rows_ptr: gl.tensor
    done_ptr: gl.tensor
    ticket_ptr: gl.tensor
    a_bufs: gl.shared_memory_descriptor
    rest_bufs: gl.shared_memory_descriptor
    b_bufs: gl.shared_memory_descriptor
    c_bufs: gl.shared_memory_descriptor
    notes: gl.shared_memory_descriptor
    ready: gl.shared_memory_descriptor
    taken: gl.shared_memory_descriptor
    written: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    hidden: gl.tensor
    inner: gl.tensor
    top_k: gl.tensor
    N: gl.constexpr
    LANES: gl.constexpr
    BM: gl.constexpr
    REST: gl.constexpr
    BN: gl.constexpr
    BK: gl.constexpr
    NB: gl.constexpr
    PDL: gl.constexpr
    SPLIT: gl.constexpr

    @gluon.constexpr_function
    def __init__(
        self, x, order_ptr, up_desc, mid_desc, down_desc, first_ptr, second_ptr, out_ptr,
        up_bias_ptr, mid_bias_ptr, down_bias_ptr, tile_end_ptr, task_ptr, row_start_ptr, rows_ptr,
        done_ptr, ticket_ptr, a_bufs, rest_bufs, b_bufs, c_bufs, notes, ready, taken, written, full,
        empty, hidden, inner, top_k, N, LANES, BM, REST, BN, BK, NB, PDL, SPLIT,
    ):  # fmt: skip
        self.x = x
        self.order_ptr = order_ptr
        self.up_desc = up_desc
        self.mid_desc = mid_desc
        self.down_desc = down_desc
        self.first_ptr = first_ptr
        self.second_ptr = second_ptr
        self.out_ptr = out_ptr
        self.up_bias_ptr = up_bias_ptr
        self.mid_bias_ptr = mid_bias_ptr
        self.down_bias_ptr = down_bias_ptr
        self.tile_end_ptr = tile_end_ptr
        self.task_ptr = task_ptr
        self.row_start_ptr = row_start_ptr
        self.rows_ptr = rows_ptr
        self.done_ptr = done_ptr
        self.ticket_ptr = ticket_ptr
        self.a_bufs = a_bufs
        self.rest_bufs = rest_bufs
        self.b_bufs = b_bufs
        self.c_bufs = c_bufs
        self.notes = notes
        self.ready = ready
        self.taken = taken
        self.written = written
        self.full = full
        self.empty = empty
        self.hidden = hidden
        self.inner = inner
        self.top_k = top_k
        self.N = gl.constexpr(N)
        self.LANES = gl.constexpr(LANES)
        self.BM = gl.constexpr(BM)
        self.REST = gl.constexpr(REST)
        self.BN = gl.constexpr(BN)
        self.BK = gl.constexpr(BK)
        self.NB = gl.constexpr(NB)
        self.PDL = gl.constexpr(PDL)
        self.SPLIT = gl.constexpr(SPLIT)
