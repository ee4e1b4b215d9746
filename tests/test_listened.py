"""Whoever wants to see torch's operators is noticed, so that no call passes them by."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import BaseTorchFunctionMode

from moesaic.dispatch import listened_to


@contextmanager
def inside_vmap() -> Iterator[None]:
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
    from torch._functorch.vmap import vmap_increment_nesting

    with temporarily_clear_interpreter_stack(), vmap_increment_nesting(3, "error"):
        yield


LISTENERS = {
    "fake tensors": FakeTensorMode,
    "a function mode": BaseTorchFunctionMode,
    "a profiler": torch.profiler.profile,
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
