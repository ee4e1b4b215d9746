"""What a placement puts on every link, in seconds: the one objective of all placement planners.

    G ranks · E experts · N nodes · P GPUs a node · R NICs a node

A row is one (token, slot). It crosses no link when its expert is on its own rank, NVLink inside a
node, and NICs between nodes. The combine sends every row back, so egress and ingress only change
places: the larger of both is what a layer waits for. A link's time is its latency, if it carries
anything, plus bytes over bandwidth; a layer's time is that of its busiest link.

>>> import numpy as np
>>> from .placement import contiguous
>>> topology = Topology(nodes=1, gpus_per_node=2, gpu_bytes_per_s=10.0)
>>> times = link_times(contiguous(2, 2).destinations(0), np.array([[5, 1], [3, 4]]), topology, 10)
>>> times["gpu in"].tolist(), busiest(times)
([3.0, 1.0], ('gpu in', 0, 3.0))
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .topology import Link, Topology

Floats = npt.NDArray[np.float64]
Times = dict[Link, Floats]


def check_counts(counts_LGE: npt.NDArray[Any], topology: Topology) -> Floats:
    """The counts as float64 of shape (L, G, E); a single layer (G, E) gets L = 1.

    Raises:
        ValueError: another number of ranks, or counts that are no counts.
    """
    counts = np.asarray(counts_LGE, np.float64)
    if counts.ndim == 2:
        counts = counts[None]
    if counts.ndim != 3 or counts.shape[1] != topology.ranks or 0 in counts.shape:
        raise ValueError(
            f"counts must be of shape (L, G={topology.ranks}, E) for {topology.nodes} nodes of "
            f"{topology.gpus_per_node} GPUs, got {np.shape(counts_LGE)}"
        )
    if not np.isfinite(counts).all() or counts.min() < 0:
        raise ValueError("counts must be finite and not negative")
    return counts


def _sum(index: npt.NDArray[Any], weights: Floats, size: int) -> Floats:
    return np.bincount(index, weights, size).astype(np.float64)


def link_times(
    destinations_GE: npt.NDArray[Any],
    counts_GE: npt.NDArray[Any],
    topology: Topology,
    row_bytes: float,
) -> Times:
    """Seconds of every link for one layer.

    Args:
        destinations_GE: `Placement.destinations`.
        counts_GE: rows that source rank g has for expert e.
        topology: the links.
        row_bytes: bytes of one row on the wire.
    """
    ranks, gpus = topology.ranks, topology.gpus_per_node
    counts = check_counts(counts_GE, topology)[0]
    source, expert = np.nonzero(counts)
    rows, to = counts[source, expert], np.asarray(destinations_GE)[source, expert].astype(np.int64)
    home = source // gpus == to // gpus
    near = home & (source != to)
    hop_in, hop_out, hop_rows = [to[near]], [source[near]], [rows[near]]
    away, a_from, a_to = rows[~home], source[~home], to[~home]
    nics = np.array(topology.nics)
    if topology.forwarded:
        entry = a_to // gpus * gpus + a_from % gpus
        hop = entry != a_to
        hop_in.append(a_to[hop])
        hop_out.append(entry[hop])
        hop_rows.append(away[hop])
    else:
        entry = a_to
    crossing = np.concatenate(hop_rows)
    scale = row_bytes / topology.gpu_bytes_per_s
    times: Times = {
        "gpu in": _sum(np.concatenate(hop_in), crossing, ranks) * scale,
        "gpu out": _sum(np.concatenate(hop_out), crossing, ranks) * scale,
        "compute": _sum(to, rows, ranks) * topology.row_s,
    }
    if topology.nodes > 1:
        times |= _outside(a_from, a_to, entry, away, nics, topology, row_bytes)
    for name, seconds in times.items():
        latency = topology.gpu_latency_s if name.startswith("gpu") else topology.nic_latency_s
        if name != "compute":
            times[name] = np.where(seconds > 0, seconds + latency, 0.0)
    return times


def _outside(
    a_from: npt.NDArray[Any],
    a_to: npt.NDArray[Any],
    entry: npt.NDArray[Any],
    rows: Floats,
    nics: npt.NDArray[Any],
    topology: Topology,
    row_bytes: float,
) -> Times:
    """Seconds of the links between nodes."""
    gpus, per = topology.gpus_per_node, topology.nics_per_node
    nic_s = row_bytes / (topology.nic_bytes_per_s or np.inf)
    out_nic, in_nic = nics[a_from % gpus], nics[entry % gpus]
    times: Times = {
        "nic out": _sum(a_from // gpus * per + out_nic, rows, topology.nodes * per) * nic_s,
        "nic in": _sum(a_to // gpus * per + in_nic, rows, topology.nodes * per) * nic_s,
    }
    node_s = row_bytes / node_rate(topology)
    times["node out"] = _sum(a_from // gpus, rows, topology.nodes) * node_s
    times["node in"] = _sum(a_to // gpus, rows, topology.nodes) * node_s
    if topology.rail_bytes_per_s is not None:
        times["rail"] = _sum(out_nic, rows, per) * row_bytes / topology.rail_bytes_per_s
    return times


def node_rate(topology: Topology) -> float:
    """Bytes per second of a node's uplink: the one given, else all its NICs together."""
    if topology.node_bytes_per_s is not None:
        return topology.node_bytes_per_s
    return topology.nics_per_node * (topology.nic_bytes_per_s or 0.0)


def busiest(times: Times) -> tuple[Link, int, float]:
    """The link that a layer waits for: its kind, its index, its seconds."""
    found: tuple[Link, int, float] = ("gpu in", 0, 0.0)
    for kind, seconds in times.items():
        index = int(seconds.argmax())
        if seconds[index] > found[2]:
            found = (kind, index, float(seconds[index]))
    return found
