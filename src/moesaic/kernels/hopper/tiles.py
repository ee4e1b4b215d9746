"""Device pieces that the Hopper kernels share: tile look-up, activation, ragged stores.

    N entries of the task map · t tile · e expert · m row tile inside a task · n column tile

Gluon names moved in Triton 3.9, so these kernels state the range they were compiled on.
"""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.language.core import _aggregate as aggregate

from ..activation_triton import activate as _activate
from ..activation_triton import pointwise as _pointwise

TRITON_RANGE = ((3, 6), (3, 9))
RAGGED_ORIGIN = gl.constexpr(1 << 30)
LEAVE = gl.constexpr(1 << 22)
"""One leave, in a counter of tiles: room for 4 million tiles and 511 programs that leave."""
activate = gluon.jit(_activate.fn)
pointwise = gluon.jit(_pointwise.fn)


def triton_problem() -> str | None:
    """Why the installed Triton cannot compile these kernels, or None."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    low, high = TRITON_RANGE
    if low <= version < high:
        return None
    return (
        f"Triton >= {low[0]}.{low[1]} and < {high[0]}.{high[1]} is needed, "
        f"this is {triton.__version__}"
    )


def check_triton() -> None:
    """Refuse a Triton outside the range that the Gluon kernels are tested on.

    Raises:
        RuntimeError: the installed Triton is too old or too new.
    """
    problem = triton_problem()
    if problem:
        raise RuntimeError(f"no Hopper kernels: {problem}; use impl='triton'")


@gluon.jit
def find_entry(tile_end_ptr, m_tile, N: gl.constexpr, LANES: gl.constexpr):
    """The entry j whose tiles hold row tile `m_tile`: the number of ends <= m_tile.

    Every warp holds the whole inclusive prefix `tile_end_ptr` (N,) int32, LANES >= N a power of
    two, so the count is one load, a compare and one warp reduction.
    With ends [1, 4, 4], m_tile 0 -> 0, 1..3 -> 1.
    """
    L: gl.constexpr = gl.BlockedLayout([LANES // 32], [32], [gl.num_warps()], [0])
    lane = gl.arange(0, LANES, layout=L)
    end = gl.load(tile_end_ptr + lane, mask=lane < N, other=0x7FFFFFFF)
    return gl.sum((end <= m_tile).to(gl.int32), axis=0)


@aggregate
class Work:
    """The task map as the device sees it, and how its row tiles meet `n_tiles` column tiles."""

    tile_end_ptr: gl.tensor
    task_ptr: gl.tensor
    row_start_ptr: gl.tensor
    rows_ptr: gl.tensor
    total_ptr: gl.tensor
    ticket_ptr: gl.tensor
    n_tiles: gl.tensor
    N: gl.constexpr
    LANES: gl.constexpr
    GROUP_M: gl.constexpr
    DYNAMIC: gl.constexpr

    @gluon.constexpr_function
    def __init__(
        self, tile_end_ptr, task_ptr, row_start_ptr, rows_ptr, total_ptr, ticket_ptr, n_tiles,
        N, LANES, GROUP_M, DYNAMIC,
    ):  # fmt: skip
        self.tile_end_ptr = tile_end_ptr
        self.task_ptr = task_ptr
        self.row_start_ptr = row_start_ptr
        self.rows_ptr = rows_ptr
        self.total_ptr = total_ptr
        self.ticket_ptr = ticket_ptr
        self.n_tiles = n_tiles
        self.N = gl.constexpr(N)
        self.LANES = gl.constexpr(LANES)
        self.GROUP_M = gl.constexpr(GROUP_M)
        self.DYNAMIC = gl.constexpr(DYNAMIC)


@gluon.jit
def tile_count(work):
    """Tiles of the launch, row tiles times column tiles."""
    return gl.load(work.total_ptr + 1) * work.n_tiles


@gluon.jit
def next_tile(t, tiles, work):
    """The tile after `t`: drawn from a counter when DYNAMIC, else one grid further.

    Tiles differ in cost (a task's last tile may be short). Drawing keeps tiles with the same
    weights in step, so that memory is read once for all of them; with a fixed stride they drift
    apart and the weights are read again. Every program draws until it fails, so the last draw is
    known, and the program that makes it puts the counter back to zero.
    """
    programs = gl.num_programs(0)
    if work.DYNAMIC:
        ticket = gl.atomic_add(work.ticket_ptr, 1, sem="relaxed")
        if ticket == gl.maximum(tiles, programs) - 1:
            gl.store(work.ticket_ptr, 0)
        return programs + ticket
    else:
        return t + programs


@gluon.jit
def draw_shared(wanted_ptr, tiles, work, GUEST: gl.constexpr):
    """The next tile of a map that several launches share, or `tiles` when the program is to end.

    The owner's programs draw until no tile is left. A guest's also end when `wanted_ptr` (one
    int32) is not 0: it runs on SMs that somebody else may want back. Who leaves draws nothing, so
    the others take its tiles. `work.ticket_ptr` is [counter, programs of all launches]: leaves are
    counted in the counter's upper bits, and whoever makes the last of all draws and leaves, of
    which there are as many as tiles and programs, puts it back to zero. Five tiles, programs 0 and
    1: 0 draws 0 and 1, 1 leaves, 0 draws 2, 3 and 4 and fails: 1, 2, 2 + LEAVE, ..., 5 + LEAVE, 0.
    """
    leaves = GUEST and gl.load(wanted_ptr, volatile=True) != 0
    got = gl.atomic_add(work.ticket_ptr, gl.where(leaves, LEAVE, 1), sem="relaxed")
    if (got % LEAVE) + (got // LEAVE) == tiles + gl.load(work.ticket_ptr + 1) - 1:
        gl.store(work.ticket_ptr, 0)
    return gl.where(leaves, tiles, got % LEAVE)


def draw_shared_ref(counter_2: list[int], wanted: bool, tiles: int, guest: bool) -> int:
    """The twin of `draw_shared` on [counter, programs]: the tile drawn, or `tiles`.

    >>> counter, left = [0, 2], LEAVE.value
    >>> [draw_shared_ref(counter, g, 5, g) for g in (False, False, True)], counter[0] == 2 + left
    ([0, 1, 5], True)
    >>> [draw_shared_ref(counter, False, 5, False) for _ in range(4)], counter
    ([2, 3, 4, 5], [0, 2])
    """
    leaves, leave = guest and wanted, LEAVE.value
    got = counter_2[0]
    counter_2[0] += leave if leaves else 1
    if got % leave + got // leave == tiles + counter_2[1] - 1:
        counter_2[0] = 0
    return tiles if leaves else got % leave


@gluon.jit
def locate(t, work):
    """Expert, first row, rows, row tile and column tile of tile `t`.

    Inside a task, GROUP_M row tiles share a sweep over the columns, so that the tiles in flight
    form a block that reads each weight column few times from L2.
    """
    j = find_entry(work.tile_end_ptr, t // work.n_tiles, work.N, work.LANES)
    first = gl.load(work.tile_end_ptr + j - 1, mask=j > 0, other=0)
    m_tiles = gl.load(work.tile_end_ptr + j) - first
    e = gl.load(work.task_ptr + j)
    if e.dtype == gl.int64:
        # The low half of an id of nobody may look like an expert's.
        e = gl.where((e >= 0) & (e < 0x7FFFFFFF), e, -1)
    e = e.to(gl.int32)
    row_start = gl.load(work.row_start_ptr + j)
    rows = gl.load(work.rows_ptr + j)
    q = t - first * work.n_tiles
    group_first = (q // (work.GROUP_M * work.n_tiles)) * work.GROUP_M
    group = gl.minimum(m_tiles - group_first, work.GROUP_M)
    r = q - group_first * work.n_tiles
    return e, row_start, rows, group_first + r % group, r // group


@gluon.jit
def activate_alone(x, ACTIVATION: gl.constexpr, HAS_LIMIT: gl.constexpr, limit, alpha):
    """act(min(x, limit)) of an ungated product; "none" returns it as it is."""
    if HAS_LIMIT:
        x = gl.where(x > limit, limit, x)
    return pointwise(x, ACTIVATION, alpha)


@gluon.jit
def store_ragged(desc, smem, row_start, rows, row, col):
    """TMA store of `smem` to rows [row, ...) of a segment, clipped by hardware at its last row."""
    origin: gl.constexpr = RAGGED_ORIGIN
    tma.async_copy_shared_to_global(
        desc, [origin, row_start + rows, origin - rows + row, col], smem
    )


@gluon.jit
def load_weight(w_desc, e, n, k, bar, buf, pred, GATED: gl.constexpr, ROWS: gl.constexpr):
    """TMA load of weight tile `n` of expert `e` (ROWS rows, gate and up in eights when GATED)."""
    if GATED:
        tma.async_copy_global_to_shared(w_desc, [e, n * (ROWS // 16), 0, 0, k], bar, buf, pred)
    else:
        tma.async_copy_global_to_shared(w_desc, [e, n * ROWS, k], bar, buf, pred)
