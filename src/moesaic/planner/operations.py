"""Single operations that others have measured, predicted before their figures were looked at.

    python -m moesaic.planner.operations 2      # benchmarks/predictions/public/operations-2.jsonl

The conditions of a round were written, and its file committed, while only the conditions of the
tables were known; `operations.json` has the figures since, all from NVIDIA aiconfigurator-core
0.12.0 (Apache-2.0), of several kernels the fastest. Round 1 (SGLang's kernels) missed the goal;
what it taught went into `primitives`. Round 2 is predicted with that: kernels of vLLM and
TensorRT-LLM, other shapes, and NCCL on H100. Compared is what was committed.

Kinds are what a step of the planner is made of: products (`gemm`), attention's core (`mla-decode`,
`mla-prefill`, `gqa-decode`, `gqa-prefill`), the sum over GPUs (`all-reduce`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import Any

from .cluster import Cluster, load_cluster
from .model import Attention
from .own import Row
from .primitives import decode_core_s, prefill_core_s, product_s, reduce_s

Operation = dict[str, Any]
FOLDER = Path("benchmarks/predictions/public")
FIRST = ((2048, 7168), (7168, 2048), (4096, 4096), (12288, 4096), (1536, 7168))
SECOND = ((4096, 7168), (7168, 16384), (8192, 8192), (16384, 2048), (3072, 1536))
_KIB = 1024


def mla(heads: int) -> Attention:
    """DeepSeek-V3's attention, `heads` of its 128 heads."""
    return Attention(heads=heads, kv_heads=heads, head_dim=192, value_dim=128, q_rank=1536,
                     kv_rank=512, rope_dim=64)  # fmt: skip


def gqa(heads: int, kv_heads: int) -> Attention:
    """Heads of 128 that share keys and values."""
    return Attention(heads=heads, kv_heads=kv_heads, head_dim=128, value_dim=128)


def _products(shapes: tuple[tuple[int, int], ...], rows: tuple[int, ...]) -> Iterator[Operation]:
    for dtype in ("bfloat16", "fp8_block"):
        for n, k in shapes:
            for m in rows:
                yield {"kind": "gemm", "dtype": dtype, "m": m, "n": n, "k": k}


def _cores(
    kind: str, heads: tuple[tuple[int, int], ...], batches: tuple[int, ...],
    contexts: tuple[int, ...],
) -> Iterator[Operation]:  # fmt: skip
    for (all_heads, kv_heads), batch, context in product(heads, batches, contexts):
        yield {"kind": kind, "heads": all_heads, "kv_heads": kv_heads, "batch": batch,
               "context": context}  # fmt: skip


def _sums(sizes: tuple[int, ...]) -> Iterator[Operation]:
    for gpus, num_bytes in product((2, 4, 8), sizes):
        yield {"kind": "all-reduce", "gpus": gpus, "bytes": num_bytes}


def operations(round_: int) -> Iterator[Operation]:
    """Every condition of a round."""
    if round_ == 1:
        yield from _products(FIRST, (16, 128, 1024, 4096))
        for kind, heads in (("mla-decode", (128, 128)), ("gqa-decode", (32, 8))):
            yield from _cores(kind, (heads,), (16, 64, 128, 256), (1024, 4096, 16384))
        for kind, heads in (("mla-prefill", (128, 128)), ("gqa-prefill", (32, 8))):
            yield from _cores(kind, (heads,), (1, 4), (1024, 2048, 4096, 8192))
        yield from _sums(tuple(_KIB**2 * 4**p // 4 for p in range(6)))
        return
    yield from _products(SECOND, (32, 256, 2048, 8192))
    yield from _cores("mla-decode", ((128, 128), (16, 16)), (8, 32, 128), (2048, 8192))
    yield from _cores("gqa-decode", ((64, 4), (32, 4)), (8, 32, 128), (2048, 8192))
    yield from _cores("mla-prefill", ((128, 128), (16, 16)), (1, 2), (1024, 4096, 8192))
    yield from _cores("gqa-prefill", ((64, 4), (32, 4)), (1, 2), (1024, 4096, 16384))
    yield from _sums(tuple(_KIB**2 * 4**p // 2 for p in range(5)))


def predict_s(cluster: Cluster, op: Operation) -> float:
    """Seconds of one operation, by the formulas of a step."""
    kind, gpu = op["kind"], cluster.gpu
    if kind == "gemm":
        item = 2 if op["dtype"] == "bfloat16" else 1
        return product_s(gpu, op["m"], op["n"], op["k"], item)
    if kind == "all-reduce":
        return reduce_s(cluster, float(op["bytes"]), op["gpus"])
    heads = op["heads"]
    attention = mla(heads) if kind.startswith("mla") else gqa(heads, op["kv_heads"])
    batch, context = op["batch"], op["context"]
    if kind.endswith("decode"):
        return decode_core_s(gpu, attention, batch, context, 2.0 * attention.cache_elements())
    # Causal: a token attends to half of the prompt on average.
    absorbed = bool(op.get("absorbed", False))
    return prefill_core_s(gpu, attention, batch * context, context / 2, absorbed=absorbed)


def file_of(round_: int, folder: Path = FOLDER) -> Path:
    """Where the predictions of a round are."""
    return folder / ("operations.jsonl" if round_ == 1 else f"operations-{round_}.jsonl")


def blind_rows(folder: Path = FOLDER) -> list[Row]:
    """Every figure beside the prediction committed before it was read."""
    text = files("moesaic.planner").joinpath("operations.json").read_text("utf-8")
    predicted = {}
    for round_ in (1, 2):
        path = file_of(round_, folder)
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        for op in map(json.loads, lines):
            predicted[round_, _name(op)] = op["us"]
    rows = []
    for op in json.loads(text):
        key = (op["round"], _name(op))
        if key in predicted:
            group = f"operations predicted blind, round {op['round']} (us)"
            rows.append(Row(group, key[1], op["source"], op["us"], predicted[key]))
    return rows


def _name(op: Operation) -> str:
    """An operation in words."""
    left = {"kind", "us", "source", "round"}
    return " ".join([op["kind"], *(f"{k} {v}" for k, v in op.items() if k not in left)])


def main(argv: list[str] | None = None) -> int:
    """Write the predictions of a round."""
    parser = argparse.ArgumentParser(description="Predict published operations.")
    parser.add_argument("round", type=int, choices=(2,))
    round_ = parser.parse_args(argv).round
    cluster = load_cluster("H200")
    lines = [
        json.dumps(op | {"us": float(f"{predict_s(cluster, op) * 1e6:.4g}")})
        for op in operations(round_)
    ]
    path = file_of(round_)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    print(f"{len(lines)} predictions in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
