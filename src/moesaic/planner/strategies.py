"""The ways to deploy a model: how many GPUs one copy takes and what each of them holds.

    E experts · G GPUs

A deployment is `copies` copies side by side; a copy is `stages` groups of `ranks` GPUs, each with
its share of the layers. In a group attention is data-parallel over `ranks / tp` parts of `tp` GPUs
each, and experts are spread over all ranks (or cut into `ranks` slices, in the family ``tp-pp``).

- ``one-per-gpu``: E (and replicas) ranks, one expert of every layer on each;
- ``literal``: the same, and every layer has its own GPUs;
- ``ep``: fewer ranks than experts, several experts of a layer on each;
- ``tp-ep-dp``: the same with attention cut over `tp` GPUs;
- ``tp-pp``: every expert cut over all ranks of a stage, no exchange of tokens;
- ``disaggregated``: `attention` further GPUs do the attention, the ranks only experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .cluster import Cluster
from .model import Model
from .workload import Space

EP_SIZES = (2, 4, 8, 16, 32, 64, 72, 128, 144)


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """One way; see the module for the words."""

    family: str
    ranks: int
    tp: int = 1
    stages: int = 1
    replicas: int = 0
    micro_batches: int = 1
    overlap: bool = False
    attention: int = 0

    @property
    def gpus(self) -> int:
        """GPUs of one copy."""
        return self.stages * (self.ranks + self.attention)

    @property
    def homes(self) -> int:
        """GPUs of a stage that hold tokens."""
        return self.attention or self.ranks

    @property
    def slices(self) -> int:
        """Into how many parts an expert is cut."""
        return self.ranks if self.family == "tp-pp" else 1

    @property
    def name(self) -> str:
        """A short name for tables."""
        parts = {
            "one-per-gpu": f"1 expert/GPU EP{self.ranks}",
            "literal": f"1 expert/GPU/layer {self.stages}x{self.ranks}",
            "ep": f"EP{self.ranks}",
            "tp-ep-dp": f"EP{self.ranks} TP{self.tp}",
            "tp-pp": f"TP{self.ranks} PP{self.stages}",
            "disaggregated": f"A{self.attention}+E{self.ranks}",
        }[self.family]
        if self.family in ("one-per-gpu", "literal", "disaggregated") and self.tp > 1:
            parts += f" TP{self.tp}"
        if self.family in ("ep", "tp-ep-dp") and self.stages > 1:
            parts += f" PP{self.stages}"
        more = [f"+{self.replicas}r"] if self.replicas else []
        more += [f"m{self.micro_batches}"] if self.micro_batches > 1 else []
        more += ["overlap"] if self.overlap else []
        return " ".join([parts, *more])


def _groups(model: Model, space: Space) -> Iterator[Strategy]:
    """Every shape of a copy, without micro-batches and overlap."""
    experts = model.experts.num_experts
    sizes = [ep for ep in (space.ep or EP_SIZES) if ep < experts]
    for family in space.families:
        if family in ("one-per-gpu", "literal"):
            stages = model.layers if family == "literal" else 1
            for more in space.replicas:
                for tp in space.tp:
                    if (experts + more) % tp == 0:
                        yield Strategy(family=family, ranks=experts + more, tp=tp,
                                       stages=stages, replicas=more)  # fmt: skip
        elif family == "tp-pp":
            for ranks in space.tp:
                for stages in space.pp:
                    if stages <= model.layers and model.experts.intermediate_size % ranks == 0:
                        yield Strategy(family=family, ranks=ranks, tp=ranks, stages=stages)
        else:
            for ranks in sizes:
                for more in space.replicas:
                    if (experts + more) % ranks:
                        continue
                    if family == "disaggregated":
                        for share in (1, 2):
                            yield Strategy(family=family, ranks=ranks, replicas=more,
                                           attention=ranks * share)  # fmt: skip
                        continue
                    for tp in (1,) if family == "ep" else [t for t in space.tp if t > 1]:
                        for stages in space.pp:
                            if ranks % tp == 0 and stages <= model.layers:
                                yield Strategy(family=family, ranks=ranks, tp=tp, stages=stages,
                                               replicas=more)  # fmt: skip


def fits_nodes(ranks: int, per_node: int) -> bool:
    """Whether a group fills whole nodes, or divides one."""
    return ranks % per_node == 0 or (ranks < per_node and per_node % ranks == 0)


def enumerate_strategies(model: Model, cluster: Cluster, space: Space) -> list[Strategy]:
    """Every strategy of the space that the cluster has GPUs for.

    A stage deeper than one needs micro-batches to be filled, so there `micro_batches` counts in
    multiples of the stages.

    Raises:
        ValueError: none is left; names the line that asks for them.
    """
    found: dict[Strategy, None] = {}
    for shape in _groups(model, space):
        groups = [shape.ranks] + ([shape.attention] if shape.attention else [])
        if shape.gpus > cluster.gpus or not all(
            fits_nodes(size, cluster.gpus_per_node) for size in groups
        ):
            continue
        if shape.tp > cluster.gpus_per_node:
            continue
        for micro in space.micro_batches:
            for overlap in space.overlap:
                # One micro-batch has nothing to overlap with, and would leave half of the GPUs of a
                # disaggregated copy idle.
                if micro == 1 and (overlap or shape.attention):
                    continue
                found[_with(shape, micro * shape.stages, overlap)] = None
    if not found:
        raise ValueError(
            f"{space.where}: no strategy is left for {cluster.gpus} GPUs in nodes of "
            f"{cluster.gpus_per_node} and {model.experts.num_experts} experts; widen families, ep, "
            "tp or pp, or give more nodes"
        )
    return list(found)


def _with(shape: Strategy, micro_batches: int, overlap: bool) -> Strategy:
    from dataclasses import replace

    return replace(shape, micro_batches=micro_batches, overlap=overlap)
