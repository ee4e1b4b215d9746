"""An optional wire format: rows cross in fp8 with a scale for every 128 values.

Off by default: it changes bits (promise 1 does not hold), and halves the bytes of a dispatch. Rows
come back in the dtype of the model.

    T tokens · H hidden width, a multiple of 128

>>> rows = torch.randn(3, 256)
>>> packed = pack_fp8(rows)
>>> packed.shape, unpack_fp8(packed, 256, torch.float32).shape
(torch.Size([3, 272]), torch.Size([3, 256]))
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 128
E4M3_MAX = 448.0


def fp8_width(hidden: int) -> int:
    """Bytes of a row on the wire, a multiple of 16.

    Raises:
        ValueError: the width is not a multiple of 128.
    """
    if hidden % GROUP:
        raise ValueError(f"wire='fp8' needs H to be a multiple of {GROUP}, got {hidden}")
    return -(-(hidden + 4 * (hidden // GROUP)) // 16) * 16


def pack_fp8(rows_TH: Tensor) -> Tensor:
    """Rows as bytes (T, `fp8_width`): e4m3 values, then fp32 scales, then padding."""
    tokens, hidden = rows_TH.shape
    packed = rows_TH.new_zeros((tokens, fp8_width(hidden)), dtype=torch.uint8)
    groups = rows_TH.float().view(tokens, hidden // GROUP, GROUP)
    scale = groups.abs().amax(-1, keepdim=True).clamp_min(1e-12) / E4M3_MAX
    values = (groups / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    packed[:, :hidden] = values.view(tokens, hidden).view(torch.uint8)
    end = hidden + 4 * (hidden // GROUP)
    packed[:, hidden:end] = scale.view(tokens, hidden // GROUP).contiguous().view(torch.uint8)
    return packed


def unpack_fp8(packed: Tensor, hidden: int, dtype: torch.dtype) -> Tensor:
    """The rows (T, H) that `pack_fp8` wrote, in `dtype`."""
    tokens, end = packed.shape[0], hidden + 4 * (hidden // GROUP)
    values = packed[:, :hidden].contiguous().view(torch.float8_e4m3fn).float()
    scale = packed[:, hidden:end].contiguous().view(torch.float32)
    groups = values.view(tokens, hidden // GROUP, GROUP) * scale[:, :, None]
    return groups.view(tokens, hidden).to(dtype)
