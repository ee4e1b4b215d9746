"""What one GPU must hold, and whether it can.

    T tokens of a GPU in one micro-batch · H hidden · K top-k · G ranks

Exchange buffers are counted for the worst routing, as the runtime allocates them: every row of the
group to one rank, bounded by what the group can send to the experts of one rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from .cluster import Gpu
from .model import Model
from .strategies import Strategy
from .workload import Workload


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest GPU, by use."""

    weights: float
    experts: float
    cache: float
    buffers: float
    limit: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.weights + self.experts + self.cache + self.buffers

    @property
    def fits(self) -> bool:
        """Whether the GPU has them."""
        return self.total <= self.limit

    def why(self) -> str:
        """One sentence: how full it is, or what does not fit."""
        parts = {"weights outside experts": self.weights, "experts": self.experts,
                 "cache": self.cache, "buffers": self.buffers}  # fmt: skip
        largest = max(parts, key=parts.__getitem__)
        verb = "fits" if self.fits else "does not fit"
        listed = ", ".join(f"{name} {value / 1e9:.1f}" for name, value in parts.items())
        return (
            f"{self.total / 1e9:.1f} of {self.limit / 1e9:.1f} GB: {verb}, most is {largest} "
            f"(GB: {listed})"
        )


def memory(
    model: Model, gpu: Gpu, strategy: Strategy, workload: Workload, tokens: int, sequences: float
) -> Memory:
    """The bytes of a GPU that has `sequences` sequences and `tokens` tokens in a micro-batch."""
    layers = -(-model.layers // strategy.stages)
    dense = min(model.dense_layers, layers)
    moe = min(layers, model.moe_layers)
    item, hidden = model.itemsize, model.hidden
    cut = strategy.tp
    dense_elements = model.mlp_elements(model.dense_intermediate)
    shared = model.shared_experts * model.mlp_elements(model.shared_intermediate)
    # Embeddings and head keep two bytes where the rest has eight bits.
    embeddings = 2 * max(item, 2.0) * model.vocab * hidden / cut
    attention = layers * model.attention.weights(hidden) / cut
    weights = embeddings + item * (
        attention + dense * dense_elements / cut + moe * shared
        + moe * hidden * model.experts.num_experts
    )  # fmt: skip
    slots = -(-(model.experts.num_experts + strategy.replicas) // strategy.ranks)
    if strategy.family == "tp-pp":
        slots = model.experts.num_experts
    experts = moe * slots * model.expert_bytes / strategy.slices
    held = workload.context if workload.phase == "decode" else workload.prompt
    # The compressed cache of MLA has no heads to divide over the GPUs of a tensor-parallel part.
    parts = 1 if model.attention.kv_rank else min(cut, model.attention.kv_heads)
    if workload.phase == "prefill" and not workload.keep_cache:
        sequences = max(1.0, sequences / strategy.micro_batches)
    cache = layers * sequences * cut * held * model.cache_bytes / parts
    reach = min(model.top_k, slots) if strategy.slices == 1 else 1
    rows = tokens * strategy.ranks * reach if strategy.slices == 1 else tokens * strategy.ranks
    buffers = 2.0 * hidden * (rows + 4 * tokens * cut) + 2.0 * tokens * model.top_k * hidden
    return Memory(weights, experts, cache, buffers, gpu.memory_bytes - gpu.reserve_bytes)
