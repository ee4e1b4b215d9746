"""Graphs, streams and meters on a GPU: the bits of eager calls, nothing lost, failures survived."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor, nn

from moesaic import moe
from moesaic.bench.workloads import Model, make_inputs, make_weights
from moesaic.hardware.energy import Energy
from moesaic.hardware.meter import open_meter
from moesaic.hardware.nvml import NotAvailable, open_gpu
from moesaic.nn import MoE
from moesaic.runtime.capture import CudaCapturer
from moesaic.runtime.executors import SequentialExperts, StreamedExperts, dense_experts
from moesaic.runtime.expert_graphs import ExpertGraphs
from moesaic.runtime.graphs import GraphCache, GraphConfig, GraphStore
from moesaic.runtime.size_classes import SizeClassExperts
from moesaic.runtime.sliced import run_budgeted
from moesaic.runtime.streams import CopyLane, WithShared
from moesaic.types import ExpertSpec, RouterSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")
SOON = GraphConfig(min_calls=3, min_tokens=1, stable_calls=1, warmups=1)
MODEL = Model("m", 8, 2, 512, 256)
RELU3 = Model("r", 8, 2, 256, 512, kind="relu3", family="paper")


def made(model: Model, tokens: int, seed: int = 0):
    """Weights, spec and eight inputs of a layer in bf16."""
    generator = torch.Generator(CUDA).manual_seed(seed)
    weights = make_weights(model.spec(), dtype=torch.bfloat16, generator=generator)
    inputs = [
        make_inputs(model, tokens, "uniform", dtype=torch.bfloat16, generator=generator)
        for _ in range(8)
    ]
    return weights, model.spec(), inputs


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("model", [MODEL, RELU3], ids=["swiglu", "relu3"])
def test_replays_are_bit_equal_at_every_size_and_bucket(model: Model) -> None:
    weights, spec, inputs = made(model, 70)
    config = GraphConfig(
        min_calls=2,
        min_tokens=1,
        stable_calls=1,
        warmups=1,
        buckets=(1, 4, 16, 48, 80),
        pads=(0, -1),
    )
    store = GraphStore(config, CudaCapturer(CUDA))
    cache = GraphCache(lambda h, i, w: moe(h, i, w, weights, spec), store=store)
    for turn in range(3):
        for number, tokens in enumerate((1, 3, 4, 7, 16, 33, 70, 2, 48, 5)):
            given = [t[:tokens].contiguous() for t in inputs[(turn + number) % 8]]
            assert torch.equal(cache(*given), moe(*given, weights=weights, spec=spec))
    counts = cache.counts()
    assert counts.captured == counts.graphs == 5 and counts.replayed >= 20
    assert counts.held_bytes > 0 and counts.failed == 0


def test_a_stack_of_whole_layers_is_one_graph_that_sees_moved_weights() -> None:
    router = RouterSpec(num_experts=8, top_k=2)
    experts = ExpertSpec(num_experts=8, hidden_size=512, intermediate_size=256)
    layers = [MoE(router, experts, device=CUDA, dtype=torch.bfloat16) for _ in range(3)]
    stack = nn.Sequential(*layers).eval().requires_grad_(False)
    cache = GraphCache(stack, store=GraphStore(SOON, CudaCapturer(CUDA)))
    for number in range(6):
        hidden = torch.randn(48, 512, device=CUDA, dtype=torch.bfloat16)
        if number == 4:
            down = layers[1].experts.down_proj
            down.data = down.data.flip(0).contiguous()
        assert torch.equal(cache(hidden), stack(hidden))
    counts = cache.counts()
    assert (counts.captured, counts.stale, counts.graphs) == (1, 1, 0)


def test_every_sm_budget_has_a_graph_with_the_same_bits() -> None:
    weights, spec, inputs = made(MODEL, 64)

    def layer(h: Tensor, i: Tensor, w: Tensor, sms: int | None = None) -> Tensor:
        return run_budgeted(h, i, w, weights, spec, num_sms=sms)

    cache = GraphCache(layer, store=GraphStore(SOON, CudaCapturer(CUDA)))
    want = moe(*inputs[0], weights=weights, spec=spec)
    assert all(cache.prepare(*inputs[1], sms=sms) for sms in (None, 16, 64))
    for sms in (None, 16, 64):
        assert torch.equal(cache(*inputs[0], sms=sms), want)
    assert (cache.counts().captured, cache.counts().replayed, cache.counts().eager) == (3, 3, 0)


def test_replays_from_two_streams_are_ordered() -> None:
    weights, spec, inputs = made(MODEL, 32)
    store = GraphStore(SOON, CudaCapturer(CUDA))
    cache = GraphCache(lambda h, i, w: moe(h, i, w, weights, spec), store=store)
    wants = [moe(*one, weights=weights, spec=spec) for one in inputs]
    streams = [torch.cuda.Stream() for _ in range(2)]
    for _ in range(4):
        cache(*inputs[0])
    torch.cuda.synchronize()
    outs = []
    for number, one in enumerate(inputs):
        with torch.cuda.stream(streams[number % 2]):
            outs.append(cache(*one))
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(outs, wants, strict=True))


def test_a_call_that_waits_for_the_device_stays_eager_and_the_device_stays_well(caplog) -> None:
    def waits(rows: Tensor) -> Tensor:
        return rows * float(rows.sum() * 0 + 2)

    cache = GraphCache(waits, store=GraphStore(SOON, CudaCapturer(CUDA)))
    rows = torch.randn(64, 8, device=CUDA)
    for _ in range(8):
        assert torch.equal(cache(rows), rows * 2)
    assert cache.counts().failed == 1 and len(caplog.records) == 1
    assert torch.randn(4, device=CUDA).isfinite().all()


def test_a_capture_that_breaks_in_the_middle_leaves_the_device_well() -> None:
    def breaks(rows: Tensor) -> Tensor:
        out = rows * 2
        if torch.cuda.is_current_stream_capturing():
            out.sum().item()
        return out

    store = GraphStore(SOON, CudaCapturer(CUDA))
    cache = GraphCache(breaks, store=store, owner="broken")
    rows = torch.randn(64, 8, device=CUDA)
    for _ in range(8):
        assert torch.equal(cache(rows), rows * 2)
    assert cache.counts().failed == 1
    assert torch.randn(4, device=CUDA).isfinite().all()
    good = GraphCache(lambda rows: rows * 3, store=store, owner="good")
    for _ in range(8):
        assert torch.equal(good(rows), rows * 3)
    assert store.counts().replayed >= 5


def test_short_memory_keeps_the_answers(caplog) -> None:
    weights, spec, inputs = made(MODEL, 64)
    layer = lambda h, i, w: moe(h, i, w, weights, spec)  # noqa: E731
    due = [True]

    class Short(CudaCapturer):
        def record(self, call, sms):
            def greedy():
                if due:
                    due.clear()
                    torch.empty(2**45, dtype=torch.uint8, device=CUDA)
                return call()

            return super().record(greedy, sms)

    cache = GraphCache(layer, store=GraphStore(SOON, Short(CUDA)))
    for _ in range(8):
        for one in inputs:
            assert torch.equal(cache(*one), layer(*one))
    assert cache.counts().out_of_memory == 1
    assert sum("memory is short" in r.message for r in caplog.records) == 1
    assert torch.randn(4, device=CUDA).isfinite().all()


def test_moved_weights_are_seen() -> None:
    layer = nn.Linear(64, 64, bias=False, device=CUDA, dtype=torch.bfloat16).requires_grad_(False)
    cache = GraphCache(layer, store=GraphStore(SOON, CudaCapturer(CUDA)))
    rows = torch.randn(64, 64, device=CUDA, dtype=torch.bfloat16)
    for _ in range(5):
        cache(rows)
    layer.weight.data = torch.randn_like(layer.weight)
    for _ in range(5):
        assert torch.equal(cache(rows), layer(rows))
    assert (cache.counts().stale, cache.counts().captured) == (1, 2)


def test_captures_and_evictions_give_their_memory_back() -> None:
    weights, spec, inputs = made(MODEL, 40)
    config = GraphConfig(min_calls=2, min_tokens=1, stable_calls=1, warmups=1, max_graphs=2)
    capturer = CudaCapturer(CUDA)
    cache = GraphCache(
        lambda h, i, w: moe(h, i, w, weights, spec), store=GraphStore(config, capturer)
    )
    before = 0
    for number in range(300):
        given = [t[: 40 - number % 6].contiguous() for t in inputs[0]]
        assert torch.equal(cache(*given), cache(*given))
        if number == 30:
            before = capturer.free_bytes()
    assert cache.counts().captured == 300 and cache.counts().graphs == 2
    assert before - capturer.free_bytes() <= 2**21
    cache.store.clear()
    assert cache.counts().held_bytes == 0


def test_executors_of_the_same_arithmetic_have_the_same_bits() -> None:
    weights, spec, inputs = made(RELU3, 128)
    experts = dense_experts(spec, weights)
    one = SequentialExperts(experts)
    streamed = StreamedExperts(experts)
    config = GraphConfig(min_calls=4, min_tokens=8, stable_calls=1, warmups=1, max_graphs=100)
    graphs = ExpertGraphs(experts, config)
    for _ in range(6):
        for given in inputs:
            want = one(*given)
            assert torch.equal(streamed(*given), want)
            assert torch.equal(graphs(*given), want)
    assert graphs.counts().replayed > 50 and graphs.buffer_share() > 0


def test_size_classes_and_the_shared_expert_aside_keep_the_bits_also_under_a_graph() -> None:
    weights, spec, inputs = made(MODEL, 200)
    shared = nn.Linear(512, 512, bias=False, device=CUDA, dtype=torch.bfloat16)
    layer = lambda h, i, w: moe(h, i, w, weights, spec)  # noqa: E731
    classes = SizeClassExperts(weights, spec, bounds=(20, 55))
    aside = WithShared(layer, shared, max_tokens=10**6)
    cached = [GraphCache(f, store=GraphStore(SOON, CudaCapturer(CUDA))) for f in (classes, aside)]
    for _ in range(5):
        for given in inputs:
            want = layer(*given)
            assert torch.equal(classes(*given), want)
            assert torch.equal(cached[0](*given), want)
            assert torch.equal(aside(*given), want + shared(given[0]))
            assert torch.equal(cached[1](*given), want + shared(given[0]))
    assert all(c.counts().replayed > 30 for c in cached)


def test_copies_beside_the_computation_arrive_whole() -> None:
    lane = CopyLane(CUDA)
    source = torch.randn(2**24).pin_memory()
    target = torch.empty(2**24, device=CUDA)
    ticket = lane.copy(source, target)
    assert torch.equal((ticket.wait() * 2).cpu(), source * 2)
    back = torch.empty(2**24).pin_memory()
    twice = target * 2
    assert torch.equal(lane.copy(twice, back).block(), source * 2)


def test_energy_and_utilisation_of_work_and_of_idling() -> None:
    try:
        gpu = open_gpu(CUDA)
        gpu.check_gpm()
    except NotAvailable as error:
        pytest.skip(str(error))
    left = torch.randn(8192, 8192, device=CUDA, dtype=torch.bfloat16)
    right, out = torch.randn_like(left), torch.empty_like(left)
    meter = open_meter(CUDA)
    assert meter.why is None, meter.why
    idle = meter.idle(1.0)
    with gpu.gpm() as window:
        busy = meter.sustain(lambda: torch.mm(left, right, out=out), seconds=1.0)
        used = window.read()
    assert isinstance(idle, Energy) and isinstance(busy.reading, Energy)
    assert busy.reading.watts > 2 * idle.watts and 0.5 < busy.reading.share_of_tdp < 1.1
    assert busy.calls > 100 and used.sm > 0.7 and used.tensor > 0.6 and used.dram < 0.9
    time.sleep(0.5)
    with gpu.gpm() as window:
        time.sleep(0.3)
        rest = window.read()
    assert rest.sm < 0.05
