"""The links between GPUs as planners see them: nodes of GPUs, their NICs in rails, bandwidths.

    G ranks · N nodes · P GPUs a node · R rails (NICs) a node

Rank g is GPU ``g % P`` of node ``g // P``, the order in which torchrun numbers ranks. GPU p of a
node uses NIC ``p * R // P`` of that node, unless `nic_of_gpu` says otherwise; the NICs of one
index in all nodes make a rail. Where a row goes to another node it leaves by the NIC of its source.
`forwarded`: it arrives by the NIC of the same rail and crosses NVLink to its GPU (a two-level
exchange); otherwise it arrives by the NIC of the destination GPU.

Bandwidths are bytes per second in one direction, latencies seconds.

>>> Topology(nodes=2, gpus_per_node=4, gpu_bytes_per_s=450e9, nics_per_node=2).nics
(0, 0, 1, 1)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Link = Literal["gpu in", "gpu out", "nic in", "nic out", "node in", "node out", "rail", "compute"]


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Nodes, GPUs, NICs and what they carry.

    Args:
        nodes, gpus_per_node, nics_per_node: N, P and R; R may be 0 for a single node.
        gpu_bytes_per_s: what one GPU sends (and, at the same time, receives) inside the node.
        nic_bytes_per_s: the same of one NIC.
        node_bytes_per_s: of a node's uplink; None where its NICs are the limit.
        rail_bytes_per_s: of one rail's switches in total; None where they never are the limit.
        gpu_latency_s, nic_latency_s: what a first byte takes.
        row_s: seconds that a GPU computes for one row; 0 leaves compute out of the objective.
        memory_bytes: what one GPU has for the experts of one layer; None for no limit.
        forwarded: whether rows from other nodes arrive by the rail of their source.
        nic_of_gpu: the NIC of each GPU of a node; None for equal blocks.

    Raises:
        ValueError: a count, bandwidth or latency that no machine has.
    """

    nodes: int
    gpus_per_node: int
    gpu_bytes_per_s: float
    nics_per_node: int = 0
    nic_bytes_per_s: float | None = None
    node_bytes_per_s: float | None = None
    rail_bytes_per_s: float | None = None
    gpu_latency_s: float = 0.0
    nic_latency_s: float = 0.0
    row_s: float = 0.0
    memory_bytes: float | None = None
    forwarded: bool = False
    nic_of_gpu: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus_per_node"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.nics_per_node <= self.gpus_per_node:
            raise ValueError(
                f"nics_per_node must be in [0, gpus_per_node={self.gpus_per_node}] "
                f"(join the NICs of one GPU into one), got {self.nics_per_node}"
            )
        if self.nodes > 1 and not (self.nics_per_node and self.nic_bytes_per_s):
            raise ValueError(
                f"{self.nodes} nodes need nics_per_node and nic_bytes_per_s, "
                f"got {self.nics_per_node} and {self.nic_bytes_per_s}"
            )
        for name in ("gpu", "nic", "node", "rail"):
            rate = getattr(self, f"{name}_bytes_per_s")
            if rate is not None and not 0 < rate < float("inf"):
                raise ValueError(f"{name}_bytes_per_s must be positive and finite, got {rate}")
        for name in ("gpu_latency_s", "nic_latency_s", "row_s"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        chosen = self.nic_of_gpu
        if chosen is not None and (
            len(chosen) != self.gpus_per_node
            or any(not 0 <= nic < self.nics_per_node for nic in chosen)
        ):
            raise ValueError(
                f"nic_of_gpu must give {self.gpus_per_node} GPUs a NIC in "
                f"[0, {self.nics_per_node}), got {chosen}"
            )

    @property
    def ranks(self) -> int:
        """G."""
        return self.nodes * self.gpus_per_node

    @property
    def nics(self) -> tuple[int, ...]:
        """The NIC of each GPU of a node (0 where there is none)."""
        if self.nic_of_gpu is not None:
            return self.nic_of_gpu
        per, gpus = self.nics_per_node, self.gpus_per_node
        return tuple(gpu * per // gpus for gpu in range(gpus))

    def slots(self, expert_bytes: float) -> int | None:
        """How many experts of one layer fit on one GPU; None for no limit."""
        return None if self.memory_bytes is None else int(self.memory_bytes // expert_bytes)
