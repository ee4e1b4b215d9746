"""Suite `placement`: where experts go, on any machine: link times, gaps and planning times.

A cell is a cluster, a routing and an exchange: `flat` (rows arrive at the NIC of their GPU) or
`forwarded` (by the rail of their source, then NVLink). Candidates: `contiguous`, `eplb` (packing by
load alone), `moesaic` (the planner), and on small clusters `milp` (HiGHS, the judge). `link_us` is
the time of the busiest link, averaged over layers; `bound_us` what is proven to be impossible to
beat with the same replicas. `ms` is the wall time to plan, `cpu_ms` the processor's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...parallel.eplb import eplb
from ...parallel.links import busiest, link_times
from ...parallel.nodes import node_problem
from ...parallel.oracle import optimum
from ...parallel.placement import Placement, contiguous
from ...parallel.planning import plan
from ...parallel.replication import instances, replica_counts
from ...parallel.topology import Topology
from ...planner.routing import sample_counts
from ..placement_page import placement_section
from ..results import Line, Target, at_least, at_most, geomean, make_line, stamp
from ..suite import Cell, Context, Suite

ROW_BYTES = 7168 * 2
LOCALITY = 5.0
LIMIT_MS, GAP, CLOSED = 10_000.0, 0.05, 0.02


@dataclass(frozen=True)
class Shape:
    """A number of layers and experts on nodes of 8 GPUs (or `gpus`); `rails` NICs a node."""

    layers: int
    experts: int
    nodes: int
    gpus: int = 8
    rails: int = 8
    judged: bool = False

    def topology(self, forwarded: bool) -> Topology:
        """NVLink at 400 GB/s, NICs at 48 GB/s each, 50 GB/s a GPU where one uplink serves all."""
        return Topology(
            nodes=self.nodes,
            gpus_per_node=self.gpus,
            gpu_bytes_per_s=400e9,
            nics_per_node=self.rails,
            nic_bytes_per_s=48e9 * self.gpus / self.rails,
            forwarded=forwarded,
        )


SHAPES = {
    "16 experts, 4 nodes x 4, one uplink": Shape(1, 16, 4, gpus=4, rails=1, judged=True),
    "64 experts, 8 nodes x 8, one uplink": Shape(1, 64, 8, rails=1, judged=True),
    "64 experts, 8 nodes x 4, one uplink": Shape(1, 64, 8, gpus=4, rails=1, judged=True),
    "48 experts, 8 nodes x 8, one uplink": Shape(1, 48, 8, rails=1, judged=True),
    "58 x 256 experts, 32 nodes x 8": Shape(58, 256, 32),
    "58 x 256 experts, 64 nodes x 8": Shape(58, 256, 64),
    "58 x 256 experts, 4 nodes x 8": Shape(58, 256, 4),
}
LARGEST = "58 x 256 experts, 64 nodes x 8"
ROUTINGS = ("uniform", "lognormal:0.3", "lognormal:0.6", "zipf:0.8")
MODES = ("flat", "forwarded")


def cells() -> list[Cell]:
    """Every cluster under every routing and exchange, 64 tokens a rank, top-8."""
    return [
        Cell(shape, 64, routing, clock=mode)
        for shape in SHAPES
        for routing in ROUTINGS
        for mode in MODES
    ]


def layer_times(placement: Placement, counts: Any, topology: Topology) -> tuple[float, float]:
    """The busiest link's seconds and the balancedness of GPUs, both averaged over layers."""
    seconds, balance = [], []
    for layer, here in enumerate(counts):
        table = placement.destinations(layer)
        seconds.append(busiest(link_times(table, here, topology, ROW_BYTES))[2])
        rows = np.bincount(table.ravel(), here.ravel(), topology.ranks)
        balance.append(rows.mean() / rows.max())
    return float(np.mean(seconds)), float(np.mean(balance))


def candidates(counts: Any, topology: Topology) -> dict[str, Callable[[], Placement]]:
    """The ways to place, by name."""
    layers, ranks, experts = counts.shape
    return {
        "contiguous": lambda: contiguous(experts, ranks, layers),
        "eplb": lambda: eplb(counts.sum(axis=1), topology),
        "moesaic": lambda: plan(counts, topology, row_bytes=ROW_BYTES).placement,
    }


