"""What an expert layer takes on one GPU: measured lines where there are some, else the roofline.

    rows r of an expert · E experts on the GPU

Bytes and flops overlap incompletely, so the roofline here is the root of the sum of their squares,
plus a constant. Measured lines say how far above it the kernels are, as a function of the rows per
expert: that ratio is read off between the measured points, for shapes that were not measured too.

>>> table = KernelTable(((0.0, 1.0), (8.0, 1.4)), "by hand")
>>> round(float(table.ratio(16.0)), 3)
1.2
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from ..cost import expert_flops, expert_weight_elements
from ..types import ExpertSpec
from .cluster import Gpu

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class KernelTable:
    """Points (log2 of the rows per active expert, measured time over roofline), rising."""

    points: tuple[tuple[float, float], ...]
    source: str

    def ratio(self, rows: npt.ArrayLike) -> Floats:
        """The ratio at so many rows per active expert; flat beyond the measured ends."""
        at = np.log2(np.maximum(np.asarray(rows, np.float64), 1.0))
        if not self.points:
            return np.ones_like(at)
        known, values = zip(*self.points, strict=True)
        found: Floats = np.interp(at, known, values)
        return found


ROOFLINE = KernelTable((), "roofline")


def roofline_s(
    gpu: Gpu, spec: ExpertSpec, rows: npt.ArrayLike, active: npt.ArrayLike, itemsize: float
) -> Floats:
    """Seconds that `rows` rows on `active` experts need at least, without the constant."""
    rows, active = np.asarray(rows, np.float64), np.asarray(active, np.float64)
    moved = itemsize * active * expert_weight_elements(spec) + 2 * 2 * rows * spec.hidden_size
    flops = rows * expert_flops(spec, 1)
    found: Floats = np.hypot(moved / gpu.read_bytes_per_s, flops / gpu.rate(itemsize))
    return found


def expert_layer_s(
    gpu: Gpu,
    spec: ExpertSpec,
    rows: npt.ArrayLike,
    active: npt.ArrayLike,
    itemsize: float,
    table: KernelTable = ROOFLINE,
) -> Floats:
    """Seconds of the experts of one layer on GPUs with so many rows and active experts."""
    rows, active = np.asarray(rows, np.float64), np.asarray(active, np.float64)
    each = rows / np.maximum(active, 1.0)
    seconds = gpu.overhead_s + roofline_s(gpu, spec, rows, active, itemsize) * table.ratio(each)
    found: Floats = np.where(rows > 0, seconds, 0.0)
    return found


def expected_active(experts: int, top_k: int, tokens: int) -> float:
    """Experts that get a token when all sets of K are alike likely."""
    return experts * (1 - (1 - top_k / experts) ** tokens)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One measured layer: its shape, its tokens and what it took."""

    model: str
    spec: ExpertSpec
    top_k: int
    tokens: int
    seconds: float
    suite: str

    def ratio(self, gpu: Gpu) -> tuple[float, float]:
        """The point of this line: log2 of the rows per active expert, time over roofline."""
        rows = self.tokens * self.top_k
        active = expected_active(self.spec.num_experts, self.top_k, self.tokens)
        floor = float(roofline_s(gpu, self.spec, rows, active, 2))
        return float(np.log2(rows / active)), max(self.seconds - gpu.overhead_s, 0.0) / floor


def measured_layers(
    lines: Iterable[dict[str, Any]], shapes: dict[str, tuple[ExpertSpec, int]]
) -> list[Measured]:
    """The lines that time an expert layer of ours in a graph, bf16, uniform routing.

    Args:
        lines: of benchmarks/results.
        shapes: per model name its spec and K; lines of other models are left out.
    """
    found: dict[tuple[str, int], Measured] = {}
    for x in lines:
        fits = (x["clock"], x["impl"], x["mode"], x["dtype"], x["routing"]) == (
            "experts", "moesaic", "graph", "bfloat16", "uniform",
        )  # fmt: skip
        if not fits or not x["ms"] or x.get("wrong") or x["model"] not in shapes:
            continue
        spec, top_k = shapes[x["model"]]
        one = Measured(model=x["model"], spec=spec, top_k=top_k, tokens=x["tokens"],
                       seconds=x["ms"] / 1e3, suite=x["suite"])  # fmt: skip
        key = (one.model, one.tokens)
        if key not in found or one.seconds < found[key].seconds:
            found[key] = one
    return list(found.values())


def fit_table(layers: Sequence[Measured], gpu: Gpu, source: str) -> KernelTable:
    """The median ratio at every whole power of two of rows per expert that was measured.

    Layers that the constant dominates (less than twice its time) say nothing and are left out.
    """
    bins: dict[int, list[float]] = {}
    for layer in layers:
        at, ratio = layer.ratio(gpu)
        if layer.seconds > 2 * gpu.overhead_s:
            bins.setdefault(round(at), []).append(ratio)
    points = tuple((float(at), median(values)) for at, values in sorted(bins.items()))
    return KernelTable(points, source) if points else ROOFLINE


def device_lines(root: Path, device: str | None) -> list[dict[str, Any]]:
    """All committed lines of a device; none where there is no such folder."""
    import json

    folder = root / (device or "none")
    return [
        json.loads(row)
        for path in sorted(folder.glob("*.jsonl"))
        for row in path.read_text("utf-8").splitlines()
    ]
