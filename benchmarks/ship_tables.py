"""Make the Hopper rows of the shipped tables from the committed lines of suite `tune`.

    python benchmarks/ship_tables.py

The H200's rows are what was measured. The H100's are the same rows, derived and not measured: the
SXM parts have the same chip (sm_90, 132 SMs, 227 KiB of shared memory an SM), so where products
bind, the ranking of tiles is the H200's; where memory binds, the H100 has 3.35 TB/s for 4.8, and
tiles that keep enough bytes in flight for the faster memory keep enough for the slower. The file
says so in `derived`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moesaic.bench.results import Line, read_lines, write_atomic
from moesaic.bench.suites.tune import table_of
from moesaic.kernels.tune import CONFIGS

DERIVED = (
    "Not measured on an H100: the rows of h200.json. Same chip and SMs; memory 3.35 TB/s of the "
    "H200's 4.8 (0.70)."
)


def rewritten(old: dict[str, Any], lines: Sequence[Line], family: str) -> dict[str, Any]:
    """A table with its Hopper rows replaced by those of the lines."""
    stamped = {key: lines[0][key] for key in ("torch", "triton")}
    if family == "h100":
        first = {"device": "NVIDIA H100 80GB HBM3", "derived": DERIVED, **stamped}
        return first | {"shapes": {}, "hopper": table_of(lines, family)}
    return old | stamped | {"hopper": table_of(lines, family)}


def text_of(table: dict[str, Any]) -> str:
    """A table as JSON, one row of a shape a line."""
    parts = []
    for name, value in table.items():
        if name not in ("shapes", "hopper"):
            parts.append(f" {json.dumps(name)}: {json.dumps(value)}")
            continue
        shapes = []
        for shape, rows in value.items():
            packed = (json.dumps(row, separators=(",", ":")) for row in rows.values())
            told = ",\n".join(
                f"   {json.dumps(tokens)}: {row}" for tokens, row in zip(rows, packed, strict=True)
            )
            shapes.append(f"  {json.dumps(shape)}: {{\n{told}\n  }}")
        parts.append(f" {json.dumps(name)}: {{\n" + ",\n".join(shapes) + "\n }")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main(root: Path = Path("benchmarks/results")) -> int:
    """Rewrite both files."""
    lines = read_lines(root / "h200" / "tune.jsonl")
    for family in ("h200", "h100"):
        path = CONFIGS / f"{family}.json"
        old = json.loads(path.read_text()) if path.exists() else {}
        write_atomic(path, text_of(rewritten(old, lines, family)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
