"""Weights that move, change in place or are replaced: no answer from an old graph."""

from __future__ import annotations

import pytest
import torch
from fake_capture import FakeCapturer
from graph_layer import EAGER_SOON, Layer, cache_of, call, wanted
from torch import Tensor, nn

from moesaic.runtime.graphs import (
    GraphCache,
    GraphStore,
    ModuleWatch,
    TensorWatch,
)


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
