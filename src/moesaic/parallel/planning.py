"""From measured counts to a placement: replicas, then nodes, then GPUs, layer by layer.

    L layers · G ranks · E experts

The regimes: E <= G is one expert a GPU per layer on distinct GPUs, with replicas on the spare GPUs
when G > E. E > G has too few GPUs for that: experts share GPUs, balanced by load, and the plan's
`regime` says so.

Cross-layer terms. When tokens stay where their expert was, instead of going home after every layer,
the sources of a layer are the ranks of the layer before: `affinity` (rows of expert e that go on to
expert f) gives them, and `stay` is the share of tokens for which that holds.

>>> counts = np.array([[[9, 0, 1, 0], [0, 9, 0, 1], [1, 0, 9, 0], [0, 1, 0, 9]]])
>>> plan(counts, Topology(nodes=1, gpus_per_node=4, gpu_bytes_per_s=1e9), row_bytes=1e3).placement
Placement(ranks=4, layers=(((0,), (1,), (2,), (3,)),), starts=None)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .gpus import assign_gpus, pack_gpus
from .links import Floats, busiest, check_counts, link_times
from .nodes import node_problem, solve
from .placement import Layer, Placement, even_starts
from .replication import Instances, instances, replica_counts
from .topology import Link, Topology

Ints = npt.NDArray[np.int64]
KICKS, SMALL = 40, 4096
# Pairs of instances that all layers together may try for a swap, times the swaps made.
WORK = 90_000_000


@dataclass(frozen=True, kw_only=True)
class PlacementPlan:
    """A placement and what it costs.

    Args:
        placement: the value.
        regime: one sentence on how experts and GPUs meet.
        seconds: per layer, the time of the busiest link.
        binding: per layer, the kind of that link.
    """

    placement: Placement
    regime: str
    seconds: tuple[float, ...]
    binding: tuple[Link, ...]


def regime(experts: int, ranks: int, per_rank: int, replicas: int) -> str:
    """How experts and GPUs meet, in one sentence."""
    if per_rank == 1 and experts <= ranks:
        spare = ranks - experts - replicas
        return (
            f"one expert per GPU per layer: {experts} experts and {replicas} replicas on distinct "
            f"GPUs of {ranks}" + (f", {spare} without an expert" if spare else "")
        )
    return (
        f"co-located, outside the one-expert-per-GPU regime: {experts} experts and {replicas} "
        f"replicas share {ranks} GPUs, at most {per_rank} on one"
    )


def experts_per_rank(
    experts: int, topology: Topology, expert_bytes: float, asked: int | None
) -> int:
    """Slots a GPU needs: those asked for, else as few as hold every expert.

    Raises:
        ValueError: they do not hold every expert, or the memory does not hold them.
    """
    least = -(-experts // topology.ranks)
    per_rank = least if asked is None else asked
    if per_rank < least:
        raise ValueError(
            f"{experts} experts on {topology.ranks} GPUs need {least} a GPU, got {per_rank}"
        )
    fits = topology.slots(expert_bytes) if expert_bytes else None
    if fits is not None and fits < per_rank:
        raise ValueError(
            f"{per_rank} experts of {expert_bytes:.4g} bytes do not fit the "
            f"{topology.memory_bytes:.4g} bytes that a GPU has for this layer; use more GPUs"
        )
    return per_rank


def plan(
    counts_LGE: npt.NDArray[Any],
    topology: Topology,
    *,
    row_bytes: float,
    expert_bytes: float = 0.0,
    per_rank: int | None = None,
    replicas: int | None = None,
    affinity: npt.NDArray[Any] | None = None,
    stay: float = 1.0,
    rounds: int | None = None,
    kicks: int | None = None,
) -> PlacementPlan:
    """Place the experts of every layer for the smallest maximal link time.

    Args:
        counts_LGE: rows that source rank g has for expert e in layer l.
        topology: the links.
        row_bytes: bytes of one row on the wire.
        expert_bytes: what an expert needs in GPU memory; 0 does not check.
        per_rank: slots a GPU; None takes as few as hold every expert.
        replicas: extra instances a layer; None fills every slot.
        affinity: (L - 1, E, E) rows of expert e of a layer that go to expert f of the next.
        stay: the share of tokens that stay at their expert, used with `affinity`.
        rounds, kicks: how long to improve, see `nodes.solve`; None spends about as long on any
            problem, with kicks on small ones.

    Raises:
        ValueError: counts, affinity or slots that do not fit the topology.
    """
    counts = check_counts(counts_LGE, topology)
    layers, ranks, experts = counts.shape
    room = experts_per_rank(experts, topology, expert_bytes, per_rank)
    _check_affinity(affinity, stay, layers, experts)
    effort = _effort(layers, room, topology, rounds, kicks)
    wanted = _instances_wanted(experts, room * ranks, replicas)
    copies_LE = replica_counts(counts.sum(axis=1), wanted, ranks)
    placed: list[tuple[Layer, Layer]] = []
    times: list[tuple[Link, int, float]] = []
    table = np.empty((0, 0), np.int32)
    for number in range(layers):
        own = counts[number]
        if affinity is not None and number:
            own = arriving(own, table, affinity[number - 1], counts[number - 1], stay)
        found = instances(own, copies_LE[number])
        rank_I = _place(found, own, topology, row_bytes, room, effort, number)
        placed.append(_by_expert(found, rank_I, experts))
        table = _table(found, rank_I, ranks, experts)
        times.append(busiest(link_times(table, own, topology, row_bytes)))
    placement = Placement(
        ranks=ranks,
        layers=tuple(hosts for hosts, _ in placed),
        starts=_starts_or_none(placed, ranks),
    )
    most = max(placement.slots(number) for number in range(layers))
    return PlacementPlan(
        placement=placement,
        regime=regime(experts, ranks, most, int(copies_LE.sum(axis=1).max()) - experts),
        seconds=tuple(seconds for _, _, seconds in times),
        binding=tuple(kind for kind, _, _ in times),
    )


def _instances_wanted(experts: int, slots: int, replicas: int | None) -> int:
    """Instances a layer: experts and replicas.

    Raises:
        ValueError: the slots do not hold them.
    """
    wanted = slots if replicas is None else experts + replicas
    if not experts <= wanted <= slots:
        raise ValueError(f"replicas must be in [0, {slots - experts}], got {replicas}")
    return wanted


def _effort(
    layers: int, room: int, topology: Topology, rounds: int | None, kicks: int | None
) -> tuple[int, int]:
    """Rounds and kicks of a layer: those asked for, else about as long on any problem."""
    slots = room * topology.ranks
    if rounds is None:
        rounds = max(40, min(400, WORK // (layers * slots * room * topology.gpus_per_node)))
    if kicks is None:
        kicks = KICKS if layers * slots * topology.nodes <= SMALL else 0
    return rounds, kicks


def _place(
    found: Instances,
    counts_GE: Floats,
    topology: Topology,
    row_bytes: float,
    room: int,
    effort: tuple[int, int],
    seed: int,
) -> Ints:
    """(I,) the rank of every instance of one layer."""
    rows_IG = found.rows_IG(counts_GE)
    node_I = np.zeros(len(rows_IG), np.int64)
    if topology.nodes > 1:
        node_room = room * topology.gpus_per_node
        problem = node_problem(rows_IG, found.expert_I, topology, row_bytes, node_room)
        node_I = solve(problem, rounds=effort[0], kicks=effort[1], seed=seed)
    rank_I = assign_gpus(rows_IG, found.expert_I, node_I, topology, room)
    return _better(found, counts_GE, topology, row_bytes, rank_I, room) if room > 1 else rank_I


def _better(
    found: Instances,
    counts_GE: Floats,
    topology: Topology,
    row_bytes: float,
    rank_I: Ints,
    room: int,
) -> Ints:
    """These ranks, or packing by load over all GPUs at once where that is faster: with several
    instances a GPU the fullest GPU may matter more than the fullest node."""
    loads = found.rows_IG(counts_GE).sum(axis=1)
    packed = pack_gpus(loads, found.expert_I, topology.ranks, room)
    ranks, experts = counts_GE.shape

    def seconds(chosen: Ints) -> float:
        table = _table(found, chosen, ranks, experts)
        return busiest(link_times(table, counts_GE, topology, row_bytes))[2]

    return packed if seconds(packed) < seconds(rank_I) else rank_I


def _by_expert(found: Instances, rank_I: Ints, experts: int) -> tuple[Layer, Layer]:
    """The hosts and the starts of every expert, as `Placement` wants them."""
    hosts: list[list[int]] = [[] for _ in range(experts)]
    starts: list[list[int]] = [[] for _ in range(experts)]
    triples = zip(found.expert_I.tolist(), rank_I.tolist(), found.start_I.tolist(), strict=True)
    for expert, rank, start in triples:
        hosts[expert].append(rank)
        starts[expert].append(start)
    return tuple(map(tuple, hosts)), tuple(map(tuple, starts))


def _starts_or_none(placed: list[tuple[Layer, Layer]], ranks: int) -> tuple[Layer, ...] | None:
    even = all(s == even_starts(len(s), ranks) for _, starts in placed for s in starts)
    return None if even else tuple(starts for _, starts in placed)


def _table(found: Instances, rank_I: Ints, ranks: int, experts: int) -> npt.NDArray[np.int32]:
    table = np.empty((ranks, experts), np.int32)
    for expert, rank, start in zip(found.expert_I, rank_I, found.start_I, strict=True):
        table[start:, expert] = rank
    return table


def _check_affinity(
    affinity: npt.NDArray[Any] | None, stay: float, layers: int, experts: int
) -> None:
    if affinity is not None and np.shape(affinity) != (layers - 1, experts, experts):
        raise ValueError(
            f"affinity must be of shape ({layers - 1}, {experts}, {experts}), "
            f"got {np.shape(affinity)}"
        )
    if not 0 <= stay <= 1:
        raise ValueError(f"stay must be in [0, 1], got {stay}")


def arriving(
    home_GE: Floats,
    before_GE: npt.NDArray[Any],
    affinity_EE: npt.NDArray[Any],
    counts_before_GE: Floats,
    stay: float,
) -> Floats:
    """(G, E) rows by the rank they come from, where a share `stay` of the tokens did not go home.

    Args:
        home_GE: rows of this layer by their home rank.
        before_GE: `Placement.destinations` of the layer before.
        affinity_EE: rows of expert e there that go to expert f here.
        counts_before_GE: rows of the layer before.
        stay: in [0, 1].
    """
    ranks, experts = home_GE.shape
    at_GE = np.zeros((ranks, experts))
    np.add.at(at_GE, (before_GE, np.arange(experts)), counts_before_GE)
    flow = np.asarray(affinity_EE, np.float64)
    share = np.divide(
        flow, flow.sum(axis=1, keepdims=True), out=np.zeros_like(flow), where=flow > 0
    )
    moved = at_GE @ share
    scale = home_GE.sum() / max(float(moved.sum()), 1e-30)
    mixed: Floats = (1 - stay) * home_GE + stay * scale * moved
    return mixed
