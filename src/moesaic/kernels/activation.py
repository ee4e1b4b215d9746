"""The activations between an expert's two products, in torch; kernels carry device twins of them.

    S rows · U width of the first product (2I when gated, I else) · I intermediate width

One formula covers the gated family: gate and up are the two halves of the product (or its even and
odd columns when interleaved), clamped by `limit` if there is one, then
``act(gate) * (up + up_offset)``.

>>> import torch
>>> x = torch.tensor([[1.0, 2.0, 3.0, 4.0]])      # gate = [1, 2], up = [3, 4]
>>> activate_ref(x, activation="relu", gated=True)
tensor([[3., 8.]])
"""

from __future__ import annotations

import torch
from torch import Tensor


def pointwise_ref(x: Tensor, activation: str, alpha: float = 1.0) -> Tensor:
    """The scalar activation `activation` of `x`, any shape and float dtype.

    Raises:
        ValueError: when the activation has no kernel.
    """
    if activation == "silu":
        return x * torch.sigmoid(x * alpha)
    if activation == "gelu":
        return torch.nn.functional.gelu(x)
    if activation == "gelu_tanh":
        return torch.nn.functional.gelu(x, approximate="tanh")
    if activation == "relu":
        return torch.relu(x)
    if activation == "relu2":
        return torch.relu(x).square()
    raise ValueError(f"activation must be silu, gelu, gelu_tanh, relu or relu2, got {activation!r}")


def activate_ref(
    product_SU: Tensor,
    *,
    activation: str,
    gated: bool,
    interleaved: bool = False,
    limit: float | None = None,
    alpha: float = 1.0,
    up_offset: float = 0.0,
) -> Tensor:
    """The activated rows (S, I) of a first product (S, U), in the dtype of the product."""
    if not gated:
        x = product_SU if limit is None else product_SU.clamp(max=limit)
        return pointwise_ref(x, activation, alpha)
    if interleaved:
        gate_SI, up_SI = product_SU[..., ::2], product_SU[..., 1::2]
    else:
        gate_SI, up_SI = product_SU.chunk(2, dim=-1)
    if limit is not None:
        gate_SI, up_SI = gate_SI.clamp(max=limit), up_SI.clamp(-limit, limit)
    gated_SI = pointwise_ref(gate_SI, activation, alpha)
    return gated_SI * (up_SI + up_offset if up_offset else up_SI)
