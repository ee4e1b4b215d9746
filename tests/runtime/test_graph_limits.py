"""Calls that stay eager, captures that fail, memory that is short, random lives of all these."""

from __future__ import annotations

import logging

import pytest
import torch
from fake_capture import FakeCapturer, live_tensors, refused
from graph_layer import EAGER_SOON, Layer, cache_of, call, wanted
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moesaic.runtime.capture import CaptureFailed
from moesaic.runtime.graphs import (
    GraphCache,
    GraphConfig,
    GraphStore,
)


def test_gradients_and_captures_around_it_stay_eager() -> None:
    layer = Layer()
    cache, fake = cache_of(layer)
    rows = torch.ones(4, 8, requires_grad=True)
    for _ in range(6):
        cache(rows).sum().backward()
    layer.weight.requires_grad_(True)
    for _ in range(6):
        call(cache, 4)
    with torch.no_grad():
        fake.occupied = "inside a capture"
        for _ in range(6):
            call(cache, 4)
        assert fake.recorded == 0
        fake.occupied = None
        for _ in range(6):
            call(cache, 4)
        assert fake.recorded == 1
    assert cache.counts().why_eager == {"gradients": 12, "inside a capture": 6}


@pytest.mark.parametrize("where", ["fail", "fail_warm"])
def test_a_capture_that_fails_is_told_once_and_answered(
    where: str, caplog: pytest.LogCaptureFixture
) -> None:
    layer = Layer()
    cache, fake = cache_of(layer, **{where: refused})
    with caplog.at_level(logging.WARNING, "moesaic"):
        for tokens in (4, 5):
            for i in range(30):
                rows, out = call(cache, tokens, i)
                assert torch.equal(out, wanted(rows, layer))
    counts = cache.counts()
    assert (counts.failed, counts.captured, counts.replayed, fake.live) == (2, 0, 0, 0)
    assert counts.eager == 60 and counts.why_eager["barred"] > 50
    assert [r.message for r in caplog.records] == [
        "CUDA graphs: a call cannot be captured and stays eager: "
        "CaptureFailed: waits for the device (told once)"
    ]


def test_short_memory_keeps_the_graphs_that_fit(caplog: pytest.LogCaptureFixture) -> None:
    layer = Layer()
    cache, fake = cache_of(layer, total_bytes=2500)
    with caplog.at_level(logging.WARNING, "moesaic"):
        for i in range(80):
            rows, out = call(cache, 1 + i // 5 % 4, i)
            assert torch.equal(out, wanted(rows, layer))
    counts = cache.counts()
    assert counts.out_of_memory == 1 and 1 <= counts.graphs == fake.live <= 2
    assert counts.evicted > 0 and fake.used_bytes <= 2500
    assert len(caplog.records) == 1 and "memory is short" in caplog.records[0].message


def test_an_eager_call_without_memory_gets_that_of_the_graphs() -> None:
    fake = FakeCapturer()
    layer = Layer()

    def function(rows: Tensor) -> Tensor:
        if rows.shape[0] == 9 and fake.live:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return layer(rows)

    cache = GraphCache(function, store=GraphStore(EAGER_SOON, fake))
    for i in range(4):
        call(cache, 4, i)
    assert fake.live == 1
    rows, out = call(cache, 9)
    assert torch.equal(out, wanted(rows, layer)) and fake.live == 0
    assert cache.counts().out_of_memory == 1
    with pytest.raises(torch.OutOfMemoryError):
        fake.live = 1
        call(cache, 9)


def test_a_graph_over_the_whole_budget_is_not_kept_nor_tried_again() -> None:
    config = GraphConfig(
        min_calls=3, min_tokens=1, stable_calls=1, warmups=1, memory_bytes=999
    )  # the fake's graphs take 1000
    layer = Layer()
    cache, fake = cache_of(layer, config)
    for i in range(20):
        rows, out = call(cache, 4, i)
        assert torch.equal(out, wanted(rows, layer))
    counts = cache.counts()
    assert (counts.over_budget, counts.captured, counts.graphs, counts.held_bytes) == (1, 0, 0, 0)
    assert (fake.recorded, fake.live) == (1, 0)


def test_the_least_recently_used_graph_goes_first() -> None:
    config = GraphConfig(min_calls=3, min_tokens=1, stable_calls=1, warmups=1, max_graphs=2)
    cache, _ = cache_of(Layer(), config)
    for tokens in (1, 2):
        for i in range(3):
            call(cache, tokens, i)
    call(cache, 1)
    for i in range(3):
        call(cache, 3, i)
    assert [key.tokens for key in cache.store._slots] == [1, 3]
    assert cache.counts().evicted == 1


# One step of a random life: tokens, what moves or fails before the call.
steps = st.lists(
    st.tuples(
        st.sampled_from((1, 2, 3, 5, 8, 13)),
        st.sampled_from(("-",) * 8 + ("move", "in place", "fail", "memory", "another stream")),
    ),
    max_size=120,
)


@settings(max_examples=150, deadline=None)
@given(steps, st.sampled_from((None, (2, 4, 8))), st.integers(1500, 6000), st.integers(1, 4))
def test_whatever_happens_the_bits_are_those_of_the_eager_layer(
    life: list[tuple[int, str]], buckets: tuple[int, ...] | None, budget: int, most: int
) -> None:
    layer = Layer()
    due: list[Exception] = []
    fake = FakeCapturer(layer, fail=lambda: due.pop() if due else None)
    config = GraphConfig(
        min_calls=3, min_tokens=1, stable_calls=1, warmups=2, buckets=buckets,
        memory_bytes=budget, max_graphs=most,
    )  # fmt: skip
    cache = GraphCache(layer, store=GraphStore(config, fake))
    for number, (tokens, event) in enumerate(life):
        if event == "move":
            layer.weight.data = layer.weight.data + 1
        elif event == "in place":
            layer.weight.add_(1)
        elif event == "fail":
            due[:] = [CaptureFailed("no")]
        elif event == "memory":
            due[:] = [torch.OutOfMemoryError("CUDA out of memory")]
        rows, out = call(cache, tokens, number)
        assert torch.equal(out, wanted(rows, layer))
        counts = cache.counts()
        assert counts.eager + counts.replayed == number + 1
        assert counts.graphs == fake.live <= most
        assert counts.held_bytes <= budget and fake.used_bytes <= budget
        assert counts.captured == counts.graphs + counts.evicted + counts.stale
    if life:
        cache.store.clear()
        assert (fake.live, fake.used_bytes, cache.counts().held_bytes) == (0, 0, 0)


def test_nothing_leaks_over_ten_thousand_captures_and_evictions() -> None:
    config = GraphConfig(
        min_calls=2, min_tokens=1, stable_calls=1, warmups=1, max_graphs=3, tracked_shapes=32
    )
    cache, fake = cache_of(lambda rows: rows + 1, config)

    def live(rounds: range) -> None:
        for number in rounds:
            rows = torch.full((1 + number % 97, 1), float(number))
            assert cache(rows)[0, 0] == number + 1
            assert cache(rows)[0, 0] == number + 1

    live(range(200))
    before = live_tensors()
    live(range(200, 10_000))
    counts = cache.counts()
    assert counts.captured == fake.recorded == 10_000
    assert (counts.evicted, counts.graphs, fake.live) == (9_997, 3, 3)
    assert fake.used_bytes == 3000 and live_tensors() <= before + 2
    assert len(cache.store._tracker) <= 32 and len(cache.store._barred) == 0
