"""Which GPU of its node each instance goes to.

    I instances of one node · P GPUs · G ranks

With one instance a GPU the cost of each pair is known beforehand (its rows over NVLink, its own
source's rows staying home), so it is an assignment problem; a high power of the cost makes its sum
stand for the largest. With several instances a GPU, the largest goes first to the GPU with the
least load that has room and no replica of the same expert.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .topology import Topology

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def assign_gpus(
    rows_IG: Floats, expert_I: Ints, node_I: Ints, topology: Topology, room: int
) -> Ints:
    """(I,) the rank of every instance, given its node; `room` instances fit on a GPU."""
    gpus = topology.gpus_per_node
    rank_I = np.empty(len(node_I), np.int64)
    total_I = rows_IG.sum(axis=1)
    by_gpu = rows_IG.reshape(len(node_I), topology.nodes, gpus)
    off_IP = by_gpu.sum(axis=1)
    order = np.argsort(node_I, kind="stable")
    for members in np.split(order, np.flatnonzero(np.diff(node_I[order])) + 1):
        node = int(node_I[members[0]])
        here = by_gpu[members, node]
        if room == 1:
            off = off_IP[members] - here
            gpu = _one_each(here, off, total_I[members], topology)
        else:
            gpu = pack_gpus(total_I[members], expert_I[members], gpus, room)
        rank_I[members] = node * gpus + gpu
    return rank_I


def _one_each(here: Floats, off: Floats, total: Floats, topology: Topology) -> Ints:
    """Distinct GPUs, the least bottleneck; `here`, `off`: rows from the node's GPUs and, by the
    GPU at which they enter, from other nodes."""
    from scipy.optimize import linear_sum_assignment

    arriving = here.sum(axis=1, keepdims=True) - here
    leaving = here.sum(axis=0) - here
    if topology.forwarded:
        arriving = arriving + off.sum(axis=1, keepdims=True) - off
        leaving = leaving + off.sum(axis=0) - off
    cost = np.maximum(arriving, leaving)
    nics = np.array(topology.nics)
    if topology.nodes > 1 and not topology.forwarded and topology.nics_per_node < len(nics):
        return _shared_nics(cost, off.sum(axis=1), nics)
    cost = (cost / max(float(cost.max()), 1e-30)) ** 8
    rows, gpu = linear_sum_assignment(cost)
    found: Ints = gpu[np.argsort(rows)]
    return found


def _shared_nics(cost: Floats, away_I: Floats, nics: npt.NDArray[np.int_]) -> Ints:
    """Balance the NICs first, largest first; among a NIC's GPUs take the cheapest."""
    load = np.zeros(int(nics.max()) + 1)
    free = np.ones(len(nics), bool)
    gpu = np.empty(len(away_I), np.int64)
    for i in np.argsort(-away_I, kind="stable"):
        key = np.where(free, load[nics], np.inf)
        best = np.flatnonzero(key == key.min())
        gpu[i] = best[cost[i, best].argmin()]
        load[nics[gpu[i]]] += away_I[i]
        free[gpu[i]] = False
    return gpu


def pack_gpus(total: Floats, expert: Ints, gpus: int, room: int) -> Ints:
    """(I,) GPUs: largest first to the least loaded; replicas of one expert on distinct GPUs.

    Where replicas share the node the GPUs are filled in rounds, experts one after the other, which
    always finds distinct ones.
    """
    gpu = np.empty(len(total), np.int64)
    count, load = np.zeros(gpus, np.int64), np.zeros(gpus)
    held: set[tuple[int, int]] = set()
    repeated = len(set(expert.tolist())) < len(expert)
    order = np.lexsort((expert, -total)) if not repeated else np.lexsort((-total, expert))
    for i in order:
        taken = np.array([(int(expert[i]), g) in held for g in range(gpus)])
        full = count > count.min() if repeated else count >= room
        g = int(np.where(full | taken, np.inf, load).argmin())
        gpu[i] = g
        count[g] += 1
        load[g] += total[i]
        held.add((int(expert[i]), g))
    return gpu
