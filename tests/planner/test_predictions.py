"""Costs, time line, search and reports: laws they keep, planted differences they must see."""

from __future__ import annotations

import json
import resource
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.parallel.links import link_times
from moesaic.parallel.placement import Placement
from moesaic.planner.cluster import load_cluster
from moesaic.planner.command import main as plan_command
from moesaic.planner.costs import distinct, exchange_s
from moesaic.planner.exchange import table_from
from moesaic.planner.kernels import KernelTable, Measured, expert_layer_s, fit_table
from moesaic.planner.model import Attention, Model
from moesaic.planner.predict import Prediction, predict
from moesaic.planner.queueing import Service, simulate_queue
from moesaic.planner.routing import sample_counts
from moesaic.planner.sampling import Sampler
from moesaic.planner.search import Question, explain, judge, pareto, predict_all, search
from moesaic.planner.shapes import SHAPES
from moesaic.planner.simulate import Task, pipeline_s, run
from moesaic.planner.strategies import Strategy, enumerate_strategies
from moesaic.planner.workload import Arrival, Serving, Space, Workload
from moesaic.types import ExpertSpec

TINY = Model(
    name="tiny", layers=4, dense_layers=1, hidden=1024, dense_intermediate=4096, vocab=1000,
    attention=Attention(heads=8, kv_heads=8, head_dim=128, value_dim=128),
    experts=ExpertSpec(num_experts=16, hidden_size=1024, intermediate_size=2048), top_k=2,
)  # fmt: skip
WORK = Workload(sequences=32, context=512, prompt=256, routing="lognormal:0.4")
ONE_EACH = Strategy(family="one-per-gpu", ranks=16)


def at(strategy: Strategy = ONE_EACH, nodes: int = 2, **change: Any) -> Prediction:
    """A prediction of the tiny model, with fields of the workload changed."""
    return predict(TINY, load_cluster(f"H200x{nodes}"), replace(WORK, **change), strategy)


# --- the time line ---------------------------------------------------------------------------


def chain(compute: float, network: float, layers: int) -> list[Task]:
    """A micro-batch of so many layers of one task on either resource."""
    pair = [Task("x", "compute", compute), Task("y", "nic", network, joint=True)]
    return [replace(task, layer=n) for n in range(layers) for task in pair]


@given(st.integers(1, 4), st.integers(1, 5), st.floats(0.1, 9), st.floats(0.1, 9))
def test_a_time_line_is_between_its_longest_resource_and_its_sum(
    micro: int, layers: int, compute: float, network: float
) -> None:
    chains = [chain(compute, network, layers)] * micro
    total = micro * layers * (compute + network)
    serial, overlapped = run(chains, overlap=False), run(chains, overlap=True)
    assert serial.seconds == pytest.approx(total)
    least = max(micro * layers * max(compute, network), layers * (compute + network))
    assert least * (1 - 1e-9) <= overlapped.seconds <= total * (1 + 1e-9)
    for line in (serial, overlapped):
        assert line.busy["compute"] == pytest.approx(micro * layers * compute)
        assert len(line.spans) == 2 * micro * layers
    for name in ("compute", "nic"):
        spans = sorted((s.start, s.end) for s in overlapped.spans if s.resource == name)
        assert all(a[1] <= b[0] + 1e-9 for a, b in pairwise(spans))


def test_two_micro_batches_hide_a_shorter_exchange_and_one_hides_nothing() -> None:
    hidden = run([chain(2.0, 1.0, 8)] * 2, overlap=True)
    assert hidden.seconds == pytest.approx(33.0) and hidden.hidden() > 0.9
    alone = run([chain(2.0, 1.0, 8)], overlap=True)
    assert alone.seconds == pytest.approx(24.0) and alone.hidden() == 0.0


def test_the_slowest_gpu_sets_the_pace_of_an_exchange() -> None:
    slow = np.array([1.0, 4.0, 1.0])
    tasks = [Task("x", "compute", slow), Task("y", "nic", 1.0, joint=True)]
    line = run([tasks * 2], overlap=True, gpus=3)
    assert line.seconds == 10.0 and line.busy["compute"] == pytest.approx(4.0)
    assert line.bubble() == pytest.approx(0.6)


