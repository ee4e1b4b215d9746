"""A cluster: nodes of GPUs, what one GPU does, and the links, from a YAML file or a preset.

    G GPUs · N nodes · P GPUs a node

Bandwidths are bytes per second in one direction, times seconds, memory bytes. The file's fields
bear their unit in the name; docs/planner.md lists them. A cluster that cannot be built is refused
with the line that says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..parallel.machine import Machine, from_nccl, from_nvml, from_smi
from ..parallel.topology import Topology
from .documents import Block, parse, read


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU.

    Args:
        flops, fp8_flops: per second, peak, dense, 16-bit and 8-bit.
        mfu, fp8_mfu: the share of the peak that large products reach; attention_mfu: that
            attention's core does, whose softmax keeps the tensor cores waiting.
        memory_bytes, reserve_bytes: in all, and kept for the runtime.
        bytes_per_s, bandwidth_efficiency: of device memory.
        overhead_s: of one expert layer beyond its bytes and flops; kernel_s: of one other kernel.
        watts, idle_watts: at full load, and idle.
    """

    flops: float
    fp8_flops: float
    mfu: float
    fp8_mfu: float
    attention_mfu: float
    memory_bytes: float
    reserve_bytes: float
    bytes_per_s: float
    bandwidth_efficiency: float
    overhead_s: float
    kernel_s: float
    watts: float
    idle_watts: float

    def rate(self, itemsize: float) -> float:
        """Flops per second that large products of this item size reach."""
        return self.fp8_mfu * self.fp8_flops if itemsize == 1 else self.mfu * self.flops

    @property
    def attention_flops_per_s(self) -> float:
        """Flops per second of attention's core in 16 bits."""
        return self.attention_mfu * self.flops

    @property
    def read_bytes_per_s(self) -> float:
        """Bytes per second that weights are read with."""
        return self.bytes_per_s * self.bandwidth_efficiency


@dataclass(frozen=True, kw_only=True)
class Level:
    """A dimension above the nodes: groups of so many nodes, whose way out is `oversubscribed`."""

    nodes: int
    oversubscription: float
    latency_s: float


