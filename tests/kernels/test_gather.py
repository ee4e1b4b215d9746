"""Gathered rows: the example of the kernel, and its torch twin in the interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from moesaic.kernels.gather import gather_rows, gather_rows_ref


def test_the_example(kernel_device: torch.device) -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], device=kernel_device)
    order = torch.tensor([3, 0, 1, 2], dtype=torch.int32, device=kernel_device)
    want = torch.tensor([[3.0, 4.0], [1.0, 2.0], [1.0, 2.0], [3.0, 4.0]], device=kernel_device)
    assert torch.equal(gather_rows(x, order, 2), want)
    assert torch.equal(gather_rows_ref(x, order, 2), want)


@pytest.mark.parametrize("width", [8, 72, 1032])
def test_against_the_twin(kernel_device: torch.device, width: int) -> None:
    x = torch.randn(7, width, device=kernel_device, dtype=torch.float16)
    order = torch.randperm(21, device=kernel_device).int()[:18]
    assert torch.equal(gather_rows(x, order, 3), gather_rows_ref(x, order, 3))
    assert not torch.equal(gather_rows(x, order.flip(0), 3), gather_rows_ref(x, order, 3))
