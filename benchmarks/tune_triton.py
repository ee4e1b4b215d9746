"""Time the tile choices of the Triton layer on this GPU and write the table that `tune` reads.

    python benchmarks/tune_triton.py [--out src/moesaic/kernels/configs/h200.json] [--budget 200]

For every model, token count and product, each candidate cut runs under a CUDA graph over rotating
weights and routings (so that caches hold no more than in use); the fastest pair of cuts per tile
height and the fastest height win. Three-layer experts also time the fused launch. The kernels are
compiled first, by as many processes as there are cores. Cells not reached within the budget are
left to the heuristics, and named.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.runtime.jit import JITFunction

from moesaic.bench.workloads import MODELS, Model
from moesaic.kernels.batching import batch_rows
from moesaic.kernels.expert_mlp import expert_mlp
from moesaic.kernels.experts import _device
from moesaic.kernels.grouped_mm import Epilogue, grouped_mm
from moesaic.kernels.tune import (
    FUSED_ROWS,
    Config,
    GemmConfig,
    Problem,
    config_to_json,
    device_family,
    fused_stages,
    rows_per_expert,
    shape_key,
)

NAMES = ("Qwen3-30B-A3B", "paper-small", "paper-medium", "paper-large", "DeepSeek-V3",
         "Mixtral-8x7B")  # fmt: skip
TOKENS = (1, 4, 16, 64, 128, 512, 1024, 4096, 8192)
ROTATED_BYTES = 256 << 20
Layer = tuple[str, Epilogue, int]
"""A product of a layer: its weight, its epilogue, and K when it reads tokens (0: sorted rows)."""


def heights_of(rows: float) -> tuple[tuple[int, ...], ...]:
    """Tile heights worth timing for an expected number of rows an expert."""
    if rows <= 4:
        return ((16,),)
    if rows <= 24:
        return ((16,), (16, 64), (32,))
    if rows <= 96:
        return ((32, 64), (64,), (128,))
    return ((64,), (128,)) if rows <= 512 else ((128,),)


def cuts_of(heights: tuple[int, ...], gated: bool) -> list[GemmConfig]:
    """Cuts worth timing for tiles of these heights; columns are halved for gated products."""
    if heights[-1] < 128:
        shapes = ((64, 256, 4, 3), (64, 128, 4, 4), (128, 64, 4, 4), (128, 128, 4, 3),
                  (128, 128, 4, 4), (256, 64, 8, 4))  # fmt: skip
        found = [GemmConfig(n, k, w, s, 1, 64) for n, k, w, s in shapes]
        if heights[-1] <= 16:
            found += [GemmConfig(n, k, 4, 4, 1, 0) for n, k in ((64, 128), (128, 128), (32, 256))]
    else:
        shapes = ((128, 64, 4, 3), (128, 64, 8, 4), (256, 64, 8, 3), (256, 64, 8, 4),
                  (128, 128, 8, 3))  # fmt: skip
        found = [GemmConfig(n, k, w, s, 8) for n, k, w, s in shapes]
    return [cut._replace(block_n=cut.block_n // 2) for cut in found] if gated else found


def resident(cut: GemmConfig) -> tuple[GemmConfig, ...]:
    """A cut with a program per tile, and with programs that stay and walk the tiles."""
    return cut, cut._replace(ctas_per_sm=1 if cut.num_warps == 8 else 2)


def problem_for(model: Model, tokens: int, device: torch.device) -> Problem:
    """The problem of a model's layer in bf16 on `device`."""
    spec = model.spec()
    arch, family = _device(device) if device.type == "cuda" else (90, "")
    return Problem(
        tokens, model.top_k, model.num_experts, model.hidden_size, model.intermediate_size,
        spec.gated, spec.layers, "bfloat16", arch, family, spec.transposed,
    )  # fmt: skip


def layers_of(model: Model) -> list[Layer]:
    """The products of a model's layer, in order."""
    spec = model.spec()
    first = Epilogue(
        spec.activation, spec.gated, spec.interleaved, spec.limit, spec.alpha, spec.up_offset
    )
    middle: list[Layer] = [("mid", Epilogue("relu"), 0)] if spec.layers == 3 else []
    return [("up", first, model.top_k), *middle, ("down", Epilogue(), 0)]


class Rotation(NamedTuple):
    """Weights and routings that calls take in turn."""

    weights: list[dict[str, torch.Tensor]]
    ids: list[torch.Tensor]


