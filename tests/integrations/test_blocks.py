"""Blocks as one piece: the bits of their parts, every reason to run their own forward."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_checks import output, token_ids
from hf_families import families, tiny_model
from torch import Tensor, nn

import moesaic
from moesaic.integrations import blocks
from moesaic.integrations.blocks import BLOCK
from moesaic.integrations.known_blocks import recognise_block

TABLE = Path(__file__).parents[2] / "benchmarks" / "transformers-families.json"
FAMILIES = ("qwen3_moe", "deepseek_v3", "qwen2_moe")  # plain, shared expert, shared with a gate


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every block that ran as one piece."""
    seen: list[int] = []
    real = blocks._block

    def counted(*arguments: Any) -> Tensor:
        seen.append(len(arguments[0]))
        return real(*arguments)

    monkeypatch.setattr(blocks, "_block", counted)
    return seen


def attached(family: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Tensor]:
    model = tiny_model(family).to(dtype).eval().requires_grad_(False)
    moesaic.attach(model, fuse_routers="always")
    return model, token_ids(model)


def block_of(model: nn.Module) -> Any:
    return next(module for module in model.modules() if BLOCK in vars(module))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_has_the_bits_of_its_parts(
    family: str, dtype: torch.dtype, calls: list[int]
) -> None:
    model, ids_BN = attached(family, dtype)
    with torch.no_grad():
        whole = output(model, ids_BN)
        layers = sum(BLOCK in vars(module) for module in model.modules())
        assert calls == [ids_BN.numel()] * layers and layers
        for module in model.modules():
            if BLOCK in vars(module):
                del module.forward, vars(module)[BLOCK]
        assert torch.equal(output(model, ids_BN), whole) and len(calls) == layers


def test_blocks_of_every_family_have_the_bits_of_their_parts(calls: list[int]) -> None:
    pieces = []
    known = json.loads(TABLE.read_text("utf-8"))  # a newer transformers may have more
    for family in (name for name in families() if name in known):
        model, ids_BN = attached(family)
        calls.clear()
        with torch.no_grad():
            whole = output(model, ids_BN)
            for module in model.modules():
                if BLOCK in vars(module):
                    del module.forward, vars(module)[BLOCK]
            ran = len(calls)
            assert torch.equal(output(model, ids_BN), whole), family
        pieces += [family] * (ran > 0)
    assert len(pieces) >= 28 and {"deepseek_v3", "mixtral", "qwen2_moe", "qwen3_moe"} <= {*pieces}


def _hook(where: Callable[[Any], nn.Module]) -> Callable[[Any], Any]:
    return lambda block: where(block).register_forward_hook(lambda *_: None)


REASONS: dict[str, Callable[[Any], Any]] = {
    "hook on the router": _hook(lambda b: b.gate),
    "hook on the experts": _hook(lambda b: b.experts),
    "hook on the shared expert": _hook(lambda b: b.shared_experts),
    "hook inside the shared expert": _hook(lambda b: b.shared_experts.up_proj),
    "hook on the activation": _hook(lambda b: b.shared_experts.act_fn),
    "hook everywhere": lambda b: nn.modules.module.register_module_forward_hook(lambda *_: None),
    "replaced forward": lambda b: setattr(b.shared_experts, "forward", b.shared_experts.forward),
    "gradients": lambda b: b.experts.requires_grad_(True),
    "gradients of the router's bias": lambda b: b.gate.register_parameter(
        "bias", nn.Parameter(torch.zeros(8))
    ),
    "training": lambda b: b.train(),
    "counters": lambda b: b.experts.register_buffer(
        "counters", torch.zeros(3, 8, dtype=torch.int32)
    ),
}


@pytest.mark.parametrize("reason", REASONS)
def test_whoever_watches_a_part_has_it_called(reason: str, calls: list[int]) -> None:
    model, _ = attached("deepseek_v3")
    block = block_of(model)
    x_BNH = torch.randn(2, 3, model.config.hidden_size)
    want = block(x_BNH)
    assert calls == [6]
    handle = REASONS[reason](block)
    try:
        got = block(x_BNH)
    finally:
        if hasattr(handle, "remove"):
            handle.remove()
    assert calls == [6] and torch.equal(got.detach(), want)
    if reason == "counters":
        assert block.experts.counters[1].sum() == 12