@given(st.lists(st.floats(0.1, 5), min_size=2, max_size=6), st.integers(1, 8))
def test_a_pipeline_is_never_faster_than_its_slowest_stage(stages: list[float], micro: int) -> None:
    once = pipeline_s(stages, 0.0, micro, steady=False)
    steady = pipeline_s(stages, 0.0, micro, steady=True)
    assert steady <= once * (1 + 1e-9)
    assert steady >= max(sum(stages), micro * max(stages)) * (1 - 1e-9)
    assert once == pytest.approx(sum(stages) + (micro - 1) * max(stages))


# --- costs -----------------------------------------------------------------------------------


def test_the_exchange_keeps_the_law_of_nodes() -> None:
    # N/(N-1) x the NIC: the share of rows that leave a node is (N-1)/N under even routing.
    seconds = {}
    model = replace(TINY, top_k=1, experts=replace(TINY.experts, num_experts=64))
    for nodes in (2, 4, 8):
        cluster = load_cluster(f"H200x{nodes}")
        assert cluster.network is not None
        cluster = replace(cluster, network=replace(cluster.network, falloff=0.0))
        topology = cluster.topology(8 * nodes)
        even = np.full((8 * nodes, 64), 100.0)
        bare = replace(topology, nic_latency_s=0.0, gpu_latency_s=0.0)
        experts = np.arange(64) * 8 * nodes // 64
        table = np.broadcast_to(experts, (8 * nodes, 64))
        times = link_times(table, even, bare, 2.0 * 1024)
        work = replace(WORK, wire_bytes=2.0)
        out, _ = exchange_s(times, topology, model, work)
        sent = 6400 * 2.0 * 1024
        seconds[nodes] = (out.seconds - topology.nic_latency_s) * 48e9 / sent
    for nodes, share in seconds.items():
        assert share == pytest.approx((nodes - 1) / nodes, rel=1e-6)


def test_distinct_places() -> None:
    assert distinct(1, 8) == 1 and distinct(10**6, 8) == pytest.approx(8, rel=1e-4)
    assert distinct(4, 8) == pytest.approx(4 * (1 - 0.75**8))


@given(st.integers(1, 4000), st.integers(1, 16))
def test_expert_time_grows_with_rows_and_with_active_experts(rows: int, active: int) -> None:
    gpu = load_cluster("H200").gpu
    base = float(expert_layer_s(gpu, TINY.experts, rows, active, 2))
    assert float(expert_layer_s(gpu, TINY.experts, 2 * rows, active, 2)) > base
    assert float(expert_layer_s(gpu, TINY.experts, rows, active + 1, 2)) > base
    assert float(expert_layer_s(gpu, TINY.experts, 0, 0, 2)) == 0.0


def test_a_table_gives_back_what_it_was_fitted_to() -> None:
    gpu = load_cluster("H200").gpu
    truth = KernelTable(((0.0, 25.0, 0.9), (6.0, 25.0, 1.2), (9.0, 25.0, 1.6)), "truth")
    spec = SHAPES["DeepSeek-V3"][0]
    layers = []
    for tokens in (32, 2048, 16384):
        active = 256 * (1 - (1 - 8 / 256) ** tokens)
        seconds = float(expert_layer_s(gpu, spec, tokens * 8, active, 2, truth))
        layers.append(Measured(model="m", spec=spec, top_k=8, tokens=tokens, seconds=seconds,
                               suite="s"))  # fmt: skip
    table = fit_table(layers, gpu, "fit")
    for layer in layers:
        active = 256 * (1 - (1 - 8 / 256) ** layer.tokens)
        again = float(expert_layer_s(gpu, spec, layer.tokens * 8, active, 2, table))
        assert again == pytest.approx(layer.seconds, rel=0.05)


def test_an_exchange_table_meets_its_points() -> None:
    table = table_from([(2, 1e3, 5e-6), (2, 1e6, 1e-5), (8, 1e3, 1e-5), (8, 1e6, 4e-5)], "t")
    assert table.seconds(2, 1e6) == pytest.approx(1e-5)
    assert table.seconds(4, 1e6) == pytest.approx(2e-5)
    assert 5e-6 < table.seconds(2, 3e4) < 1e-5 and table.seconds(16, 1e6) == table.seconds(8, 1e6)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(("uniform", "zipf:1.2", "lognormal:0.8")), st.integers(0, 5))
