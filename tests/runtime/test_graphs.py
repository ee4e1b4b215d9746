from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from fake_capture import FakeCapturer, live_tensors, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from moesaic.runtime.capture import CaptureFailed
from moesaic.runtime.graphs import (
    GraphCache,
    GraphConfig,
    GraphCounts,
    GraphStore,
    ModuleWatch,
    TensorWatch,
    doubling_buckets,
)

EAGER_SOON = GraphConfig(min_calls=3, min_tokens=1, stable_calls=1, warmups=1)


class Layer(nn.Module):
    """Rows times a matrix, in arithmetic that does not depend on the number of rows."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randint(-3, 4, (8, 8), generator=generator).float()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.calls = 0

    def forward(self, rows: Tensor) -> Tensor:
        self.calls += 1
        return (rows[:, :, None] * self.weight).sum(1)


def cache_of(
    layer: Any, config: GraphConfig = EAGER_SOON, **capturer: Any
) -> tuple[GraphCache, FakeCapturer]:
    fake = FakeCapturer(module=layer if isinstance(layer, nn.Module) else None, **capturer)
    return GraphCache(layer, store=GraphStore(config, fake)), fake


def call(cache: GraphCache, tokens: int, seed: int = 0, **kwargs: Any) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(-9, 10, (tokens, 8), generator=generator).float()
    return rows, cache(rows, **kwargs)


def wanted(rows: Tensor, layer: Layer) -> Tensor:
    return (rows[:, :, None] * layer.weight).sum(1)


def tally(counts: GraphCounts) -> tuple[int, int, int]:
    return counts.captured, counts.replayed, counts.eager


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


@pytest.mark.parametrize("how", ["data", "parameter", "module"])
def test_weights_that_move_are_never_answered_from_an_old_graph(how: str) -> None:
    inner = Layer()
    model = nn.Sequential(inner)
    cache, _ = cache_of(model)
    for i in range(4):
        call(cache, 4, i)
    assert cache.counts().graphs == 1
    if how == "data":
        inner.weight.data = inner.weight.data * 2
    elif how == "parameter":
        inner.weight = nn.Parameter(inner.weight * 2, requires_grad=False)
    else:
        model[0] = inner = Layer(seed=5)
    for i in range(6):
        rows, out = call(cache, 4, i)
        assert torch.equal(out, wanted(rows, inner))
    counts = cache.counts()
    assert (counts.stale, counts.captured, counts.graphs) == (1, 2, 1)
    inner.weight.data = torch.zeros_like(inner.weight)
    rows, out = call(cache, 4, 9)
    assert not out.any()


def test_a_cache_that_watches_nothing_would_answer_from_old_weights() -> None:
    layer = Layer()
    cache = GraphCache(layer, watch=[], store=GraphStore(EAGER_SOON, FakeCapturer(layer)))
    for i in range(4):
        call(cache, 4, i)
    layer.weight.data = layer.weight.data * 2
    rows, out = call(cache, 4, 9)
    assert torch.equal(out * 2, wanted(rows, layer)) and not torch.equal(out, wanted(rows, layer))


def test_values_that_change_in_place_need_no_new_graph() -> None:
    layer = Layer()
    cache, _ = cache_of(layer)
    for i in range(4):
        call(cache, 4, i)
    layer.weight.mul_(3)
    rows, out = call(cache, 4, 8)
    assert torch.equal(out, wanted(rows, layer)) and cache.counts().stale == 0


def test_weights_that_move_within_every_call_stay_eager() -> None:
    class Gathered(Layer):
        def forward(self, rows: Tensor) -> Tensor:
            self.weight.data = self.weight.data.clone()
            return super().forward(rows)

    layer = Gathered()
    cache, fake = cache_of(layer)
    for i in range(20):
        rows, out = call(cache, 4, i)
        assert torch.equal(out, wanted(rows, layer))
    assert (cache.counts().failed, cache.counts().graphs, fake.live) == (1, 0, 0)


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


def test_a_watch_sees_everything_that_can_be_replaced() -> None:
    model = nn.Sequential(Layer(), nn.Linear(8, 8), nn.BatchNorm1d(8))
    watch = ModuleWatch(model)
    seen = {watch()}
    model[1].bias = None
    seen.add(watch())
    model[2].running_mean = torch.zeros(8)
    seen.add(watch())
    model.eval()
    seen.add(watch())
    model.add_module("late", Layer())
    seen.add(watch())
    model.late.weight.data = torch.zeros(8, 8)
    seen.add(watch())
    assert len(seen) == 6
    assert watch() == watch()


def test_a_distributed_tensor_is_watched_by_its_shard() -> None:
    # Its own address is 0, so that moving it would go unseen.
    tensor, shard = torch.zeros(4), torch.zeros(2)
    tensor._local_tensor = shard
    watch = TensorWatch([tensor])
    before = watch()
    assert before == (shard.data_ptr(),)
    tensor._local_tensor = torch.zeros(2)
    assert watch() != before and shard.numel() == 2
