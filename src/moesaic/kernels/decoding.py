"""The small launches of a decode step between its products: residual sum and norm, rotary turn.

    T tokens · H width · A heads · G heads of keys and values · D their width, pairs of neighbours
    L positions of the cache, the last of which is written

>>> add_norm_ref(torch.tensor([[3.0, 3.0]]), torch.tensor([[0.0, 1.0]]), torch.ones(2), 0.0)[0]
tensor([[3., 4.]])
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aot import AotCase


@triton.jit
def add_norm_kernel(
    x_ptr, y_ptr, gain_ptr, sum_ptr, out_ptr, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, HAS_Y: tl.constexpr,
):  # fmt: skip
    """Program t: sum[t] = x[t] + y[t], rounded, and out[t] = sum / sqrt(mean(sum^2) + eps) * gain.

    x_ptr, y_ptr, sum_ptr, out_ptr: (T, WIDTH) row-major. gain_ptr: (WIDTH,). Without HAS_Y the sum
    is x and not written. x [3, 3], y [0, 1], gain 1, eps 0 give sum [3, 4], out [.8485, 1.1314].
    """
    column = tl.arange(0, BLOCK)
    live = column < WIDTH
    at = tl.program_id(0).to(tl.int64) * WIDTH + column
    x = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32)
    if HAS_Y:
        y = tl.load(y_ptr + at, mask=live, other=0.0).to(tl.float32)
        rounded = (x + y).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + at, rounded, mask=live)
        x = rounded.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x) / WIDTH + eps)
    gain = tl.load(gain_ptr + column, mask=live, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, (x * scale * gain).to(out_ptr.dtype.element_ty), mask=live)


def add_norm(
    x_TH: Tensor, y_TH: Tensor | None, gain_H: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Residual sum (T, H) and its root-mean-square norm (T, H), one launch; x itself without y.

    All tensors are contiguous and on the current device.
    """
    tokens, width = x_TH.shape
    sum_TH = x_TH if y_TH is None else torch.empty_like(x_TH)
    out_TH = torch.empty_like(x_TH)
    add_norm_kernel[(tokens,)](
        x_TH, x_TH if y_TH is None else y_TH, gain_H, sum_TH, out_TH, eps,
        WIDTH=width, BLOCK=triton.next_power_of_2(width), HAS_Y=y_TH is not None, num_warps=4,
    )  # fmt: skip
    return sum_TH, out_TH


