"""Seconds of every operation of a layer, for every GPU of a stage.

    G GPUs of a stage · T tokens of a home GPU in one micro-batch · E experts · K top-k

Compute is a roofline of `Gpu` with a constant per kernel; expert layers are `kernels`' measured
ratios where there are any; exchanges are `parallel.links` on sampled counts under the placement
that the runtime's own planner makes. So nothing here is an average over experts: the fullest GPU
and the fullest link are seen.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ..parallel.links import Times, link_times
from ..parallel.topology import Topology
from .cluster import Cluster, Gpu
from .exchange import NO_WAYS, Ways
from .kernels import ROOFLINE, KernelTable, expert_layer_s
from .model import Model
from .primitives import decode_core_s, prefill_core_s, product_s, reduce_s
from .sampling import Sampler, on_ranks
from .strategies import Strategy
from .workload import Workload

Floats = npt.NDArray[np.float64]
# Kernels of an attention block beside products and core (norms, rope), and of a gate.
ATTENTION_KERNELS, GATE_KERNELS = 3, 2


@dataclass(frozen=True)
class Way:
    """An exchange one way: until it is done, and how long NVLink and the NICs are busy with it."""

    seconds: float = 0.0
    nvlink_s: float = 0.0
    nic_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """Seconds of one MoE layer in one micro-batch; arrays are over the stage's ranks.

    `copy_s`: of the experts that a new placement moves, spread over the steps until the next one.
    """

    attention_s: float
    reduce_s: float
    gate_s: float
    shared_s: float
    dispatch: Way
    experts_G: Floats
    combine: Way
    balancedness: float
    copy_s: float = 0.0

    @property
    def nvlink_s(self) -> float:
        """NVLink, both ways."""
        return self.dispatch.nvlink_s + self.combine.nvlink_s

    @property
    def nic_s(self) -> float:
        """NICs, both ways."""
        return self.dispatch.nic_s + self.combine.nic_s

    @property
    def binding(self) -> str:
        """Which of the two is busier."""
        return "network" if self.nic_s > self.nvlink_s else "nvlink"


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


def mlp_s(model: Model, gpu: Gpu, tokens: float, width: float, cut: int) -> float:
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
    inside: Ways = NO_WAYS,
) -> tuple[Way, Way]:
    """Dispatch and combine.

    `times` are those of one row per (token, slot) of H two-byte numbers. A token goes once to
    each rank; with `forwarded` once to each node. Combine returns every row, or sums per node.
    """
    link = max(float(times["gpu in"].max()), float(times["gpu out"].max()))
    outside = max((float(times[k].max()) for k in times if k.startswith(("nic", "node"))),
                  default=0.0)  # fmt: skip
    per_rank = distinct(topology.ranks, model.top_k) / model.top_k
    per_node = distinct(topology.nodes, model.top_k) / model.top_k
    once = per_node if topology.forwarded else per_rank
    back = once if workload.engine == "node-sums" else 1.0
    near = workload.wire_bytes / 2 * per_rank * link
    far = workload.wire_bytes / 2 * once * outside
    back_near = link * (per_rank if workload.engine == "node-sums" else 1.0)
    back_far = back * outside
    fixed = _latency(topology)
    dispatch, combine = fixed + max(near, far), fixed + max(back_near, back_far)
    if inside and topology.nodes == 1 and topology.ranks > 1:
        rate = topology.gpu_bytes_per_s
        dispatch = inside.seconds("dispatch", topology.ranks, near * rate)
        combine = inside.seconds("combine", topology.ranks, back_near * rate)
    return (
        Way(dispatch, min(near, dispatch), min(far, dispatch)),
        Way(combine, min(back_near, combine), min(back_far, combine)),
    )


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
    inside: Ways = NO_WAYS,
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
    copy = 0.0
    if workload.replan is not None:
        moved = sampler.moved_bytes(strategy, tokens)
        copy = copy_s(cluster, topology, moved) / workload.replan.every
    found = []
    for layer, here in enumerate(on_ranks(counts, strategy)):
        where = placement.destinations(layer)
        times = link_times(where, here, _no_latency(topology), 2.0 * model.hidden)
        if strategy.attention:
            times = _from_outside(times, strategy, cluster, here, model)
        dispatch, combine = exchange_s(times, topology, model, workload, inside)
        rows, active = _rows(where, here, strategy.ranks)
        seconds = expert_layer_s(gpu, model.experts, rows, active, model.itemsize, table)
        found.append(
            LayerCost(
                attention_s=attend, reduce_s=reduce, gate_s=gate, shared_s=shared,
                dispatch=dispatch, experts_G=seconds, combine=combine,
                balancedness=float(rows.mean() / max(rows.max(), 1)), copy_s=copy,
            )
        )  # fmt: skip
    return found


def copy_s(cluster: Cluster, topology: Topology, num_bytes: float) -> float:
    """Seconds that experts take to come from other ranks: over NVLink, or a GPU's share of NICs."""
    if topology.nodes == 1 or topology.nic_bytes_per_s is None:
        return num_bytes / cluster.nvlink_bytes_per_s
    share = topology.nics_per_node / topology.gpus_per_node
    return num_bytes / (topology.nic_bytes_per_s * share)


def _no_latency(topology: Topology) -> Topology:
    """Latency is added once per exchange, not once per kind of link."""
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
        attention_s=attend, reduce_s=reduce, gate_s=gate, shared_s=shared, dispatch=Way(),
        experts_G=np.full(strategy.ranks, seconds), combine=Way(merge, merge), balancedness=1.0,
    )  # fmt: skip
