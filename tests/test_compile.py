"""The public functions trace into one graph, and a graph belongs to the spec it was traced with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from moesaic import ops
from moesaic.functional import moe, route
from moesaic.types import ExpertSpec, ExpertWeights, RouterSpec


def test_route_and_moe_compile_whole() -> None:
    silu = ExpertSpec(num_experts=4, hidden_size=8, intermediate_size=16)
    gelu = ExpertSpec(num_experts=4, hidden_size=8, intermediate_size=16, activation="gelu")
    weights = ExpertWeights(up=torch.randn(4, 32, 8), down=torch.randn(4, 8, 16))
    router = RouterSpec(num_experts=4, top_k=2)
    hidden, logits = torch.randn(3, 8), torch.randn(3, 4)

    def layer(hidden: torch.Tensor, spec: ExpertSpec) -> torch.Tensor:
        ids, share, _ = route(logits * 1, router)
        return moe(hidden, ids, share, weights, spec, impl="reference") + 0

    whole = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for spec in (silu, gelu, silu):
        assert torch.equal(whole(hidden, spec), layer(hidden, spec))
    assert not torch.equal(layer(hidden, silu), layer(hidden, gelu))


def test_a_gpu_op_refuses_weights_that_lie_apart() -> None:
    """A compiled caller checks nothing, and the kernels read weights as one piece."""
    spec = ExpertSpec(num_experts=2, hidden_size=8, intermediate_size=8, gated=False)
    up, down = torch.randn(2, 8, 8), torch.randn(2, 8, 8)
    tokens = (torch.randn(3, 8), torch.zeros(3, 1, dtype=torch.int32), torch.ones(3, 1))
    rest = (None, None, None, None, spec.key(), "reference")
    ops._experts_cuda(*tokens, up, down, *rest)
    with pytest.raises(ValueError, match="down must be contiguous"):
        ops._experts_cuda(*tokens, up, down.transpose(1, 2), *rest)


def test_a_gpu_op_makes_the_device_of_its_tensors_current(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[torch.device] = []

    @contextmanager
    def device(where: torch.device) -> Iterator[None]:
        entered.append(where)
        yield

    monkeypatch.setattr(torch.cuda, "device", device)
    scratch = torch.library.Library("moesaic_there", "DEF")
    scratch.define("add(Tensor x, int y, *, int? z=None) -> Tensor")
    scratch.impl("add", ops.on_its_device(lambda x, y, z=None: x + y + (z or 0)), "CPU")
    for current, wanted in ((-1, []), (0, [torch.device("cpu")])):
        monkeypatch.setattr(torch.cuda, "current_device", lambda current=current: current)
        assert torch.ops.moesaic_there.add(torch.ones(1), 2, z=4).item() == 7
        assert entered == wanted
