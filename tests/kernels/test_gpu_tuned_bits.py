"""Bits over the whole tuned table: rows on their own shapes, SM budgets, graphs, either path.

Real shapes, so it needs an H100 or H200 and some 30 GB; kernels are compiled as they are met.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from moesaic.kernels.experts import experts_triton
from moesaic.kernels.hopper.experts import choose_layer, experts_hopper, layer_config
from moesaic.kernels.tune import CONFIGS, Problem, _config_from_json, load_table, shape_key

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)

needs_hopper = pytest.mark.skipif(not HOPPER, reason="needs an sm_90 GPU")
FAMILIES = sorted(path.stem for path in CONFIGS.glob("*.json"))
KEY = re.compile(r"E(\d+)_H(\d+)_I(\d+)_K(\d+)_L(\d)_(gated|plain)_(\w+)")


def problem_of(key: str, tokens: int) -> Problem:
    """The problem that a table's key names."""
    match = KEY.fullmatch(key)
    assert match, key
    experts, hidden, inter, top_k, layers = map(int, match.groups()[:5])
    found = Problem(
        tokens, top_k, experts, hidden, inter, match[6] == "gated", layers, match[7], 90
    )
    assert shape_key(found) == key
    return found


class Layer:
    """Random weights of a shape, and calls of either path on given inputs."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.dtype = problem, getattr(torch, problem.dtype)
        self.generator = torch.Generator("cuda").manual_seed(problem.hidden)
        e, h, i = problem.num_experts, problem.hidden, problem.intermediate
        self.named = {"up": self.normal(e, i * (2 if problem.gated else 1), h, std=h**-0.5)}
        if problem.layers == 3:
            self.named["mid"] = self.normal(e, i, i, std=i**-0.5)
        self.named["down"] = self.normal(e, h, i, std=i**-0.5)
        activation = "silu" if problem.gated else "relu"
        self.how = {**self.named, "activation": activation, "gated": problem.gated}

    def normal(self, *shape: int, std: float = 1.0) -> torch.Tensor:
        empty = torch.empty(shape, dtype=self.dtype, device="cuda")
        return empty.normal_(0.0, std, generator=self.generator)

    def inputs(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        p, draw = self.problem, partial(torch.rand, device="cuda", generator=self.generator)
        ids_TK = draw(tokens, p.num_experts).topk(p.top_k, dim=1).indices.int()
        return self.normal(tokens, p.hidden), ids_TK, draw(tokens, p.top_k)

    def triton(self, inputs: Any, config: Any = None) -> torch.Tensor:
        return experts_triton(*inputs, **self.how, config=config)

    def hopper(self, inputs: Any, config: Any = None, num_sms: int | None = None) -> torch.Tensor:
        return experts_hopper(*inputs, **self.how, config=config, num_sms=num_sms)


def cases(section: str) -> list[Any]:
    """Every shape of a section of the shipped tables, once."""
    keys = {key for family in FAMILIES for key in getattr(load_table(family), section)}
    return [pytest.param(key, id=key) for key in sorted(keys)]


def rows_of(section: str, key: str) -> dict[int, list[Any]]:
    """The rows of a shape by tokens, of every family's table, each once."""
    found: dict[int, list[Any]] = {}
    for family in FAMILIES:
        for tokens, row in getattr(load_table(family), section).get(key, {}).items():
            rows = found.setdefault(int(tokens), [])
            rows += [row] if row not in rows else []
    return found


@needs_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("key", cases("hopper"))
def test_every_hopper_row_gives_the_triton_paths_bits(key: str) -> None:
    rows = rows_of("hopper", key)
    layer = Layer(problem_of(key, 1))
    p = layer.problem
    many = {layer_config(row) for tokens, some in rows.items() if tokens > 1 for row in some}
    for tokens, own in rows.items():
        inputs = layer.inputs(tokens)
        want = layer.triton(inputs)
        rest = layer.inputs(tokens)[0]
        assert not torch.equal(want, layer.triton((rest, *inputs[1:])))
        up_rows = p.intermediate * (2 if p.gated else 1)
        untuned = choose_layer(tokens, p.top_k, p.num_experts, up_rows, 132)
        configs = {untuned, *map(layer_config, own)} | (many if tokens > 1 else set())
        for config in configs:
            assert torch.equal(want, layer.hopper(inputs, config)), (tokens, config)
        config = layer_config(own[0])
        for budget in (7, 66, 131):
            assert torch.equal(want, layer.hopper(inputs, config, budget)), (tokens, budget)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer.hopper(inputs, config)
        for tensor, fresh in zip(inputs, layer.inputs(tokens), strict=True):
            tensor.copy_(fresh)
        graph.replay()
        assert torch.equal(out, layer.triton(inputs)) and not torch.equal(out, want), tokens


@needs_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("key", cases("shapes"))
def test_every_triton_row_gives_the_same_bits(key: str) -> None:
    layer = Layer(problem_of(key, 1))
    for tokens, own in rows_of("shapes", key).items():
        inputs = layer.inputs(tokens)
        want = layer.triton(inputs)
        for row in own:
            assert torch.equal(want, layer.triton(inputs, _config_from_json(row, "")))


def test_every_key_of_the_tables_can_be_read() -> None:
    for section in ("shapes", "hopper"):
        for param in cases(section):
            (key,) = param.values
            assert problem_of(key, 8).tokens == 8 and rows_of(section, key)
