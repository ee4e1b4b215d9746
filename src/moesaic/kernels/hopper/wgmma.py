"""wgmma over any multiple of eight rows, as inline PTX: Gluon's own takes powers of two alone.

    N rows of a tile (8 to 192) · two times 64 weight rows of one warpgroup · depth 64 of a stage

Weights stand on the side of wgmma that is 64 wide, rows on the side that grows in steps of eight.
A product of 136 rows then costs 136, and reads its weights from shared memory once; two products of
128 and of 8 rows would read them twice, which costs as much as 64 rows more.

One warpgroup holds 128 weight rows by up to 192 rows in accumulators of (64, 64): first those of
its lower 64 weight rows, then those of its upper. In the layout that Gluon gives such a tensor,
element i of a thread is the i-th accumulator register of wgmma, so three tensors of 32 elements are
the 96 registers of 192 rows and the first N / 2 of them those of N rows. All of them are outputs
and inputs of the inline PTX, tied.

wgmma finds its operands by address. Gluon gives none, so `start_of` looks for it.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

barrier = getattr(gl, "barrier", None) or gl.thread_barrier
SWIZZLED = gl.constexpr(0x40000040)
"""Upper half of a descriptor: rows of 128 bytes swizzled, eight of them 1024 bytes further."""


@gluon.constexpr_function
def product_text(N, PIECES, TYPE):
    """PTX of one stage: (128, 64) by (64, N) onto 2 * PIECES accumulators, and the wait for it."""
    half = 32 * PIECES
    weights, rows = 4 * half, 4 * half + 32
    lines = [
        ".reg .b64 a, b;", ".reg .b32 u;", ".reg .pred p;", "setp.eq.u32 p, 0, 0;",
        "wgmma.fence.sync.aligned;",
    ]  # fmt: skip
    for k in range(4):
        lines += [f"add.u32 u, ${rows}, {2 * k};", f"mov.b64 b, {{u, {SWIZZLED.value}}};"]
        for part in range(2):
            held = ", ".join(f"${part * half + i}" for i in range(N // 2))
            lines += [
                f"add.u32 u, ${weights}, {2 * k + 512 * part};",
                f"mov.b64 a, {{u, {SWIZZLED.value}}};",
                f"wgmma.mma_async.sync.aligned.m64n{N}k16.f32.{TYPE}.{TYPE}",
                f"{{{held}}}, a, b, p, 1, 1, 0, 0;",
            ]
    lines += ["wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;"]
    return "{\n" + "\n".join(lines) + "\n}"


@gluon.constexpr_function
def tied(PIECES):
    """Constraints of 64 * PIECES accumulators, in and out, and of two tensors of integers."""
    count = 64 * PIECES
    return ",".join(["=f"] * count + [str(i) for i in range(count)] + ["r"] * 64)


@gluon.constexpr_function
def floats(COUNT):
    """The types of COUNT outputs."""
    return tuple([gl.float32] * COUNT)


@gluon.jit
def multiply(acc, weights, rows, N: gl.constexpr, TYPE: gl.constexpr):
    """One stage's product, added to the accumulators.

    It is waited for: the stage can then be filled again at once, where a product left under way
    would hold it until the next stage has come. Meanwhile the other warpgroup's product runs.

    acc: four or six fp32 (64, 64), three (two) for each 64 weight rows. weights, rows: starts of
    the 128 weight rows and of the N rows in shared memory, as `start_of` gives them.
    """
    L: gl.constexpr = acc[0].type.layout
    w = gl.full([64, 64], weights, gl.int32, layout=L)
    x = gl.full([64, 64], rows, gl.int32, layout=L)
    if len(acc) == 6:
        return gl.inline_asm_elementwise(
            product_text(N, 3, TYPE), tied(3),
            [acc[0], acc[1], acc[2], acc[3], acc[4], acc[5], w, x], floats(6), False, 32,
        )  # fmt: skip
    else:
        return gl.inline_asm_elementwise(
            product_text(N, 2, TYPE), tied(2),
            [acc[0], acc[1], acc[2], acc[3], w, x], floats(4), False, 32,
        )  # fmt: skip


@gluon.jit
def _words(at):
    """The 32-bit words at addresses `at` of shared memory; 0 past its end."""
    return gl.inline_asm_elementwise(
        "{\n.reg .pred p;\n.reg .u32 n;\nmov.u32 n, %total_smem_size;\nsetp.lt.u32 p, $1, n;\n"
        "mov.u32 $0, 0;\n@p ld.shared.u32 $0, [$1];\n}",
        "=r,r", [at], gl.int32, False, 1,
    )  # fmt: skip


@gluon.jit
def start_of(buf, MARK: gl.constexpr):
    """Where `buf` (ROWS, 64), of 16 bits and aligned to 1024 bytes, starts, in units of 16 bytes.

    Its first words are written and looked for at every place where a buffer can start, twice with
    other values, so that nothing left by an earlier launch is taken for it. By all four warps of
    the default partition, before others start; what `buf` held is lost. A buffer at byte 3072 of
    shared memory gives 192.
    """
    ROWS: gl.constexpr = buf.shape[0]
    BL: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    LS: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    at = gl.arange(0, 256, layout=LS) * 1024 + 1024
    mark = gl.full([ROWS, 64], MARK, gl.int16, layout=BL)
    buf.store(mark.to(buf.dtype, bitcast=True))
    barrier()
    once = _words(at)
    barrier()
    buf.store((mark + 1).to(buf.dtype, bitcast=True))
    barrier()
    again = _words(at)
    barrier()
    first: gl.constexpr = MARK * 65537
    second: gl.constexpr = (MARK + 1) * 65537
    found = gl.where((once == first) & (again == second), at, 0x7FFFFFFF)
    start = gl.min(found, axis=0) // 16
    # The minimum went from warp to warp through memory that what the partitions are given may take.
    barrier()
    return start
