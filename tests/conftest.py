"""Shared fixtures: the device of kernels, and a `torch.empty` that shows what was never written."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")


def _interpreter_problem() -> str | None:
    """Why Triton kernels cannot run here, or None."""
    if GPU:
        return None
    try:
        import numpy
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton kernels need a GPU or the interpreter: {error}"
    version = tuple(int(part) for part in numpy.__version__.split(".")[:2])
    if version >= (2, 4):
        return f"Triton's interpreter needs numpy < 2.4, found {numpy.__version__}"
    return None


@pytest.fixture
def kernel_device() -> torch.device:
    """The device Triton kernels run on: the GPU, or the CPU through Triton's interpreter."""
    problem = _interpreter_problem()
    if problem:
        pytest.skip(problem)
    return torch.device("cuda" if GPU else "cpu")


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_floating_point():
        return tensor.fill_(float("nan"))
    if tensor.dtype in (torch.int32, torch.int64):
        return tensor.fill_(-(2**31) + 12345)
    return tensor


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make `torch.empty`, `empty_like` and `new_empty` return NaN, so that reading it shows."""
    empty, empty_like, new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: _poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: _poison(empty_like(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: _poison(new_empty(*a, **k)))
    yield
