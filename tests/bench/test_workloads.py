"""Shapes of the named models, routings that are what they say, fresh data that a seed repeats."""

from __future__ import annotations

import pytest
import torch

from moesaic.bench import workloads
from moesaic.bench.workloads import MODELS, make_inputs, make_weights, routing_ids


def ids(routing: str, tokens: int = 4000, e: int = 16, k: int = 4, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return routing_ids(
        routing, tokens=tokens, num_experts=e, top_k=k, generator=generator, curve=[9, 1, 1, 1]
    )


def loads(ids_TK: torch.Tensor, e: int = 16) -> list[int]:
    return sorted(torch.bincount(ids_TK.flatten().long(), minlength=e).tolist(), reverse=True)


@pytest.mark.parametrize("routing", ["uniform", "zipf1", "zipf0.5", "worst", "curve"])
def test_every_token_gets_k_different_experts_in_range(routing: str) -> None:
    got = ids(routing)
    assert got.dtype == torch.int32 and got.shape == (4000, 4)
    assert int(got.min()) >= 0 and int(got.max()) < 16
    assert all(len(set(row)) == 4 for row in got.tolist())
    assert torch.equal(got, ids(routing)) and not torch.equal(got, ids(routing, seed=1))


def test_routings_have_the_loads_of_their_names() -> None:
    assert max(loads(ids("uniform"))) < 1.15 * 1000
    assert loads(ids("worst")) == [4000] * 4 + [0] * 12
    one_pick = loads(ids("zipf1", tokens=100_000, k=1))
    harmonic = sum(1 / r for r in range(1, 17))
    assert one_pick[0] / 100_000 == pytest.approx(1 / harmonic, rel=0.05)
    assert one_pick[0] / one_pick[3] == pytest.approx(4.0, rel=0.1)
    curve = loads(ids("curve", tokens=100_000, k=1))
    assert curve[0] / curve[-1] == pytest.approx(9.0, rel=0.15)


def test_all_ids_are_reachable_when_k_is_e() -> None:
    assert {tuple(sorted(row)) for row in ids("zipf1", e=4, k=4).tolist()} == {(0, 1, 2, 3)}


@pytest.mark.parametrize("routing", ["random", "curve"])
def test_a_routing_that_is_none_is_refused(routing: str) -> None:
    with pytest.raises(ValueError, match="curve"):
        workloads.popularity(routing, 8)


def test_models_are_those_of_the_papers() -> None:
    deepseek = MODELS["DeepSeek-V3"].spec()
    assert workloads.weight_bytes(deepseek, 2) == 256 * 3 * 7168 * 2048 * 2
    paper = {m.name: workloads.weight_bytes(m.spec(), 1) for m in MODELS.values()}
    claimed = {"paper-small": 16.8e6, "paper-medium": 134e6, "paper-large": 1.07e9}
    for name, parameters in claimed.items():
        assert paper[name] == pytest.approx(parameters, rel=0.01)
    assert MODELS["gpt-oss-120b"].spec().transposed


def test_data_are_fresh_and_repeat_with_their_seed() -> None:
    model = MODELS["paper-small"]
    first, again, other = (
        make_inputs(
            model, 5, "uniform", dtype=torch.bfloat16,
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in (1, 1, 2)
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.hidden_TH, other.hidden_TH)
    assert torch.allclose(first.topk_weights_TK.sum(-1), torch.ones(5))
    weights = make_weights(
        model.spec(), dtype=torch.float32, generator=torch.Generator().manual_seed(0)
    )
    assert weights.down.std().item() == pytest.approx(1024**-0.5, rel=0.02)
    assert {n: tuple(t.shape) for n, t in weights.named().items()} == model.spec().weight_shapes()
