"""The baseline: packing by expert load alone, as load balancers of serving engines do.

    L layers · E experts · G ranks · N nodes

Replicas go to the largest load per replica; instances are packed into equally many a bin, largest
first, each into the bin with the least load. With whole groups of experts a node the groups are
packed onto nodes first. It knows nothing of who sends the rows. With one slot a GPU there is
nothing to pack: experts keep their order and replicas follow, the hottest first. The idea is that
of DeepSeek's expert-parallel load balancer; the code is not.
"""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np
import numpy.typing as npt

from .placement import Layer, Placement
from .replication import replica_counts
from .topology import Topology

Floats = npt.NDArray[np.float64]


def pack(loads: Floats, bins: int) -> list[list[int]]:
    """Items into bins, equally many in each, largest first into the least loaded bin with room.

    >>> pack(np.array([5.0, 4.0, 3.0, 2.0]), 2)
    [[0, 3], [1, 2]]
    """
    room = len(loads) // bins
    if room == 1:
        return [[item] for item in range(bins)]
    found: list[list[int]] = [[] for _ in range(bins)]
    heap = [(0.0, b) for b in range(bins)]
    for item in np.argsort(-loads, kind="stable").tolist():
        load, least = heapq.heappop(heap)
        found[least].append(item)
        if len(found[least]) < room:
            heapq.heappush(heap, (load + float(loads[item]), least))
    return found


def eplb(loads_LE: npt.NDArray[Any], topology: Topology, *, groups: int = 1) -> Placement:
    """Place by load. Sources are divided evenly among an expert's replicas.

    Args:
        loads_LE: rows of each expert.
        topology: only its counts of nodes and GPUs are used.
        groups: the router's expert groups; they stay whole on a node where their number allows it.

    Raises:
        ValueError: experts do not divide into the groups.
    """
    loads = np.asarray(loads_LE, np.float64)
    experts = loads.shape[1]
    if groups < 1 or experts % groups:
        raise ValueError(f"groups must divide {experts} experts, got {groups}")
    per_rank = -(-experts // topology.ranks)
    nodes = topology.nodes if groups % topology.nodes == 0 else 1
    layers = [_layer(row, topology.ranks, per_rank, nodes, groups) for row in loads]
    return Placement(ranks=topology.ranks, layers=tuple(layers))


def _layer(load_E: Floats, ranks: int, per_rank: int, nodes: int, groups: int) -> Layer:
    hosts: list[list[int]] = [[] for _ in load_E]
    size, gpus = len(load_E) // groups, ranks // nodes
    group_load = load_E.reshape(groups, size).sum(axis=1)
    for node, members in enumerate(pack(group_load, nodes)):
        experts = [e for g in sorted(members) for e in range(g * size, (g + 1) * size)]
        here = load_E[experts]
        copies = replica_counts(here[None], gpus * per_rank, gpus)[0]
        again = np.repeat(np.arange(len(experts)), copies - 1)
        again = again[np.argsort(-(here / copies)[again], kind="stable")]
        owner = np.concatenate([np.arange(len(experts)), again])
        share = (here / copies)[owner]
        empty = gpus * per_rank - len(owner)
        owner = np.concatenate([owner, np.full(empty, -1)])
        for gpu, items in enumerate(pack(np.concatenate([share, np.zeros(empty)]), gpus)):
            for item in items:
                if owner[item] >= 0:
                    hosts[experts[owner[item]]].append(node * gpus + gpu)
    # A bin may have got two replicas of one expert: one of them is enough.
    return tuple(tuple(sorted(set(found))) for found in hosts)
