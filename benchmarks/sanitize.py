"""Run every kernel on a small grid under compute-sanitizer and write what it found.

    python benchmarks/sanitize.py [--out benchmarks/results]

One process per tool (memcheck, racecheck) runs the layer on each path, routing, sorting, the fused
three-layer expert and the LoRA application. Two more run planted faults, an out-of-bounds store
and a shared-memory race, which the tools must find: a tool that finds nothing there proves nothing.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import triton
import triton.language as tl

from moesaic import ExpertSpec, ExpertWeights, RouterSpec, moe, route
from moesaic.bench.results import Recorder, device_slug, make_line, stamp
from moesaic.bench.suites.sanitizer import GRIDS, SUITE, TOOLS, line_of


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


def layers(impl: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """The layer calls of the reduced grid on one path: name and call."""
    half = torch.bfloat16
    kinds = {
        "swiglu": ExpertSpec(num_experts=8, hidden_size=128, intermediate_size=128),
        "gpt-oss": ExpertSpec(
            num_experts=8, hidden_size=72, intermediate_size=88, bias=True, interleaved=True,
            transposed=True, limit=7.0, alpha=1.702, up_offset=1.0,
        ),
        "three layers": ExpertSpec(
            num_experts=8, hidden_size=128, intermediate_size=256, gated=False, layers=3,
            bias=True, activation="relu",
        ),
    }  # fmt: skip
    sm_90 = torch.cuda.get_device_capability() == (9, 0)
    for kind, spec in kinds.items():
        shapes = spec.weight_shapes()
        weights = ExpertWeights(
            **{n: torch.randn(s, device="cuda").to(half) * 0.1 for n, s in shapes.items()}
        )
        for tokens in (1, 5, 200):
            hidden = torch.randn(tokens, spec.hidden_size, device="cuda").to(half)
            logits = torch.randn(tokens, spec.num_experts, device="cuda")
            routing = route(logits, RouterSpec(num_experts=8, top_k=2))
            call = (hidden, routing.topk_ids_TK, routing.topk_weights_TK, weights, spec)
            if impl == "triton" or (kind == "swiglu" and sm_90):
                yield f"{kind}, {tokens} tokens, {impl}", lambda c=call: moe(*c, impl=impl)


def pieces() -> Iterator[tuple[str, Callable[[], object]]]:
    """Kernels that the layers above do not reach: every scoring, the long sort, the fused MLP."""
    from moesaic.kernels.batching import batch_rows
    from moesaic.kernels.experts import experts_triton
    from moesaic.kernels.ragged_lora import add_lora_

    half = torch.bfloat16
    for scoring in ("softmax", "topk_softmax", "sigmoid"):
        spec = RouterSpec(num_experts=40, top_k=6, scoring=scoring, n_group=8, topk_group=4)
        logits = torch.randn(33, 40, device="cuda")
        yield f"route {scoring}", lambda s=spec, x=logits: route(x, s)
    mlp = {n: torch.randn(8, 128, 128, device="cuda").to(half) for n in ("up", "mid", "down")}
    hidden, share = torch.randn(50, 128, device="cuda").to(half), torch.rand(50, 2, device="cuda")
    chosen = torch.randint(0, 8, (50, 2), device="cuda")
    shape = {"activation": "relu", "gated": False, "fused": True}
    yield "fused three layers", lambda: experts_triton(hidden, chosen, share, **mlp, **shape)
    banks = torch.randn(8, 16, 128, device="cuda").to(half), torch.randn(8, 128, 16).cuda().to(half)
    out = torch.zeros(50, 128, device="cuda", dtype=half)
    scale = torch.ones(8, device="cuda")
    yield "LoRA", lambda: add_lora_(out, hidden, chosen[:, 0].int(), *banks, scale)
    ids = torch.randint(0, 64, (1500, 4), device="cuda")
    yield "long sort", lambda: batch_rows(ids, 64, heights=(16, 128), order="mixed")


def run_grid(impl: str) -> None:
    """Every call of one path once, then wait for the device."""
    torch.manual_seed(0)
    for name, call in (*layers(impl), *(pieces() if impl == "triton" else ())):
        call()
        torch.cuda.synchronize()
        sys.stdout.write(f"ran {name}\n")


JOBS: dict[str, Callable[[], None]] = {
    "grid_triton": lambda: run_grid("triton"),
    "grid_hopper": lambda: run_grid("hopper"),
    "plant_memcheck": plant_memcheck,
    "plant_racecheck": plant_racecheck,
}


def check(tool: str, job: str) -> dict[str, object]:
    """Run `job` of this file under `tool`; what it reported."""
    command = ["compute-sanitizer", "--tool", tool, "--target-processes", "all"]
    child = [*command, sys.executable, __file__, "--job", job]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(child, capture_output=True, text=True, env=environment, check=False)
    text = (done.stdout + done.stderr).replace(f"{Path.cwd()}/", "")
    counts = [int(n) for n in re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", text)]
    return line_of(tool, job, text, counts, done.returncode)


def main() -> int:
    """Check the grid and the planted faults with each tool; 1 when a fault was missed or found."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--only", nargs="*", default=[], help="tool/job pairs, all by default")
    parser.add_argument("--job", choices=JOBS)
    args = parser.parse_args()
    if args.job:
        JOBS[args.job]()
        torch.cuda.synchronize()
        return 0
    device = torch.device("cuda")
    stamped = stamp(device) | {"suite": SUITE.name}
    recorder = Recorder(args.out, device_slug(device), SUITE.name, SUITE.summarize)
    for grid in GRIDS:
        JOBS[grid]()
    for tool in TOOLS:
        for job in (*GRIDS, f"plant_{tool}"):
            if not args.only or f"{tool}/{job}" in args.only:
                line = make_line(stamped, **check(tool, job))
                recorder.record([line])
                print(tool, job, "reported", line["reported"], "in", line["calls"], "calls")
    return 0 if all(target.met for target in recorder.targets()) else 1


if __name__ == "__main__":
    sys.exit(main())
