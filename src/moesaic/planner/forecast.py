"""Predictions of suites `ep` and `layer`, written before they run, then set beside their lines.

    python -m moesaic.planner.forecast write --gpus 8      # benchmarks/predictions/h200-x8/ep.jsonl
    python -m moesaic.planner.forecast compare --gpus 8    # beside benchmarks/results/h200-x8
    python -m moesaic.planner.forecast compare --gpus 1    # suite layer, clock experts, uniform

`write` uses every committed line on one GPU and on fewer GPUs than it predicts (for 2, those of the
other cells) and leaves out cells measured before; `git log` of the file says when it was written.
`compare` prints one row per cell that has been measured since, and ends with 1 where the median
error is over the goal.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .cluster import load_cluster
from .exchange import measured_ways
from .kernels import device_lines, fit_table, measured_layers, path_of
from .own import Row
from .shapes import EIGHT, FIELD, SHAPES, SPREAD
from .spread import WIDTHS, exchange_cell_s, experts_of_layers, layer_s

TOKENS = (1, 4, 16, 64, 128, 512, 1024, 4096, 8192, 32768)
ROWS = (1, 4, 32, 128, 512, 2048, 8192, 32768, 65536)
PER_RANK, SMALL = 8192, 128
GOAL = 0.10
Line = dict[str, Any]


def _ranks(gpus: int) -> list[int]:
    return [r for r in (1, 2, 4, 8) if r <= gpus]


def cells(gpus: int) -> Iterator[tuple[str, str, int, str, int]]:
    """(clock, model, tokens, routing, ranks): exchanges, strong, weak and small scaling.

    On 1 GPU: the layers of suite `layer`.
    """
    if gpus == 1:
        for model in FIELD:
            yield from (("experts", model, tokens, "uniform", 1) for tokens in TOKENS)
        return
    for model in WIDTHS:
        for routing in ("even", "uniform", "zipf1"):
            for rows in ROWS:
                for clock in ("dispatch", "combine"):
                    yield clock, model, rows, routing, gpus
    for model in SPREAD | (EIGHT if gpus == 8 else {}):
        for ranks in _ranks(gpus):
            totals = {PER_RANK, ranks * PER_RANK, 4 * SMALL, gpus * SMALL, ranks * 4096}
            for tokens in sorted(totals):
                yield f"layer-ep{ranks}", model, tokens, "uniform", ranks


def predictions(gpus: int, results: Path) -> list[Line]:
    """One line per cell, from what was measured on fewer GPUs (on as many for 1 and 2)."""
    lines, gpu = device_lines(results, "h200"), load_cluster("H200").gpu
    known = (2,) if gpus == 2 else range(2, gpus)
    shapes = SPREAD | EIGHT | FIELD
    ways = measured_ways(lines, ranks=known)
    layers = measured_layers(lines, SHAPES | SPREAD)
    layers += experts_of_layers(lines, SPREAD, ways, ranks=known)
    tables = {
        path: fit_table([x for x in layers if x.path == path], gpu, path)
        for path in {x.path for x in layers}
    }
    found = []
    for clock, model, tokens, routing, ranks in cells(gpus):
        if model in WIDTHS:
            seconds = exchange_cell_s(ways, clock, ranks, tokens, WIDTHS[model], routing)
        else:
            spec, top_k = shapes[model]
            seconds = layer_s(gpu, spec, top_k, tokens, ranks, tables[path_of(spec)], ways)
        found.append({"suite": suite_of(gpus), "clock": clock, "model": model, "tokens": tokens,
                      "routing": routing, "ranks": ranks,
                      "ms": float(f"{seconds * 1e3:.4g}")})  # fmt: skip
    return found


def suite_of(gpus: int) -> str:
    """The suite that measures these cells."""
    return "layer" if gpus == 1 else "ep"


def key(line: Line) -> tuple[Any, ...]:
    """What a prediction and a measured line have in common."""
    names = ("suite", "clock", "model", "tokens", "routing")
    return (*(line[name] for name in names), int(line.get("ranks") or 1))


def unmeasured(predicted: list[Line], measured: list[Line]) -> list[Line]:
    """The predictions of cells that no line has yet: the others would not be predictions."""
    known = {id(line) for line, _ in pairs(predicted, measured)}
    return [line for line in predicted if id(line) not in known]


def pairs(predicted: list[Line], measured: list[Line]) -> list[tuple[Line, Line]]:
    """Each prediction whose cell has a right time of ours in a graph, with that line."""
    known = {
        key(x): x
        for x in measured
        if x["impl"] == "moesaic" and x["mode"] == "graph" and x["ms"] and not x.get("wrong")
    }  # fmt: skip
    return [(line, known[key(line)]) for line in predicted if key(line) in known]


def read_lines(path: Path) -> list[Line]:
    """The lines of a file; none where there is none."""
    if not path.exists():
        return []
    return [json.loads(row) for row in path.read_text("utf-8").splitlines()]


def table_of(both: list[tuple[Line, Line]]) -> tuple[list[str], float]:
    """Predictions beside measurements as a table, and the median error."""
    heads = ("suite", "clock", "model", "tokens", "routing", "ranks", "predicted ms",
             "measured ms", "error")  # fmt: skip
    rows = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    errors = []
    for guess, line in both:
        errors.append(guess["ms"] / line["ms"] - 1)
        cell = " | ".join(str(x) for x in key(line))
        rows.append(
            f"| {cell} | {guess['ms']:.4g} | {line['ms']:.4g} | {100 * errors[-1]:+.0f} % |"
        )
    median = float(np.median(np.abs(errors)))
    p90 = float(np.percentile(np.abs(errors), 90))
    rows += ["", f"{len(errors)} cells, median error {100 * median:.1f} %, 90th percentile "
             f"{100 * p90:.1f} %, goal {100 * GOAL:.0f} %"]  # fmt: skip
    return rows, median


def foretold_rows(results: Path, folder: Path) -> list[Row]:
    """This project's lines whose predictions were committed before them."""
    rows = []
    for gpus in (1, 2, 4, 8):
        file = file_of(gpus)
        for guess, line in pairs(read_lines(folder / file), read_lines(results / file)):
            what = " ".join(str(x) for x in key(line)[1:-1]) + f", {line.get('ranks') or 1} GPUs"
            source = f"suite {line['suite']} on {gpus} GPUs"
            rows.append(Row("own, predicted before they were measured (ms)", what, source,
                            line["ms"], guess["ms"]))  # fmt: skip
    return rows


