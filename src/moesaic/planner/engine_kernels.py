"""Expert layers and all-reduces as serving engines run them, from published measurements.

    T tokens that all ranks have · H hidden · I inner width of a rank's slice · E experts · K top-k

Tensor parallelism cuts every expert into slices. A slice's products are small and its rows are as
wide as before, so that eight ranks are far from eight times as fast: times over the roofline of the
slice are read off between published points, by rows an expert, width of the slice and of the row.
A card without points takes its sister's time or its own roofline, whichever is longer.

>>> gpu = load_cluster("H200").gpu
>>> spec = ExpertSpec(num_experts=256, hidden_size=7168, intermediate_size=2048)
>>> whole, part = (engine_experts_s(gpu, "H200", "sglang", spec, 8 * 8192, 256, 1, cut=c)
...                for c in (1, 8))
>>> 3 < whole / part < 6
True
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
import numpy.typing as npt

from ..types import ExpertSpec
from .cluster import Gpu, load_cluster
from .kernels import roofline_s

Floats = npt.NDArray[np.float64]
# How fast a point loses weight: doublings of rows an expert, of a slice's and of a row's width.
NEAR = np.array([1.0, 1.0, 2.0])
# Whose kernels a card without points is compared with, and what runs where an engine has none.
SISTER = {"H800": "H100", "H20": "H200"}
KNOWN_CARDS = ("A100", "H100", "H200", *SISTER)
OTHER_ENGINE = "vllm"
# Rows that the smallest tile of a product on tensor cores has, filled or not.
TILE_ROWS = 16


@dataclass(frozen=True)
class Slices:
    """Points (log2 rows an active expert, log2 I, log2 H) and log of time over the roofline."""

    points: Floats
    logs: Floats

    def ratio(self, rows: float, inner: float, hidden: float) -> float:
        """Time over roofline at such a slice."""
        at = np.log2([max(rows, 1.0), inner, hidden])
        away = (((self.points - at) / NEAR) ** 2).sum(-1)
        weight = (away + 0.01) ** -2
        return float(np.exp((weight * self.logs).sum() / weight.sum()))


@cache
def _gpu(card: str) -> tuple[Gpu, float]:
    """A preset's GPU, and its NVLink in bytes a second."""
    cluster = load_cluster(card)
    return cluster.gpu, cluster.nvlink_bytes_per_s


@cache
def published() -> dict[str, Any]:
    """The figures, as the file has them."""
    text = files("moesaic.planner").joinpath("engine_kernels.json").read_text("utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def _slice(spec: ExpertSpec, cut: int) -> ExpertSpec:
    return replace(spec, intermediate_size=max(1, spec.intermediate_size // cut))


@cache
def slices(card: str, engine: str, dtype: str) -> Slices | None:
    """The points of a card's kernels, None where none are published."""
    of = (card, engine, dtype)
    entries = [e for e in published()["moe"] if (e["card"], e["engine"], e["dtype"]) == of]
    if not entries:
        return None
    gpu, _ = _gpu(card)
    points, logs = [], []
    for entry in entries:
        hidden, inner, top_k, experts = entry["shape"]
        cut = int(entry["cut"])
        part = _slice(
            ExpertSpec(num_experts=experts, hidden_size=hidden, intermediate_size=inner), cut
        )
        for tokens, us in entry["us"]:
            active = min(experts, tokens * top_k)  # measured balanced: no expert twice
            floor = float(roofline_s(gpu, part, tokens * top_k, active, 1 if dtype == "fp8" else 2))
            points.append(np.log2([tokens * top_k / active, inner / cut, hidden]))
            logs.append(np.log(us * 1e-6 / floor))
    return Slices(np.array(points), np.array(logs))


def _known(card: str, engine: str, dtype: str) -> tuple[str, str] | None:
    """This engine's kernels, else another's, else those of 16 bits (eight-bit weights)."""
    tries = ((engine, dtype), (OTHER_ENGINE, dtype), (engine, "bf16"), (OTHER_ENGINE, "bf16"))
    return next((one for one in tries if slices(card, *one)), None)


def _points(card: str, engine: str, dtype: str) -> Slices | None:
    """The points of those kernels; None where a card has none."""
    known = _known(card, engine, dtype)
    return None if known is None else slices(card, *known)


def source_of(card: str | None, engine: str, dtype: str) -> str:
    """Whence the times of experts come, in words."""
    if card is None:
        return "roofline"
    known, sister = _known(card, engine, dtype), SISTER.get(card)
    if known is not None:
        return f"published times of {known[0]} in {known[1]} on {card}"
    if sister is None:
        return "roofline"
    known = _known(sister, engine, dtype)
    assert known is not None
    return f"roofline, at least published times of {known[0]} in {known[1]} on {sister}"


def engine_experts_s(
    gpu: Gpu, card: str | None, engine: str, spec: ExpertSpec, rows: float, active: float,
    itemsize: int, *, cut: int = 1,
) -> float:  # fmt: skip
    """Seconds of the experts of one layer on one rank.

    Args:
        gpu: the card, of which `card` is the preset's name; None: the roofline.
        engine: whose kernels.
        rows, active: rows of this rank and its experts that have any.
        itemsize: bytes of a weight.
        cut: ranks that every expert is cut over.
    """
    part = _slice(spec, cut)
    dtype = "fp8" if itemsize == 1 else "bf16"
    each = rows / max(active, 1.0)
    floor = float(roofline_s(gpu, part, rows, active, itemsize))
    points = None if card is None else _points(card, engine, dtype)
    if points is not None:
        return floor * points.ratio(each, part.intermediate_size, part.hidden_size)
    sister = None if card is None else SISTER.get(card)
    if sister is None:
        return gpu.overhead_s + floor
    other, _ = _gpu(sister)
    there = float(roofline_s(other, part, rows, active, itemsize))
    points = _points(sister, engine, dtype)
    assert points is not None
    there *= points.ratio(each, part.intermediate_size, part.hidden_size)
    padded = float(roofline_s(gpu, part, max(rows, TILE_ROWS * active), active, itemsize))
    return max(gpu.overhead_s + padded, there)


@cache
def _reduce_points(card: str, engine: str, gpus: int) -> tuple[Floats, Floats] | None:
    for entry in published()["all_reduce"]:
        if (entry["card"], entry["engine"], entry["gpus"]) == (card, engine, gpus):
            num_bytes, us = np.array(entry["us"], np.float64).T
            return np.log(num_bytes), np.log(us * 1e-6)
    return None


def engine_reduce_s(card: str, engine: str, num_bytes: float, gpus: int) -> float:
    """An all-reduce inside a node, as the engine does it in a graph; 0 on one GPU.

    Raises:
        ValueError: no figures of so many GPUs.
    """
    if gpus == 1:
        return 0.0
    known = card if _reduce_points(card, OTHER_ENGINE, gpus) else SISTER.get(card, card)
    slower = _gpu(known)[1] / _gpu(card)[1]
    points = _reduce_points(known, engine, gpus) or _reduce_points(known, OTHER_ENGINE, gpus)
    if points is None:
        raise ValueError(f"no all-reduce of {gpus} {card} is published here; 1, 2, 4 or 8 GPUs are")
    sizes, times = points
    at = np.log(max(num_bytes, 1.0))
    beyond = max(0.0, at - sizes[-1])
    least, seconds = np.exp(times.min()), np.exp(np.interp(at, sizes, times) + beyond)
    return float(least + (seconds - least) * slower)