def judge(counts: Any, topology: Topology, seconds_limit: float) -> dict[str, float]:
    """The MILP's own value and its proven bound for the single layer in `counts`."""
    here = counts[0].astype(float)
    experts = here.shape[1]
    room = -(-experts // topology.ranks)
    copies = replica_counts(here.sum(axis=0)[None], room * topology.ranks, topology.ranks)[0]
    found = instances(here, copies)
    problem = node_problem(
        found.rows_IG(here), found.expert_I, topology, ROW_BYTES, room * topology.gpus_per_node
    )
    best = optimum(problem, seconds_limit=seconds_limit)
    return {"link_us": best.seconds * 1e6, "bound_us": best.bound * 1e6}


def measure(cell: Cell, stamped: Line, seed: int, budget_s: float) -> list[Line]:
    """The lines of one cell."""
    shape = SHAPES[cell.model]
    topology = shape.topology(cell.clock == "forwarded")
    counts = sample_counts(
        cell.routing, layers=shape.layers, ranks=topology.ranks, experts=shape.experts,
        top_k=8, tokens=cell.tokens, locality=LOCALITY, seed=seed,
    )  # fmt: skip
    common = {"suite": SUITE.name, "clock": cell.clock, "model": cell.model,
              "tokens": cell.tokens, "routing": cell.routing, "mode": "planner",
              "dtype": "bfloat16"}  # fmt: skip
    lines = []
    for impl, place in candidates(counts, topology).items():
        began, cpu = time.perf_counter(), time.process_time()
        placement = place()
        ms = (time.perf_counter() - began) * 1e3
        cpu_ms = float(f"{(time.process_time() - cpu) * 1e3:.6g}")
        seconds, balance = layer_times(placement, counts, topology)
        values = {"ms": ms, "ms_p20": ms, "ms_p80": ms, "samples": 1, "impl": impl,
                  "cpu_ms": cpu_ms, "link_us": float(f"{seconds * 1e6:.6g}"),
                  "balancedness": balance, "per_rank": placement.slots(0)}  # fmt: skip
        lines.append(make_line(stamped, **common, **values))
    if shape.judged:
        began = time.perf_counter()
        found = judge(counts, topology, max(2.0, budget_s))
        ms = (time.perf_counter() - began) * 1e3
        values = {"ms": ms, "ms_p20": ms, "ms_p80": ms, "samples": 1, "impl": "milp"}
        lines.append(make_line(stamped, **common, **values, **found))
    return lines


def run(wanted: Sequence[Cell], context: Context) -> None:
    """Place and judge, recording each cell at once."""
    stamped = stamp(context.device)
    for number, cell in enumerate(wanted):
        share = context.share_s(len(wanted) - number)
        lines = measure(cell, stamped, context.seed + number, min(share, 12.0))
        context.record(lines)
        told = ", ".join(f"{x['impl']} {x['link_us']:.1f} us ({x['ms']:.0f} ms)" for x in lines)
        context.say(f"{cell.model} {cell.routing} {cell.clock}: {told}")


def measured(line: Line) -> Cell | None:
    """The cell that a line of the planner shows to be measured."""
    if line["impl"] != "moesaic":
        return None
    return Cell(line["model"], line["tokens"], line["routing"], clock=line["clock"])


def summarize(lines: Sequence[Line]) -> list[Target]:
    """The gap to what is proven, the time to plan, and the busiest link against the baselines."""
    by_cell: dict[tuple[Any, ...], dict[str, Line]] = {}
    for x in lines:
        key = (x["model"], x["routing"], x["clock"], x["tokens"])
        by_cell.setdefault(key, {})[x["impl"]] = x
    mine = [found for found in by_cell.values() if "moesaic" in found]
    judged = [f for f in mine if "milp" in f]
    gaps = [f["moesaic"]["link_us"] / f["milp"]["link_us"] - 1 for f in judged]
    closed = [f for f in judged if f["milp"]["link_us"] <= (1 + CLOSED) * f["milp"]["bound_us"]]
    proven = [f["moesaic"]["link_us"] / f["milp"]["bound_us"] - 1 for f in closed]
    slow = [f["moesaic"]["cpu_ms"] for f in mine if f["moesaic"]["model"] == LARGEST]
    targets = [
        at_most("largest gap to the best that HiGHS found", max(gaps, default=None), GAP),
        at_most(
            f"largest gap to HiGHS' bound where it closed, {len(closed)} of {len(judged)} cells",
            max(proven, default=None),
            GAP,
        ),
        at_most(f"CPU ms to plan {LARGEST}", max(slow, default=None), LIMIT_MS),
    ]
    for rival in ("contiguous", "eplb"):
        ratios = [f[rival]["link_us"] / f["moesaic"]["link_us"] for f in mine if rival in f]
        targets.append(at_least(f"busiest link, {rival} / moesaic, geomean", geomean(ratios), 1.0))
        targets.append(
            at_least(f"busiest link, {rival} / moesaic, worst", min(ratios, default=None), 1.0)
        )
    return targets


SUITE = Suite(
    name="placement",
    about="expert placement: busiest link, gap to the optimum, time to plan; on any CPU",
    cells=cells,
    run=run,
    summarize=summarize,
    devices=("cpu",),
    budget_s=1200.0,
    measured=measured,
    section=placement_section,
)
