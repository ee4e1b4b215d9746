"""What the machine reaches in this process: copy, read and cuBLAS ceilings, and the dense twin.

    S routed rows · H hidden width · I intermediate width · U first-product width (2I when gated)

The dense twin of a layer is the same flops as plain dense products, one weight matrix for all rows:
(S, H) @ (H, U), then (S, I) @ (I, H), with (S, I) @ (I, I) between for three-layer experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..cost import H200_READ_BYTES_PER_S
from ..types import ExpertSpec, Measurement
from .timing import Call, Sampler, cpu_sampler, eager_sampler, interleave


def default_sampler(device: torch.device) -> Callable[[Sequence[Call]], Sampler]:
    """The sampler of plain calls on a device."""
    return eager_sampler if device.type == "cuda" else cpu_sampler


@dataclass(frozen=True)
class Ceilings:
    """Measured rates: GB/s of a copy (read plus write) and a read, TFLOP/s of a square product."""

    copy_gbps: float
    read_gbps: float
    gemm_tflops: float
    gemm_size: int
    timings: dict[str, Measurement]


def measure_ceilings(
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    num_bytes: int = 2**32,
    gemm_size: int = 8192,
    budget_s: float = 3.0,
) -> Ceilings:
    """The ceilings now, on random data: buffers of `num_bytes`, a product of `gemm_size` cubed."""
    source = torch.randn(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    left = torch.randn(gemm_size, gemm_size, device=device, dtype=dtype)
    right = torch.randn(gemm_size, gemm_size, device=device, dtype=dtype)
    product = torch.empty_like(left)
    sampler = default_sampler(device)
    timed = interleave(
        {
            "copy": sampler([lambda: target.copy_(source)]),
            "read": sampler([lambda: source.sum()]),
            "gemm": sampler([lambda: torch.mm(left, right, out=product)]),
        },
        budget_s=budget_s,
    )
    if timed.errors:
        raise RuntimeError(f"ceilings could not be measured: {timed.errors}")
    ms = {name: m.median for name, m in timed.measured.items()}
    size = source.numel() * 4
    return Ceilings(
        copy_gbps=2 * size / ms["copy"] / 1e6,
        read_gbps=size / ms["read"] / 1e6,
        gemm_tflops=2 * gemm_size**3 / ms["gemm"] / 1e9,
        gemm_size=gemm_size,
        timings=timed.measured,
    )


def read_rate(device_name: str, ceilings: Ceilings) -> float:
    """Bytes per second of the floor: the best rate seen on an H200, else the measured read."""
    return H200_READ_BYTES_PER_S if "H200" in device_name else ceilings.read_gbps * 1e9


def dense_twin(
    spec: ExpertSpec, rows: int, *, dtype: torch.dtype, device: torch.device
) -> Callable[[], Tensor]:
    """One call of the dense twin for `rows` routed rows, outputs allocated beforehand."""
    h, u, i = spec.hidden_size, spec.up_rows, spec.intermediate_size

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    x_SH, act_SI = random(rows, h), random(rows, i)
    up_UH, down_HI = random(u, h), random(h, i)
    mid_II = random(i, i) if spec.layers == 3 else None
    first_SU, second_SI = torch.empty_like(random(rows, u)), torch.empty_like(act_SI)
    out_SH = torch.empty_like(x_SH)

    def call() -> Tensor:
        torch.mm(x_SH, up_UH.T, out=first_SU)
        if mid_II is not None:
            torch.mm(act_SI, mid_II.T, out=second_SI)
        return torch.mm(act_SI, down_HI.T, out=out_SH)

    return call