def file_of(gpus: int) -> str:
    """Where predictions and lines of so many GPUs are, in their folders."""
    return f"{'h200' if gpus == 1 else f'h200-x{gpus}'}/{suite_of(gpus)}.jsonl"


def main(argv: list[str] | None = None) -> int:
    """Write predictions, or compare."""
    parser = argparse.ArgumentParser(description="Predictions before measurements.")
    parser.add_argument("what", choices=("write", "compare"))
    parser.add_argument("--gpus", type=int, choices=(1, 2, 4, 8), required=True)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--predictions", type=Path, default=Path("benchmarks/predictions"))
    options = parser.parse_args(argv)
    file = file_of(options.gpus)
    path, results = options.predictions / file, options.results / file
    measured = read_lines(results)
    if options.what == "write":
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True,
                                text=True, check=True).stdout.strip()  # fmt: skip
        found = unmeasured(predictions(options.gpus, options.results), measured)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(x | {"commit": commit}) + "\n" for x in found), "utf-8")
        print(f"{len(found)} predictions in {path}")
        return 0
    both = pairs(read_lines(path), measured)
    if not both:
        print(f"no measured line in {results} belongs to a prediction in {path}", file=sys.stderr)
        return 1
    rows, median = table_of(both)
    print("\n".join(rows))
    return int(median > GOAL)


if __name__ == "__main__":
    sys.exit(main())
