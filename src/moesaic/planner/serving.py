"""What a step of a serving engine takes: kernels, all-reduces, the host, and the cache that fits.

    C requests at once · T tokens of a step on all GPUs of a copy

A step takes its kernels' time, or the time in which a host launches them where no CUDA graph does,
and what the host does between steps. `batching` says which requests share a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .cluster import Cluster
from .costs import ATTENTION_KERNELS, GATE_KERNELS, gemm_s, mlp_s
from .engine_kernels import engine_experts_s, engine_reduce_s
from .kernels import expected_active
from .model import Model
from .primitives import decode_core_s, prefill_core_s, product_s, reduce_s
from .routing import sample_counts
from .scheduler import Engine


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """One copy of a model on the GPUs of a node.

    Args:
        card: the preset whose published kernel times hold; None: rooflines alone.
        gpus: of the copy; dp: groups of them that attend to requests of their own.
        ep: ranks that share the experts whole; 1: every expert is cut over all GPUs.
        cache: bytes of a number in the cache.
    """

    model: Model
    cluster: Cluster
    card: str | None
    engine: Engine
    gpus: int
    dp: int = 1
    ep: int = 1
    cache: int = 2
    routing: str = "lognormal:0.4"

    @property
    def cut(self) -> int:
        """GPUs that attention's heads are cut over."""
        return self.gpus // self.dp

    @property
    def cache_bytes(self) -> float:
        """Bytes that a layer keeps of a token."""
        return self.model.cache_bytes * self.cache / 2

    @property
    def weight_bytes(self) -> float:
        """Bytes of the weights on all GPUs together; groups each keep attention and dense parts."""
        m = self.model
        shared = m.shared_experts * m.mlp_elements(m.shared_intermediate)
        dense = m.dense_layers * m.mlp_elements(m.dense_intermediate) + m.moe_layers * shared
        kept = m.layers * m.attention.weights(m.hidden) * self.dp + dense
        weights = m.itemsize * kept + 2.0 * 2 * m.vocab * m.hidden
        return weights + m.moe_layers * m.experts.num_experts * m.expert_bytes

    @property
    def free_bytes(self) -> float:
        """Bytes that are left for the cache, below 0 where weights do not fit."""
        have = self.cluster.gpu.memory_bytes * self.gpus
        return self.engine.memory * have - self.weight_bytes

    def room(self) -> float:
        """Tokens whose cache fits."""
        m = self.model
        # Weights that fill a GPU leave the engine what its operator found by trying.
        free = max(self.free_bytes, 0.04 * self.cluster.gpu.memory_bytes * self.gpus)
        # The compressed cache has no heads to divide: every GPU of a group keeps it whole.
        heads = 1 if m.attention.kv_rank else m.attention.kv_heads
        copies = self.cut / min(self.cut, heads)
        return max(1.0, free / (m.layers * self.cache_bytes * copies))

    def reduce_s(self, num_bytes: float, gpus: int) -> float:
        """An all-reduce: the engine's published times, else NCCL's at this cluster's rate."""
        if self.card is None:
            return reduce_s(self.cluster, num_bytes, gpus)
        return engine_reduce_s(self.card, self.engine.name, num_bytes, gpus)

    def step_s(self, decode: int, context: float, prompt: int, pairs: float, done: int) -> float:
        """Seconds of a step.

        Args:
            decode: requests that get one more token, with `context` tokens before it on average.
            prompt: tokens of prompts; pairs: tokens they attend to, summed; done: prompts finished.
        """
        m, gpu, e = self.model, self.cluster.gpu, self.engine
        tokens = decode + prompt
        seconds = _rest(self, _rounded(tokens), prompt == 0)
        heads = 1 if m.attention.kv_rank else min(self.cut, m.attention.kv_heads)
        if decode:
            own = decode / self.dp
            core = decode_core_s(gpu, m.attention, own, context, self.cache_bytes / heads, self.cut)
            seconds += m.layers * core
        if prompt:
            own = prompt / self.dp
            core = prefill_core_s(gpu, m.attention, own, pairs / prompt, self.cut)
            seconds += m.layers * core
        seconds += product_s(
            gpu, max(1.0, decode + done), m.vocab / self.gpus, m.hidden, 2, kernels=2
        )
        seconds = (seconds + m.layers * e.small_s) * (1 + e.drag)
        if prompt or decode > e.graph:
            seconds = max(seconds, m.layers * e.layer_s)
        return seconds + e.step_s + e.request_s * decode


def _rounded(tokens: int) -> int:
    """The next of few sizes, an eighth apart at most: engines pad to such, and steps repeat."""
    if tokens <= 16:
        return tokens
    unit = 1 << (tokens.bit_length() - 4)
    return -(-tokens // unit) * unit


@lru_cache(maxsize=4096)
def _rest(d: Deployment, tokens: int, decode: bool) -> float:
    """Everything of a step's layers but attention's cores."""
    m, gpu = d.model, d.cluster.gpu
    own = tokens / d.dp
    attend = sum(
        product_s(gpu, own, n, k, m.itemsize)
        for n, k in m.attention.products(m.hidden, d.cut, absorbed=decode)
    )
    attend += gemm_s(gpu, 0.0, 2 * 2 * 4.0 * own * m.hidden, 2, ATTENTION_KERNELS)
    attend += d.reduce_s(2.0 * own * m.hidden, d.cut)
    # Groups gather the tokens of all and scatter the sums: together as much as an all-reduce.
    merge = d.reduce_s(2.0 * tokens * m.hidden, d.gpus)
    experts = m.experts.num_experts
    gate = gemm_s(gpu, 2.0 * own * m.hidden * experts, 2.0 * m.hidden * experts, 2, GATE_KERNELS)
    each = tokens / d.gpus  # `mlp_s` takes a GPU's share of the tokens of all
    shared = mlp_s(m, gpu, each, m.shared_experts * m.shared_intermediate, d.gpus)
    dense = mlp_s(m, gpu, each, m.dense_intermediate, d.gpus)
    moe = _experts_s(d, tokens) + gate + shared
    return m.layers * (attend + merge) + m.moe_layers * moe + m.dense_layers * dense


def _experts_s(d: Deployment, tokens: int) -> float:
    """Cut experts, or the fullest rank of those that share them."""
    m, gpu = d.model, d.cluster.gpu
    experts, top_k = m.experts.num_experts, m.top_k
    if d.ep == 1:
        active = expected_active(experts, top_k, tokens)
        return engine_experts_s(gpu, d.card, d.engine.name, m.experts, tokens * top_k, active,
                                m.itemsize, cut=d.gpus)  # fmt: skip
    counts_LE = sample_counts(d.routing, layers=4, ranks=1, experts=experts, top_k=top_k,
                              tokens=tokens)[:, 0]  # fmt: skip
    found = []
    for counts_E in counts_LE:
        by_rank = counts_E.reshape(d.ep, -1)
        rank = int(by_rank.sum(1).argmax())
        rows, active = float(by_rank[rank].sum()), float((by_rank[rank] > 0).sum())
        found.append(
            engine_experts_s(gpu, d.card, d.engine.name, m.experts, rows, active, m.itemsize,
                             cut=d.gpus // d.ep)
        )  # fmt: skip
    return float(np.mean(found))
