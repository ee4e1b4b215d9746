"""Which tiles the Hopper kernels can have: a check of numbers alone, before anything is compiled.

    BM token rows · BN weight rows · BK depth of a stage

>>> tile_problem({"kernel": "decode", "bm": 16, "bn": 128, "stages": 10})
>>> tile_problem({"kernel": "decode", "bm": 24, "bn": 128, "stages": 10})
'decode tiles have bm in (16, 32, 64, 128), got 24'
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SHARED_LIMIT = 227 * 1024
STAGED_BYTES = 4 * 64 * 64 * 2
TRIM_STAGED = 2 * 32 * 64 * 2
BARRIER_BYTES = 1024
"""Barriers, notes and what the partitions are started with: an upper bound of what is compiled."""

ROWS = {
    "prefill": (128,),
    "tall": (64, 128, 192, 256, 320, 384),
    "trim": (128, 144, 160),
    "decode": (16, 32, 64, 128),
    "pair": (16, 32, 64, 128),
    "flex": (64, 128),
}
COLUMNS = {
    "prefill": (256,), "tall": (128,), "trim": (256,), "decode": (64, 128), "pair": (64, 128),
    "flex": (128, 256),
}  # fmt: skip
ONE_LAUNCH = ("pair", "flex")
FOUND_BYTES = 2560
"""Through which a launch of pairs that finds its tasks itself numbers slots, and their list."""
STAGED = {"decode": 2, "pair": 3}
"""Bytes of staged output for each element of a tile: of a gated product's half, and of a whole."""
DEPTHS = {"pair": (64, 128)}
"""Depths of a stage, where more than one: a deep one halves what programs say of stages."""
DEFAULTS = {"bk": 64, "group_m": 8, "ctas_per_sm": 1}
RANGES = {"stages": (2, 16), "group_m": (1, 64), "ctas_per_sm": (1, 4)}
ORDERS = ("index", "large_first", "mixed")


def shared_bytes(kernel: str, bm: int, bn: int, stages: int, bk: int = 64) -> int:
    """Shared memory of one program: the ring of 16-bit operands, staged output, barriers.

    >>> shared_bytes("prefill", 128, 256, 4)
    230400
    """
    staged = bm * bn * STAGED[kernel] if kernel in STAGED else STAGED_BYTES
    if kernel == "flex":
        staged = 2 * 64 * (64 + (32 if bn == 128 else 0)) * 2
    if kernel == "trim":
        left = SHARED_LIMIT - BARRIER_BYTES - stages * (bm + bn) * bk * 2
        staged = min(STAGED_BYTES, max(TRIM_STAGED, left // TRIM_STAGED * TRIM_STAGED))
    found = FOUND_BYTES if (kernel, bm) == ("pair", 16) else 0
    return stages * (bm + bn) * bk * 2 + staged + found + BARRIER_BYTES


def tile_problem(row: Mapping[str, Any]) -> str | None:
    """Why a tile, given as the fields of `HopperConfig`, cannot exist, or None."""
    known = {"kernel", "bm", "bn", "stages", *DEFAULTS}
    if odd := sorted(set(row) - known) + sorted({"kernel", "bm", "bn", "stages"} - set(row)):
        return f"unknown or missing fields: {', '.join(odd)}"
    values = DEFAULTS | dict(row)
    kernel = values.pop("kernel")
    if kernel not in ROWS:
        return f"kernel must be one of {', '.join(ROWS)}, got {kernel!r}"
    if not all(type(value) is int for value in values.values()):
        return f"sizes must be whole numbers, got {values}"
    depths = DEPTHS.get(kernel, (64,))
    for name, allowed in (("bm", ROWS[kernel]), ("bn", COLUMNS[kernel]), ("bk", depths)):
        if values[name] not in allowed:
            return f"{kernel} tiles have {name} in {allowed}, got {values[name]}"
    for name, (low, high) in RANGES.items():
        if not low <= values[name] <= high:
            return f"{name} must be in [{low}, {high}], got {values[name]}"
    sizes = (values[name] for name in ("bm", "bn", "stages", "bk"))
    used = values["ctas_per_sm"] * shared_bytes(kernel, *sizes)
    if used > SHARED_LIMIT:
        return f"{used} bytes of shared memory are needed, an SM has {SHARED_LIMIT}"
    return None


def chain_problem(row: Any) -> str | None:
    """Why tiles of one launch for three products cannot exist, or None.

    >>> chain_problem({"bm": 160, "bn": 256, "rest": 32, "stages": 4, "split": 1})
    >>> chain_problem({"bm": 192, "bn": 256, "rest": 32, "stages": 4, "split": 1})
    'bm must be a multiple of 16 in [16, 160], got 192'
    """
    names = {"bm", "bn", "rest", "stages", "split"}
    if not isinstance(row, dict) or set(row) != names:
        return f"it must have {', '.join(sorted(names))}"
    if not all(isinstance(row[name], int) and row[name] > 0 for name in names):
        return "its values must be positive whole numbers"
    if row["bn"] not in (128, 256) or row["rest"] not in (16, 32):
        return f"bn must be 128 or 256 and rest 16 or 32, got {row['bn']} and {row['rest']}"
    most = 128 + row["rest"]
    if row["bm"] % 16 or row["bm"] > most:
        return f"bm must be a multiple of 16 in [16, {most}], got {row['bm']}"
    used = row["stages"] * 128 * (most + row["bn"]) + 16384 + 1024
    if used > SHARED_LIMIT:
        return f"{used} bytes of shared memory are needed, an SM has {SHARED_LIMIT}"
    return None


def layer_problem(row: Any) -> str | None:
    """Why a table's row, two or three tiles and an order, cannot exist, or None."""
    known = {"up", "mid", "down", "order", "chain"}
    if not isinstance(row, dict) or not {"up", "down"} <= set(row) <= known:
        return "a row must have up, down and perhaps mid, order and chain"
    names = [name for name in ("up", "mid", "down") if name in row]
    for name in names:
        if not isinstance(row[name], dict):
            return f"{name} must be an object"
        if problem := tile_problem(row[name]):
            return f"{name}: {problem}"
    heights = [row[name]["bm"] for name in names]
    if len(set(heights)) > 1:
        return f"{' and '.join(names)} share one map: bm {' and '.join(map(str, heights))} differ"
    one = [name for name in names if row[name]["kernel"] in ONE_LAUNCH]
    if one and row["up"] != row["down"]:
        kernel = row[one[0]]["kernel"]
        return f"{kernel} tiles are of one launch: up and down must be the same tile"
    if "chain" in row and (problem := chain_problem(row["chain"])):
        return f"chain: {problem}"
    if row.get("order", "index") not in ORDERS:
        return f"order must be one of {', '.join(ORDERS)}, got {row['order']!r}"
    return None
