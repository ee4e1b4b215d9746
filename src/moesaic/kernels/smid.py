"""On which SMs a stream's kernels run: a probe for partitions of the GPU.

    P programs

Many more programs than the GPU can hold each write the number of the SM that runs them, and stay a
while so that every SM that may take one does. Right after another partition was in use, its SMs
come free with a delay, so a probe is launched a few times.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .aot import AotCase

PROGRAMS = 2048
WAIT = 20_000


@triton.jit
def smid_kernel(out_ptr, WAIT: tl.constexpr):
    """Program p writes the number of its SM to out[p]; out_ptr: int32 (P,).

    On SMs 4 and 5 alone, four programs may write [4, 5, 4, 5].
    """
    sm = tl.inline_asm_elementwise(
        "mov.u32 $0, %smid;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )
    x = tl.arange(0, 128).to(tl.float32) + sm
    for _ in range(WAIT):
        x = x * 0.999 + 1.0
    # The sum is far from this number: the loop cannot be left out, and nothing is added.
    tl.store(out_ptr + tl.program_id(0), sm + (tl.sum(x) == -12345.0).to(tl.int32))


def sms_used(stream: torch.cuda.Stream, *, programs: int = PROGRAMS, launches: int = 3) -> set[int]:
    """The SMs that ran the programs of some launches on `stream`; waits for them."""
    with torch.cuda.device(stream.device):
        out_LP = torch.full((launches, programs), -1, dtype=torch.int32, device=stream.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for out_P in out_LP:
                smid_kernel[(programs,)](out_P, WAIT=WAIT, num_warps=4)
        stream.synchronize()
        return set(out_LP.flatten().tolist())


def aot_cases() -> list[AotCase]:
    """The one kernel; its PTX must read the number of the SM."""
    return [
        AotCase(
            name="smid",
            fn=smid_kernel,
            signature={"out_ptr": "*i32"},
            constexprs={"WAIT": WAIT},
            options={"num_warps": 4},
            ptx={arch: ("%smid",) for arch in (80, 90, 100)},
        )
    ]
