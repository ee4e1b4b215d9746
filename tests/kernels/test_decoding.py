"""Launches of a decode step between its products: examples, and the torch twins."""

from __future__ import annotations

import pytest
import torch

from moesaic.kernels.decoding import add_norm, add_norm_ref, turn, turn_ref


def test_the_examples(kernel_device: torch.device) -> None:
    x, y = (torch.tensor([row], device=kernel_device) for row in ([3.0, 3.0], [0.0, 1.0]))
    gain = torch.ones(2, device=kernel_device)
    total, out = add_norm(x, y, gain, 0.0)
    assert total.tolist() == [[3.0, 4.0]]
    assert out.flatten().tolist() == pytest.approx([0.8485, 1.1314], abs=1e-4)
    caches = torch.zeros(2, 1, 1, 1, 2, device=kernel_device)
    qkv = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]], device=kernel_device)
    zero, one = torch.zeros(1, device=kernel_device), torch.ones(1, device=kernel_device)
    assert turn(qkv, zero, one, caches[0], caches[1]).tolist() == [[[-2.0, 1.0]]]
    assert caches.flatten().tolist() == [-4.0, 3.0, 5.0, 6.0]


@pytest.mark.parametrize("width", [64, 96])
@pytest.mark.parametrize("residual", [True, False])
def test_sum_and_norm(kernel_device: torch.device, width: int, residual: bool) -> None:
    generator = torch.Generator(kernel_device).manual_seed(width)
    x, y = torch.randn(2, 3, width, generator=generator, device=kernel_device)
    gain = torch.rand(width, generator=generator, device=kernel_device)
    found = add_norm(x, y if residual else None, gain, 1e-6)
    for a, b in zip(found, add_norm_ref(x, y if residual else None, gain, 1e-6), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_queries_keys_and_values_go_where_they_belong(kernel_device: torch.device) -> None:
    generator = torch.Generator(kernel_device).manual_seed(0)
    qkv = torch.randn(3, (4 + 2 * 2) * 16, generator=generator, device=kernel_device)
    angle = torch.rand(8, generator=generator, device=kernel_device)
    caches = torch.randn(2, 3, 2, 5, 16, generator=generator, device=kernel_device)
    twins = caches.clone()
    found = turn(qkv, angle.cos(), angle.sin(), caches[0], caches[1])
    expected = turn_ref(qkv, angle.cos(), angle.sin(), twins[0], twins[1])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(caches, twins)