def add_norm_ref(
    x_TH: Tensor, y_TH: Tensor | None, gain_H: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The torch twin of `add_norm`."""
    sum_TH = x_TH if y_TH is None else x_TH + y_TH
    wide_TH = sum_TH.float()
    scale_T1 = (wide_TH.square().mean(-1, keepdim=True) + eps).rsqrt()
    return sum_TH, (wide_TH * scale_T1 * gain_H.float()).to(x_TH.dtype)


@triton.jit
def turn_kernel(
    qkv_ptr, cos_ptr, sin_ptr, q_ptr, keys_ptr, values_ptr, heads, kv_heads, context,
    PAIRS: tl.constexpr,
):  # fmt: skip
    """Program (t, head): queries and keys turned by pairs of neighbours, values as they are.

    qkv_ptr: (T, A + 2G, D), D = 2 * PAIRS. cos_ptr, sin_ptr: fp32 (PAIRS,). q_ptr: (T, A, D).
    keys_ptr, values_ptr: (T, G, L, D), of which position L - 1 is written. A pair (a, b) becomes
    (a cos - b sin, a sin + b cos): with cos 0 and sin 1, [1, 2] becomes [-2, 1].
    """
    t, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    pair = tl.arange(0, PAIRS)
    at = qkv_ptr + (t * (heads + 2 * kv_heads) + head) * 2 * PAIRS + 2 * pair
    a, b = tl.load(at).to(tl.float32), tl.load(at + 1).to(tl.float32)
    turned = head < heads + kv_heads
    cos = tl.where(turned, tl.load(cos_ptr + pair), 1.0)
    sin = tl.where(turned, tl.load(sin_ptr + pair), 0.0)
    first, second = a * cos - b * sin, a * sin + b * cos
    group = tl.where(turned, head - heads, head - heads - kv_heads)
    last = ((t * kv_heads + group) * context + context - 1) * 2 * PAIRS
    if head < heads:
        to = q_ptr + (t * heads + head) * 2 * PAIRS + 2 * pair
    elif turned:
        to = keys_ptr + last + 2 * pair
    else:
        to = values_ptr + last + 2 * pair
    tl.store(to, first.to(q_ptr.dtype.element_ty))
    tl.store(to + 1, second.to(q_ptr.dtype.element_ty))


def turn(
    qkv_TU: Tensor, cos_D2: Tensor, sin_D2: Tensor, keys_TGLD: Tensor, values_TGLD: Tensor
) -> Tensor:
    """Turned queries (T, A, D) of `qkv_TU` (T, (A + 2G) * D); keys and values go to the caches.

    All tensors are contiguous and on the current device.
    """
    tokens, kv_heads, context, width = keys_TGLD.shape
    heads = qkv_TU.shape[1] // width - 2 * kv_heads
    q_TAD = qkv_TU.new_empty((tokens, heads, width))
    turn_kernel[(tokens, heads + 2 * kv_heads)](
        qkv_TU, cos_D2, sin_D2, q_TAD, keys_TGLD, values_TGLD, heads, kv_heads, context,
        PAIRS=width // 2, num_warps=1,
    )  # fmt: skip
    return q_TAD


def turn_ref(
    qkv_TU: Tensor, cos_D2: Tensor, sin_D2: Tensor, keys_TGLD: Tensor, values_TGLD: Tensor
) -> Tensor:
    """The torch twin of `turn`.

    >>> caches = torch.zeros(2, 1, 1, 1, 2)
    >>> qkv = torch.arange(1.0, 7.0)[None]
    >>> turn_ref(qkv, torch.zeros(1), torch.ones(1), *caches).tolist()
    [[[-2.0, 1.0]]]
    >>> caches.flatten().tolist()
    [-4.0, 3.0, 5.0, 6.0]
    """
    tokens, kv_heads, _, width = keys_TGLD.shape
    heads = qkv_TU.shape[1] // width - 2 * kv_heads
    pairs = qkv_TU.view(tokens, heads + 2 * kv_heads, width // 2, 2)
    a, b = pairs[:, : heads + kv_heads].float().unbind(-1)
    turned = torch.stack((a * cos_D2 - b * sin_D2, a * sin_D2 + b * cos_D2), -1)
    turned = turned.flatten(2).to(qkv_TU.dtype)
    keys_TGLD[:, :, -1] = turned[:, heads:]
    values_TGLD[:, :, -1] = pairs[:, heads + kv_heads :].flatten(2)
    return turned[:, :heads]


def aot_cases() -> list[AotCase]:
    """Both kernels at the widths of a small and a large model."""
    four = ("x_ptr", "y_ptr", "gain_ptr", "sum_ptr", "out_ptr")
    turned = ("qkv_ptr", "q_ptr", "keys_ptr", "values_ptr")
    norms = [
        AotCase(
            name=f"decoding/norm-{width}", fn=add_norm_kernel,
            signature={**dict.fromkeys(four, "*bf16"), "eps": "fp32"},
            constexprs={"WIDTH": width, "BLOCK": width, "HAS_Y": True}, options={"num_warps": 4},
        )
        for width in (1024, 4096)
    ]  # fmt: skip
    turns = [
        AotCase(
            name=f"decoding/turn-{2 * pairs}", fn=turn_kernel,
            signature={
                **dict.fromkeys(turned, "*bf16"), "cos_ptr": "*fp32", "sin_ptr": "*fp32",
                **dict.fromkeys(("heads", "kv_heads", "context"), "i32"),
            },
            constexprs={"PAIRS": pairs}, options={"num_warps": 1},
        )
        for pairs in (32, 64)
    ]  # fmt: skip
    return [*norms, *turns]
