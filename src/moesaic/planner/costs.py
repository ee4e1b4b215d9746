"""Seconds of every operation of a layer, for every GPU of a stage.

    G GPUs of a stage · T tokens of a home GPU in one micro-batch · E experts · K top-k

Compute is a roofline of `Gpu` with a constant per kernel; expert layers are `kernels`' measured
ratios where there are any; exchanges are `parallel.links` on sampled counts under the placement
that the runtime's own planner makes. So nothing here is an average over experts: the fullest GPU
and the fullest link are seen.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ..parallel.links import Times, link_times
from ..parallel.placement import Placement
from ..parallel.planning import plan
from ..parallel.topology import Topology
from .cluster import Cluster, Gpu
from .exchange import NO_TABLE, ExchangeTable
from .kernels import ROOFLINE, KernelTable, expert_layer_s
from .model import Model
from .primitives import decode_core_s, prefill_core_s, product_s, reduce_s
from .routing import Counts, sample_counts
from .strategies import Strategy
from .workload import Workload

Floats = npt.NDArray[np.float64]
# Kernels of an attention block beside products and core (norms, rope), and of a gate.
ATTENTION_KERNELS, GATE_KERNELS = 3, 2


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """Seconds of one MoE layer in one micro-batch; arrays are over the stage's ranks."""

    attention_s: float
    reduce_s: float
    gate_s: float
    shared_s: float
    dispatch_s: float
    experts_G: Floats
    combine_s: float
    nvlink_s: float
    nic_s: float
    balancedness: float
    binding: str


