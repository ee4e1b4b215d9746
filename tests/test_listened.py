"""Whoever wants to see torch's operators is noticed, so that no call passes them by."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import BaseTorchFunctionMode

from moesaic.dispatch import listened_to
from moesaic.types import ExpertSpec, ExpertWeights


@contextmanager
def inside_vmap() -> Iterator[None]:
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
    from torch._functorch.vmap import vmap_increment_nesting

    with temporarily_clear_interpreter_stack(), vmap_increment_nesting(3, "error"):
        yield


LISTENERS = {
    "fake tensors": FakeTensorMode,
    "a function mode": BaseTorchFunctionMode,
    "a profiler": partial(torch.profiler.profile, acc_events=True),
    "vmap": inside_vmap,
}


@pytest.mark.parametrize("name", LISTENERS)
def test_a_listener_is_noticed(name: str) -> None:
    assert not listened_to()
    with LISTENERS[name]():
        assert listened_to()
    assert not listened_to()


def test_a_tracer_is_noticed() -> None:
    told: list[bool] = []

    def traced(x: torch.Tensor) -> torch.Tensor:
        told.append(listened_to())
        return x + 1

    torch.jit.trace(traced, torch.ones(2), check_trace=False)
    assert told == [True] and not listened_to()


def test_a_call_like_an_earlier_one_reaches_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from moesaic import functional
    from moesaic.kernels.hopper import experts

    calls: list[inspect.BoundArguments] = []
    takes = inspect.signature(experts.experts_hopper)

    def kernels(*args: object, **given: object) -> torch.Tensor:
        calls.append(takes.bind(*args, **given))
        return hidden * 2

    hidden, ids, share = torch.ones(3, 8), torch.zeros(3, 2, dtype=torch.int32), torch.ones(3, 2)
    weights = ExpertWeights(up=torch.ones(4, 32, 8), down=torch.ones(4, 8, 16))
    spec = ExpertSpec(num_experts=4, hidden_size=8, intermediate_size=16, activation="gelu")
    plain = functional.moe(hidden, ids, share, weights, spec)
    monkeypatch.setattr(experts, "experts_hopper", kernels)
    monkeypatch.setattr(functional, "_known", {})
    monkeypatch.setattr(
        functional, "_repeatable", lambda *given: (given[2].key(), given[4] is None)
    )
    monkeypatch.setattr(functional, "choose_impl", lambda *_: "hopper")
    assert torch.equal(functional.moe(hidden, ids, share, weights, spec), plain) and not calls
    assert torch.equal(functional.moe(hidden, ids, share, weights, spec), hidden * 2)
    told = calls[0].arguments
    assert told["up"] is weights.up and told["down"] is weights.down
    assert told["activation"] == "gelu" and told["key"] is functional._known[spec.key(), True][1]


class OnGpu(torch.Tensor):
    """A tensor of the CPU that says it is on the GPU with the number 0."""

    is_cuda = True  # type: ignore[assignment]

    def get_device(self) -> int:
        return 0


def test_what_a_repeated_call_may_not_leave_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from moesaic import functional

    current = [0]
    monkeypatch.setattr(functional, "PLAIN", (OnGpu,))
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: current[0], raising=False)

    def on_gpu(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype).as_subclass(OnGpu)

    tensors = on_gpu(3, 8), on_gpu(3, 2, dtype=torch.int32), on_gpu(3, 2)
    up, down = on_gpu(4, 32, 8), on_gpu(4, 8, 16)
    spec = ExpertSpec(num_experts=4, hidden_size=8, intermediate_size=16)

    def key(given: tuple[torch.Tensor, ...] = tensors, **more: torch.Tensor) -> object:
        weights = ExpertWeights(up=up, down=down, **more)
        return functional._repeatable((*given, up, down), weights, spec, "auto", None, None)

    assert key() is not None and key() == key()
    assert key((tensors[0], tensors[1].long(), tensors[2])) != key()
    for name in ("mid", "mid_bias", "up_bias", "down_bias"):
        assert key(**{name: up}) is None
    assert key((tensors[0][:, ::2], *tensors[1:])) is None
    assert key((torch.zeros(3, 8), *tensors[1:])) is None
    current[0] = 1
    assert key() is None
    current[0] = 0
    up.requires_grad_(True)
    assert key() is None
    with torch.no_grad():
        assert key() is not None
