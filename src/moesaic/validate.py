"""The checks of the public edge, one function a contract: what was expected, what came, a remedy.

    T tokens · H hidden width · E experts · K top-k

Shapes, dtypes and devices are checked always; values (ids in range, finite logits) always on CPU
and on GPU only when ``MOESAIC_CHECK=1``, because reading them would wait for the device.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from .types import ExpertSpec, ExpertWeights, RouterSpec

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


# What `os.environ` keeps: there a variable that is not set costs an exception every call.
_environment: dict[Any, Any] | None = getattr(os.environ, "_data", None)
_asked = os.environ.encodekey("MOESAIC_CHECK"), os.environ.encodevalue("1")


def values_wanted() -> bool:
    """Whether ``MOESAIC_CHECK=1`` asks for checks of values on a GPU, now."""
    if _environment is None:
        return os.environ.get("MOESAIC_CHECK") == "1"
    return _environment.get(_asked[0]) == _asked[1]


def checks_values(tensor: Tensor) -> bool:
    """Whether the values of `tensor` may be read to check them."""
    return tensor.device.type == "cpu" or values_wanted()


def _shape(name: str, tensor: Tensor, expected: tuple[int, ...], remedy: str = "") -> None:
    if tuple(tensor.shape) != expected:
        hint = f"; {remedy}" if remedy else ""
        raise ValueError(f"{name} must have shape {expected}, got {tuple(tensor.shape)}{hint}")


def check_same(name: str, tensor: Tensor, hidden: Tensor) -> None:
    """Check that a tensor has the dtype and the device of the hidden states.

    Raises:
        TypeError, ValueError: it has not.
    """
    if tensor.dtype != hidden.dtype:
        raise TypeError(
            f"{name} must have the dtype of hidden, {hidden.dtype}, got {tensor.dtype}; "
            f"cast it with .to({hidden.dtype})"
        )
    _device(name, tensor, hidden)


def _device(name: str, tensor: Tensor, hidden: Tensor) -> None:
    if tensor.device != hidden.device:
        raise ValueError(
            f"{name} must be on {hidden.device}, like hidden, got {tensor.device}; "
            f"move it with .to({str(hidden.device)!r})"
        )


def _hidden(hidden_TH: Tensor, spec: ExpertSpec) -> None:
    if hidden_TH.dtype not in FLOATS:
        names = ", ".join(str(d).removeprefix("torch.") for d in FLOATS)
        raise TypeError(f"hidden must be one of {names}, got {hidden_TH.dtype}")
    if hidden_TH.dim() != 2 or hidden_TH.shape[1] != spec.hidden_size:
        raise ValueError(
            f"hidden must have shape (T, {spec.hidden_size}), got {tuple(hidden_TH.shape)}; "
            "flatten batch and sequence with .reshape(-1, H)"
        )


def _ids(topk_ids_TK: Tensor, hidden_TH: Tensor, spec: ExpertSpec) -> None:
    bounds = f"of shape (T, K) with values in [0, {spec.num_experts})"
    if topk_ids_TK.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"topk_ids must be int32|int64 {bounds}, got {topk_ids_TK.dtype}")
    if topk_ids_TK.dim() != 2 or topk_ids_TK.shape[0] != hidden_TH.shape[0]:
        raise ValueError(
            f"topk_ids must be int32|int64 {bounds} and T = {hidden_TH.shape[0]}, "
            f"got shape {tuple(topk_ids_TK.shape)}"
        )
    k = topk_ids_TK.shape[1]
    if not 1 <= k <= 64 or k > spec.num_experts:
        raise ValueError(f"K must be in [1, min(64, num_experts={spec.num_experts})], got {k}")
    _device("topk_ids", topk_ids_TK, hidden_TH)
    if topk_ids_TK.numel() and checks_values(topk_ids_TK):
        low, high = (int(v) for v in torch.aminmax(topk_ids_TK))
        if low < 0 or high >= spec.num_experts:
            side, value = ("max", high) if high >= spec.num_experts else ("min", low)
            raise ValueError(f"topk_ids must be int32|int64 {bounds}, got {side} {value}")


def check_moe(
    hidden_TH: Tensor,
    topk_ids_TK: Tensor,
    topk_weights_TK: Tensor,
    weights: ExpertWeights,
    spec: ExpertSpec,
) -> None:
    """Check the inputs of `moe`.

    Raises:
        TypeError: a dtype is not supported or differs from that of the hidden states.
        ValueError: a shape, device, count or id is not what the spec says.
    """
    check_inputs(hidden_TH, topk_ids_TK, topk_weights_TK, spec)
    check_weights(weights, spec, hidden_TH)


def check_inputs(
    hidden_TH: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor, spec: ExpertSpec
) -> None:
    """Check the inputs of `moe` but for the weights.

    Raises:
        TypeError, ValueError: as `check_moe`.
    """
    _hidden(hidden_TH, spec)
    _ids(topk_ids_TK, hidden_TH, spec)
    _shape("topk_weights", topk_weights_TK, tuple(topk_ids_TK.shape), "one weight per id")
    if topk_weights_TK.dtype not in (torch.float32, hidden_TH.dtype):
        raise TypeError(
            f"topk_weights must be float32 or {hidden_TH.dtype}, got {topk_weights_TK.dtype}"
        )
    _device("topk_weights", topk_weights_TK, hidden_TH)


def check_weights(weights: ExpertWeights, spec: ExpertSpec, hidden_TH: Tensor) -> None:
    """Check that the weight tensors are those of `spec`, with the dtype and device of the input.

    Raises:
        TypeError: a dtype differs from that of the hidden states.
        ValueError: a tensor is missing, not wanted, of another shape, device or not contiguous.
    """
    shapes, present = spec.weight_shapes(), weights.named()
    if shapes.keys() != present.keys():
        raise ValueError(
            f"weights must be exactly {sorted(shapes)} for this ExpertSpec, got {sorted(present)}"
        )
    for name, shape in shapes.items():
        tensor = present[name]
        _shape(name, tensor, shape, "see ExpertSpec.weight_shapes()")
        check_same(name, tensor, hidden_TH)
    check_contiguous(weights)


def check_contiguous(weights: ExpertWeights) -> None:
    """Check that each weight lies in one piece, as the kernels read it.

    Raises:
        ValueError: one does not.
    """
    for name, tensor in weights.named().items():
        if not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous, got strides {tensor.stride()}; "
                "call .contiguous() once, outside the forward"
            )


def counters_mark(counters: Tensor) -> tuple[int, int] | None:
    """Experts and device of counters that `check_counters` has found right, else None; they stay
    the same over many calls."""
    mark: tuple[int, int] | None = getattr(counters, "_counts_of", None)
    return mark


def check_counters(counters: Tensor, num_experts: int, like: Tensor) -> None:
    """Check the counters of routed tokens, rows and tiles of one layer.

    Raises:
        TypeError: they are not int32.
        ValueError: their shape is not (3, E), or they are not on the device of `like`.
    """
    if counters_mark(counters) == (num_experts, like.get_device()):
        return
    if (
        counters.dtype is torch.int32
        and counters.shape == (3, num_experts)
        and counters.device == like.device
        and counters.is_contiguous()
    ):
        # What was found right is written on the tensor.
        counters._counts_of = num_experts, like.get_device()  # type: ignore[attr-defined]
        return
    if counters.dtype != torch.int32:
        raise TypeError(f"counters must be int32, got {counters.dtype}")
    _shape("counters", counters, (3, num_experts))
    raise ValueError(
        f"counters must be contiguous and on {like.device}, got strides {counters.stride()} "
        f"on {counters.device}; attach the profiler after moving the model"
    )


def check_route(logits_TE: Tensor, spec: RouterSpec, bias_E: Tensor | None) -> None:
    """Check the inputs of `route`.

    Raises:
        TypeError: a dtype is not supported.
        ValueError: a shape or device is wrong, a bias is given to a router that has none, or
            (where values are checked) a logit is NaN.
    """
    if logits_TE.dtype not in FLOATS:
        raise TypeError(f"logits must be float32, float16 or bfloat16, got {logits_TE.dtype}")
    if logits_TE.dim() != 2 or logits_TE.shape[1] != spec.num_experts:
        raise ValueError(
            f"logits must have shape (T, {spec.num_experts}), got {tuple(logits_TE.shape)}"
        )
    if bias_E is not None:
        if spec.scoring != "sigmoid":
            raise ValueError(
                f"a correction bias needs scoring='sigmoid', got scoring={spec.scoring!r}"
            )
        _shape("bias", bias_E, (spec.num_experts,))
        _device("bias", bias_E, logits_TE)
        if bias_E.dtype != torch.float32:
            raise TypeError(f"bias must be float32, got {bias_E.dtype}")
    if checks_values(logits_TE):
        refuse_nan(logits_TE)


def refuse_nan(logits_TE: Tensor) -> None:
    """Read the logits of a router and refuse NaN among them.

    Raises:
        ValueError: a logit is NaN.
    """
    nan_T = torch.isnan(logits_TE).any(dim=1)
    if bool(nan_T.any()):
        raise ValueError(
            f"logits must not be NaN, got NaN in row {int(nan_T.nonzero()[0])}; "
            "the model diverged before the router"
        )
