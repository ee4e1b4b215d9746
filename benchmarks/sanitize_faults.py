"""What `sanitize.py` plants and controls: faults the tools must find, and right code they report.

Where several threads write what another group reads, a barrier of theirs and one thread's arrival
at an mbarrier, which the readers wait for, order it. Racecheck follows only what the arriving
thread has written itself, and reports the others: `CONTROLS` show it in CUDA. So in the Hopper
kernels all lanes that write notes arrive. ConSan of Triton 3.6 counts no such arrival, and is given
loaders that arrive once (`waiting`).
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import triton
import triton.language as tl

PACKAGE = "moesaic.kernels.hopper"
SOURCE = """
__device__ unsigned at(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }
__device__ void arrive(unsigned bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(bar) : "memory");
}
__device__ void wait(unsigned bar, int phase) {
    asm volatile("{ .reg .pred done; again:"
                 " mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;"
                 " @!done bra again; }" :: "r"(bar), "r"(phase) : "memory");
}
__device__ void readers_meet() { asm volatile("bar.sync 1, 128;" ::: "memory"); }
__device__ void writers_meet() { asm volatile("bar.sync 2, 128;" ::: "memory"); }

extern "C" __global__ void NAME(int* out) {
    __shared__ int note;
    __shared__ unsigned long long full, empty;
    int lane = threadIdx.x - 128, sum = 0;
    if (threadIdx.x == 0) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;"
                     :: "r"(at(&full)), "r"(EACH ? WRITERS : 1) : "memory");
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;"
                     :: "r"(at(&empty)), "r"(EACH ? 128 : 1) : "memory");
    }
    __syncthreads();
    for (int round = 0; round < 4; ++round) {
        if (lane < 0) {
            if (WAIT) wait(at(&full), round & 1);
            sum += *(volatile int*)&note;
            readers_meet();
            if (EACH || threadIdx.x == 0) arrive(at(&empty));
        } else {
            wait(at(&empty), (round & 1) ^ 1);
            *(volatile int*)&note = round;
            if (WRITERS == 32) __syncwarp(); else writers_meet();
            if (EACH || lane == 0) arrive(at(&full));
        }
    }
    out[threadIdx.x] = sum;
}
"""
CONTROLS = {
    "hand_over_warp": (32, False, True),
    "hand_over_block": (128, False, True),
    "hand_over_each": (32, True, True),
    "hand_over_unread": (32, True, False),
}
"""How many threads write, whether each of them (and each reader) arrives, whether readers wait: a
warp and four warps that meet before one thread arrives, a warp whose every lane arrives, and the
same with readers who do not wait, which is wrong."""


def control_source(name: str) -> str:
    """The CUDA text of one of `CONTROLS`."""
    writers, each, waits = CONTROLS[name]
    constants = f"enum {{ WRITERS = {writers}, EACH = {int(each)}, WAIT = {int(waits)} }};"
    return constants + SOURCE.replace("NAME", name)


def run_controls() -> None:
    """Run every one of `CONTROLS` with 128 readers.

    Raises:
        RuntimeError: a right hand-over brought a wrong number.
    """
    for name, (writers, _, waits) in CONTROLS.items():
        kernel = torch.cuda._compile_kernel(control_source(name), name)
        out = torch.empty(128 + writers, device="cuda", dtype=torch.int32)
        kernel((1, 1, 1), (128 + writers, 1, 1), (out,))
        torch.cuda.synchronize()
        if waits and not bool((out[:128] == 6).all()):
            raise RuntimeError(f"{name}: the readers did not read 0, 1, 2 and 3")
        sys.stdout.write(f"ran {name}\n")


@triton.jit
def out_of_bounds_kernel(out_ptr, far, BLOCK: tl.constexpr):
    """A planted fault: BLOCK stores that begin `far` elements behind the buffer."""
    tl.store(out_ptr + far + tl.arange(0, BLOCK), 1.0)


def plant_memcheck() -> None:
    """Store far outside an allocation."""
    torch.cuda.init()
    lonely = torch.empty(1024, device="cuda")
    out_of_bounds_kernel[(1,)](lonely, 1 << 34, BLOCK=128)


def plant_racecheck() -> None:
    """Two warps exchange through shared memory without a barrier."""
    source = """
    extern "C" __global__ void race(float* out) {
        __shared__ float cell[64];
        cell[threadIdx.x] = threadIdx.x;
        out[threadIdx.x] = cell[63 - threadIdx.x];
    }
    """
    kernel = torch.cuda._compile_kernel(source, "race")
    kernel((1, 1, 1), (64, 1, 1), (torch.empty(64, device="cuda"),))


def text_of(module: str, edits: Sequence[tuple[str, str]] = ()) -> str:
    """The text of a module of the Hopper kernels with each of `edits` made where it occurs once.

    Raises:
        RuntimeError: a text to replace does not occur, or more than once.
    """
    found = importlib.import_module(f"{PACKAGE}.{module}")
    text = Path(str(found.__file__)).read_text(encoding="utf-8")
    for old, new in edits:
        if text.count(old) != 1:
            raise RuntimeError(f"{module}: {text.count(old)} times {old!r}; plant the fault anew")
        text = text.replace(old, new)
    return text


def install(texts: Mapping[str, str]) -> None:
    """Use these texts instead of the package's modules of the same names, and their kernels."""
    from moesaic.kernels.hopper import launch

    # Triton reads the source of its functions, so they must lie in files for as long as it runs.
    folder = Path(tempfile.mkdtemp(prefix="moesaic-"))
    sys.path.insert(0, str(folder))
    for name, text in texts.items():
        for other in texts:
            text = text.replace(f"from .{other} import", f"from planted_{other} import")
        text = text.replace("from .", f"from {PACKAGE}.")
        (folder / f"planted_{name}.py").write_text(text, encoding="utf-8")
    for kind, kernel in launch.KERNELS.items():
        if kind in texts:
            planted = importlib.import_module(f"planted_{kind}")
            launch.KERNELS[kind] = getattr(planted, kernel.fn.__name__)


