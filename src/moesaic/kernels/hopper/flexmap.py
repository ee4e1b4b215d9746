"""What the partitions of `flexed` share, and how its work ends.

N entries of the task map · NB stages of the ring
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.language.core import _aggregate as aggregate


@aggregate
class Layer:
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
    a_bufs: gl.shared_memory_descriptor
    b_bufs: gl.shared_memory_descriptor
    notes: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    hidden: gl.tensor
    inner: gl.tensor
    top_k: gl.tensor
    limit: gl.tensor
    alpha: gl.tensor
    up_offset: gl.tensor
    N: gl.constexpr
    LANES: gl.constexpr
    GATED: gl.constexpr
    ACTIVATION: gl.constexpr
    HAS_LIMIT: gl.constexpr
    BM: gl.constexpr
    BN: gl.constexpr
    BK: gl.constexpr
    NB: gl.constexpr
    PDL: gl.constexpr
    FIRST: gl.constexpr

    @gluon.constexpr_function
    def __init__(
        self, x, order_ptr, act_ptr, out_ptr, up_desc, down_desc, tile_end_ptr, task_ptr,
        row_start_ptr, rows_ptr, done_ptr, ticket_ptr, a_bufs, b_bufs, notes, full, empty,
        hidden, inner, top_k, limit, alpha, up_offset, N, LANES, GATED, ACTIVATION, HAS_LIMIT, BM,
        BN, BK, NB, PDL, FIRST,
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
        self.a_bufs = a_bufs
        self.b_bufs = b_bufs
        self.notes = notes
        self.full = full
        self.empty = empty
        self.hidden = hidden
        self.inner = inner
        self.top_k = top_k
        self.limit = limit
        self.alpha = alpha
        self.up_offset = up_offset
        self.N = gl.constexpr(N)
        self.LANES = gl.constexpr(LANES)
        self.GATED = gl.constexpr(GATED)
        self.ACTIVATION = gl.constexpr(ACTIVATION)
        self.HAS_LIMIT = gl.constexpr(HAS_LIMIT)
        self.BM = gl.constexpr(BM)
        self.BN = gl.constexpr(BN)
        self.BK = gl.constexpr(BK)
        self.NB = gl.constexpr(NB)
        self.PDL = gl.constexpr(PDL)
        self.FIRST = gl.constexpr(FIRST)


@gluon.jit
def settle(p, t, total):
    """The program that drew last puts the counter back."""
    if t == total + gl.num_programs(0) - 1:
        gl.store(p.ticket_ptr, 0)
