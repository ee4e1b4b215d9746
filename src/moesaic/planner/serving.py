"""A serving engine, step by step: what waits, what runs, what a step takes, what its users see.

    C requests at once · T tokens of a step on all GPUs of a copy

Requests queue, are let in while there is room for their cache and fewer than the engine's most are
running, and share every step's budget of tokens: prompts in chunks, one token of every other
request. `vllm` and `trtllm` put both into one step, `sglang` prefills first. The last requests of a
burst decode alone: lengths that spread are drawn from an exponential distribution with the mean
that a source gives. A step takes its kernels' time, or the time in which a host launches them where
no CUDA graph does, and what the host does between steps.

>>> engine = ENGINES["vllm"].on("H200")
>>> engine.budget, engine.most
(8192, 1024)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from .cluster import Cluster
from .costs import ATTENTION_KERNELS, GATE_KERNELS, gemm_s, mlp_s
from .engine_kernels import engine_experts_s, engine_reduce_s
from .kernels import expected_active
from .model import Model
from .primitives import decode_core_s, prefill_core_s, product_s
from .routing import sample_counts

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Engine:
    """How an engine schedules, and what its host costs; defaults of its server.

    Args:
        budget: tokens of a step; most: requests that run at once; both of all groups together.
        mixed: prompts and other requests share steps; else prompts go first.
        graph: requests of the largest decode step that is a CUDA graph.
        step_s: of the host, between steps; request_s: for every running request.
        layer_s: of the host, to launch a layer that is not in a graph.
        small_s: of every layer, for kernels that have no model: norms, rotations, sorting, casts.
        drag: share that steps take longer than their kernels alone, one after the other.
        front_s: to take in a request, one after the other.
        memory: share of a GPU's memory that weights and cache may fill.
    """

    name: str
    budget: int = 8192
    most: int = 1024
    mixed: bool = True
    graph: int = 512
    step_s: float = 1e-3
    request_s: float = 0.0
    layer_s: float = 150e-6
    small_s: float = 30e-6
    drag: float = 0.3
    front_s: float = 1e-3
    memory: float = 0.9

    def on(self, card: str) -> Engine:
        """The engine on a card: vLLM has smaller limits on an A100."""
        if self.name == "vllm" and card == "A100":
            return replace(self, budget=2048, most=256)
        return self


# Limits: vLLM from 0.9 (get_batch_defaults), SGLang 0.5 (server_args), TensorRT-LLM 1.0.
# Host: vLLM's loop 0.54 ms a step and 12.7 us a running request (openfabric-systems/simllm 204),
# its first engine 5 ms (vllm-project/vllm 6854), SGLang 0.31 ms (tenstorrent/tt-inference-server
# 3560). `small_s` and `drag` were chosen from rounds 2 to 5 of the validation page: published times
# of kernels are of one alone, tuned for its shape, with even routing, and leave out waiting for
# the slowest rank. `layer_s` and `front_s` are estimates.
ENGINES = {
    "vllm": Engine(name="vllm", step_s=0.54e-3, request_s=12.7e-6),
    "sglang": Engine(name="sglang", most=4096, mixed=False, step_s=0.31e-3, memory=0.85),
    "vllm-v0": Engine(name="vllm-v0", budget=8192, most=256, mixed=False, graph=256, step_s=5e-3),
    "trtllm": Engine(name="trtllm", most=2048, step_s=0.54e-3),
}


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """One copy of a model on the GPUs of a node.

    Args:
        cluster: its preset's name is `card`.
        gpus: of the copy; dp: groups of them that attend to requests of their own.
        ep: ranks that share the experts whole; 1: every expert is cut over all GPUs.
        cache: bytes of a number in the cache.
    """

    model: Model
    cluster: Cluster
    card: str
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

    def room(self) -> float:
        """Tokens whose cache fits."""
        m, gpu = self.model, self.cluster.gpu
        shared = m.shared_experts * m.mlp_elements(m.shared_intermediate)
        dense = m.dense_layers * m.mlp_elements(m.dense_intermediate) + m.moe_layers * shared
        kept = m.layers * m.attention.weights(m.hidden) * self.dp + dense
        weights = m.itemsize * kept + 2.0 * 2 * m.vocab * m.hidden
        weights += m.moe_layers * m.experts.num_experts * m.expert_bytes
        have = gpu.memory_bytes * self.gpus
        # Weights that fill a GPU leave the engine what its operator found by trying.
        free = max(self.engine.memory * have - weights, 0.04 * have)
        # The compressed cache has no heads to divide: every GPU of a group keeps it whole.
        heads = 1 if m.attention.kv_rank else m.attention.kv_heads
        copies = self.cut / min(self.cut, heads)
        return max(1.0, free / (m.layers * self.cache_bytes * copies))

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
    own, name = tokens / d.dp, d.engine.name
    attend = sum(
        product_s(gpu, own, n, k, m.itemsize)
        for n, k in m.attention.products(m.hidden, d.cut, absorbed=decode)
    )
    attend += gemm_s(gpu, 0.0, 2 * 2 * 4.0 * own * m.hidden, 2, ATTENTION_KERNELS)
    attend += engine_reduce_s(d.card, name, 2.0 * own * m.hidden, d.cut)
    # Groups gather the tokens of all and scatter the sums: together as much as an all-reduce.
    merge = engine_reduce_s(d.card, name, 2.0 * tokens * m.hidden, d.gpus)
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


@dataclass(frozen=True, kw_only=True)
class Load:
    """Requests of a benchmark.

    Args:
        total: how many there are; at_once: how many may be under way, None for all.
        prompt, output: tokens, means where they `spread`.
        rate: requests a second, evenly random; None: as soon as allowed.
    """

    total: int
    prompt: int
    output: int
    at_once: int | None = None
    spread: bool = False
    rate: float | None = None
    longest: int = 2048

    def lengths(self, seed: int = 0) -> tuple[Ints, Ints]:
        """Prompt and output tokens of every request."""
        if not self.spread:
            shape = self.total
            return np.full(shape, self.prompt, np.int64), np.full(shape, self.output, np.int64)
        random = np.random.default_rng(seed)
        # Quantiles, shuffled, and brought back to the mean that a cut at the longest takes away.
        at = (np.arange(self.total) + 0.5) / self.total
        found = []
        for mean, most in ((self.prompt, self.longest // 2), (self.output, self.longest)):
            values = np.minimum(-np.log1p(-at) * mean, most)
            values = np.maximum(1, np.round(values * mean / values.mean()))
            found.append(random.permutation(values).astype(np.int64))
        return found[0], found[1]


@dataclass(frozen=True)
class Served:
    """What a benchmark reports; seconds are means over requests, `ttft_median_s` apart."""

    seconds: float
    prompt_tokens: int
    output_tokens: int
    requests: int
    ttft_s: float
    ttft_median_s: float
    tpot_s: float
    tpot_median_s: float
    latency_s: float

    def figures(self) -> dict[str, float]:
        """By the names that published figures have."""
        return {
            "output_tokens_per_s": self.output_tokens / self.seconds,
            "input_tokens_per_s": self.prompt_tokens / self.seconds,
            "total_tokens_per_s": (self.prompt_tokens + self.output_tokens) / self.seconds,
            "requests_per_s": self.requests / self.seconds,
            "ttft_ms": 1e3 * self.ttft_s,
            "ttft_median_ms": 1e3 * self.ttft_median_s,
            "tpot_ms": 1e3 * self.tpot_s,
            "tpot_median_ms": 1e3 * self.tpot_median_s,
            "itl_ms": 1e3 * self.tpot_s,
            "latency_ms": 1e3 * self.latency_s,
        }


class _Run:
    """A benchmark under way: who waits, who runs, what each has left and was given.

    R requests, in the order in which they come.
    """

    def __init__(self, d: Deployment, load: Load, seed: int) -> None:
        self.d, self.total = d, load.total
        self.prompt_R, self.output_R = load.lengths(seed)
        self.ready_R = _arrivals(load, d.engine, seed)
        self.left_R, self.given_R = self.prompt_R.copy(), np.zeros(load.total, np.int64)
        self.first_R, self.last_R = np.zeros(load.total), np.zeros(load.total)
        self.room, self.budget = d.room(), d.engine.budget
        self.running: list[int] = []
        self.now, self.used, self.next, self.done = 0.0, 0.0, 0, 0
        # Requests that users have sent; the next comes when one is answered.
        self.sent = load.total if load.at_once is None else min(load.at_once, load.total)

    def size(self, request: int) -> float:
        """Tokens of cache that a request ends with."""
        return float(self.prompt_R[request] + self.output_R[request])

    def admitted(self, tokens: int) -> list[tuple[int, int]]:
        """Requests let in now, each with as much of its prompt as the step still takes."""
        chunk = []
        while (
            self.next < self.sent
            and self.ready_R[self.next] <= self.now
            and len(self.running) < self.d.engine.most
            and tokens < self.budget
            and self.used + self.size(self.next) <= self.room
        ):
            part = int(min(self.left_R[self.next], self.budget - tokens))
            chunk.append((self.next, part))
            self.running.append(self.next)
            self.used += self.size(self.next)
            tokens += part
            self.next += 1
        return chunk

    def scheduled(self) -> tuple[Ints, list[tuple[int, int]]]:
        """Requests that get one more token in the next step, and parts of prompts in it."""
        run = np.array(self.running, np.int64)
        prefilling, decoding = run[self.left_R[run] > 0], run[self.left_R[run] == 0]
        tokens = len(decoding) if self.d.engine.mixed else 0
        chunk: list[tuple[int, int]] = []
        for r in prefilling:
            part = int(min(self.left_R[r], self.budget - tokens))
            if part > 0:
                chunk.append((int(r), part))
                tokens += part
        chunk += self.admitted(tokens)
        return (decoding[:0] if chunk and not self.d.engine.mixed else decoding), chunk

    def step(self) -> None:
        """One step, or as many as pass until a request ends or comes."""
        waits = self.next < self.sent and self.ready_R[self.next] > self.now
        if not self.running and waits:
            self.now = float(self.ready_R[self.next])
        decoding, chunk = self.scheduled()
        pairs = sum(p * (float(self.prompt_R[r] - self.left_R[r]) + p / 2) for r, p in chunk)
        finished = [r for r, p in chunk if self.left_R[r] == p]
        count, prompt = len(decoding), sum(p for _, p in chunk)
        before = (self.prompt_R + self.given_R)[decoding]
        context = float(before.mean()) if count else 0.0
        seconds, repeats = self.d.step_s(count, context, prompt, pairs, len(finished)), 1
        if not chunk:
            repeats = int((self.output_R - self.given_R)[decoding].min())
            if self.next < self.sent and self.ready_R[self.next] > self.now:
                until = float(self.ready_R[self.next]) - self.now
                repeats = max(1, min(repeats, -int(-until // seconds)))
            seconds = self.d.step_s(count, context + (repeats - 1) / 2, 0, 0.0, 0)
        self.now += repeats * seconds
        for r, part in chunk:
            self.left_R[r] -= part
        self.first_R[finished] = self.now
        self.given_R[finished] = 1
        self.given_R[decoding] += repeats
        self.leave([*decoding.tolist(), *finished])

    def leave(self, had: list[int]) -> None:
        """Those of `had` that have all their tokens go; for each a user sends the next."""
        over = [r for r in had if self.given_R[r] >= self.output_R[r]]
        gone = set(over)
        if gone:
            self.running = [r for r in self.running if r not in gone]
        for r in over:
            self.last_R[r] = self.now
            self.used -= self.size(r)
            if self.sent < self.total:
                self.ready_R[self.sent] = max(self.now, self.ready_R[self.sent])
                self.sent += 1
        self.done += len(over)


def serve(d: Deployment, load: Load, *, seed: int = 0) -> Served:
    """Run the benchmark step by step.

    Raises:
        ValueError: a request whose cache does not fit at all.
    """
    run = _Run(d, load, seed)
    longest = int((run.prompt_R + run.output_R).max())
    if longest > run.room:
        raise ValueError(
            f"{d.model.name} on {d.gpus} {d.card} has room for {run.room:.0f} tokens of cache, a "
            f"request has {longest}"
        )
    while run.done < run.total:
        run.step()
    sent_R = run.ready_R if load.at_once is not None or load.rate else np.zeros(load.total)
    first_R, rest_R = run.first_R - sent_R, run.last_R - run.first_R
    pace_R = (rest_R / np.maximum(run.output_R - 1, 1))[run.output_R > 1]
    pace_R = pace_R if len(pace_R) else np.zeros(1)
    return Served(
        seconds=run.now, prompt_tokens=int(run.prompt_R.sum()), requests=load.total,
        output_tokens=int(run.output_R.sum()), ttft_s=float(first_R.mean()),
        ttft_median_s=float(np.median(first_R)), tpot_s=float(pace_R.mean()),
        tpot_median_s=float(np.median(pace_R)), latency_s=float((run.last_R - sent_R).mean()),
    )  # fmt: skip


def _arrivals(load: Load, engine: Engine, seed: int) -> Floats:
    """When each request could be let in: a front end takes them in one by one."""
    if load.rate:
        random = np.random.default_rng(seed)
        gaps_R = random.exponential(1 / load.rate, load.total)
        return np.asarray(gaps_R.cumsum(), dtype=np.float64)
    found: Floats = np.arange(1, load.total + 1, dtype=np.float64) * engine.front_s
    if load.at_once is not None:
        found[load.at_once :] = 0.0
    return found
