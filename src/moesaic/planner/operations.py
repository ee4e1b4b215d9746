"""Single operations that others have measured, predicted before their figures were looked at.

    python -m moesaic.planner.operations         # benchmarks/predictions/public/operations.jsonl

The conditions here were written, and that file committed, while only the conditions of the tables
were known; `operations.yaml` has the figures since. Every kind is what a step of the planner is
made of: products (`gemm`), attention's core in decode and prefill (`mla-decode`, `mla-prefill`,
`gqa-decode`, `gqa-prefill`) and the sum over the GPUs of a node (`all-reduce`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .cluster import Cluster, load_cluster
from .costs import core_s, gemm_s, reduce_s
from .model import Attention

Operation = dict[str, Any]
PREDICTIONS = Path("benchmarks/predictions/public/operations.jsonl")
# DeepSeek-V3's heads, and 32 heads of 128 with 8 for keys and values.
MLA = Attention(heads=128, kv_heads=128, head_dim=192, value_dim=128, q_rank=1536, kv_rank=512,
                rope_dim=64)  # fmt: skip
GQA = Attention(heads=32, kv_heads=8, head_dim=128, value_dim=128)
SHAPES = ((2048, 7168), (7168, 2048), (4096, 4096), (12288, 4096), (1536, 7168))


def operations() -> Iterator[Operation]:
    """Every condition."""
    for dtype in ("bfloat16", "fp8_block"):
        for n, k in SHAPES:
            for m in (16, 128, 1024, 4096):
                yield {"kind": "gemm", "dtype": dtype, "m": m, "n": n, "k": k}
    for kind in ("mla-decode", "gqa-decode"):
        for batch in (16, 64, 128, 256):
            for context in (1024, 4096, 16384):
                yield {"kind": kind, "batch": batch, "context": context}
    for kind in ("mla-prefill", "gqa-prefill"):
        for batch in (1, 4):
            for context in (1024, 2048, 4096, 8192):
                yield {"kind": kind, "batch": batch, "context": context}
    for gpus in (2, 4, 8):
        for num_bytes in (2**18, 2**20, 2**22, 2**24, 2**26, 2**28):
            yield {"kind": "all-reduce", "gpus": gpus, "bytes": num_bytes}


def predict_s(cluster: Cluster, op: Operation) -> float:
    """Seconds of one operation, by the formulas of a step."""
    kind, gpu = op["kind"], cluster.gpu
    if kind == "gemm":
        item = 2 if op["dtype"] == "bfloat16" else 1
        m, n, k = op["m"], op["n"], op["k"]
        moved = float(item * (n * k + m * k) + 2 * m * n)
        return gemm_s(gpu, 2.0 * m * n * k, moved, item, 1)
    if kind == "all-reduce":
        return reduce_s(cluster, float(op["bytes"]), op["gpus"])
    attention = MLA if kind.startswith("mla") else GQA
    batch, context = op["batch"], op["context"]
    if kind.endswith("decode"):
        flops = attention.core_flops(float(batch * context), absorbed=True)
        return core_s(gpu, flops, 2.0 * batch * context * attention.cache_elements())
    # Causal: a token attends to half of the prompt on average.
    flops = attention.core_flops(batch * context * context / 2, absorbed=False)
    heads = attention.heads * (attention.head_dim + attention.value_dim)
    through = 2.0 * batch * context * 2 * heads
    return core_s(gpu, flops, through)


def main() -> int:
    """Write the predictions."""
    cluster = load_cluster("H200")
    lines = [
        json.dumps(op | {"us": float(f"{predict_s(cluster, op) * 1e6:.4g}")}) for op in operations()
    ]
    PREDICTIONS.parent.mkdir(parents=True, exist_ok=True)
    PREDICTIONS.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    print(f"{len(lines)} predictions in {PREDICTIONS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