@dataclass(frozen=True, kw_only=True)
class Network:
    """The links between nodes: `nics` a node of `bytes_per_s` each, already times efficiency.

    `step_s` is added for every doubling of the nodes beyond two, `falloff` is the share of the
    bandwidth lost with every doubling beyond two. `levels` are groups of nodes, groups of groups
    and so on: what leaves a group shares a way out that is narrower than the NICs below it.
    """

    nics: int
    bytes_per_s: float
    latency_s: float
    step_s: float
    falloff: float
    levels: tuple[Level, ...] = ()

    def at(self, nodes: int) -> tuple[float, float]:
        """Bytes per second of a NIC and the latency when `nodes` exchange all to all."""
        doublings = max(0.0, math.log2(max(nodes, 1)) - 1)
        rate = self.bytes_per_s * (1 - self.falloff) ** doublings
        latency = self.latency_s + self.step_s * doublings
        for level in self.levels:
            if nodes > level.nodes:
                # Of what a node sends to the others, so much leaves its group.
                leaves = (nodes - level.nodes) / (nodes - 1)
                rate = min(rate, self.bytes_per_s / (level.oversubscription * leaves))
                latency += level.latency_s
        return rate, latency


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """N nodes of P GPUs."""

    name: str
    nodes: int
    gpus_per_node: int
    gpu: Gpu
    nvlink_bytes_per_s: float
    nvlink_latency_s: float
    network: Network | None
    usd_per_gpu_hour: float | None = None
    device: str | None = None

    @property
    def gpus(self) -> int:
        """G."""
        return self.nodes * self.gpus_per_node

    def topology(self, gpus: int, *, forwarded: bool = False, row_s: float = 0.0) -> Topology:
        """The links of a group of `gpus` GPUs that fills whole nodes where it needs several.

        Raises:
            ValueError: the group is larger than the cluster or does not fill its nodes.
        """
        per = min(gpus, self.gpus_per_node)
        nodes = gpus // per
        if nodes * per != gpus or gpus > self.gpus:
            raise ValueError(
                f"a group of {gpus} GPUs does not fill nodes of {self.gpus_per_node} of the "
                f"{self.gpus} there are"
            )
        if nodes == 1 or self.network is None:
            return Topology(
                nodes=nodes, gpus_per_node=per, gpu_bytes_per_s=self.nvlink_bytes_per_s,
                gpu_latency_s=self.nvlink_latency_s, row_s=row_s,
            )  # fmt: skip
        rate, latency = self.network.at(nodes)
        return Topology(
            nodes=nodes, gpus_per_node=per, gpu_bytes_per_s=self.nvlink_bytes_per_s,
            nics_per_node=self.network.nics, nic_bytes_per_s=rate,
            gpu_latency_s=self.nvlink_latency_s, nic_latency_s=latency, row_s=row_s,
            forwarded=forwarded,
        )  # fmt: skip

    def resized(self, gpus: int) -> Cluster:
        """The same nodes, as many as `gpus` GPUs need."""
        return replace(self, nodes=-(-gpus // self.gpus_per_node))


def presets() -> tuple[str, ...]:
    """The names of the nodes that need no file."""
    return tuple(_presets().names())


def _presets() -> Block:
    text = files("moesaic.planner").joinpath("presets.yaml").read_text("utf-8")
    return parse(text, "presets.yaml")


def load_cluster(path: str | Path) -> Cluster:
    """A cluster from a file, or from ``PRESET`` or ``PRESETxNODES`` (``H200x4``).

    Raises:
        OSError: there is neither such a file nor such a preset.
        ValueError: a field that is unknown, missing or impossible; names the line.
    """
    name, _, nodes = str(path).partition("x")
    if name in presets() and (not nodes or nodes.isdigit()):
        text = f"name: {path}\npreset: {name}\nnodes: {nodes or 1}\n"
        return cluster_from(parse(text, str(path)), Path())
    if not Path(path).exists():
        known = ", ".join(presets())
        raise FileNotFoundError(
            f"{path} is neither a file nor a preset ({known}; {presets()[0]}x4 is four nodes)"
        )
    return cluster_from(read(path), Path(path).parent)


def cluster_from(block: Block, folder: Path) -> Cluster:
    """The cluster that a document describes; files it names are relative to `folder`."""
    preset = block.text("preset", None, among=presets())
    base = _presets().block(preset) if preset else None
    nodes = block.integer("nodes")
    machine = _machine(block, folder)
    size = machine.gpus if machine else (base.integer("gpus_per_node") if base else None)
    gpus_per_node = block.integer("gpus_per_node", *(() if size is None else (size,)))
    if machine and gpus_per_node != machine.gpus:
        raise block.wrong("gpus_per_node", f"{machine.gpus}, as {machine.source} has",
                          gpus_per_node)  # fmt: skip
    gpu = _gpu(block.block("gpu", required=base is None), base.block("gpu") if base else None)
    nvlink = block.block("nvlink", required=base is None and machine is None)
    rate, latency = _nvlink(nvlink, base.block("nvlink") if base else None, gpus_per_node, machine)
    given = block.block("network")
    network = _network(given, base.block("network") if base else None, gpus_per_node, machine)
    if nodes > 1 and network is None:
        raise ValueError(f"{block.where('nodes')}: {nodes} nodes need a network, none is given")
    network = _graph(block, nodes, network)
    cluster = Cluster(
        name=block.text("name", preset or "cluster"),
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        gpu=gpu,
        nvlink_bytes_per_s=rate,
        nvlink_latency_s=latency,
        network=network,
        usd_per_gpu_hour=block.number("usd_per_gpu_hour", None, above=True),
        device=block.text("device", preset.lower() if preset else None),
    )
    block.done()
    return cluster


def _machine(block: Block, folder: Path) -> Machine | None:
    """The node that `machine` says to import."""
    inner = block.block("machine")
    if inner is None:
        return None
    smi, nccl = inner.text("nvidia_smi", None), inner.text("nccl_xml", None)
    here = inner.boolean("nvml", False)
    inner.done()
    if bool(smi) + bool(nccl) + here != 1:
        raise ValueError(f"{block.where('machine')}: give one of nvidia_smi, nccl_xml and nvml")
    if here:
        return from_nvml()
    path = folder / (smi or nccl)
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise ValueError(
            f"{inner.where('nvidia_smi' if smi else 'nccl_xml')}: cannot read {path} "
            f"({error.strerror})"
        ) from error
    return (from_smi if smi else from_nccl)(text, source=str(path))


def _pick(given: Block | None, base: Block | None, name: str, **limits: Any) -> float:
    """A number from the file, else from the preset."""
    default = base.number(name) if base is not None and name in base else None
    if given is None:
        return float(default) if default is not None else 0.0
    if default is None:
        return float(given.number(name, **limits))
    return float(given.number(name, default, **limits))


def _gpu(given: Block | None, base: Block | None) -> Gpu:
    share: dict[str, Any] = {"low": 0.0, "high": 1.0, "above": True}
    positive: dict[str, Any] = {"above": True}
    mfu = _pick(given, base, "mfu", **share)
    values = Gpu(
        flops=_pick(given, base, "tflops", **positive) * 1e12,
        fp8_flops=(
            _pick(given, base, "fp8_tflops", **positive)
            if base is not None or (given is not None and "fp8_tflops" in given)
            else _pick(given, base, "tflops", **positive)
        ) * 1e12,
        mfu=mfu,
        fp8_mfu=_share(given, base, "fp8_mfu", mfu),
        attention_mfu=_share(given, base, "attention_mfu", mfu),
        memory_bytes=_pick(given, base, "memory_gb", **positive) * 1e9,
        reserve_bytes=_or(given, base, "reserve_gb", 4.0) * 1e9,
        bytes_per_s=_pick(given, base, "bandwidth_tb_per_s", **positive) * 1e12,
        bandwidth_efficiency=_pick(given, base, "bandwidth_efficiency", **share),
        overhead_s=_or(given, base, "overhead_us", 20.0) * 1e-6,
        kernel_s=_or(given, base, "kernel_us", 4.0) * 1e-6,
        watts=_or(given, base, "watts", 700.0),
        idle_watts=_or(given, base, "idle_watts", 75.0),
    )  # fmt: skip
    if given is not None:
        given.done()
        if values.reserve_bytes >= values.memory_bytes:
            raise given.wrong("reserve_gb", "less than memory_gb", values.reserve_bytes / 1e9)
    return values


def _share(given: Block | None, base: Block | None, name: str, fallback: float) -> float:
    """A number in (0, 1] from the file, the preset, or the fallback."""
    if base is not None and name in base:
        fallback = float(base.number(name))
    if given is None:
        return fallback
    return float(given.number(name, fallback, low=0.0, high=1.0, above=True))


def _or(given: Block | None, base: Block | None, name: str, fallback: float) -> float:
    """A number of 0 or more from the file, the preset, or the fallback."""
    if base is not None and name in base:
        fallback = float(base.number(name))
    return fallback if given is None else float(given.number(name, fallback))


def _nvlink(
    given: Block | None, base: Block | None, gpus: int, machine: Machine | None
) -> tuple[float, float]:
    """Bytes per second of a GPU inside its node, and the latency."""
    share = 0.79
    if base is not None and "efficiency" in base:
        share = float(base.number("efficiency"))
    if given is not None:
        share = float(given.number("efficiency", share, low=0.0, high=1.0, above=True))
    latency = _or(given, base, "latency_us", 4.0) * 1e-6
    if machine is not None:
        rate = machine.gpu_bytes_per_s()
    else:
        rate = _pick(given, base, "gb_per_s", above=True) * 1e9
    if given is not None:
        ports = given.integer("ports", None)
        links = given.integer("links_per_gpu", None)
        given.done()
        if ports is not None and links is not None and links > ports:
            raise given.wrong("links_per_gpu", f"at most the {ports} ports a GPU has", links)
    return rate * share, latency


def _network(
    given: Block | None, base: Block | None, gpus: int, machine: Machine | None
) -> Network | None:
    if given is None and base is None:
        if machine is None or not machine.nic_names:
            return None
        topology = machine.topology()
        if topology.nic_bytes_per_s is None:
            return None
        return Network(nics=topology.nics_per_node, bytes_per_s=topology.nic_bytes_per_s * 0.96,
                       latency_s=20e-6, step_s=2.5e-6, falloff=0.01)  # fmt: skip
    nics = int(base.integer("nics")) if base is not None else None
    if nics is not None:
        nics = min(nics, gpus)
    if given is not None:
        nics = given.integer("nics", nics) if nics is not None else given.integer("nics")
        if nics > gpus:
            raise given.wrong("nics", f"at most the {gpus} GPUs of a node (join the others)", nics)
    share: dict[str, Any] = {"low": 0.0, "high": 1.0, "above": True}
    efficiency = 0.96
    if base is not None and "efficiency" in base:
        efficiency = float(base.number("efficiency"))
    if given is not None:
        efficiency = float(given.number("efficiency", efficiency, **share))
    found = Network(
        nics=int(nics or 1),
        bytes_per_s=_pick(given, base, "gb_per_s", above=True) * 1e9 * efficiency,
        latency_s=_or(given, base, "latency_us", 20.0) * 1e-6,
        step_s=_or(given, base, "step_us", 2.5) * 1e-6,
        falloff=_or(given, base, "falloff", 0.01),
        levels=_levels(given),
    )
    if given is not None:
        if found.falloff >= 1:
            raise given.wrong("falloff", "a number in [0, 1)", found.falloff)
        given.done()
    return found


def _levels(given: Block | None) -> tuple[Level, ...]:
    """Groups of nodes, the smallest first, each of whole groups of the one before."""
    found: list[Level] = []
    for block in given.blocks("levels") if given is not None and "levels" in given else ():
        nodes = block.integer("nodes")
        below = found[-1].nodes if found else 1
        if nodes <= below or nodes % below:
            raise block.wrong("nodes", f"a larger multiple of the {below} below", nodes)
        narrow = block.number("oversubscription", low=1.0)
        latency = block.number("latency_us", 0.0) * 1e-6
        block.done()
        found.append(Level(nodes=nodes, oversubscription=narrow, latency_s=latency))
    return tuple(found)


def _graph(block: Block, nodes: int, network: Network | None) -> Network | None:
    """The network with each NIC held to what the explicit graph lets all nodes exchange."""
    graph = block.block("graph")
    if graph is None:
        return network
    if network is None:
        raise ValueError(f"{block.where('graph')}: a graph needs a network (nics, gb_per_s)")
    from .fabric import node_rate

    rate = node_rate(graph, nodes)
    return replace(network, bytes_per_s=min(network.bytes_per_s, rate / network.nics))
