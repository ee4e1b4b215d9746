"""What the suite `graphs` measures in one cell: variants of the same layer that must agree in bits.

    T tokens · E experts · K top-k

A variant is a way to run the same calls. Each is run until its graphs are captured, its outputs are
compared bit for bit with those of the way that it must be like, and then all are timed in turn.
`host_us` is what a call costs the host: the time to queue it while the device is idle.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..cost import expert_weight_elements
from ..functional import moe
from ..runtime.executors import SequentialExperts, StreamedExperts, dense_experts
from ..runtime.expert_graphs import ExpertGraphs
from ..runtime.graphs import GraphCache, GraphConfig, GraphStore, doubling_buckets, open_store
from ..runtime.size_classes import SizeClassExperts
from ..runtime.streams import WithShared
from ..types import ExpertSpec, ExpertWeights
from .ceilings import default_sampler
from .results import Line
from .suite import Cell
from .timing import Call, capture, check_device, interleave, reason
from .workloads import Inputs, Model, make_inputs, make_weights

Way = tuple[str, str]
WAYS_IN_ROTATION = 8
SOON = GraphConfig(min_tokens=1, memory_bytes=4 * 2**30)


@dataclass(frozen=True)
class Variant:
    """Calls of one way to run a cell; `state` adds values to its line once it was timed.

    `like`: the way whose bits it must have; None for the first of its arithmetic.
    """

    calls: Sequence[Callable[[], Tensor]]
    state: Callable[[], dict[str, Any]] = dict
    like: Way | None = None


EAGER: Way = ("moesaic", "eager")
Variants = dict[Way, Variant]


@dataclass(frozen=True)
class Setting:
    """A cell's model on the device: weights, and the inputs of the calls of a rotation."""

    model: Model
    spec: ExpertSpec
    weights: ExpertWeights
    inputs: list[Inputs]
    device: torch.device
    make_store: Callable[[GraphConfig, torch.device], GraphStore] = open_store

    @property
    def weight_bytes(self) -> int:
        """Bytes of the experts' weights."""
        per = expert_weight_elements(self.spec) * self.weights.up.element_size()
        return self.spec.num_experts * per

    def layer(self) -> Callable[..., Tensor]:
        """moesaic's layer as a function of hidden states, ids and weights."""

        def layer(hidden_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
            return moe(hidden_TH, ids_TK, weights_TK, self.weights, self.spec)

        return layer

    def store(self, config: GraphConfig = SOON) -> GraphStore:
        """A store of graphs for this device."""
        return self.make_store(config, self.device)


def make_setting(
    model: Model,
    cell: Cell,
    device: torch.device,
    seed: int,
    make_store: Callable[[GraphConfig, torch.device], GraphStore] = open_store,
) -> Setting:
    """Fresh weights and inputs; routing `fixed` is one uniform routing for every call."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype: torch.dtype = getattr(torch, cell.dtype)
    weights = make_weights(model.spec(), dtype=dtype, generator=generator)
    routing = "uniform" if cell.routing == "fixed" else cell.routing
    inputs = [
        make_inputs(model, cell.tokens, routing, dtype=dtype, generator=generator)
        for _ in range(WAYS_IN_ROTATION)
    ]
    if cell.routing == "fixed":
        inputs = [one._replace(topk_ids_TK=inputs[0].topk_ids_TK) for one in inputs]
    return Setting(model, model.spec(), weights, inputs, device, make_store)


def graph_state(store: GraphStore, weight_bytes: int) -> dict[str, Any]:
    """What a store did and holds, over the bytes of the weights."""
    counts = store.counts()
    names = ("captured", "replayed", "eager", "warmed", "evicted", "failed", "graphs")
    values: dict[str, Any] = {name: getattr(counts, name) for name in names}
    values |= {"held_bytes": counts.held_bytes, "buffer_bytes": counts.buffer_bytes}
    return values | {"held_share": counts.held_bytes / weight_bytes}


def cached_calls(
    layer: Callable[..., Tensor],
    setting: Setting,
    *,
    in_place: bool = False,
    like: Way | None = EAGER,
) -> Variant:
    """A layer behind the cache; `in_place`: inputs lie in the graph's buffers, outputs stay there.

    In place every call has the first inputs, for that is what the buffers hold.
    """
    config = replace(SOON, copy_output=not in_place)
    store = setting.store(config)
    cache = GraphCache(layer, watch=setting.weights.named().values(), store=store)
    calls: list[Callable[[], Tensor]] = [partial(cache, *one) for one in setting.inputs]
    state = partial(graph_state, store, setting.weight_bytes)
    if not in_place:
        return Variant(calls, state, like)
    for _ in range(config.min_calls):
        calls[0]()
    buffers = store.buffers(lambda _: True)
    if buffers is None:
        return Variant([partial(_no_graph, store)], state, like)
    for buffer, given in zip(buffers, setting.inputs[0], strict=True):
        buffer.copy_(given)
    return Variant([partial(cache, *buffers)], state, like)


def _no_graph(store: GraphStore) -> Tensor:
    raise RuntimeError(f"no graph was captured: {store.counts()}")


def layer_variants(setting: Setting) -> Variants:
    """The whole layer: eager, behind the cache with copies, and replayed in place."""
    layer = setting.layer()
    return {
        EAGER: Variant([partial(layer, *one) for one in setting.inputs]),
        ("moesaic", "cache"): cached_calls(layer, setting),
        ("moesaic", "replay"): cached_calls(layer, setting, in_place=True),
    }


def stack_variants(setting: Setting, layers: int = 8) -> Variants:
    """The layer several times in a row: eager, with a graph each time, as one graph."""
    layer = setting.layer()

    def stack(hidden: Tensor, ids: Tensor, weights: Tensor, each: Any = layer) -> Tensor:
        for _ in range(layers):
            hidden = each(hidden, ids, weights)
        return hidden

    store = setting.store()
    each = GraphCache(layer, watch=setting.weights.named().values(), store=store)
    state = partial(graph_state, store, setting.weight_bytes)
    return {
        EAGER: Variant([partial(stack, *one) for one in setting.inputs]),
        ("moesaic-layers", "cache"): Variant(
            [partial(stack, *one, each=each) for one in setting.inputs], state, EAGER
        ),
        ("moesaic", "cache"): cached_calls(stack, setting),
        ("moesaic", "replay"): cached_calls(stack, setting, in_place=True),
    }


def expert_variants(setting: Setting) -> Variants:
    """Experts one by one: in order, a stream each, a graph each with exact and with padded rows."""
    experts = dense_experts(setting.spec, setting.weights)
    most = max(64, setting.inputs[0].topk_ids_TK.numel())
    padded = GraphConfig(
        buckets=doubling_buckets(most), max_graphs=16 * len(experts), memory_bytes=8 * 2**30
    )
    exact = replace(padded, buckets=None)
    variants: Variants = {}

    def add(way: Way, layer: Any, like: Way | None = None) -> None:
        state: Callable[[], dict[str, Any]] = dict
        if isinstance(layer, ExpertGraphs):
            state = partial(state_of_experts, layer, setting.weight_bytes)
        variants[way] = Variant([partial(layer, *one) for one in setting.inputs], state, like)

    def graphs(config: GraphConfig) -> ExpertGraphs:
        return ExpertGraphs(experts, config, capturer=setting.store().capturer)

    order: Way = ("sequential", "eager")
    add(order, SequentialExperts(experts))
    add(("per-expert-streams", "eager"), StreamedExperts(experts), order)
    add(("per-expert-graphs", "exact"), graphs(exact), order)
    # Padded rows may take another path of the library, with other bits.
    add(("per-expert-graphs", "padded"), graphs(padded))
    add(EAGER, setting.layer())
    variants["moesaic", "cache"] = cached_calls(setting.layer(), setting)
    return variants


def state_of_experts(layer: ExpertGraphs, weight_bytes: int) -> dict[str, Any]:
    """Counts and bytes of a layer of captured experts."""
    return graph_state(layer.store, weight_bytes)


class Swiglu(nn.Module):
    """A dense SwiGLU of a layer's own width, as shared experts are."""

    def __init__(self, width: int, inner: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        kwargs: dict[str, Any] = {"bias": False, "dtype": dtype, "device": device}
        self.up, self.down = (
            nn.Linear(width, 2 * inner, **kwargs),
            nn.Linear(inner, width, **kwargs),
        )
        self.requires_grad_(False)

    def forward(self, hidden_TH: Tensor) -> Tensor:
        """(T, H) to (T, H)."""
        gate, up = self.up(hidden_TH).chunk(2, dim=-1)
        out_TH: Tensor = self.down(nn.functional.silu(gate) * up)
        return out_TH


def stream_variants(setting: Setting) -> Variants:
    """A shared expert in turn and aside, and size classes side by side; each under one graph."""
    spec, dtype = setting.spec, setting.weights.up.dtype
    shared = Swiglu(spec.hidden_size, spec.intermediate_size, dtype, setting.device)
    layer, huge = setting.layer(), 1 << 30
    ways: dict[str, tuple[Callable[..., Tensor], Way | None]] = {
        "moesaic+shared": (WithShared(layer, shared, max_tokens=0), None),
        "moesaic+shared-aside": (
            WithShared(layer, shared, max_tokens=huge),
            ("moesaic+shared", "replay"),
        ),
        "moesaic": (layer, None),
        "moesaic-size-classes": (
            SizeClassExperts(setting.weights, spec),
            ("moesaic", "replay"),
        ),
    }
    return {
        (name, "replay"): cached_calls(function, setting, in_place=True, like=like)
        for name, (function, like) in ways.items()
    }


def host_us(calls: Sequence[Call], device: torch.device, *, repeats: int = 5) -> float:
    """Microseconds that the host spends on one call, the median of rounds of up to 32 calls."""
    count = min(32, 8 * len(calls))
    found = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        for number in range(count):
            calls[number % len(calls)]()
        found.append((time.perf_counter() - begin) * 1e6 / count)
    return statistics.median(found)


@dataclass
class Found:
    """What a cell gave: values of each way's line."""

    values: dict[Way, Line] = field(default_factory=dict)

    def note(self, way: Way, **values: Any) -> None:
        """Add values to a way's line."""
        self.values.setdefault(way, {}).update(values)


def measure_variants(
    variants: Variants, device: torch.device, *, budget_s: float, seed: int
) -> Found:
    """Capture, compare, time; one that raises has its error noted and the others go on.

    Raises:
        DeviceLost: the GPU answers no more.
    """
    found, samplers = Found(), {}
    wanted: dict[Way, list[Tensor]] = {}
    with torch.no_grad():
        for way, variant in variants.items():
            try:
                for _ in range(SOON.min_calls + 2 if variant.state is not dict else 1):
                    for call in variant.calls:
                        call()
                outputs = wanted[way] = [call().clone() for call in variant.calls]
                like = outputs if variant.like is None else wanted[variant.like]
                same = all(torch.equal(a, b) for a, b in zip(outputs, like, strict=False))
                found.note(way, wrong=not same)
                samplers[way] = default_sampler(device)(variant.calls)
            except Exception as error:
                found.note(way, error=reason(error))
                check_device(reason(error))
        timed = interleave(samplers, budget_s=budget_s, min_samples=5, seed=seed)
        for way, m in timed.measured.items():
            found.note(way, ms=m.median, ms_p20=m.p20, ms_p80=m.p80, samples=m.samples)
            found.note(way, host_us=host_us(variants[way].calls, device))
            found.note(way, **variants[way].state())
        for way, text in timed.errors.items():
            found.note(way, error=text)
    return found


def nodes_of(graph: Any) -> int | None:
    """Nodes of a captured graph that was made with `keep_graph`, None without cuda-bindings."""
    try:
        from cuda.bindings import driver
    except ImportError:
        return None
    error, _, count = driver.cuGraphGetNodes(graph.raw_cuda_graph(), 0)
    return int(count) if int(error) == 0 else None


def launch_values(setting: Setting, rows: int) -> dict[Way, Line]:
    """What launching one expert costs the host: its kernels one by one, and as one graph."""
    spec, dtype = setting.spec, setting.weights.up.dtype
    (expert,) = dense_experts(spec, setting.weights)[:1]
    given = torch.randn(rows, spec.hidden_size, device=setting.device).to(dtype)
    with torch.no_grad():
        captured = capture([partial(expert, given)])
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(graph):
            expert(given)
        kernels = nodes_of(graph)
        eager_us = host_us([partial(expert, given)], setting.device, repeats=21)
        replay_us = host_us([captured.graph.replay], setting.device, repeats=21)
    values: dict[Way, Line] = {}
    for way, us in ((("expert", "eager"), eager_us), (("expert", "replay"), replay_us)):
        values[way] = {"ms": us / 1e3, "host_us": us, "kernels": kernels}
        values[way] |= {"host_us_per_kernel": us / kernels if kernels else None}
    return values


def warmup_values(setting: Setting, calls: int = 12) -> dict[Way, Line]:
    """Each of the first calls of a shape that this process has not seen, until they are steady.

    `warmups` are the calls before the first within a tenth of the later half's median.
    """
    values: dict[Way, Line] = {}
    expert = dense_experts(setting.spec, setting.weights)[0]
    ways: dict[Way, Callable[[], Any]] = {
        ("expert", "eager"): partial(expert, setting.inputs[0].hidden_TH),
        ("moesaic", "eager"): partial(setting.layer(), *setting.inputs[0]),
    }
    with torch.no_grad():
        for way, call in ways.items():
            times = []
            for _ in range(calls):
                begin = time.perf_counter()
                call()
                if setting.device.type == "cuda":
                    torch.cuda.synchronize(setting.device)
                times.append((time.perf_counter() - begin) * 1e3)
            steady = statistics.median(times[calls // 2 :])
            needed = next(i for i, ms in enumerate(times) if ms <= 1.1 * steady)
            rounded = [float(f"{ms:.4g}") for ms in times]
            values[way] = {"ms": steady, "samples": calls, "warmups": needed, "calls_ms": rounded}
    return values


def memory_values(setting: Setting, rounds: int) -> dict[Way, Line]:
    """Captures and evictions of a layer, and what of the device's memory they keep.

    Every round is a token count that evicts another; the first tenth settles the allocator.
    """
    config = GraphConfig(min_calls=2, min_tokens=1, stable_calls=1, warmups=1, max_graphs=3)
    store = setting.store(config)
    cache = GraphCache(setting.layer(), store=store)
    hidden, ids, weights = setting.inputs[0]
    sizes = [max(1, hidden.shape[0] - number) for number in range(8)]
    times, before = [], 0
    with torch.no_grad():
        for number in range(rounds):
            tokens = sizes[number % len(sizes)]
            given = (hidden[:tokens], ids[:tokens], weights[:tokens])
            want = cache(*given)
            begin = time.perf_counter()
            got = cache(*given)
            times.append((time.perf_counter() - begin) * 1e3)
            if not torch.equal(got, want):
                return {("moesaic", "cache"): {"wrong": True, "ms": None}}
            if number == rounds // 10 and store.capturer is not None:
                before = store.capturer.free_bytes()
        lost = before - store.capturer.free_bytes() if store.capturer is not None else 0
    state = graph_state(store, setting.weight_bytes)
    median = statistics.median(times[rounds // 10 :])
    return {
        ("moesaic", "cache"): state
        | {"ms": median, "samples": rounds, "lost_bytes": lost, "wrong": False}
    }