def weights_of(model: Model, device: torch.device) -> list[dict[str, torch.Tensor]]:
    """Copies of random bf16 weights, together at least `ROTATED_BYTES`."""
    shapes = model.spec().weight_shapes()
    size = sum(2 * torch.Size(shape).numel() for shape in shapes.values())
    return [
        {
            name: torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0, 0.02)
            for name, shape in shapes.items()
        }
        for _ in range(max(1, ROTATED_BYTES // size))
    ]


def draw_ids(model: Model, tokens: int, device: torch.device) -> list[torch.Tensor]:
    """Uniform routings, as many as a rotation needs."""
    count = 16 if tokens <= 16 else 4 if tokens <= 1024 else 1
    shape = (count, tokens, model.num_experts)
    return list(torch.rand(shape, device=device).topk(model.top_k).indices.int().unbind())


def captured(calls: list[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
    """A graph of the calls; made by hand, as `torch.cuda.graph` collects garbage each time."""
    calls[0]()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        graph.capture_begin()
        try:
            for call in calls:
                call()
        finally:
            graph.capture_end()
    return graph


def seconds_of(calls: list[Callable[[], Any]], best: float) -> float:
    """Device seconds a call under a CUDA graph: the least of three, or of one if it is hopeless."""
    graph = captured(calls)
    taken: list[float] = []
    for _ in range(4):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end) / 1e3 / len(calls))
        if len(taken) > 1 and taken[-1] > 1.5 * best:
            break
    return min(taken[1:])


def compile_share(names: list[str], share: int, of: int) -> None:
    """Compile every `of`-th candidate launch into Triton's cache, without running anything."""
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        return kernel.result() if hasattr(kernel, "result") else kernel

    JITFunction.run = compile_only
    for number, launch in enumerate(launches(names)):
        if number % of == share:
            try:
                launch()
            except Exception as error:
                print(f"does not compile: {error}"[:300], file=sys.stderr)


def launches(names: list[str]) -> Iterator[Callable[[], Any]]:
    """Every distinct compilation the tuning needs, as a call on memory that is never touched."""
    cpu, seen = torch.device("cpu"), set()
    for model in (MODELS[name] for name in names):
        shapes = model.spec().weight_shapes()
        weight = {k: torch.empty(1, dtype=torch.bfloat16).expand(v) for k, v in shapes.items()}
        for tokens in TOKENS:
            problem = problem_for(model, tokens, cpu)
            for heights in heights_of(rows_per_expert(problem)):
                for layer in layers_of(model):
                    for cut in cuts_of(heights, layer[1].gated):
                        key = (model.name, heights, layer[0], cut)
                        if key not in seen:
                            seen.add(key)
                            yield lambda a=(model, weight, layer, heights, cut): _dry(*a)
        if model.spec().layers == 3 and fused_stages(problem.hidden, problem.intermediate, 2, 90):
            yield lambda m=model, w=weight: _dry_fused(m, w)


def _tables(model: Model, heights: tuple[int, ...], tokens: int = 16) -> Any:
    from moesaic.kernels.batching import batch_rows_ref

    ids = torch.zeros(tokens, model.top_k, dtype=torch.int32)
    return batch_rows_ref(ids, model.num_experts, heights=heights)


def _dry(model: Model, weight: Any, layer: Layer, heights: tuple[int, ...], cut: GemmConfig) -> Any:
    sort, tasks = _tables(model, heights)
    name, epilogue, top_k = layer
    width = model.hidden_size if top_k else model.intermediate_size
    x = torch.empty(1, dtype=torch.bfloat16).expand(16 * (1 if top_k else model.top_k), width)
    return grouped_mm(
        x, weight[name], sort, tasks, top_k=top_k, heights=heights,
        transposed=model.spec().transposed, bias=weight.get(f"{name}_bias"),
        epilogue=epilogue, config=cut,
    )  # fmt: skip


def _dry_fused(model: Model, weight: Any) -> Any:
    sort, tasks = _tables(model, (FUSED_ROWS,))
    x = torch.empty(1, dtype=torch.bfloat16).expand(16, model.hidden_size)
    return expert_mlp(
        x, weight["up"], weight["mid"], weight["down"], sort, tasks, top_k=model.top_k, arch=90,
        biases=(weight["up_bias"], weight["mid_bias"], weight["down_bias"]),
    )  # fmt: skip


def time_layer(
    model: Model, layer: Layer, cut: GemmConfig, heights: tuple[int, ...], turn: Rotation,
    batches: list[Any], x: torch.Tensor, best: float,
) -> float:  # fmt: skip
    """Seconds of one product with one cut."""
    name, epilogue, top_k = layer
    calls = []
    for i, (sort, tasks) in enumerate(batches):
        weight = turn.weights[i % len(turn.weights)]
        calls.append(
            lambda w=weight, s=sort, t=tasks: grouped_mm(
                x, w[name], s, t, top_k=top_k, heights=heights,
                transposed=model.spec().transposed, bias=w.get(f"{name}_bias"),
                epilogue=epilogue, config=cut,
            )
        )  # fmt: skip
    return seconds_of(calls, best)


def time_fused(model: Model, turn: Rotation, x: torch.Tensor, problem: Problem) -> float:
    """Seconds of the fused three-layer launch; infinite where it does not fit."""
    if not fused_stages(problem.hidden, problem.intermediate, 2, problem.arch):
        return float("inf")
    calls = []
    for i, ids in enumerate(turn.ids):
        w = turn.weights[i % len(turn.weights)]
        sort, tasks = batch_rows(ids, model.num_experts, heights=(FUSED_ROWS,))
        calls.append(
            lambda w=w, s=sort, t=tasks: expert_mlp(
                x, w["up"], w["mid"], w["down"], s, t, top_k=model.top_k, arch=problem.arch,
                biases=(w["up_bias"], w["mid_bias"], w["down_bias"]),
            )
        )  # fmt: skip
    return seconds_of(calls, float("inf"))


def tune_cell(model: Model, tokens: int, turn: Rotation) -> tuple[Config, dict[str, float]]:
    """The fastest configuration of one cell and the microseconds of its products."""
    device = turn.ids[0].device
    problem = problem_for(model, tokens, device)
    options = []
    for heights in heights_of(rows_per_expert(problem)):
        batches = [batch_rows(ids, model.num_experts, heights=heights) for ids in turn.ids]
        chosen: dict[str, GemmConfig] = {}
        took: dict[str, float] = {}
        for layer in layers_of(model):
            width = model.hidden_size if layer[2] else model.intermediate_size
            rows = tokens if layer[2] else tokens * model.top_k
            x = torch.randn(rows, width, device=device, dtype=torch.bfloat16)
            best = float("inf")
            for cut in (c for base in cuts_of(heights, layer[1].gated) for c in resident(base)):
                try:
                    spent = time_layer(model, layer, cut, heights, turn, batches, x, best)
                except triton.runtime.errors.OutOfResources as error:
                    print(f"  {model.name} {layer[0]} {cut}: {error}"[:200])
                    continue
                if spent < best:
                    best, chosen[layer[0]], took[layer[0]] = spent, cut, spent * 1e6
        options.append((sum(took.values()), Config(heights, **chosen), took))
    total, config, took = min(options, key=lambda option: option[0])
    if model.spec().layers == 3:
        x = torch.randn(tokens, model.hidden_size, device=device, dtype=torch.bfloat16)
        took["fused"] = time_fused(model, turn, x, problem) * 1e6
        config = config._replace(fused=took["fused"] < total)
    return config, took


def tune_models(names: list[str], budget_s: float, started: float) -> dict[str, Any]:
    """Tables of shapes and times for the models, as far as the budget reaches."""
    device = torch.device("cuda")
    shapes: dict[str, Any] = {}
    times: dict[str, Any] = {}
    for model in (MODELS[name] for name in names):
        weights = None
        for tokens in TOKENS:
            if time.perf_counter() - started > budget_s:
                print(f"out of time, left to the heuristics: {model.name} T={tokens}")
                continue
            weights = weights or weights_of(model, device)
            turn = Rotation(weights, draw_ids(model, tokens, device))
            config, took = tune_cell(model, tokens, turn)
            key = shape_key(problem_for(model, tokens, device))
            shapes.setdefault(key, {})[str(tokens)] = config_to_json(config)
            times.setdefault(key, {})[str(tokens)] = {k: round(v, 2) for k, v in took.items()}
            print(f"{model.name} T={tokens}: {config} {took}", flush=True)
        del weights
        gc.collect()
        torch.cuda.empty_cache()
    return {"shapes": shapes, "microseconds": times}


def main() -> None:
    """Compile, time, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="default: the package's table of this device")
    parser.add_argument("--budget", type=float, default=200, help="seconds, compilation included")
    parser.add_argument("--only", action="append", help="a model by name")
    parser.add_argument("--compile", nargs=2, type=int, metavar=("SHARE", "OF"))
    args = parser.parse_args()
    names = args.only or list(NAMES)
    if args.compile:
        return compile_share(names, *args.compile)
    started = time.perf_counter()
    cores = max(1, (os.cpu_count() or 2) - 1)
    chosen = [part for name in names for part in ("--only", name)]
    command = [sys.executable, __file__, *chosen, "--compile"]
    workers = [subprocess.Popen([*command, str(i), str(cores)]) for i in range(cores)]
    if any(worker.wait() for worker in workers):
        raise SystemExit("a compiling process failed")
    print(f"compiled in {time.perf_counter() - started:.0f} s", flush=True)
    table = tune_models(names, args.budget, started)
    device = torch.cuda.get_device_name()
    stamp = {"device": device, "torch": torch.__version__, "triton": triton.__version__}
    out = args.out or Path(f"src/moesaic/kernels/configs/{device_family(device)}.json")
    out.write_text(json.dumps(stamp | table, indent=1) + "\n")
    print(f"wrote {out} in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
