"""The profiler on whole layers: true counts, the same bits, and failures that stop nothing."""

from __future__ import annotations

import copy
import doctest
import gc
import logging
import pickle
import time
from typing import Any

import pytest
import torch
from torch import nn

import moesaic
from moesaic import ExpertSpec, MoE, RouterSpec
from moesaic.runtime import profiler as room
from moesaic.runtime.counters import ROUTED, ROWS
from moesaic.runtime.profiler import LayerInfo, Profiler
from moesaic.runtime.rates import Settings


def layer(experts: int = 4, seed: int = 0) -> MoE:
    torch.manual_seed(seed)
    return MoE(
        RouterSpec(num_experts=experts, top_k=2),
        ExpertSpec(num_experts=experts, hidden_size=8, intermediate_size=16),
    ).eval()


def stack() -> nn.Sequential:
    return nn.Sequential(layer(4), nn.Linear(8, 8), layer(6, seed=1)).eval()


def test_docstring_example() -> None:
    found = doctest.testmod(room, extraglobs={"torch": torch})
    assert found.attempted and not found.failed


@torch.no_grad()
def test_counts_of_a_model_are_those_of_its_routing() -> None:
    model, want = stack(), [torch.zeros(4, dtype=torch.long), torch.zeros(6, dtype=torch.long)]
    inputs = [torch.randn(tokens, 8) for tokens in (5, 1, 33, 7)]
    plain = [model(x) for x in inputs]
    for x in inputs:
        want[0] += model[0].route(x).counts_E
        want[1] += model[2].route(model[1](model[0](x))).counts_E
    with moesaic.profile(model) as profiler:
        assert [info.name for info in profiler.layers] == ["0.experts", "2.experts"]
        for number, (x, y) in enumerate(zip(inputs, plain, strict=True)):
            assert torch.equal(model(x), y)
            profiler.step()
            profile = profiler.poll()
            assert profile is not None
            assert (profile.step, profile.steps, profile.tokens) == (number, 1, len(x))
    assert profiler.poll() is None and profiler.last == profile
    for total, counts in zip(profiler.totals, want, strict=True):
        assert total[ROWS].tolist() == counts.tolist() == total[ROUTED].tolist()
    before = [c.clone() for c in profiler.counters]
    model(inputs[0])
    assert all(torch.equal(a, b) for a, b in zip(before, profiler.counters, strict=True))


@torch.no_grad()
def test_several_steps_make_one_profile_and_history_keeps_each() -> None:
    model = layer()
    profiler = moesaic.profile(model, history=3)
    for tokens in (1, 2, 3, 4):
        model(torch.randn(tokens, 8))
        profiler.step()
    profile = profiler.poll()
    assert profile is not None
    assert (profile.steps, profile.tokens, profile.seconds) == (4, 10, 0.0)
    assert [sum(row) for row in profiler.history(0)] == [4, 6, 8]
    model(torch.randn(6, 8))
    time.sleep(0.01)
    profiler.step()
    later = profiler.poll()
    assert later is not None and later.seconds >= 0.01 and 0 < later.tokens_per_s <= 600
    assert later.layers[0].routed_E == later.layers[0].counts_E


@torch.no_grad()
def test_a_layer_that_drifts_says_so_once() -> None:
    settings = Settings(window=32, block=4)
    profiler = Profiler([LayerInfo("a", 2, 1)], torch.device("cpu"), settings=settings)
    flags = []
    for step in range(160):
        share = (3, 1) if step < 96 else (1, 3)
        profiler.counters[0][ROUTED] += torch.tensor(share, dtype=torch.int32)
        profiler.step()
        profile = profiler.poll()
        assert profile is not None
        flags.append(profile.layers[0].drifted)
    assert flags.index(True) == 127 and sum(flags) == 1
    assert profile.layers[0].hot == set() and profile.layers[0].ewma_E[1] > 2.5