def test_sampled_counts_are_whole_and_repeatable(routing: str, seed: int) -> None:
    sizes = {"layers": 2, "ranks": 4, "experts": 8, "top_k": 2, "tokens": 32}
    counts = sample_counts(routing, **sizes, seed=seed)
    assert (counts.sum(axis=2) == 64).all() and counts.min() >= 0
    np.testing.assert_array_equal(counts, sample_counts(routing, **sizes, seed=seed))


def test_more_tokens_meet_the_same_hot_experts() -> None:
    sizes = {"layers": 3, "ranks": 4, "experts": 32, "top_k": 2}
    few, many = (sample_counts("zipf:1", **sizes, tokens=t) for t in (500, 20000))
    for layer in range(3):
        hot = [set(np.argsort(c[layer].sum(axis=0))[-4:].tolist()) for c in (few, many)]
        assert len(hot[0] & hot[1]) >= 3
    other = sample_counts("zipf:1", **sizes, tokens=500, seed=1)
    assert (other.sum(axis=1).argmax(axis=1) != few.sum(axis=1).argmax(axis=1)).any()


# --- predictions -----------------------------------------------------------------------------


def test_what_costs_more_takes_longer() -> None:
    base = at()
    assert at(context=4096).step_s > base.step_s
    assert at(sequences=64).step_s > base.step_s
    assert at(routing="zipf:1.5").step_s > at(routing="uniform").step_s
    assert at(wire_bytes=1.0).step_s < base.step_s
    assert base.binding and base.copies == 1 and base.fits
    assert base.tokens_per_s == pytest.approx(32 * 16 / base.step_s)
    assert 0 <= base.bubble <= 1 and base.joules_per_token > 0


def test_skew_hurts_one_expert_per_gpu_and_not_tensor_parallelism() -> None:
    sliced = Strategy(family="tp-pp", ranks=8, tp=8)
    prefill = {"phase": "prefill", "prefill_tokens": 16384, "forwarded": True}
    for strategy, most in ((sliced, 1.05), (ONE_EACH, 99.0)):
        even = at(strategy, routing="uniform", **prefill)
        skewed = at(strategy, routing="zipf:1.2", **prefill)
        assert skewed.step_s / even.step_s < most
    assert at(routing="zipf:1.2", **prefill).step_s > 2 * at(routing="uniform", **prefill).step_s
    spread = replace(ONE_EACH, ranks=32, replicas=16)
    lone = at(ONE_EACH, nodes=4, routing="zipf:1.2", **prefill)
    relieved = at(spread, nodes=4, routing="zipf:1.2", **prefill)
    assert relieved.per_gpu * 2 > lone.per_gpu and relieved.balancedness > lone.balancedness


def test_a_recorded_trace_takes_the_place_of_the_distribution() -> None:
    one_hot = np.zeros((2, 3, 16), np.int64)
    one_hot[:, :, 5] = 64
    found = at(trace=one_hot)
    assert found.balancedness == pytest.approx(1 / 16)
    flat = at(trace=np.full((2, 3, 16), 4))
    assert flat.balancedness > 0.6 and flat.step_s < found.step_s


def test_memory_counts_a_replicas_weights_and_a_longer_cache() -> None:
    base, longer = at(), at(context=1024)
    assert longer.memory.cache == pytest.approx(2 * base.memory.cache)
    co = at(Strategy(family="ep", ranks=8))
    assert co.memory.experts == pytest.approx(2 * base.memory.experts)
    full = at(sequences=100_000)
    assert not full.fits and "does not fit" in full.memory.why() and full.binding == "memory"


def test_a_price_becomes_cost() -> None:
    cluster = replace(load_cluster("H200x2"), usd_per_gpu_hour=3.6)
    found = predict(TINY, cluster, WORK, ONE_EACH)
    assert found.usd_per_million == pytest.approx(16 * 0.001 / found.tokens_per_s * 1e6)


# --- search ----------------------------------------------------------------------------------


def small_question(**change: Any) -> Question:
    space = Space(ep=(4, 8), tp=(1, 2), pp=(1, 2), replicas=(0, 16), micro_batches=(1, 2))
    work = replace(WORK, space=space, **change)
    return Question(model=TINY, cluster=load_cluster("H200x4"), workload=work, sampled_layers=2)


