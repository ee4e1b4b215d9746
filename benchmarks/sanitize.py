"""Run every kernel on a small grid under compute-sanitizer and ConSan, and write what they found.

    python benchmarks/sanitize.py [--out benchmarks/results] [--sanitizer path/compute-sanitizer]

One process per tool (memcheck, racecheck) and path runs the layer, every kind of Hopper tile,
routing, sorting, the fused three-layer expert and the LoRA application. ConSan, which Triton
compiles in, watches the rings of the Hopper kernels (`sanitize_rings.py`). More processes run
planted faults, which the tools must find: one that finds nothing there proves nothing. Controls say
which reports of right code are a tool's own (`sanitize_faults.py`, suite `sanitizer`).
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import sanitize_faults as faults
import sanitize_rings as rings
import torch
import triton

from moesaic import ExpertSpec, ExpertWeights, RouterSpec, moe, route
from moesaic.bench.results import Recorder, device_slug, make_line, stamp
from moesaic.bench.suites.sanitizer import CHECKS, SUITE, asserted, line_of


def tiles() -> Iterator[tuple[str, Callable[[], object]]]:
    """Both products on every kind of Hopper tile, several tiles a program, rings shorter than K."""
    from moesaic.kernels.batching import batch_rows
    from moesaic.kernels.gather import gather_rows
    from moesaic.kernels.hopper.launch import HopperConfig, grouped_mm_hopper

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda").bfloat16()

    hidden, up, down = normal(150, 320), normal(3, 384, 320), normal(3, 320, 192)
    ids = torch.rand(150, 3, device="cuda").topk(2, 1).indices.int()
    kinds = [("decode", 16, 64, 3), ("decode", 64, 128, 3), ("prefill", 128, 256, 4)]
    kinds += [("tall", 256, 128, 4), ("tall", 384, 128, 3), ("trim", 160, 256, 4)]

    def both(config: HopperConfig) -> None:
        sort, tasks = batch_rows(ids, 3, heights=(config.bm,))
        gather = config.kernel != "tall"
        rows = hidden if gather else gather_rows(hidden, sort.order_S, 2)
        order_S = sort.order_S if gather else None
        act = grouped_mm_hopper(
            rows, up, tasks, hidden.new_empty((300, 192)), config=config, num_sms=2,
            order_S=order_S, top_k=2, gated=True, activation="silu", ticket=0, pdl="wait",
        )  # fmt: skip
        grouped_mm_hopper(
            act, down, tasks, hidden.new_empty((300, 320)), config=config, num_sms=2, ticket=1,
            pdl="prefetch",
        )  # fmt: skip

    for kernel, bm, bn, stages in kinds:
        config = HopperConfig(kernel, bm, bn, stages)  # type: ignore[arg-type]
        yield f"tile {kernel} {bm}x{bn}", lambda c=config: both(c)


def one_launch() -> Iterator[tuple[str, Callable[[], object]]]:
    """All products of a layer in one launch: two by flexible and pair tiles, three by a chain."""
    from moesaic.kernels.hopper.chain import ChainTiles
    from moesaic.kernels.hopper.experts import LayerConfig, experts_hopper
    from moesaic.kernels.hopper.launch import HopperConfig
    from moesaic.kernels.hopper.mlp import MlpConfig, experts_mlp

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda").bfloat16() * 0.1

    up, mid, down = normal(3, 384, 320), normal(3, 192, 192), normal(3, 320, 192)
    three = {"up": up[:, :192].contiguous(), "mid": mid, "down": down, "activation": "relu"}
    three |= {"up_bias": normal(3, 192), "mid_bias": normal(3, 192), "down_bias": normal(3, 320)}
    for tokens in (5, 150):
        ids = torch.rand(tokens, 3, device="cuda").topk(2, 1).indices.int()
        call = normal(tokens, 320), ids, torch.rand(tokens, 2, device="cuda")
        tiles = [("flex", 128, 128, 6), ("flex", 128, 256, 4), ("pair", 16, 128, 5)]
        for kernel, bm, bn, stages in (*tiles, ("pair", 64, 128, 4)):
            tile = HopperConfig(kernel, bm, bn, stages)  # type: ignore[arg-type]
            how = {"up": up, "down": down, "gated": True, "activation": "silu", "num_sms": 2}
            how["config"] = LayerConfig(tile, tile, "index")
            yield f"{kernel} {bm}x{bn}, {tokens}", lambda c=call, h=how: experts_hopper(*c, **h)
        base = HopperConfig("decode", 16, 128, 5)
        for chain in (ChainTiles(160, 256, 32, 4), ChainTiles(144, 128, 16, 6)):
            config = MlpConfig((base, base, base), "index", chain)
            more = three | {"config": config, "num_sms": 2}
            yield f"chain {chain.bn}, {tokens}", lambda c=call, h=more: experts_mlp(*c, **h)


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
            if impl == "triton" or (kind != "gpt-oss" and sm_90):
                yield f"{kind}, {tokens} tokens, {impl}", lambda c=call: moe(*c, impl=impl)


def pieces() -> Iterator[tuple[str, Callable[[], object]]]:
    """Kernels that the layers above do not reach: every scoring, the long sort, the fused MLP."""
    from moesaic.kernels.batching import batch_rows
    from moesaic.kernels.experts import experts_triton
    from moesaic.kernels.ragged_lora import add_lora_
    from moesaic.ops import choose_op, route_hidden_op

    half = torch.bfloat16
    for scoring in ("softmax", "topk_softmax", "sigmoid"):
        spec = RouterSpec(num_experts=40, top_k=6, scoring=scoring, n_group=8, topk_group=4)
        logits = torch.randn(33, 40, device="cuda")
        yield f"route {scoring}", lambda s=spec, x=logits: route(x, s)
        half_TE = logits.to(half)
        yield f"choose {scoring}", lambda s=spec, x=half_TE: choose_op(x, None, s.key(), True)
    few = RouterSpec(num_experts=8, top_k=2)
    states, rows = torch.randn(9, 128, device="cuda").to(half), torch.randn(8, 128).cuda().to(half)
    yield "router", lambda: route_hidden_op(states, rows, None, None, few.key(), False, True)
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
    """Every call of one part of the grid once, the device waited for."""
    torch.manual_seed(0)
    calls = {
        "triton": lambda: itertools.chain(layers(impl), pieces()),
        "hopper": lambda: itertools.chain(layers(impl), tiles()),
        "together": one_launch,
    }
    for name, call in calls[impl]():
        call()
        torch.cuda.synchronize()
        sys.stdout.write(f"ran {name}\n")


def run_planted(plant: Callable[[], None]) -> None:
    """The narrowest decode tile with a fault planted in its kernel."""
    plant()
    for name, call in tiles():
        if name.startswith("tile decode 16x64"):
            call()
            torch.cuda.synchronize()


JOBS: dict[str, Callable[[], None]] = {
    "grid_triton": lambda: run_grid("triton"),
    "grid_hopper": lambda: run_grid("hopper"),
    "grid_together": lambda: run_grid("together"),
    "controls": faults.run_controls,
    "plant_memcheck": faults.plant_memcheck,
    "plant_racecheck": faults.plant_racecheck,
    "plant_note": lambda: run_planted(faults.plant_note),
    **rings.JOBS,
}


def version_of(sanitizer: str) -> str:
    """What the program says its version is."""
    run = subprocess.run([sanitizer, "--version"], capture_output=True, text=True, check=True)
    found = re.search(r"Version (\S+)", run.stdout)
    return found[1] if found else "unknown"


def check(tool: str, job: str, sanitizer: str) -> dict[str, object]:
    """Run `job` of this file under `tool`; what it reported."""
    child = [sys.executable, __file__, "--job", job]
    if tool == "consan":
        with tempfile.TemporaryDirectory() as cache:
            modes = {"TRITON_INSTRUMENTATION_MODE": "consan", "CUDA_LAUNCH_BLOCKING": "1"}
            text, status = _run(child, modes | {"TRITON_CACHE_DIR": cache})
        found = asserted(text)
        counts = [len(found)] if found or status == 0 else []
        return line_of(tool, job, text, counts, status, f"Triton {triton.__version__}")
    command = [sanitizer, "--tool", tool, "--target-processes", "all", "--print-limit", "400"]
    text, status = _run([*command, *child], {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    counts = [int(n) for n in re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", text)]
    return line_of(tool, job, text, counts, status, version_of(sanitizer))


def _run(command: list[str], more: dict[str, str]) -> tuple[str, int]:
    environment = os.environ | more
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, check=False, errors="replace"
    )
    return (done.stdout + done.stderr).replace(f"{Path.cwd()}/", ""), done.returncode


def main() -> int:
    """Check the grid and the planted faults with each tool; 1 when a fault was missed or found."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--only", nargs="*", default=[], help="tool/job pairs, all by default")
    parser.add_argument("--job", choices=JOBS)
    parser.add_argument("--processes", type=int, default=1, help="checks that run at a time")
    parser.add_argument("--sanitizer", default="compute-sanitizer", help="the program to run")
    args = parser.parse_args()
    if args.job:
        JOBS[args.job]()
        torch.cuda.synchronize()
        return 0
    device = torch.device("cuda")
    stamped = stamp(device) | {"suite": SUITE.name}
    recorder = Recorder(args.out, device_slug(device), SUITE.name, SUITE.summarize)
    wanted = [pair for pair in CHECKS if not args.only or "/".join(pair) in args.only]
    with ThreadPoolExecutor(args.processes) as pool:
        running = {pool.submit(check, *pair, args.sanitizer): pair for pair in wanted}
        for done in as_completed(running):
            line = make_line(stamped, **done.result())
            recorder.record([line])
            print(*running[done], "reported", line["reported"], "in", line["calls"], "calls")
    return 0 if all(target.met for target in recorder.targets()) else 1


if __name__ == "__main__":
    sys.exit(main())
