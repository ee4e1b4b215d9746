"""What an expert layer takes on one GPU: measured lines where there are some, else the roofline.

    rows r of an expert · E experts on the GPU

Bytes and flops overlap incompletely, so the roofline here is the root of the sum of their squares,
plus a constant. Measured lines say how far above it the kernels are. That ratio is read off between
the measured points, by the rows per expert and the size of an expert, for shapes that were not
measured too: a mean of logarithms, nearer points counting more.

>>> table = KernelTable(((0.0, 20.0, 1.0), (8.0, 20.0, 1.44)), "by hand")
>>> round(float(table.ratio(16.0, 2**20)), 3)
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


# How fast a measured point loses weight: doublings of the rows, doublings of an expert's size. An
# expert's rows say which tiles run and how full they are; its size changes little besides.
NEAR_ROWS, NEAR_SIZE = 1.0, 3.0


@dataclass(frozen=True)
class KernelTable:
    """Points (log2 of rows per active expert, log2 of an expert's elements, time over roofline).

    `overhead_s` is what these kernels take beyond that; None leaves it to the GPU's own figure.
    """

    points: tuple[tuple[float, float, float], ...]
    source: str
    overhead_s: float | None = None

    def beyond(self, gpu: Gpu) -> float:
        """Seconds of a layer beyond its bytes and flops."""
        return gpu.overhead_s if self.overhead_s is None else self.overhead_s

    def ratio(self, rows: npt.ArrayLike, elements: float) -> Floats:
        """The ratio at so many rows per active expert of so many elements; 1 without points."""
        at = np.log2(np.maximum(np.asarray(rows, np.float64), 1.0))
        if not self.points:
            return np.ones_like(at)
        known, size, ratio = np.array(self.points).T
        across = (size - np.log2(elements)) / NEAR_SIZE
        away = ((at[..., None] - known) / NEAR_ROWS) ** 2 + across**2
        weight = (away + 0.01) ** -1.5
        found: Floats = np.exp((weight * np.log(ratio)).sum(-1) / weight.sum(-1))
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
    floor = roofline_s(gpu, spec, rows, active, itemsize)
    seconds = table.beyond(gpu) + floor * table.ratio(each, expert_weight_elements(spec))
    found: Floats = np.where(rows > 0, seconds, 0.0)
    return found


def expected_active(experts: int, top_k: int, tokens: int) -> float:
    """Experts that get a token when all sets of K are alike likely."""
    return experts * (1 - (1 - top_k / experts) ** tokens)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One measured layer: its shape, its tokens, what it took and which kernels ran.

    With `ranks`, the share of one of so many GPUs that have `tokens` together.
    """

    model: str
    spec: ExpertSpec
    top_k: int
    tokens: int
    seconds: float
    suite: str
    path: str = "hopper"
    ranks: int = 1

    @property
    def rows(self) -> float:
        """Rows of this GPU."""
        return self.tokens * self.top_k / self.ranks

    @property
    def active(self) -> float:
        """Experts of this GPU that get a row."""
        return expected_active(self.spec.num_experts, self.top_k, self.tokens) / self.ranks

    def floor_s(self, gpu: Gpu) -> float:
        """The roofline of this layer."""
        return float(roofline_s(gpu, self.spec, self.rows, self.active, 2))

    def point(self, gpu: Gpu, beyond_s: float) -> tuple[float, float, float]:
        """The point of this line in a `KernelTable`."""
        above = (self.seconds - beyond_s) / self.floor_s(gpu)
        size = float(np.log2(expert_weight_elements(self.spec)))
        return float(np.log2(self.rows / self.active)), size, above


def path_of(spec: ExpertSpec, suite: str = "layer") -> str:
    """Which kernels run such experts in 16 bits on Hopper.

    Suite `triton` was measured before there were others; experts of three layers have their own.
    """
    if suite == "triton":
        return "triton"
    return "three-layer" if spec.layers == 3 else "hopper"


def measured_layers(
    lines: Iterable[dict[str, Any]], shapes: dict[str, tuple[ExpertSpec, int]]
) -> list[Measured]:
    """The lines that time an expert layer of ours on one GPU in a graph, bf16, uniform routing.

    Args:
        lines: of benchmarks/results.
        shapes: per model name its spec and K; lines of other models are left out.

    Of equal layers on the same kernels the fastest counts.
    """
    found: dict[tuple[str, int, str], Measured] = {}
    for x in lines:
        fits = x["clock"] in ("experts", "layer-ep1") and (
            x["impl"], x["mode"], x["dtype"], x["routing"],
        ) == ("moesaic", "graph", "bfloat16", "uniform")  # fmt: skip
        if not fits or not x["ms"] or x.get("wrong") or x["model"] not in shapes:
            continue
        spec, top_k = shapes[x["model"]]
        one = Measured(model=x["model"], spec=spec, top_k=top_k, tokens=x["tokens"],
                       seconds=x["ms"] / 1e3, suite=x["suite"],
                       path=path_of(spec, x["suite"]))  # fmt: skip
        key = (one.model, one.tokens, one.path)
        if key not in found or one.seconds < found[key].seconds:
            found[key] = one
    return list(found.values())


def fit_table(layers: Sequence[Measured], gpu: Gpu, source: str) -> KernelTable:
    """A point for every layer; what layers take beyond their floor is read off those of one token.

    Layers that it dominates (less than twice its time) say nothing of the ratio and are left out.
    """
    single = [max(x.seconds - x.floor_s(gpu), 0.0) for x in layers if x.tokens == 1]
    beyond = median(single) if single else gpu.overhead_s
    points = tuple(x.point(gpu, beyond) for x in layers if x.seconds > 2 * beyond)
    return KernelTable(points, source, beyond) if points else ROOFLINE


def device_lines(root: Path, device: str | None) -> list[dict[str, Any]]:
    """All committed lines of a device, on one GPU and (``<device>-x<G>``) on several of a host."""
    import json

    name = device or "none"
    folders = [root / name, *sorted(root.glob(f"{name}-x*"))]
    return [
        json.loads(row)
        for folder in folders
        for path in sorted(folder.glob("*.jsonl"))
        for row in path.read_text("utf-8").splitlines()
    ]
