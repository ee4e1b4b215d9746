from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from fake_capture import FakeCapturer
from torch import Tensor, nn

from moesaic.reference import moe_reference
from moesaic.runtime.executors import (
    SequentialExperts,
    StreamedExperts,
    combine_rows,
    dense_experts,
    host_rows,
    make_executor,
)
from moesaic.runtime.expert_graphs import ExpertGraphs
from moesaic.runtime.graphs import GraphConfig
from moesaic.runtime.streams import CopyLane, NoLanes, WithShared, open_lanes
from moesaic.types import ExpertSpec, ExpertWeights

E, K, H, WIDTH = 6, 2, 16, 24
SPECS = {
    "swiglu": ExpertSpec(num_experts=E, hidden_size=H, intermediate_size=WIDTH),
    "relu3": ExpertSpec(
        num_experts=E, hidden_size=H, intermediate_size=WIDTH,
        activation="relu", gated=False, layers=3, bias=True,
    ),
    "gpt-oss": ExpertSpec(
        num_experts=E, hidden_size=H, intermediate_size=WIDTH, interleaved=True, transposed=True,
        bias=True, limit=7.0, alpha=1.702, up_offset=1.0,
    ),
}  # fmt: skip


def weights_of(spec: ExpertSpec, seed: int = 0) -> ExpertWeights:
    generator = torch.Generator().manual_seed(seed)
    shapes = spec.weight_shapes().items()
    return ExpertWeights(**{n: torch.randn(s, generator=generator) * 0.3 for n, s in shapes})


def inputs(tokens: int, seed: int = 0, experts: int = E) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden_TH = torch.randn(tokens, H, generator=generator)
    ids_TK = torch.rand(tokens, experts, generator=generator).topk(K).indices.to(torch.int32)
    return hidden_TH, ids_TK, torch.rand(tokens, K, generator=generator)


@dataclass
class SpyLanes:
    """Lanes that note what happens, and refuse work outside a fork."""

    count: int = 32
    forked: set[int] = field(default_factory=set)
    events: list[tuple[str, int]] = field(default_factory=list)

    def __len__(self) -> int:
        return self.count

    @contextmanager
    def fork(self, lanes: Iterable[int]) -> Iterator[None]:
        self.forked |= set(lanes)
        try:
            yield
        finally:
            self.events += [("join", lane) for lane in sorted(self.forked)]
            self.forked.clear()

    @contextmanager
    def on(self, lane: int) -> Iterator[None]:
        assert lane in self.forked, "a lane is used that does not wait for what came before"
        self.events.append(("on", lane))
        yield


@pytest.mark.parametrize("kind", SPECS)
def test_every_executor_computes_the_layer_and_agrees_to_the_bit(kind: str) -> None:
    spec = SPECS[kind]
    weights = weights_of(spec)
    experts = dense_experts(spec, weights)
    for tokens in (1, 7, 40):
        given = inputs(tokens, tokens)
        want = moe_reference(*given, weights, spec, dtype=torch.float64)
        sequential = SequentialExperts(experts)(*given)
        assert (sequential.double() - want).norm() <= 1e-5 * want.norm()
        streamed = StreamedExperts(experts, lanes=SpyLanes(count=4))(*given)
        assert torch.equal(streamed, sequential)
        config = GraphConfig(min_calls=2, min_tokens=1, stable_calls=1, warmups=1)
        graphs = ExpertGraphs(experts, config, capturer=FakeCapturer())
        for _ in range(3):
            assert torch.equal(graphs(*given), sequential)
        assert graphs.counts().replayed > 0


def test_modules_share_the_weights_of_the_layer() -> None:
    weights = weights_of(SPECS["relu3"])
    experts = dense_experts(SPECS["relu3"], weights)
    assert experts[3].up.data_ptr() == weights.up[3].data_ptr()
    assert "up" not in experts[3].state_dict()


def test_any_module_is_an_expert() -> None:
    torch.manual_seed(0)
    experts = [nn.Sequential(nn.LayerNorm(H), nn.Linear(H, H), nn.Tanh()) for _ in range(E)]
    hidden_TH, ids_TK, weights_TK = inputs(9)
    with torch.no_grad():
        want = torch.zeros(9, H)
        for t in range(9):
            for k in range(K):
                want[t] += weights_TK[t, k] * experts[int(ids_TK[t, k])](hidden_TH[t])
        for name in ("sequential", "per-expert-streams", "per-expert-graphs"):
            got = make_executor(name, experts)(hidden_TH, ids_TK, weights_TK)
            assert torch.allclose(got, want, atol=1e-6)
    with pytest.raises(ValueError, match="must be one of"):
        make_executor("per-expert-slices", experts)


