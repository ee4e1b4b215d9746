"""This project's measurements beside predictions that have not seen them.

Held out are whole models (every width of a model's family, on any number of GPUs) and everything
measured on 4 GPUs: layers are predicted from other models' lines, exchanges over 4 GPUs from those
over 2, and on 2 GPUs the exchanges of 2048 numbers and of uneven routings from even ones of 7168.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .cluster import Gpu, load_cluster
from .exchange import Ways, measured_ways
from .kernels import (
    KernelTable,
    Measured,
    device_lines,
    expert_layer_s,
    fit_table,
    measured_layers,
    path_of,
)
from .shapes import EIGHT, FIELD, SHAPES, SPREAD
from .spread import WIDTHS, exchange_cell_s, experts_of_layers, layer_s

DEVICE = "h200"
ALL = SHAPES | SPREAD | EIGHT | FIELD
BASE = "rows-7168"


@dataclass(frozen=True)
class Row:
    """One comparison, in the unit of its group."""

    group: str
    what: str
    source: str
    published: float
    predicted: float
    status: str = "counted"

    @property
    def error(self) -> float:
        """Prediction over publication, minus one."""
        return self.predicted / self.published - 1


def family(model: str) -> str:
    """Models that are one when one is held out: those with the same widths of an expert."""
    spec = ALL[model][0]
    return f"{spec.hidden_size}x{spec.intermediate_size}"


def table_without(layers: Sequence[Measured], held: str, path: str, gpu: Gpu) -> KernelTable:
    """The table of these kernels' layers of other models."""
    others = [x for x in layers if x.path == path and family(x.model) != family(held)]
    return fit_table(others, gpu, "other models")


def own_layers(results: Path) -> list[Row]:
    """Every measured expert layer on one H200, predicted from the other models' layers alone."""
    gpu = load_cluster("H200").gpu
    layers = measured_layers(device_lines(results, DEVICE), ALL)
    rows = []
    for held in layers:
        table = table_without(layers, held.model, held.path, gpu)
        if not table.points:
            continue
        found = float(expert_layer_s(gpu, held.spec, held.rows, held.active, 2, table))
        what, source = f"{held.model}, {held.tokens} tokens", f"suite {held.suite}, model held out"
        group = f"own layers, 1 H200, {held.path} kernels (ms)"
        rows.append(Row(group, what, source, held.seconds * 1e3, found * 1e3))
    return rows


def is_ours(x: dict[str, Any]) -> bool:
    """A right time of suite `ep` of ours in a graph."""
    mine = (x["suite"], x["impl"], x["mode"]) == ("ep", "moesaic", "graph")
    return mine and bool(x["ms"]) and not x.get("wrong") and bool(x.get("ranks"))


def own_exchange(results: Path) -> list[Row]:
    """Exchanges, predicted from the even ones of width 7168 over 2 GPUs alone."""
    lines = device_lines(results, DEVICE)
    ways = measured_ways([x for x in lines if x["model"] == BASE], ranks=(2,))
    rows = []
    for x in lines:
        if not is_ours(x) or x["model"] not in WIDTHS or not ways:
            continue
        gpus, clock = int(x["ranks"]), str(x["clock"])
        if gpus == 2 and (x["model"], x["routing"]) == (BASE, "even"):
            continue
        width = WIDTHS[x["model"]]
        found = exchange_cell_s(ways, clock, gpus, x["tokens"], width, x["routing"])
        held = "4 GPUs held out" if gpus == 4 else "width and routing held out"
        what = f"{clock}, {x['tokens']} rows of {width}, {x['routing']}"
        rows.append(Row(f"own exchange, {gpus} H200 (us)", what, f"suite ep, {held}",
                        x["ms"] * 1e3, found * 1e6))  # fmt: skip
    return rows


def own_spread(results: Path) -> list[Row]:
    """Whole layers over 2 and 4 GPUs: neither the model's lines nor any of 4 GPUs are used."""
    lines, gpu = device_lines(results, DEVICE), load_cluster("H200").gpu
    ways: Ways = measured_ways(lines, ranks=(2,))
    layers = measured_layers(lines, ALL)
    if ways:
        layers += experts_of_layers(lines, ALL, ways, ranks=(2,))
    rows = []
    for x in lines:
        clock = str(x["clock"])
        if not clock.startswith("layer-ep") or clock == "layer-ep1" or not is_ours(x):
            continue
        if not ways or x["model"] not in ALL or x["routing"] != "uniform":
            continue
        gpus, (spec, top_k) = int(clock.removeprefix("layer-ep")), ALL[x["model"]]
        table = table_without(layers, x["model"], path_of(spec), gpu)
        found = layer_s(gpu, spec, top_k, x["tokens"], gpus, table, ways)
        held = "model and 4 GPUs held out" if gpus == 4 else "model held out"
        what = f"{x['model']}, {x['tokens']} tokens in all, {gpus} GPUs"
        rows.append(Row("own layers over GPUs (ms)", what, f"suite ep, {held}", x["ms"],
                        found * 1e3))  # fmt: skip
    return list({(r.what, r.published): r for r in rows}.values())


def own_rows(results: Path) -> list[Row]:
    """All of them."""
    return own_layers(results) + own_exchange(results) + own_spread(results)
