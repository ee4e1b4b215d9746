"""Frozen values: keys that come back, costs that can be checked by hand, examples that hold."""

from __future__ import annotations

import doctest
import importlib

import pytest
import torch

from moesaic import ExpertSpec, ExpertWeights, MoE, RouterSpec, cost, moe, route

NAMES = {
    "torch": torch,
    "ExpertSpec": ExpertSpec,
    "ExpertWeights": ExpertWeights,
    "MoE": MoE,
    "RouterSpec": RouterSpec,
    "moe": moe,
    "route": route,
    "spec": ExpertSpec(num_experts=8, hidden_size=16, intermediate_size=24),
}


@pytest.mark.parametrize(
    "module", ["types", "cost", "functional", "nn", "dispatch", "kernels.activation"]
)
def test_examples_of_the_docstrings(module: str) -> None:
    found = importlib.import_module(f"moesaic.{module}")
    result = doctest.testmod(found, extraglobs=NAMES)
    assert result.attempted and not result.failed


def test_keys_come_back() -> None:
    spec = ExpertSpec(num_experts=4, hidden_size=8, intermediate_size=16, limit=7.0, bias=True)
    assert ExpertSpec.from_key(spec.key()) == spec
    router = RouterSpec(num_experts=16, top_k=3, scoring="sigmoid", n_group=4, topk_group=2)
    assert RouterSpec.from_key(router.key()) == router
    assert spec.key() != ExpertSpec.from_key(spec.key().replace("7.0", "6.0")).key()


def test_costs_by_hand() -> None:
    spec = ExpertSpec(num_experts=4, hidden_size=8, intermediate_size=16)
    assert cost.expert_weight_elements(spec) == 32 * 8 + 8 * 16
    assert cost.expert_flops(spec, rows=3) == 2 * 3 * (8 * 32 + 16 * 8)
    assert cost.layer_bytes(spec, tokens=5, active=2, itemsize=2) == 2 * (2 * 384 + 2 * 5 * 8)
    deep = ExpertSpec(
        num_experts=4,
        hidden_size=8,
        intermediate_size=16,
        gated=False,
        layers=3,
        bias=True,
        activation="relu",
    )
    assert cost.expert_weight_elements(deep) == 8 * 16 + 16 * 16 + 16 * 8 + 16 + 16 + 8
    assert cost.floor_ms(4_500_000_000, 0.1, cost.H200_READ_BYTES_PER_S) == 1.0
    assert cost.balancedness([2, 2, 4, 0]) == 0.5
    assert cost.balancedness([]) == cost.balancedness([0, 0]) == 1.0