def test_compiled_layers_are_counted_and_compile_whole() -> None:
    model, x = layer(), torch.randn(5, 8)
    model.experts.impl = "reference"
    with torch.no_grad():
        plain = model(x)
        with moesaic.profile(model) as profiler:
            whole = torch.compile(model, fullgraph=True, backend="aot_eager")
            for _ in range(3):
                torch.testing.assert_close(whole(x), plain)
                profiler.step()
            profile = profiler.poll()
        assert profile is not None and profile.tokens == 15
        torch.testing.assert_close(whole(x), plain)
        profiler.step()
        after = profiler.poll()
    assert after is not None and after.tokens == 0


@torch.no_grad()
def test_copies_count_nothing_and_a_second_profiler_is_refused() -> None:
    model = layer()
    profiler = moesaic.profile(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.experts.counters is None
    assert "counters" not in str(sorted(model.state_dict()))
    with pytest.raises(RuntimeError, match="already"):
        moesaic.profile(model)
    kept = profiler.counters[0]
    model(torch.randn(2, 8))
    profiler.detach()
    # Captured graphs may still write there: the memory stays with the module and is used again.
    del profiler
    gc.collect()
    again = moesaic.profile(model)
    assert again.counters[0] is kept
    again.step()
    profile = again.poll()
    assert profile is not None and profile.tokens == 0


def test_experts_alone_need_top_k_and_a_dense_model_is_refused() -> None:
    alone = layer().experts
    with pytest.raises(ValueError, match="top_k"):
        moesaic.profile(alone)
    assert moesaic.profile(alone, top_k=2).layers[0] == LayerInfo("experts", 4, 2)
    with pytest.raises(ValueError, match="no layer to profile"):
        moesaic.profile(nn.Linear(8, 8))


@torch.no_grad()
def test_attached_models_of_transformers_are_counted() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, moe_intermediate_size=16,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        num_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    model = transformers.Qwen3MoeForCausalLM(config).eval()
    with pytest.raises(ValueError, match="attach"):
        moesaic.profile(model)
    moesaic.attach(model)
    words = torch.randint(0, 64, (1, 7))
    plain = model(words).logits
    with moesaic.profile(model) as profiler:
        assert torch.equal(model(words).logits, plain)
        profiler.step()
        profile = profiler.poll()
    assert profile is not None and [layer.tokens for layer in profile.layers] == [7, 7]
    assert profile.layers[1].name == "model.layers.1.mlp.experts"
    model(words)
    assert [int(c[ROWS].sum()) for c in profiler.counters] == [14, 14]


@torch.no_grad()
def test_failures_are_logged_once_and_counted_and_nothing_stops(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = layer(), torch.randn(3, 8)
    plain = model(x)
    profiler = moesaic.profile(model)

    def broken(_: Any) -> None:
        raise OSError("disk full")

    got = []
    profiler.sinks = {"jsonl": broken, "good": got.append}
    with caplog.at_level(logging.WARNING, logger="moesaic"):
        for _ in range(3):
            assert torch.equal(model(x), plain)
            profiler.step()
            assert profiler.poll() is not None
        assert len(got) == 3 and profiler.failures == {"jsonl": 3}
        monkeypatch.setattr(profiler.ring, "publish", lambda: broken(0))
        for _ in range(3):
            assert torch.equal(model(x), plain)
            profiler.step()
            assert profiler.poll() is None
    assert profiler.failures == {"jsonl": 3, "publish": 1}
    assert [record.getMessage() for record in caplog.records] == [
        "profiler: jsonl failed and is not logged again: disk full",
        "profiler: publish failed and is not logged again: disk full",
    ]


@torch.no_grad()
def test_the_thread_polls_while_the_model_runs() -> None:
    model, x = layer(), torch.randn(3, 8)
    seen = []
    with moesaic.profile(model, slots=4) as profiler:
        profiler.sinks["list"] = seen.append
        profiler.start(0.001)
        for _ in range(400):
            model(x)
            profiler.step()
    assert profiler.failures == {}
    assert sum(update.profile.steps for update in seen) == 400 == profiler.observed.steps
    assert sum(update.profile.tokens for update in seen) == 1200