def test_search_is_sorted_and_told() -> None:
    question = small_question()
    told: list[tuple[int, int]] = []
    one = search(question, workers=1, progress=lambda done, of: told.append((done, of)))
    names = [p.strategy.name for p in one]
    assert len(set(names)) == len(names) >= 20 and told[-1] == (len(one), len(one))
    rates = [p.tokens_per_s for p in one]
    assert rates == sorted(rates, reverse=True)


@pytest.mark.slow
def test_several_cores_give_what_one_gives() -> None:
    question = small_question()
    one = search(question, workers=1)
    two = predict_all(question, [p.strategy for p in one], workers=2)
    assert [(p.strategy, p.step_s) for p in two] == [(p.strategy, p.step_s) for p in one]


@pytest.mark.slow
def test_200_strategies_for_256_gpus_take_less_than_a_minute() -> None:
    from moesaic.planner.validation import deepseek

    space = Space(replicas=(0,), pp=(1, 2), tp=(1, 2, 4, 8), micro_batches=(1, 2))
    work = Workload(sequences=64, context=2048, space=space)
    question = Question(model=deepseek(), cluster=load_cluster("H200x32"), workload=work)
    began = time.perf_counter()
    found = search(question)
    assert len(found) >= 200 and time.perf_counter() - began < 60


def test_the_front_has_no_strategy_that_another_beats() -> None:
    found = search(small_question(), workers=1)
    front = pareto(found)
    for p in found:
        assert any(f.per_gpu >= p.per_gpu and f.step_s <= p.step_s for f in front)


def test_the_verdict_may_be_dont() -> None:
    question = small_question()
    found = search(question, workers=1)
    good = judge(found, question.workload)
    assert good.best is found[0] and good.sentence.startswith(found[0].strategy.name)
    small = [p for p in found if p.strategy.family == "ep" and p.strategy.ranks == 8]
    lone = [replace(small[0], gpus=8)]
    assert "24 of 32 GPUs stay idle" in judge(lone, question.workload, 32).sentence
    strict = judge(found, replace(question.workload, tpot_ms=1e-3))
    assert strict.best is None and strict.sentence.startswith("Don't: no strategy keeps 0.001 ms")
    full = small_question(sequences=10**6)
    never = judge(search(full, workers=1), full.workload)
    assert never.best is None and "nothing fits" in never.sentence
    skewed = small_question(routing="zipf:1.5", phase="prefill", forwarded=True)
    found = search(skewed, workers=1)
    assert judge(found, skewed.workload).one_per_gpu.startswith("Don't use one expert per GPU")


def test_an_explanation_names_what_helps() -> None:
    question = small_question(sequences=2)
    found = search(question, workers=1)
    verdict = explain(question, found, judge(found, question.workload))
    gains = {c.what: c.gain for c in verdict.changes}
    # Two sequences a GPU: weights are read for a handful of rows; bandwidth helps, flops do not.
    assert gains["memory bandwidth x2"] > gains["flops x2"] and gains["flops x2"] < 1.05
    assert verdict.binds is not None and verdict.binds.startswith("memory bandwidth (twice of it")
    assert judge(found, question.workload).binds is None


def test_an_explanation_tells_a_gain_that_memory_forbids() -> None:
    """Twice the batch would be faster, and does not fit beside the cache there is."""
    some = small_question(sequences=1000, context=20000)
    need = min(p.memory.total for p in search(some, workers=1))
    gpu = replace(some.cluster.gpu, memory_bytes=1.2 * need, reserve_bytes=0.0)
    tight = replace(some, cluster=replace(some.cluster, gpu=gpu))
    found = search(tight, workers=1)
    verdict = explain(tight, found, judge(found, tight.workload))
    twice = next(c for c in verdict.changes if c.what == "twice the batch")
    assert twice.best is None and not twice.kept
    assert str(twice).endswith("over memory or limits, best then none of them")