def inside(text: str, function: str, edits: Sequence[tuple[str, str]]) -> str:
    """`text` with `edits` made in one of its functions, at the last place each.

    Raises:
        RuntimeError: the function or a text to replace is not there.
    """
    head, name, tail = text.partition(f"def {function}(")
    body, decorator, rest = tail.partition("\n\n\n")
    for old, new in edits:
        before, there, after = body.rpartition(old)
        if not (name and there):
            raise RuntimeError(f"{function}: no {old!r}; write the control anew")
        body = before + new + after
    return head + name + body + decorator + rest


ALL = "async_copy.mbarrier_arrive({}, increment_count=False)"
STAGE = ALL.format("p.full.index(i)")
END = "    mbarrier.arrive(p.full.index(i), count=1)"
COUNT = "count=129 if GATHER else 33)"
WAITED = """async_copy.commit_group()
            async_copy.wait_group(0)
            mbarrier.arrive(p.full.index(i), count=1)
"""
FULL = "            mbarrier.wait(p.full.index(i), (c // p.NB) & 1)\n"
ARRIVE = "mbarrier.arrive(p.empty.index((c + p.NB - 1) % p.NB), count=1"
LAST = f"        {ARRIVE})\n"
NEXT = "        row_start, rows, m, n = read_note(p, c)\n"
EARLY = """        L1: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
        early = gl.max(p.notes.index(4 * (c % p.NB) + 1).load(L1), axis=0)
"""
USED = "        m += gl.where(early == -12345, 1, 0)\n"


def waiting() -> dict[str, str]:
    """The modules in which one thread of a loader arrives, after it waited for the copies."""
    last = f"{END}\n    {STAGE}"
    gathered = [(f"            {STAGE}\n", f"            {WAITED}"), (last, f"{END}\n{END}")]
    loop, end = f"        {ALL.format('full')}\n", (last, END)
    pipeline = inside(text_of("pipeline"), "load_gathered", gathered)
    tall = text_of("tall", [(".init(full.index(i), count=33)", ".init(full.index(i), count=1)")])
    lanes = (COUNT, "count=2 if GATHER else 1)")
    return {
        "pipeline": inside(pipeline, "load_rows", [(f"    {loop}", ""), end]),
        "decode": text_of("decode", [lanes]),
        "prefill": text_of("prefill", [lanes]),
        "tall": inside(inside(tall, "_load_tile", [(loop, "")]), "_end", [end]),
    }


def plant_note() -> None:
    """The decode kernel whose consumer reads notes before it waits for them."""
    install({"decode": inside(text_of("decode"), "_multiply", [(NEXT, EARLY + NEXT + USED)])})


def plant_ring() -> None:
    """The decode kernel with its stages given back before they are read."""
    early = "            mbarrier.arrive(p.empty.index(i), count=1)\n"
    late = f"            {ARRIVE}, pred=k > 0)\n"
    texts = waiting()
    for old, new in ((late, ""), (LAST, ""), (FULL, FULL + early)):
        texts["decode"] = inside(texts["decode"], "_multiply", [(old, new)])
    install(texts)
