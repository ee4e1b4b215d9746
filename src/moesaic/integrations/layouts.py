"""How transformers' experts modules hold their weights, read off the module at every call.

    T tokens · H hidden width · I intermediate width · E experts · K top-k

transformers marks an experts class with four flags (`has_gate`, `has_bias`, `is_transposed`,
`is_concatenated`) and gives it an activation `act_fn` or an own `_apply_gate`. From these and the
shapes of the weights comes an `ExpertSpec`. Nothing is kept: a module that was sharded, cast or
wrapped since the last call is read as it is now. All of it can be traced by `torch.compile`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F

from ..types import ExpertSpec, ExpertWeights

# Class of an `act_fn` -> activation of `ExpertSpec`.
ACTIVATIONS = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "ReLU": "relu",
    "ReLUSquaredActivation": "relu2",
}

# Experts classes with an own `_apply_gate`: names of the attributes that hold the clamp and the
# factor of the sigmoid (None: 1), and what is added to `up`.
OWN_GATES: dict[str, tuple[str, str | None, float]] = {
    "DeepseekV4Experts": ("limit", None, 0.0),
    "Glm5NextTextExperts": ("swiglu_limit", None, 0.0),
    "HYV4Experts": ("swiglu_limit", None, 0.0),
    "MiniMaxM3VLExperts": ("swiglu_limit", "swiglu_alpha", 1.0),
    "GptOssExperts": ("limit", "alpha", 1.0),
    "OpenAIPrivacyFilterExperts": ("limit", "alpha", 1.0),
}
FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")


class UnsupportedExperts(ValueError):
    """An experts module that moesaic cannot run; the message has family, attribute and remedy."""


def family_of(module: nn.Module) -> str:
    """The transformers family of a module, such as "mixtral", or its class's module."""
    for cls in type(module).__mro__:  # a parametrised module has a class made for it
        parts = cls.__module__.split(".")
        if parts[0] == "transformers" and len(parts) > 2:
            return parts[-2]
    return type(module).__module__.split(".")[0]


def unsupported(module: nn.Module, attribute: str, problem: str) -> UnsupportedExperts:
    """The error for one attribute of an experts module."""
    return UnsupportedExperts(
        f"{family_of(module)} ({type(module).__name__}): {attribute} {problem}; for the whole "
        "model use experts_implementation='grouped_mm', for such layers alone "
        "moesaic.attach(model, fallback='grouped_mm')"
    )


def is_experts(module: nn.Module) -> bool:
    """Whether a module is one of transformers' experts with the interface."""
    return all(flag in vars(module) for flag in FLAGS)


def _activation(module: nn.Module) -> str:
    """The activation of a module by the class of its `act_fn`."""
    act = getattr(module, "act_fn", None)
    if act is None or act is F.silu:
        return "silu"
    name = getattr(act, "__name__", None) or type(act).__name__
    if name not in ACTIVATIONS:
        raise unsupported(module, "act_fn", f"is {name}, which has no kernel")
    return ACTIVATIONS[name]


def _gate(module: nn.Module) -> tuple[str, float | None, float, float]:
    """Activation, limit, alpha and up_offset of a gated module."""
    for cls in type(module).__mro__:
        if cls.__name__ in OWN_GATES:
            limit, alpha, offset = OWN_GATES[cls.__name__]
            factor = 1.0 if alpha is None else getattr(module, alpha)
            return _activation(module), getattr(module, limit), factor, offset
    if type(module)._apply_gate.__name__ != "_default_apply_gate":  # type: ignore[attr-defined]
        raise unsupported(module, "_apply_gate", "is the family's own, which is not known here")
    return _activation(module), None, 1.0, 0.0


@lru_cache(maxsize=4096)
def _make_spec(
    experts: int, hidden: int, intermediate: int, activation: str, flags: tuple[bool, ...],
    limit: float | None, alpha: float, up_offset: float,
) -> ExpertSpec:  # fmt: skip
    gated, bias, transposed, concatenated = flags
    return ExpertSpec(
        num_experts=experts,
        hidden_size=hidden,
        intermediate_size=intermediate,
        activation=activation,  # type: ignore[arg-type]
        gated=gated,
        bias=bias,
        transposed=transposed,
        interleaved=gated and not concatenated,
        limit=None if limit is None else float(limit),
        alpha=float(alpha),
        up_offset=up_offset,
    )


class TracedSpec:
    """What stands for a spec in a traced function, which can hold its key but not build it."""

    def __init__(self, key: str) -> None:
        self._key = key

    def key(self) -> str:
        """As `ExpertSpec.key`."""
        return self._key


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _spec_key(*values: Any) -> str:
    """The key of the spec of these values; the tracer calls it and keeps what comes out."""
    return _make_spec(*values).key()


def weights_of(module: nn.Module) -> ExpertWeights:
    """The weight tensors of an experts module, each attribute read once."""
    first = "gate_up_proj" if module.has_gate else "up_proj"
    up, down = getattr(module, first), module.down_proj
    if not module.has_bias:
        return ExpertWeights(up, down)  # type: ignore[arg-type]
    return ExpertWeights(up, down, getattr(module, f"{first}_bias"), module.down_proj_bias)  # type: ignore[arg-type]


def spec_of(module: nn.Module, weights: ExpertWeights) -> ExpertSpec:
    """The spec of an experts module with these weights.

    Raises:
        UnsupportedExperts: an activation, gate, dtype or width has no kernel; says which.
    """
    if weights.up.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise unsupported(module, "weights", f"are {weights.up.dtype}, not fp32, fp16 or bf16")
    gated = bool(module.has_gate)
    if gated:
        activation, limit, alpha, offset = _gate(module)
    else:
        activation, limit, alpha, offset = _activation(module), None, 1.0, 0.0
    transposed = bool(module.is_transposed)
    experts, width, hidden = (
        weights.down.shape if transposed else weights.down.transpose(1, 2).shape
    )
    if hidden % 8 or width % 8:
        raise unsupported(
            module, "down_proj", f"has widths H={hidden}, I={width}, which must be multiples of 8"
        )
    flags = (gated, bool(module.has_bias), transposed, bool(module.is_concatenated))
    values = (experts, hidden, width, activation, flags, limit, alpha, offset)
    if torch.compiler.is_compiling():
        return cast(ExpertSpec, TracedSpec(_spec_key(*values)))
    return _make_spec(*values)