def test_an_explanation_of_dont_names_what_would_make_it_possible() -> None:
    """A cache that needs a little more than the memory: twice of it, or half the batch, helps."""
    some = small_question(sequences=1000, context=20000)
    need = min(p.memory.total for p in search(some, workers=1))
    gpu = replace(some.cluster.gpu, memory_bytes=0.9 * need, reserve_bytes=0.0)
    tight = replace(some, cluster=replace(some.cluster, gpu=gpu))
    found = search(tight, workers=1)
    verdict = explain(tight, found, judge(found, tight.workload))
    then = {c.what: c.best for c in verdict.changes}
    assert verdict.best is None and "with it or without" in verdict.one_per_gpu
    assert then["memory x2"] is not None and then["half the batch"] is not None
    assert then["flops x2"] is None and then["NVLink x2"] is None
    told = {str(c) for c in verdict.changes}
    assert "flops x2: still nothing within the limits, nothing fits" in told
    slow = replace(some.workload, sequences=64, context=2000, tpot_ms=1e-3)
    late = replace(some, workload=slow)
    found = search(late, workers=1)
    changes = {c.what: c for c in explain(late, found, judge(found, slow)).changes}
    assert all(c.best is None for c in changes.values())
    # What is not within the limits says how near it comes.
    wider, faster = changes["network bandwidth x2"], changes["memory bandwidth x2"]
    assert faster.fastest_ms is not None and wider.fastest_ms is not None
    assert 1e-3 < faster.fastest_ms < wider.fastest_ms
    assert str(faster).endswith(f"the fastest {faster.fastest_ms:.1f} ms")


def test_an_empty_space_is_refused() -> None:
    space = Space(families=("one-per-gpu",), where="w.yaml:3")
    with pytest.raises(ValueError, match=r"w\.yaml:3: no strategy is left for 8 GPUs"):
        enumerate_strategies(TINY, load_cluster("H200x1"), space)


# --- queues ----------------------------------------------------------------------------------


def test_a_queue_that_is_not_full_gives_the_steps_own_pace() -> None:
    service = Service(copies=1, slots=8, batches=(1.0, 8.0), step_s=(0.01, 0.02), prefill_s=0.1,
                      first_s=0.3, output=11)  # fmt: skip
    calm = simulate_queue(service, Arrival(rate=1.0, seconds=50.0, times=(1.0, 11.0, 21.0)))
    assert (calm.offered, calm.finished) == (3, 3)
    assert calm.ttft_s == pytest.approx((0.3, 0.3)) and calm.tpot_s is not None
    assert calm.tpot_s[0] == pytest.approx(0.01) and calm.tokens_per_s == 3 * 11 / 50
    busy = simulate_queue(service, Arrival(rate=40.0, seconds=20.0), seed=1)
    assert busy.ttft_s is not None and busy.ttft_s[0] > 5 * calm.ttft_s[0]
    assert busy.finished <= busy.started < busy.offered
    assert f"of the {busy.started} that got one in time" in str(busy)
    assert busy == simulate_queue(service, Arrival(rate=40.0, seconds=20.0), seed=1)
    with pytest.raises(ValueError, match="no request arrives"):
        simulate_queue(service, Arrival(rate=1.0, seconds=1.0, times=(5.0,)))


def test_a_queue_counts_every_token_once_and_says_what_nobody_got() -> None:
    service = Service(copies=1, slots=8, batches=(1.0, 8.0), step_s=(0.01, 0.02), prefill_s=0.1,
                      first_s=0.3, output=1)  # fmt: skip
    arrival = Arrival(rate=1.0, seconds=50.0, times=(1.0, 11.0, 21.0))
    single = simulate_queue(service, arrival)
    assert single.finished == 3 and single.tpot_s is None and single.tokens_per_s == 3 / 50
    none = simulate_queue(replace(service, prefill_s=100.0, output=11), arrival)
    assert (none.started, none.finished, none.ttft_s, none.tpot_s) == (0, 0, None, None)
    assert str(none) == "0 of 3 finished, 0 tokens/s, a first token for none in time"


# --- the command -----------------------------------------------------------------------------

MODEL_FILE = """\
moesaic: 1
name: tiny
layers: 3
hidden: 512
attention: {heads: 8, head_dim: 64}
experts: {count: 16, top_k: 2, intermediate: 1024}
"""
WORK_FILE = """\
sequences: [4, 16]
context: 128
arrival: {rate: 50, seconds: 5}
strategies: {ep: [8], tp: [1], pp: [1], replicas: [0], micro_batches: [1]}
"""


