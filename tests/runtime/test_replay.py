"""A recorded trace gives what the running job gave, drift and all."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest
import torch

from moesaic.integrations.recording import RoutingTrace
from moesaic.runtime import observe as room
from moesaic.runtime.counters import ROWS
from moesaic.runtime.observe import LayerInfo, replay
from moesaic.runtime.profiler import Profiler
from moesaic.runtime.rates import Settings
from moesaic.trace import TraceInfo, TraceWriter, read_trace

INFO = TraceInfo(model="t", num_experts=8, top_k=2, layers=2, text_sha256="0" * 64)


def test_docstring_example() -> None:
    found = doctest.testmod(room)
    assert found.attempted and not found.failed


@pytest.mark.parametrize("every", [1, 7])
def test_a_replayed_trace_gives_the_profiles_of_the_job(tmp_path: Path, every: int) -> None:
    gen = torch.Generator().manual_seed(0)
    settings = Settings(window=64, block=4)
    profiler = Profiler([LayerInfo(n, 8, 2) for n in "ab"], torch.device("cpu"), settings=settings)
    live, shares = [], torch.rand(2, 2, 8, generator=gen) ** 3
    path = tmp_path / "trace.parquet"
    with TraceWriter(path, INFO) as writer:
        profiler.sinks["trace"] = RoutingTrace(writer)
        for step in range(280):
            for layer, counters in enumerate(profiler.counters):
                share = shares[int(step > 150), layer]
                ids = torch.multinomial(share.expand(20, -1), 2, generator=gen)
                counters[ROWS] += torch.bincount(ids.view(-1), minlength=8).int()
            profiler.step()
            if step % every == every - 1:
                live.append(profiler.poll())
    assert profiler.failures == {} and any(p.layers[0].drifted for p in live)
    again = list(replay(read_trace(path), every=every, settings=settings))
    assert len(again) == len(live)
    for mine, theirs in zip(again, live, strict=True):
        assert (mine.step, mine.steps) == (theirs.step, theirs.steps)
        for a, b in zip(mine.layers, theirs.layers, strict=True):
            assert (a.counts_E, a.ewma_E, a.tiles_E) == (b.counts_E, b.ewma_E, b.tiles_E)
            assert (a.hot, a.cold, a.drifted) == (b.hot, b.cold, b.drifted)
