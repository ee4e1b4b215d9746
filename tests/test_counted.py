"""The counted ops: right counts, the same results, whole graphs under `torch.compile`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moesaic import pack
from moesaic.functional import moe, route
from moesaic.ops import experts_counted_op, route_counted_op
from moesaic.types import ExpertSpec, ExpertWeights, RouterSpec

SPEC = ExpertSpec(num_experts=4, hidden_size=8, intermediate_size=16)
ROUTER = RouterSpec(num_experts=4, top_k=2)


def layer(tokens: int = 5) -> tuple[torch.Tensor, torch.Tensor, ExpertWeights]:
    gen = torch.Generator().manual_seed(tokens)
    weights = ExpertWeights(
        up=torch.randn(4, 32, 8, generator=gen), down=torch.randn(4, 8, 16, generator=gen)
    )
    draw = (torch.randn(tokens, n, generator=gen) for n in (8, 4))
    return *draw, weights


def zeros() -> torch.Tensor:
    return torch.zeros(3, 4, dtype=torch.int32)


@pytest.mark.parametrize("impl", ["cpu", "reference", "packed"])
def test_counts_are_right_and_results_the_same(impl: Any) -> None:
    hidden, logits, weights = layer()
    counters = zeros()
    given: Any = pack(weights, SPEC) if impl == "packed" else weights
    how = {"impl": "auto" if impl == "packed" else impl}
    plain, counted = route(logits, ROUTER), route(logits, ROUTER, counters=counters)
    assert all(torch.equal(a, b) for a, b in zip(plain, counted, strict=True))
    args = (hidden, plain.topk_ids_TK, plain.topk_weights_TK, given, SPEC)
    for _ in range(2):
        assert torch.equal(moe(*args, **how), moe(*args, **how, counters=counters))
    assert counters.tolist() == [plain.counts_E.tolist(), (2 * plain.counts_E).tolist(), [0] * 4]


def test_the_ops_pass_opcheck() -> None:
    hidden, logits, weights = layer()
    torch.library.opcheck(route_counted_op, (logits, None, ROUTER.key(), zeros()))
    routing = route(logits, ROUTER)
    params = (weights.up, weights.down, None, None, None, None)
    args = (hidden, routing.topk_ids_TK, routing.topk_weights_TK, *params, SPEC.key(), "cpu")
    torch.library.opcheck(experts_counted_op, (*args, zeros()))


# Tracing any autograd.Function warns so.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_counted_layers_compile_whole(train: bool, backend: str) -> None:
    hidden, logits, weights = layer()
    weights.up.requires_grad_(train)
    first, second = zeros(), zeros()

    def two_layers(hidden: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        for counters in (first, second):
            ids, share, _ = route(logits * 1, ROUTER, counters=counters)
            hidden = moe(hidden, ids, share, weights, SPEC, impl="reference", counters=counters)
        return hidden + 0

    want = two_layers(hidden, logits)
    counts = first.clone()
    assert counts[1].sum() == 10 and torch.equal(first, second)
    whole = torch.compile(two_layers, fullgraph=True, backend=backend)
    for times in (2, 3):
        got = whole(hidden, logits)
        torch.testing.assert_close(got, want)
        assert torch.equal(first, times * counts) and torch.equal(second, times * counts)
    if train:
        (gradient,) = torch.autograd.grad(got.sum(), [weights.up])
        (wanted,) = torch.autograd.grad(want.sum(), [weights.up])
        torch.testing.assert_close(gradient, wanted)
        assert torch.equal(first, 3 * counts)


@pytest.mark.parametrize(
    ("counters", "complaint"),
    [
        (torch.zeros(3, 5, dtype=torch.int32), r"shape \(3, 4\)"),
        (torch.zeros(3, 4), "int32"),
        (torch.zeros(4, 3, dtype=torch.int32).T, "contiguous"),
    ],
)
def test_wrong_counters_are_refused(counters: torch.Tensor, complaint: str) -> None:
    hidden, logits, weights = layer()
    with pytest.raises((TypeError, ValueError), match=complaint):
        route(logits, ROUTER, counters=counters)
    ids, share, _ = route(logits, ROUTER)
    with pytest.raises((TypeError, ValueError), match=complaint):
        moe(hidden, ids, share, weights, SPEC, counters=counters)