def test_the_command_writes_everything_and_its_placement_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "m.yaml").write_text(MODEL_FILE)
    (tmp_path / "w.yaml").write_text(WORK_FILE)
    code = plan_command(
        model=tmp_path / "m.yaml", cluster="H200x2", workload=tmp_path / "w.yaml",
        out=tmp_path / "out", explained=True, results=tmp_path, workers=1, layers=2,
    )  # fmt: skip
    printed = capsys.readouterr().out
    told = json.loads(printed.splitlines()[-1])
    assert code == 0 and told["recommended"] in printed and "What" not in told
    document = json.loads((tmp_path / "out/plan.json").read_text())
    assert document["recommended"] == told["recommended"] and document["queue"]["offered"] > 100
    assert len(document["predictions"]) == told["predictions"] and document["changes"]
    trace = json.loads((tmp_path / "out/timeline.perfetto.json").read_text())
    spans = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    assert spans and all(e["dur"] >= 0 for e in spans)
    html = (tmp_path / "out/report.html").read_text()
    assert html.count("<svg") == 2 and "http-equiv" not in html and "src=" not in html
    best = next(p for p in document["predictions"] if p["strategy"] == told["recommended"])
    if best["family"] != "tp-pp":
        placement = Placement.load(tmp_path / "out/placement.json", num_experts=16)
        assert placement.num_layers == 3


def test_the_literal_reading_on_16384_gpus_is_quick_and_small() -> None:
    from moesaic.planner.validation import deepseek

    cluster = load_cluster("H200x2048")
    strategy = Strategy(family="literal", ranks=256, stages=61, micro_batches=61)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    work = Workload(sequences=64, context=2048)
    model = deepseek()
    sampler = Sampler(model, cluster, work, layers=58)
    found = predict(model, cluster, work, strategy, sampler=sampler)
    assert time.process_time() - began < 10
    assert found.gpus == 61 * 256
    # ru_maxrss is in KiB.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 4 * 2**20


@pytest.mark.slow
def test_public_figures_are_met_as_the_page_says() -> None:
    from moesaic.planner.validation import all_rows
    from moesaic.planner.validation_page import errors, kind

    rows = all_rows(Path("no-such-folder"), Path("benchmarks/predictions"))
    operations = errors(r for r in rows if kind(r.group) == "operations")
    whole = errors(r for r in rows if kind(r.group) == "end to end")
    named = [abs(r.error) for r in rows if r.group.startswith("end to end, named")]
    assert len(operations) > 100 and float(np.median(operations)) <= 0.10
    assert len(whole) > 100 and float(np.median(whole)) <= 0.20
    assert len(named) >= 11 and float(np.median(named)) <= 0.20
    broken = [replace(r, predicted=2 * r.published) for r in rows]
    assert float(np.median(errors(broken))) == pytest.approx(1.0)


def test_a_serving_engine_adds_what_it_says_and_nothing_by_default() -> None:
    """A constant, a layer's time for every micro-batch, and a share of all of it."""
    bare, idle = at(), at(serving=Serving(step_s=0.0, layer_s=0.0, share=0.0))
    assert idle.step_s == bare.step_s and "engine" not in bare.breakdown
    twice = replace(ONE_EACH, micro_batches=2)
    found = at(twice, serving=Serving(step_s=1e-3, layer_s=1e-4, share=0.5))
    expected = (at(twice).step_s + 1e-3 + 2 * TINY.layers * 1e-4) * 1.5
    assert found.step_s == pytest.approx(expected)
    assert found.breakdown["engine"] == pytest.approx(expected - at(twice).step_s)


def test_a_breakdown_sums_to_its_step() -> None:
    """Nothing of a step that hides nothing is missing, the head neither."""
    for changed in ({}, {"phase": "prefill", "prefill_tokens": 512}):
        found = at(**changed)
        assert found.breakdown["head"] > 0
        # Exchange waits for the fullest GPU, so the longest tasks add up; experts end together.
        assert sum(found.breakdown.values()) == pytest.approx(found.step_s, rel=1e-3)


def test_embeddings_keep_two_bytes_beside_eight_bit_weights() -> None:
    found = predict(replace(TINY, dtype="fp8"), load_cluster("H200x2"), WORK, ONE_EACH)
    both = predict(replace(TINY, dtype="fp8", vocab=2000), load_cluster("H200x2"), WORK, ONE_EACH)
    assert both.memory.weights - found.memory.weights == 2 * 2 * 1000 * 1024