def test_a_block_runs_the_implementation_that_its_layer_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    named: list[str] = []
    real = blocks.experts_op
    monkeypatch.setattr(blocks, "experts_op", lambda *a: (named.append(a[-1]), real(*a))[1])
    model, _ = attached("deepseek_v3")
    block = block_of(model)
    x_BNH = torch.randn(2, 3, model.config.hidden_size)
    want = block(x_BNH)
    block.experts._moesaic.impl = "reference"
    torch.testing.assert_close(block(x_BNH), want)
    assert named == ["auto", "reference"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_checked_on_a_cpu(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = attached("qwen3_moe", dtype)
    block = block_of(model)
    x_BNH = torch.randn(2, 3, model.config.hidden_size).to(dtype)
    with torch.no_grad():
        compiled = torch.compile(block, backend="eager")
        compiled(x_BNH)
        x_BNH[1, 2] = torch.nan
        for call in (block, block.gate, compiled):
            with pytest.raises(ValueError, match="got NaN in row 5"):
                call(x_BNH)
        monkeypatch.setenv("MOESAIC_CHECK", "1")
        with pytest.raises(ValueError, match="got NaN in row 5"):
            block(x_BNH)


def test_a_compiled_block_is_one_op() -> None:
    found: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        found.extend(
            str(node.target)
            for node in graph.graph.nodes
            if node.op == "call_function" and "moesaic" in str(node.target)
        )
        return graph

    model, _ = attached("qwen2_moe")
    block = block_of(model)
    x_BNH = torch.randn(2, 3, model.config.hidden_size)
    with torch.no_grad():
        want = block(x_BNH)
        torch._dynamo.reset()
        got = torch.compile(block, fullgraph=True, backend=backend)(x_BNH)
    assert torch.equal(got, want) and found == ["moesaic.block.default"]


def test_detach_puts_every_block_back() -> None:
    model, _ = attached("qwen2_moe")
    moesaic.detach(model)
    assert not any({"forward", BLOCK} & vars(module).keys() for module in model.modules())
    states = moesaic.attach(model, fuse_routers="never").layers
    assert {state.block for state in states} == {"its router is not fused"}


CHANGES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "adds something else": lambda b, x: 2 * type(b).forward(b, x),
    "not once": lambda b, x: b.gate(x)[0].sum() * 0 + type(b).forward(b, x),
    "something else than its input": lambda b, x: b.experts(x.flatten(0, 1) + 1, *b.gate(x)[:0:-1])
    .view(x.shape) + b.shared_experts(x),
    "another routing": lambda b, x: b.experts(x.flatten(0, 1), *b.gate(x)[1:]).view(x.shape)
    + b.shared_experts(x),
    "hidden states alone": lambda b, x: (type(b).forward(b, x), None),  # type: ignore[dict-item, return-value]
}  # fmt: skip


@pytest.mark.parametrize("problem", CHANGES)
def test_a_block_that_does_something_else_is_left_alone(problem: str) -> None:
    model = tiny_model("deepseek_v3")
    block: Any = next(m for m in model.modules() if type(m).__name__ == "DeepseekV3MoE")
    assert not isinstance(recognise_block(block, block.gate, block.experts), str)
    base = type(block)
    other = type("Other", (base,), {"forward": lambda b, x: CHANGES[problem](_As(b, base), x)})
    block.__class__ = other
    found = recognise_block(block, block.gate, block.experts)
    assert isinstance(found, str) and problem in found


class _As:
    """A block seen as its base class, so that `type(b).forward` is the family's."""

    def __new__(cls, block: Any, base: Any) -> Any:
        block.__class__ = base
        return block


def test_a_shared_expert_of_another_kind_is_left_alone() -> None:
    model = tiny_model("deepseek_v3")
    block: Any = next(m for m in model.modules() if type(m).__name__ == "DeepseekV3MoE")
    act = block.shared_experts.act_fn
    block.shared_experts.act_fn = nn.GELU()
    assert "not silu" in str(recognise_block(block, block.gate, block.experts))
    block.shared_experts.act_fn = act
    block.shared_experts.up_proj = nn.Linear(8, 8)
    assert "no plain ones" in str(recognise_block(block, block.gate, block.experts))
    block.extra = nn.LayerNorm(8)
    assert "its part extra is unknown" in str(recognise_block(block, block.gate, block.experts))
