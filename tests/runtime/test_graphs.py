"""When a call is captured, what a replay is given and what it gives back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fake_capture import FakeCapturer, refused
from graph_layer import EAGER_SOON, Layer, cache_of, call, tally, wanted
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from moesaic.runtime.graphs import (
    GraphCache,
    GraphConfig,
    GraphStore,
    doubling_buckets,
)


def test_the_papers_heuristics_are_the_default() -> None:
    layer = Layer()
    cache, fake = cache_of(layer, GraphConfig())
    for i in range(9):
        call(cache, 32, i)
    assert tally(cache.counts()) == (0, 0, 9) and fake.warmed == 3
    rows, out = call(cache, 32, 10)
    assert torch.equal(out, wanted(rows, layer)) and tally(cache.counts()) == (1, 1, 9)
    call(cache, 32, 11)
    assert tally(cache.counts()) == (1, 2, 9)
    for i in range(50):
        call(cache, 31, i)
    assert tally(cache.counts()) == (1, 2, 59)
    assert cache.counts().why_eager == {"token count": 50}


def test_warm_ups_are_calls_that_count_so_nothing_runs_twice() -> None:
    layer = Layer()
    cache, fake = cache_of(layer, GraphConfig(min_tokens=1))
    for i in range(10):
        call(cache, 4, i)
    # Nine eager calls of which three warmed up; the fake runs the call once to know its shapes.
    assert (layer.calls, fake.warmed, fake.recorded, fake.replayed) == (9 + 1 + 1, 3, 1, 1)


def test_a_shape_must_come_several_times_in_a_row() -> None:
    cache, fake = cache_of(Layer(), GraphConfig(min_calls=4, min_tokens=1, stable_calls=2))
    for i in range(40):
        call(cache, 1 + i % 2, i)
    # Three warm-ups a shape and no more, however often it comes without being stable.
    assert (fake.recorded, fake.warmed) == (0, 6)
    call(cache, 2)
    assert fake.recorded == 1


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 10_000), unique=True, max_size=60))
def test_a_shape_that_never_repeats_is_never_captured(sizes: list[int]) -> None:
    config = GraphConfig(min_calls=2, min_tokens=0, stable_calls=1, warmups=1, tracked_shapes=8)
    cache, fake = cache_of(lambda rows: rows, config)
    for size in sizes:
        cache(torch.zeros(size, 1))
    assert fake.recorded == 0 and len(cache.store._tracker if sizes else []) <= 8


def test_shapes_that_hardly_repeat_are_counted_and_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = GraphConfig(min_tokens=1, tracked_shapes=4)
    cache, _ = cache_of(Layer(), config)
    for tokens in range(1, 21):
        call(cache, tokens)
    assert cache.counts().forgotten == 16 and cache.counts().captured == 0
    assert [r.message for r in caplog.records] == [
        "CUDA graphs: shapes hardly repeat; such calls are never captured (told once)"
    ]


def test_a_size_can_be_captured_ahead() -> None:
    layer = Layer()
    cache, fake = cache_of(layer, GraphConfig(min_tokens=1, buckets=(8, 16)))
    assert cache.prepare(torch.zeros(16, 8)) and cache.prepare(torch.zeros(5, 8))
    assert (fake.warmed, fake.recorded) == (6, 2)
    rows, out = call(cache, 7)
    assert torch.equal(out, wanted(rows, layer)) and tally(cache.counts()) == (2, 1, 0)
    assert cache.prepare(torch.zeros(6, 8)) and fake.recorded == 2
    broken, _ = cache_of(layer, fail=refused)
    assert not broken.prepare(torch.zeros(8, 8))
    assert not GraphCache(layer).prepare(torch.zeros(40, 8))  # a CPU has no graphs


def test_padding_to_buckets_keeps_bits_and_stale_rows_out() -> None:
    layer = Layer()
    config = GraphConfig(
        min_calls=2, min_tokens=1, stable_calls=1, warmups=1, buckets=(4, 8), pads=(7.0,)
    )
    seen: list[Tensor] = []

    def function(rows: Tensor) -> Tensor:
        seen.append(rows.clone())
        return layer(rows)

    cache, fake = cache_of(function, config)
    for i, tokens in enumerate((3, 4, 2, 4, 1, 3, 8, 5, 7, 9)):
        rows, out = call(cache, tokens, i)
        assert out.shape == (tokens, 8) and torch.equal(out, wanted(rows, layer))
        given = seen[-1]
        assert bool((given[tokens:] == 7.0).all()) and torch.equal(given[:tokens], rows)
    assert fake.recorded == 2  # buckets 4 and 8; 9 is over the last one and came once
    assert doubling_buckets(100)[-2:] == (96, 100)


def test_pads_of_whole_numbers_reach_whole_number_inputs() -> None:
    config = GraphConfig(
        min_calls=2, min_tokens=1, stable_calls=1, warmups=1, buckets=(4,), pads=(0, -1)
    )
    seen: list[Tensor] = []

    def function(rows: Tensor, ids: Tensor) -> Tensor:
        seen.append(ids.clone())
        return rows + ids

    cache, _ = cache_of(function, config)
    for _ in range(4):
        out = cache(torch.ones(2, 1), torch.ones(2, 1, dtype=torch.int32))
        assert out.tolist() == [[2.0], [2.0]]
    assert seen[-1].tolist() == [[1], [1], [-1], [-1]] and seen[-1].dtype == torch.int32


def test_eager_calls_are_padded_too_when_asked() -> None:
    seen: list[int] = []
    config = GraphConfig(buckets=(16,), pad_eager=True, min_tokens=1)

    def function(rows: Tensor) -> Tensor:
        seen.append(rows.shape[0])
        return rows

    cache, _ = cache_of(function, config)
    assert call(cache, 3)[1].shape == (3, 8)
    assert seen == [16]


def test_each_sm_budget_has_its_own_graph() -> None:
    got: list[int | None] = []

    def function(rows: Tensor, sms: int | None = None) -> Tensor:
        got.append(sms)
        return rows + 1

    cache, fake = cache_of(function)
    for sms in (None, 64, 128):
        for _ in range(3):
            call(cache, 4, sms=sms)
    assert fake.recorded == 3 and {*got} == {None, 64, 128}
    assert {key.sms for key in cache.store._slots} == {None, 64, 128}


def test_outputs_survive_the_next_replay_unless_the_copy_is_waived() -> None:
    layer = Layer()
    cache, _ = cache_of(layer)
    for i in range(3):
        rows, out = call(cache, 4, i)
    call(cache, 4, 50)
    assert torch.equal(out, wanted(rows, layer))
    raw = GraphConfig(min_calls=3, min_tokens=1, stable_calls=1, warmups=1, copy_output=False)
    cache, _ = cache_of(layer, raw)
    for i in range(4):
        _, out = call(cache, 4, i)
    rows, again = call(cache, 4, 60)
    assert again.data_ptr() == out.data_ptr() and torch.equal(out, wanted(rows, layer))
    mine = torch.empty(4, 8)
    rows, got = call(cache, 4, 61, out=mine)
    assert got is mine and torch.equal(mine, wanted(rows, layer))


def test_inputs_that_are_the_graphs_own_are_not_copied() -> None:
    layer = Layer()
    cache, _ = cache_of(layer)
    for i in range(3):
        call(cache, 4, i)
    buffers = cache.store.buffers(lambda key: key.tokens == 4)
    assert buffers is not None
    buffers[0].fill_(2.0)
    assert torch.equal(cache(buffers[0]), wanted(torch.full((4, 8), 2.0), layer))


def test_layers_may_share_a_store_and_a_stack_may_be_one_graph() -> None:
    first, second = Layer(1), Layer(2)
    fake = FakeCapturer()
    store = GraphStore(EAGER_SOON, fake)
    one, two = (
        GraphCache(m, store=store, owner=m.calls + i) for i, m in enumerate((first, second))
    )
    for i in range(5):
        rows, hidden = call(one, 4, i)
        assert torch.equal(two(hidden), wanted(wanted(rows, first), second))
    assert store.counts().graphs == 2
    stack, fake = cache_of(nn.Sequential(first, second))
    for i in range(5):
        rows, out = call(stack, 4, i)
        assert torch.equal(out, wanted(wanted(rows, first), second))
    assert fake.recorded == 1
    first.weight.data = first.weight.data.clone()
    call(stack, 4)
    assert stack.counts().stale == 1


def test_tuples_come_back_as_tuples() -> None:
    cache, _ = cache_of(lambda rows: (rows + 1, rows * 2))
    for _ in range(5):
        more, twice = cache(torch.ones(3, 1))
        assert more.tolist() == twice.tolist() == [[2.0]] * 3
    with pytest.raises(ValueError, match="one tensor"):
        cache(torch.ones(3, 1), out=torch.empty(3, 1))


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"min_calls": 1}, "min_calls must be at least 2"),
        ({"warmups": 10}, "warmups must be under min_calls=10"),
        ({"warmups": 0}, "warmups must be at least 1"),
        ({"buckets": (8, 4)}, "buckets must be positive and ascending"),
        ({"buckets": (0, 4)}, "buckets must be positive and ascending"),
    ],
)
def test_rules_without_meaning_are_refused(values: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        GraphConfig(**values)


def test_inputs_must_share_their_leading_dimension() -> None:
    cache, _ = cache_of(lambda a, b: a)
    with pytest.raises(ValueError, match=r"leading dimension, got \[\(2, 1\), \(3, 1\)\]"):
        cache(torch.ones(2, 1), torch.ones(3, 1))
