"""The simulated serving engine: what it schedules, what it reports, what its kernels take."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moesaic.planner.engine_kernels import engine_experts_s, engine_reduce_s
from moesaic.planner.engines import known_model, part_of
from moesaic.planner.serving import ENGINES, Deployment, Load, serve

MODEL = known_model("qwen3_30b")


def on(engine: str = "vllm", gpus: int = 2, **changes) -> Deployment:
    return Deployment(
        model=MODEL, cluster=part_of("H200", gpus), card="H200",
        engine=replace(ENGINES[engine], **changes), gpus=gpus,
    )  # fmt: skip


def test_figures_agree_with_one_another_and_more_requests_are_more_in_all_and_slower_each() -> None:
    some, more = (
        serve(on(), Load(total=4 * c, prompt=128, output=64, at_once=c)).figures() for c in (8, 32)
    )
    assert some["total_tokens_per_s"] == pytest.approx(3 * some["output_tokens_per_s"])
    assert some["output_tokens_per_s"] == pytest.approx(64 * some["requests_per_s"])
    assert more["output_tokens_per_s"] > some["output_tokens_per_s"]
    assert more["tpot_ms"] > some["tpot_ms"]


def test_steps_taken_at_once_are_the_steps_one_by_one() -> None:
    """One request: a prefill, then a step for every further token, each with a longer context."""
    d = on(front_s=0.0)
    found = serve(d, Load(total=1, prompt=100, output=40))
    prefill = d.step_s(0, 0.0, 100, 100 * 50.0, 1)
    steps = [d.step_s(1, 101.0 + i, 0, 0.0, 0) for i in range(39)]
    assert found.ttft_s == pytest.approx(prefill)
    assert found.seconds == pytest.approx(prefill + sum(steps), rel=1e-3)


def test_lengths_that_spread_leave_a_tail_in_which_few_requests_run() -> None:
    even, spread = (
        serve(on(), Load(total=200, prompt=100, output=100, spread=s)) for s in (False, True)
    )
    assert spread.output_tokens == pytest.approx(even.output_tokens, rel=0.02)
    assert spread.seconds > 1.5 * even.seconds


def test_prompts_are_cut_to_the_budget_and_go_first_in_sglang() -> None:
    load = Load(total=64, prompt=1000, output=50)
    small, large = (serve(on(budget=b), load) for b in (500, 64000))
    assert small.ttft_s > 1.5 * large.ttft_s  # every chunk reads the weights
    first, mixed = (serve(on(e), load) for e in ("sglang", "vllm"))
    assert first.ttft_s < mixed.ttft_s and first.tpot_s > 0
    few = serve(on(most=8), load)
    assert few.tpot_s < mixed.tpot_s and few.ttft_s > mixed.ttft_s


def test_a_cache_that_is_full_lets_nobody_in_and_one_too_small_is_refused() -> None:
    roomy, tight = on(), on(memory=0.24)
    assert 0 < tight.room() < roomy.room() / 5
    load = Load(total=300, prompt=2000, output=100)
    assert serve(tight, load).ttft_s > serve(roomy, load).ttft_s
    with pytest.raises(ValueError, match="has room for"):
        serve(tight, Load(total=1, prompt=10_000_000, output=1))


def test_slices_of_experts_are_slower_than_their_share_and_cards_without_figures_take_a_floor() -> (
    None
):
    spec, h200 = known_model("deepseek_v3").experts, part_of("H200", 8).gpu
    whole, part = (
        engine_experts_s(h200, "H200", "vllm", spec, 65536, 256, 1, cut=c) for c in (1, 8)
    )
    assert whole / 8 < part / 1.5
    # 2371 us are published for exactly this.
    assert part == pytest.approx(2371e-6, rel=0.02)
    h20 = part_of("H20", 8).gpu
    assert engine_experts_s(h20, "H20", "vllm", spec, 65536, 256, 1, cut=8) > part
    assert engine_reduce_s("H200", "vllm", 2**21, 8) == pytest.approx(18.1e-6, rel=0.6)
    assert engine_reduce_s("H800", "vllm", 2**27, 8) > 1.5 * engine_reduce_s(
        "H100", "vllm", 2**27, 8
    )
    with pytest.raises(ValueError, match="no all-reduce of 3"):
        engine_reduce_s("H200", "vllm", 1024, 3)


def test_a_cache_of_eight_bits_holds_twice_the_tokens_and_is_read_faster() -> None:
    wide, narrow = on(), replace(on(), cache=1)
    assert narrow.room() == pytest.approx(2 * wide.room())
    assert narrow.step_s(64, 8192.0, 0, 0.0, 0) < wide.step_s(64, 8192.0, 0, 0.0, 0)


def test_small_kernels_add_their_time_to_every_layer_and_drag_stretches_both() -> None:
    bare, small, slow = on(small_s=0.0), on(small_s=30e-6), on(small_s=30e-6, drag=0.6)
    added = small.step_s(8, 100.0, 0, 0.0, 0) - bare.step_s(8, 100.0, 0, 0.0, 0)
    assert added == pytest.approx(MODEL.layers * 30e-6 * (1 + bare.engine.drag))
    host = small.engine.step_s + 8 * small.engine.request_s
    ratio = (slow.step_s(8, 100.0, 0, 0.0, 0) - host) / (small.step_s(8, 100.0, 0, 0.0, 0) - host)
    assert ratio == pytest.approx(1.6 / (1 + small.engine.drag))
