"""The slicing paper's comparison in a minute: every executor of one MoE layer, interleaved.

    python examples/run_benchmark.py      # Small; on a CPU with a quarter of its widths
    python examples/run_benchmark.py --size medium --tokens 32 256 --energy

The same code as `moesaic bench --suite paper`, which also measures stages and the break-even map;
lines are written to --out, and a table and the paper's claim beside it are printed.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from moesaic.bench.command import show
from moesaic.bench.paper.configuration import grid, layers
from moesaic.bench.paper.tables import by_batch, energy, latency, tokens_per_s
from moesaic.bench.results import Recorder, device_slug
from moesaic.bench.suite import Cell, Context
from moesaic.bench.suites.paper import SUITE, run


def main() -> None:
    """Measure, print."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=list(layers()), default="small")
    parser.add_argument("--tokens", type=int, nargs="+", default=None)
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--energy", action="store_true", help="and joules per 1000 tokens (NVML)")
    parser.add_argument("--out", type=Path, default=Path("runs/paper"))
    options = parser.parse_args()

    device, layer = torch.device(options.device), layers()[options.size]
    model, dtype = layer.model, "bfloat16"
    if device.type == "cpu":
        h, i = model.hidden_size // 4, model.intermediate_size // 4
        model, dtype = replace(model, hidden_size=h, intermediate_size=i), "float32"
    batches = options.tokens or (grid()["batches"]["paper"] if device.type == "cuda" else [8, 32])
    clocks = ["experts", "energy"] if options.energy else ["experts"]
    cells = [Cell(model.name, t, dtype=dtype, clock=clock) for clock in clocks for t in batches]

    recorder = Recorder(options.out, device_slug(device), SUITE.name, SUITE.summarize)
    run(cells, Context(device, recorder, options.seconds), models=lambda name: model)

    shape = f"H={model.hidden_size} I={model.intermediate_size} {dtype}, {device}"
    show(by_batch(recorder.lines, model.name, tokens_per_s), f"{layer.title}, tokens/s, {shape}")
    show(by_batch(recorder.lines, model.name, latency), f"{layer.title}, ms, {shape}")
    if options.energy:
        show(energy(recorder.lines), "Energy")
    print(f"lines: {recorder.path}")


if __name__ == "__main__":
    main()