@dataclass
class Sampler:
    """Counts and placements, sampled once for equal questions."""

    model: Model
    cluster: Cluster
    workload: Workload
    layers: int = 4
    _counts: dict[Any, Counts] = field(default_factory=dict)
    _placements: dict[Any, Placement] = field(default_factory=dict)

    def counts(self, homes: int, tokens: int) -> Counts:
        """(L, G, E) rows of one micro-batch for as many sampled layers."""
        key = (homes, tokens)
        if key not in self._counts:
            self._counts[key] = self._draw(homes, tokens)
        return self._counts[key]

    def _draw(self, homes: int, tokens: int) -> Counts:
        w, experts, top_k = self.workload, self.model.experts.num_experts, self.model.top_k
        if w.trace is None:
            return sample_counts(
                w.routing, layers=self.layers, ranks=homes, experts=experts, top_k=top_k,
                tokens=tokens, locality=w.locality, seed=w.seed,
            )  # fmt: skip
        # A trace gives each layer's shares; its steps stand for the sources' different leanings.
        random = np.random.default_rng(w.seed)
        chosen = np.linspace(0, w.trace.shape[1] - 1, min(self.layers, w.trace.shape[1]))
        found = np.empty((len(chosen), homes, experts), np.int64)
        for number, layer in enumerate(chosen.astype(int)):
            rows = w.trace[:, layer].astype(float)
            rows = rows[rows.sum(axis=1) > 0]
            share = rows / rows.sum(axis=1, keepdims=True)
            picked = share[random.integers(len(share), size=homes)]
            found[number] = random.multinomial(tokens * top_k, picked)
        return found

    def placement(self, strategy: Strategy, tokens: int) -> Placement:
        """Where the sampled layers' experts live, planned as the runtime plans it."""
        key = (strategy.ranks, strategy.homes, strategy.replicas)
        if key not in self._placements:
            counts = self.counts(strategy.homes, tokens)
            spread = _on_ranks(counts, strategy)
            slots = -(-(self.model.experts.num_experts + strategy.replicas) // strategy.ranks)
            self._placements[key] = plan(
                spread, self.cluster.topology(strategy.ranks, forwarded=self.workload.forwarded),
                row_bytes=self.model.hidden * 2.0, per_rank=slots, replicas=strategy.replicas,
                rounds=60, kicks=0,
            ).placement  # fmt: skip
        return self._placements[key]


def _on_ranks(counts: Counts, strategy: Strategy) -> Counts:
    """Counts by expert rank: where attention has GPUs of its own, neighbours are put together."""
    if not strategy.attention:
        return counts
    layers, homes, experts = counts.shape
    found: Counts = counts.reshape(layers, strategy.ranks, homes // strategy.ranks, experts).sum(2)
    return found


def gemm_s(gpu: Gpu, flops: float, moved: float, itemsize: float, kernels: int) -> float:
    """A roofline with a constant per kernel."""
    return kernels * gpu.kernel_s + float(
        np.hypot(flops / gpu.rate(itemsize), moved / gpu.read_bytes_per_s)
    )


def attention_s(
    model: Model, gpu: Gpu, tokens: int, context: float, tp: int, *, decode: bool
) -> float:
    """Seconds of attention on one GPU of `tp` that share tp * tokens tokens.

    Args:
        tokens: of one home GPU.
        context: tokens each of them attends to, on average.
        decode: MLA works on its compressed cache, every token reads the whole of its sequence's.
    """
    a, shared = model.attention, float(tokens * tp)
    seconds = sum(
        product_s(gpu, shared, n, k, model.itemsize)
        for n, k in a.products(model.hidden, tp, absorbed=decode)
    )
    # Norms, residual and their like pass over the hidden state four times, two bytes a number.
    seconds += gemm_s(gpu, 0.0, 2 * 2 * 4.0 * shared * model.hidden, 2, ATTENTION_KERNELS)
    if not decode:
        return seconds + prefill_core_s(gpu, a, shared, context, tp)
    # The compressed cache has no heads to divide; key-value heads divide until there are none left.
    parts = 1 if a.kv_rank else min(tp, a.kv_heads)
    return seconds + decode_core_s(gpu, a, shared, context, model.cache_bytes / parts, tp)


def mlp_s(model: Model, gpu: Gpu, tokens: int, width: float, cut: int) -> float:
    """A dense MLP of so many inner numbers, cut over `cut` GPUs that share cut * tokens tokens."""
    if not width:
        return 0.0
    rows, item = float(tokens * cut), model.itemsize
    columns = (2 if model.experts.gated else 1) * width / cut
    up = product_s(gpu, rows, columns, model.hidden, item, kernels=2)
    return up + product_s(gpu, rows, model.hidden, width / cut, item)


def distinct(places: int, top_k: int) -> float:
    """Expected different places that K choices, each place alike likely, fall on."""
    return places * (1 - (1 - 1 / places) ** top_k)


def exchange_s(
    times: Times,
    topology: Topology,
    model: Model,
    workload: Workload,
    inside_table: ExchangeTable = NO_TABLE,
) -> tuple[float, float, float, float]:
    """Dispatch, combine, and what NVLink and the NICs have to do in both together.

    `times` are those of one row per (token, slot) of H two-byte numbers. A token goes once to
    each rank; with `forwarded` once to each node. Combine returns every row, or sums per node.
    """
    inside = max(float(times["gpu in"].max()), float(times["gpu out"].max()))
    outside = max((float(times[k].max()) for k in times if k.startswith(("nic", "node"))),
                  default=0.0)  # fmt: skip
    per_rank = distinct(topology.ranks, model.top_k) / model.top_k
    per_node = distinct(topology.nodes, model.top_k) / model.top_k
    once = per_node if topology.forwarded else per_rank
    back = once if workload.engine == "node-sums" else 1.0
    near = workload.wire_bytes / 2 * per_rank * inside
    far = workload.wire_bytes / 2 * once * outside
    back_near = inside * (per_rank if workload.engine == "node-sums" else 1.0)
    back_far = back * outside
    fixed = _latency(topology)
    dispatch, combine = fixed + max(near, far), fixed + max(back_near, back_far)
    if inside_table and topology.nodes == 1 and topology.ranks > 1:
        # What one GPU sends to the others, and its own part, which tables count.
        whole = topology.gpu_bytes_per_s * topology.ranks / (topology.ranks - 1)
        dispatch = inside_table.seconds(topology.ranks, near * whole)
        combine = inside_table.seconds(topology.ranks, back_near * whole)
    return dispatch, combine, near + back_near, far + back_far


def _latency(topology: Topology) -> float:
    return topology.nic_latency_s if topology.nodes > 1 else topology.gpu_latency_s


def moe_layer_costs(
    model: Model,
    cluster: Cluster,
    workload: Workload,
    strategy: Strategy,
    tokens: int,
    context: float,
    sampler: Sampler,
    table: KernelTable = ROOFLINE,
    inside: ExchangeTable = NO_TABLE,
) -> list[LayerCost]:
    """The costs of the sampled MoE layers, `tokens` tokens a home GPU in the micro-batch."""
    gpu, decode = cluster.gpu, workload.phase == "decode"
    attend = attention_s(model, gpu, tokens, context, strategy.tp, decode=decode)
    reduce = reduce_s(cluster, 2.0 * tokens * strategy.tp * model.hidden, strategy.tp)
    gate = gemm_s(gpu, 2.0 * tokens * model.hidden * model.experts.num_experts,
                  2.0 * model.hidden * model.experts.num_experts, 2, GATE_KERNELS)  # fmt: skip
    shared = mlp_s(model, gpu, tokens, model.shared_experts * model.shared_intermediate, 1)
    counts = sampler.counts(strategy.homes, tokens)
    if strategy.family == "tp-pp":
        return [
            _sliced(model, cluster, strategy, tokens, here, (attend, reduce, gate, shared), table)
            for here in counts
        ]
    placement = sampler.placement(strategy, tokens)
    topology = cluster.topology(strategy.ranks, forwarded=workload.forwarded)
    found = []
    for layer, here in enumerate(_on_ranks(counts, strategy)):
        where = placement.destinations(layer)
        times = link_times(where, here, _no_latency(topology), 2.0 * model.hidden)
        if strategy.attention:
            times = _from_outside(times, strategy, cluster, here, model)
        dispatch, combine, nvlink, nic = exchange_s(times, topology, model, workload, inside)
        rows, active = _rows(where, here, strategy.ranks)
        seconds = expert_layer_s(gpu, model.experts, rows, active, model.itemsize, table)
        found.append(
            LayerCost(
                attention_s=attend, reduce_s=reduce, gate_s=gate, shared_s=shared,
                dispatch_s=dispatch, experts_G=seconds, combine_s=combine,
                nvlink_s=nvlink, nic_s=nic, balancedness=float(rows.mean() / max(rows.max(), 1)),
                binding="network" if nic > nvlink else "nvlink",
            )
        )  # fmt: skip
    return found


def _no_latency(topology: Topology) -> Topology:
    """Latency is added once per exchange, not once per kind of link."""
    from dataclasses import replace

    return replace(topology, gpu_latency_s=0.0, nic_latency_s=0.0)


def _rows(where_GE: Any, counts_GE: Any, ranks: int) -> tuple[Floats, Floats]:
    """Rows of every rank, and how many of its experts have any."""
    experts = counts_GE.shape[1]
    flat = np.asarray(where_GE, np.int64) * experts + np.arange(experts)
    load = np.bincount(flat.ravel(), counts_GE.ravel(), ranks * experts).reshape(ranks, experts)
    return load.sum(axis=1), (load > 0).sum(axis=1).astype(np.float64)


def _from_outside(
    times: Times, strategy: Strategy, cluster: Cluster, counts: Any, model: Model
) -> Times:
    """Attention on other GPUs: every row crosses, by the NICs where there are several nodes."""
    rows_out = counts.sum() / strategy.homes
    rows_in = counts.sum(axis=0).max() if strategy.ranks >= counts.shape[1] else (
        counts.sum() / strategy.ranks
    )  # fmt: skip
    num_bytes = 2.0 * model.hidden * max(rows_out, rows_in)
    if strategy.gpus > cluster.gpus_per_node and cluster.network is not None:
        share = cluster.network.nics / cluster.gpus_per_node
        rate = cluster.network.at(-(-strategy.gpus // cluster.gpus_per_node))[0] * share
        return times | {"nic in": np.array([num_bytes / rate])}
    return times | {"gpu in": np.array([num_bytes / cluster.nvlink_bytes_per_s])}


def _sliced(
    model: Model, cluster: Cluster, strategy: Strategy, tokens: int, counts_GE: Any,
    common: tuple[float, float, float, float], table: KernelTable,
) -> LayerCost:  # fmt: skip
    """Tensor parallel experts: every rank computes a slice of every expert for all tokens."""
    attend, reduce, gate, shared = common
    rows_E = np.asarray(counts_GE, np.float64).sum(axis=0)
    active = float((rows_E > 0).sum())
    whole = expert_layer_s(cluster.gpu, model.experts, rows_E.sum(), active, model.itemsize, table)
    overhead = table.beyond(cluster.gpu)
    seconds = overhead + (float(whole) - overhead) / strategy.ranks
    merge = reduce_s(cluster, 2.0 * tokens * strategy.ranks * model.hidden, strategy.ranks)
    return LayerCost(
        attention_s=attend, reduce_s=reduce, gate_s=gate, shared_s=shared, dispatch_s=0.0,
        experts_G=np.full(strategy.ranks, seconds), combine_s=merge, nvlink_s=merge + reduce,
        nic_s=0.0, balancedness=1.0, binding="nvlink",
    )  # fmt: skip