def test_rows_are_sorted_stably_and_experts_without_rows_left_out() -> None:
    rows = host_rows(torch.tensor([[3, 1], [1, 3], [3, 5]], dtype=torch.int32), 6)
    assert rows.ranges == [(1, 0, 2), (3, 2, 5), (5, 5, 6)]
    assert rows.token_S.tolist() == [0, 1, 0, 1, 2, 2]
    assert rows.position_TK.tolist() == [[2, 0], [1, 3], [4, 5]]
    out = combine_rows(
        torch.arange(6.0)[:, None], rows.position_TK, torch.tensor([[1.0, 10.0]] * 3)
    )
    assert out[:, 0].tolist() == [2.0, 31.0, 54.0]


def test_streamed_experts_fork_and_join_the_lanes_that_they_use() -> None:
    experts = dense_experts(SPECS["swiglu"], weights_of(SPECS["swiglu"]))
    lanes = SpyLanes(count=4)
    hidden_TH, _, weights_TK = inputs(3)
    ids_TK = torch.tensor([[0, 1], [5, 0], [1, 5]])
    StreamedExperts(experts, lanes=lanes)(hidden_TH, ids_TK, weights_TK)
    assert lanes.events == [("on", 0), ("on", 1), ("on", 1), ("join", 0), ("join", 1)]


def graph_layer(config: GraphConfig) -> tuple[ExpertGraphs, FakeCapturer]:
    fake = FakeCapturer()
    experts = dense_experts(SPECS["relu3"], weights_of(SPECS["relu3"]))
    return ExpertGraphs(experts, config, capturer=fake), fake


def test_experts_are_captured_one_by_one_by_the_papers_heuristics() -> None:
    layer, fake = graph_layer(GraphConfig())
    given = inputs(120)  # about forty rows an expert, the same at each step
    counts_E = given[1].flatten().long().bincount(minlength=E)
    worth = int((counts_E >= 32).sum())
    assert worth > 0
    for _ in range(12):
        layer(*given)
    counts = layer.counts()
    assert counts.captured == counts.graphs == fake.live == worth
    assert counts.replayed == 3 * worth and counts.eager == 12 * E - counts.replayed
    assert counts.warmed == 3 * worth
    assert counts.why_eager == ({"token count": 12 * (E - worth)} if worth < E else {})
    weights = sum(t.nbytes for m in layer.experts for t in m.buffers())
    assert layer.buffer_share() == pytest.approx(counts.held_bytes / weights)


def test_routing_that_changes_keeps_exact_shapes_from_repeating_and_buckets_help() -> None:
    exact, _ = graph_layer(GraphConfig(min_calls=4, min_tokens=4, warmups=1))
    buckets = GraphConfig(min_calls=4, min_tokens=4, warmups=1, buckets=(8, 16, 32, 64))
    padded, _ = graph_layer(buckets)
    eager = SequentialExperts(exact.experts)
    for step in range(30):
        given = inputs(40, step)
        assert torch.equal(exact(*given), eager(*given))
        assert torch.allclose(padded(*given), eager(*given), atol=1e-5)
    assert padded.counts().replayed > exact.counts().replayed
    assert padded.counts().captured >= 1


def test_padded_experts_have_the_same_bits_eager_or_replayed() -> None:
    config = GraphConfig(min_calls=4, min_tokens=1, warmups=1, buckets=(16, 32, 64))
    layer, _ = graph_layer(config)
    never, _ = graph_layer(GraphConfig(min_calls=10**6, buckets=(16, 32, 64)))
    for step in range(20):
        given = inputs(40, step % 4)
        assert torch.equal(layer(*given), never(*given))
    assert layer.counts().replayed > 20 and never.counts().replayed == 0


def test_counts_before_the_first_call_are_refused() -> None:
    with pytest.raises(RuntimeError, match="before the first call"):
        ExpertGraphs([]).counts()


@pytest.mark.parametrize("tokens", [3, 300])
def test_the_shared_expert_runs_aside_up_to_a_size_with_the_same_bits(tokens: int) -> None:
    experts = dense_experts(SPECS["swiglu"], weights_of(SPECS["swiglu"]))
    shared = nn.Linear(H, H)
    given = inputs(tokens)
    lanes = SpyLanes(count=1)
    layer = WithShared(SequentialExperts(experts), shared, lanes=lanes)
    with torch.no_grad():
        assert torch.equal(layer(*given), SequentialExperts(experts)(*given) + shared(given[0]))
    assert lanes.events == ([("on", 0), ("join", 0)] if tokens <= 256 else [])


def test_a_lane_is_joined_after_an_error() -> None:
    lanes = SpyLanes(count=1)

    def broken(rows: Tensor) -> Tensor:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        WithShared(broken, nn.Linear(H, H), lanes=lanes)(torch.zeros(2, H))
    assert lanes.events == [("on", 0), ("join", 0)]


def test_without_streams_copies_are_done_at_once() -> None:
    lane = CopyLane(torch.device("cpu"))
    target = torch.zeros(3)
    ticket = lane.copy(torch.ones(3), target)
    assert ticket.done() and ticket.wait() is target and ticket.block().tolist() == [1.0] * 3
    lanes: Any = open_lanes(torch.device("cpu"), 3, "test")
    assert isinstance(lanes, NoLanes) and len(lanes) == 3
