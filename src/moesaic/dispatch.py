"""Which implementation runs a layer: the automatic choice with its reason, and refusals by name.

>>> choose_impl("auto", torch.device("cpu"), torch.float32, spec)
'cpu'
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Literal, get_args

import torch

from .types import ExpertSpec

Impl = Literal["auto", "cpu", "triton", "hopper", "reference"]
log = logging.getLogger("moesaic")


def listened_to() -> bool:
    """Whether somebody wants to see torch's operators called: a mode, a transform, a tracer or a
    profiler."""
    told = torch._C
    return bool(
        told._len_torch_dispatch_stack()
        or told._len_torch_function_stack()
        or told._functorch.peek_interpreter_stack() is not None
        or told._autograd._profiler_enabled()
        or told._get_tracing_state() is not None
    )


def hopper_problem(device: torch.device, dtype: torch.dtype, spec: ExpertSpec) -> str | None:
    """Why the Hopper kernels cannot run this layer on this CUDA device, or None."""
    from .kernels.hopper.experts import refusal

    return refusal(
        torch.cuda.get_device_capability(device),
        dtype,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        plain=not (spec.transposed or spec.interleaved or (spec.gated and spec.bias)),
    )


def _problem(
    impl: str, device: torch.device, dtype: torch.dtype, spec: ExpertSpec
) -> tuple[str, str] | None:
    """What is wrong with running `impl` there, and what to use instead; None when nothing is."""
    on_gpu = device.type == "cuda"
    if impl == "reference":
        return None
    if impl == "cpu":
        return (f"needs tensors on the CPU, got {device}", "auto") if on_gpu else None
    if not on_gpu:
        return f"needs a CUDA device, got {device}", "auto"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"needs compute capability 8.0 or newer, got {major}.{minor}", "reference"
    if impl == "hopper":
        problem = hopper_problem(device, dtype, spec)
        return (f"cannot run: {problem}", "triton") if problem else None
    return None


@lru_cache(maxsize=1024)
def choose_impl(impl: str, device: torch.device, dtype: torch.dtype, spec: ExpertSpec) -> str:
    """The implementation that runs `spec` on `device`; each automatic choice is logged once.

    Raises:
        ValueError: `impl` is not a name of one.
        RuntimeError: the one asked for cannot run there, and why.
    """
    if impl not in get_args(Impl):
        raise ValueError(f"impl must be one of {', '.join(get_args(Impl))}, got {impl!r}")
    if impl == "auto":
        if device.type == "cpu":
            impl, reason = "cpu", "the tensors are on the CPU"
        else:
            problem = hopper_problem(device, dtype, spec)
            impl = "triton" if problem else "hopper"
            reason = problem or "the device is a Hopper GPU and the layer has kernels there"
        log.info("impl=%s: %s", impl, reason)
    problem_and_remedy = _problem(impl, device, dtype, spec)
    if problem_and_remedy:
        problem, remedy = problem_and_remedy
        raise RuntimeError(f"impl={impl!r} {problem}; use impl={remedy!r}")
    return impl
