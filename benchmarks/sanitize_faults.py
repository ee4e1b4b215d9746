"""What `sanitize.py` plants and controls: faults the tools must find, and right code they report.

A one-warp loader hands its notes over by a barrier of its warp and one lane's arrival at an
mbarrier. ptxas leaves nothing of such a barrier where the warp has converged (a NOP stands there),
and racecheck, which reads the machine code, takes the other 31 lanes' writes for races. Two
controls show it, one small and one large:

- `CONTROLS`, five kernels in CUDA that hand one number over through a pair of mbarriers;
- `widen`, which makes every loader four warps: the same text of the same kernels, but the
  barrier is one that stays in the machine code.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import triton
import triton.language as tl

PACKAGE = "moesaic.kernels.hopper"
LOADER = re.compile(r"\[(4, )?1\],\s*\[(CREG, )?LREG\]")
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
__device__ void block_meets() { asm volatile("bar.sync 2, 128;" ::: "memory"); }

extern "C" __global__ void NAME(int* out) {
    __shared__ int note;
    __shared__ unsigned long long full, empty;
    int lane = threadIdx.x - 128, sum = 0;
    if (threadIdx.x == 0) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(at(&full)) : "memory");
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(at(&empty)) : "memory");
    }
    __syncthreads();
    for (int round = 0; round < 4; ++round) {
        if (lane < 0) {
            READ
            sum += *(volatile int*)&note;
            readers_meet();
            if (threadIdx.x == 0) arrive(at(&empty));
        } else {
            wait(at(&empty), (round & 1) ^ 1);
            WRITE *(volatile int*)&note = round;
            MEET
            if (lane == 0) arrive(at(&full));
        }
    }
    out[threadIdx.x] = sum;
}
"""


WAIT = "wait(at(&full), round & 1);"
CONTROLS: dict[str, tuple[int, str, str, str]] = {
    "hand_over_warp": (32, WAIT, "", "__syncwarp();"),
    "hand_over_lane": (32, WAIT, "if (lane == 0)", "__syncwarp();"),
    "hand_over_block": (128, WAIT, "", "block_meets();"),
    "hand_over_unmet": (128, WAIT, "", ""),
    "hand_over_unread": (32, "", "if (lane == 0)", "__syncwarp();"),
}
"""Writing threads and the three places of `SOURCE` that differ. Right hand-overs by one warp that
writes as a whole, by one lane and by four warps; and two that are wrong: four warps that do not
meet before one thread arrives, and readers who do not wait."""


def control_source(name: str) -> str:
    """The CUDA text of one of `CONTROLS`."""
    _, read, write, meet = CONTROLS[name]
    text = SOURCE.replace("NAME", name)
    return text.replace("READ", read).replace("WRITE", write).replace("MEET", meet)


def run_controls() -> None:
    """Run every one of `CONTROLS` with 128 readers."""
    for name, (writers, *_) in CONTROLS.items():
        kernel = torch.cuda._compile_kernel(control_source(name), name)
        out = torch.empty(128 + writers, device="cuda", dtype=torch.int32)
        kernel((1, 1, 1), (128 + writers, 1, 1), (out,))
        torch.cuda.synchronize()
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


def rewritten(kind: str, edits: Sequence[tuple[str, str]]) -> str:
    """The text of the module of a Hopper kernel with each of `edits` made where it occurs once.

    Raises:
        RuntimeError: a text to replace does not occur, or more than once.
    """
    from moesaic.kernels.hopper.launch import KERNELS

    text = Path(str(sys.modules[KERNELS[kind].fn.__module__].__file__)).read_text(encoding="utf-8")
    for old, new in edits:
        if text.count(old) != 1:
            raise RuntimeError(f"{kind}: {text.count(old)} times {old!r}; plant the fault anew")
        text = text.replace(old, new)
    return text


def install(texts: Mapping[str, str]) -> None:
    """Use the kernels of these module texts, by kind, instead of the package's own."""
    from moesaic.kernels.hopper import launch

    # Triton reads the source of its functions, so they must lie in files for as long as it runs.
    folder = Path(tempfile.mkdtemp(prefix="moesaic-"))
    for kind, text in texts.items():
        name = f"planted_{kind}"
        path = folder / f"{name}.py"
        path.write_text(text.replace("from .", f"from {PACKAGE}."), encoding="utf-8")
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        launch.KERNELS[kind] = getattr(module, launch.KERNELS[kind].fn.__name__)


def wide(text: str) -> str:
    """A kernel's text with every loader of one warp made one of four."""
    return LOADER.sub(lambda m: m[0].replace("1]", "4]", 1), text)


def widen() -> None:
    """Make every one-warp loader of the Hopper products four warps.

    Raises:
        RuntimeError: no kernel has a one-warp loader.
    """
    from moesaic.kernels.hopper.launch import KERNELS

    texts = {kind: rewritten(kind, ()) for kind in KERNELS}
    wider = {kind: wide(text) for kind, text in texts.items() if LOADER.search(text)}
    if not wider:
        raise RuntimeError("no Hopper kernel has a loader of one warp any more")
    install(wider)


FULL = "            mbarrier.wait(p.full.index(i), (c // p.NB) & 1)\n"
ARRIVE = "mbarrier.arrive(p.empty.index((c + p.NB - 1) % p.NB), count=1"
LAST = f"        {ARRIVE})\n"
STALE = """        L1: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
        again = gl.max(p.notes.index(4 * (first % p.NB) + 1).load(L1), axis=0)
        m += gl.where(again == -12345, 1, 0)
"""


def plant_note() -> None:
    """The decode kernel with a wide loader that reads a note again when it gave its stage back."""
    begin = "        acc = gl.zeros((p.BN, p.BM), gl.float32, layout=L)\n"
    edits = [(begin, f"{begin}        first = c\n"), (LAST, LAST + STALE)]
    install({"decode": wide(rewritten("decode", edits))})


def plant_ring() -> None:
    """The decode kernel with its stages given back before they are read."""
    early = "            mbarrier.arrive(p.empty.index(i), count=1)\n"
    late = f"            {ARRIVE}, pred=k > 0)\n"
    edits = [(late, ""), (LAST, ""), (FULL, FULL + early)]
    install({"decode": rewritten("decode", edits)})
