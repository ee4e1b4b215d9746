"""Calls like earlier ones go straight to the kernels: same answer, same refusals, nothing stale."""

from __future__ import annotations

import pytest
import torch

from moesaic.functional import moe, route
from moesaic.types import ExpertSpec, ExpertWeights, RouterSpec

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="needs an sm_90 GPU")]
SPEC = ExpertSpec(num_experts=16, hidden_size=512, intermediate_size=256)


def draw(tokens: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator("cuda").manual_seed(seed)
    hidden = torch.randn(tokens, 512, device="cuda", generator=generator).to(dtype)
    scores = torch.rand(tokens, 16, device="cuda", generator=generator)
    share, ids = scores.topk(4, dim=1)
    return hidden, ids.int(), share


def draw_weights(seed: int) -> ExpertWeights:
    generator = torch.Generator("cuda").manual_seed(seed)
    up, down = (
        torch.randn(*shape, device="cuda", generator=generator).bfloat16() * 0.05
        for shape in ((16, 512, 512), (16, 512, 256))
    )
    return ExpertWeights(up=up, down=down)


def raw_calls() -> int:
    from moesaic.kernels.hopper import plans

    return plans.told().get("raw", 0)


@pytest.mark.parametrize("tokens", [1, 7, 100])
def test_repeated_calls_follow_their_tensors(tokens: int) -> None:
    weights = [draw_weights(seed) for seed in (1, 2)]
    cases = [draw(tokens, seed) for seed in range(4)]
    wanted = [
        moe(*case, weights[i % 2], SPEC, impl="triton").clone() for i, case in enumerate(cases)
    ]
    before = raw_calls()
    for _ in range(3):
        for i, case in enumerate(cases):
            assert torch.equal(moe(*case, weights[i % 2], SPEC), wanted[i])
    assert raw_calls() - before >= 10
    assert not torch.equal(wanted[0], wanted[2])


def test_weights_may_be_freed_and_come_back_elsewhere() -> None:
    case = draw(1, 0)
    for seed in range(6):
        weights = draw_weights(seed)
        wanted = moe(*case, weights, SPEC, impl="triton")
        for _ in range(2):
            assert torch.equal(moe(*case, weights, SPEC), wanted)
        kept = [tensor.clone() for tensor in (weights.up, weights.down)]
        for tensor in (weights.up, weights.down):
            tensor.untyped_storage().resize_(0)
        hole = torch.full((4 << 20,), float("nan"), device="cuda")
        for tensor, values in zip((weights.up, weights.down), kept, strict=True):
            tensor.untyped_storage().resize_(values.numel() * 2)
            tensor.copy_(values)
        assert torch.equal(moe(*case, weights, SPEC), wanted)
        del hole, weights


def test_bad_input_is_refused_after_good() -> None:
    weights = draw_weights(1)
    hidden, ids, share = draw(7, 0)
    for _ in range(3):
        moe(hidden, ids, share, weights, SPEC)
    with pytest.raises(TypeError, match="int32"):
        moe(hidden, ids.short(), share, weights, SPEC)
    with pytest.raises(ValueError, match="one weight per id"):
        moe(hidden, ids, share[:3], weights, SPEC)
    with pytest.raises(TypeError, match="dtype of hidden"):
        moe(hidden.half(), ids, share, weights, SPEC)
    turned = ExpertWeights(up=weights.up.mT.contiguous().mT, down=weights.down)
    with pytest.raises(ValueError, match="contiguous"):
        moe(hidden, ids, share, turned, SPEC)
    with pytest.raises(ValueError, match="on cuda"):
        moe(hidden, ids.cpu(), share, weights, SPEC)


def test_values_are_checked_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = draw_weights(1)
    hidden, ids, share = draw(7, 0)
    for _ in range(2):
        moe(hidden, ids, share, weights, SPEC)
    monkeypatch.setenv("MOESAIC_CHECK", "1")
    with pytest.raises(ValueError, match="got max 16"):
        moe(hidden, ids.clamp(min=16), share, weights, SPEC)


def test_gradients_compilers_and_profilers_see_the_operator() -> None:
    weights = draw_weights(1)
    hidden, ids, share = draw(7, 0)
    for _ in range(2):
        plain = moe(hidden, ids, share, weights, SPEC)
    leaf = hidden.clone().requires_grad_()
    out = moe(leaf, ids, share, weights, SPEC)
    out.sum().backward()
    assert torch.equal(out, plain) and leaf.grad is not None and bool(leaf.grad.abs().sum() > 0)
    whole = torch.compile(
        lambda x: moe(x * 1, ids, share, weights, SPEC) + 0, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(whole(hidden), plain)
    with torch.profiler.profile(acc_events=True) as profile:
        moe(hidden, ids, share, weights, SPEC)
    assert any(event.name == "moesaic::experts" for event in profile.events())


@pytest.mark.parametrize("tokens", [1, 7])
def test_streams_and_graphs_do_not_meet(tokens: int) -> None:
    weights, case = draw_weights(1), draw(tokens, 0)
    wanted = moe(*case, weights, SPEC, impl="triton")
    streams = [torch.cuda.Stream() for _ in range(2)]
    found: list[torch.Tensor] = []
    torch.cuda.synchronize()
    for _ in range(100):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(moe(*case, weights, SPEC))
    torch.cuda.synchronize()
    assert all(torch.equal(out, wanted) for out in found)
    graphs = []
    for stream in streams:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            outs = [moe(*case, weights, SPEC) for _ in range(5)]
        graphs.append((graph, outs, stream))
    for _ in range(20):
        for graph, _, stream in graphs:
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(out, wanted) for _, outs, _ in graphs for out in outs)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_layer_on_another_device_than_the_current() -> None:
    weights, case = draw_weights(1), draw(7, 0)
    wanted = moe(*case, weights, SPEC)
    there = ExpertWeights(up=weights.up.to("cuda:1"), down=weights.down.to("cuda:1"))
    moved = [tensor.to("cuda:1") for tensor in case]
    for _ in range(2):
        assert torch.equal(moe(*moved, there, SPEC).to("cuda:0"), wanted)
    with torch.cuda.device(1):
        for _ in range(3):
            assert torch.equal(moe(*moved, there, SPEC).to("cuda:0"), wanted)
    logits, router = torch.randn(7, 16, device="cuda:0"), RouterSpec(num_experts=16, top_k=4)
    ids = route(logits, router).topk_ids_TK
    for current in (0, 1, 0):
        with torch.cuda.device(current):
            assert torch.equal(route(logits.to("cuda:1"), router).topk_ids_TK.to("cuda:0"), ids)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("tokens", [1, 5])
def test_repeated_routes_follow_their_tensors(tokens: int, scoring: str) -> None:
    """Launched by Triton, recorded, then made again: the same bits, also from unaligned logits."""
    router = RouterSpec(num_experts=128, top_k=8, scoring=scoring)
    rows = torch.randn(9, tokens * 128 + 8, device="cuda").bfloat16()
    logits = [row[: tokens * 128].view(tokens, 128) for row in rows]
    logits[4] = rows[4, 1 : tokens * 128 + 1].view(tokens, 128)
    bias = torch.randn(128, device="cuda") if scoring == "sigmoid" else None
    wanted = [route(torch.cat([x] * 20), router, bias_E=bias) for x in logits]
    counters = torch.zeros((3, 128), dtype=torch.int32, device="cuda")
    for watched in (None, counters, None, counters):
        for x, want in zip(logits, wanted, strict=True):
            ids, share, counts = route(x, router, bias_E=bias, counters=watched)
            assert torch.equal(ids, want.topk_ids_TK[:tokens])
            assert torch.equal(share, want.topk_weights_TK[:tokens])
            assert torch.equal(counts * 20, want.counts_E)
    assert torch.equal(counters[0] * 10, sum(want.counts_E for want in wanted))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ids, share, _ = route(logits[0], router, bias_E=bias)
    logits[0].copy_(logits[1].clone())
    graph.replay()
    assert torch.equal(ids, wanted[1].topk_ids_TK[:tokens])
    assert torch.equal(share, wanted[1].topk_weights_TK[:tokens])
    with pytest.raises(TypeError, match="int32"):
        route(logits[1], router, bias_E=bias, counters=counters.long())
