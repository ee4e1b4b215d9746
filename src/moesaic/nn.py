"""`MoE`: a router and its experts as one `nn.Module`, weights in transformers' layouts.

    B... leading dims · T tokens · H hidden width · E experts · K top-k

>>> layer = MoE(
...     RouterSpec(num_experts=8, top_k=2),
...     ExpertSpec(num_experts=8, hidden_size=64, intermediate_size=128),
... )
>>> layer(torch.randn(2, 5, 64)).shape
torch.Size([2, 5, 64])
>>> sorted(layer.state_dict())
['experts.down_proj', 'experts.gate_up_proj', 'gate.weight']
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from .dispatch import Impl
from .functional import moe, route
from .packing import PackedWeights, pack
from .types import ExpertSpec, ExpertWeights, RouterSpec, Routing


def parameter_names(spec: ExpertSpec) -> dict[str, str]:
    """The state_dict name of each weight tensor of `spec`, as transformers calls it."""
    first = "gate_up_proj" if spec.gated else "up_proj"
    names = {"up": first, "down": "down_proj", "mid": "mid_proj"}
    names |= {f"{weight}_bias": f"{name}_bias" for weight, name in names.items()}
    return {weight: names[weight] for weight in spec.weight_shapes()}


class Experts(nn.Module):
    """The experts of one layer; call it with hidden states, ids and weights of the routing.

    On the CPU, `pack_` makes inference faster for about twice the memory. The pack is no part of
    the state_dict nor of copies; `train()`, `load_state_dict()` and `to()` drop it.

    While `counters` (3, E) int32 are there, calls count into them: see `runtime.profiler`. Copies
    count nothing.
    """

    counters: Tensor | None

    def __init__(
        self,
        spec: ExpertSpec,
        *,
        impl: Impl = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.spec, self.impl = spec, impl
        self.packed: PackedWeights | None = None
        self.counters = None
        for weight, shape in spec.weight_shapes().items():
            empty = torch.empty(shape, device=device, dtype=dtype)
            self.register_parameter(parameter_names(spec)[weight], nn.Parameter(empty))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights of variance 1 / fan-in, zero biases."""
        for weight, name in parameter_names(self.spec).items():
            parameter = self.get_parameter(name)
            if weight.endswith("_bias"):
                nn.init.zeros_(parameter)
            else:
                fan_in = parameter.shape[1 if self.spec.transposed else 2]
                nn.init.normal_(parameter, std=fan_in**-0.5)

    def weights(self) -> ExpertWeights:
        """The parameters as the functional interface takes them."""
        names = parameter_names(self.spec)
        return ExpertWeights(**{weight: getattr(self, name) for weight, name in names.items()})

    def pack_(self) -> Experts:
        """Pack the weights for inference on the CPU, as `packing.pack` does; returns the layer.

        Raises:
            TypeError, ValueError, RuntimeError: see `packing.pack`; the layer is in training mode.
        """
        if self.training:
            raise RuntimeError("a layer in training mode cannot be packed; call .eval() first")
        self.packed = pack(self.weights(), self.spec)
        return self

    def unpack_(self) -> Experts:
        """Drop the packed copy, if there is one, and its memory; returns the layer."""
        self.packed = None
        return self

    def train(self, mode: bool = True) -> Experts:
        """As in `nn.Module`; training drops the pack."""
        if mode:
            self.unpack_()
        return super().train(mode)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Experts:
        self.unpack_()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        self.unpack_()
        super()._load_from_state_dict(*args)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "packed": None, "counters": None, "kept_counters": None}

    def forward(self, hidden_TH: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        """Output (T, H) of `moe` on this layer's weights; raises as `moe` does."""
        plain = self.weights()
        weights = plain if self.packed is None else self.packed.of(plain)
        return moe(
            hidden_TH,
            topk_ids_TK,
            topk_weights_TK,
            weights,
            self.spec,
            impl=self.impl,
            counters=self.counters,
        )


class MoE(nn.Module):
    """A Mixture-of-Experts layer: linear router, top-k, experts, weighted sum.

    Args:
        router: how logits become a choice.
        experts: shape and arithmetic of the experts.
        impl: implementation of the experts, see `moe`.

    Raises:
        ValueError: router and experts disagree on the number of experts.
    """

    def __init__(
        self,
        router: RouterSpec,
        experts: ExpertSpec,
        *,
        impl: Impl = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if router.num_experts != experts.num_experts:
            raise ValueError(
                f"router and experts must have the same num_experts, "
                f"got {router.num_experts} and {experts.num_experts}"
            )
        self.router = router
        kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        self.gate = nn.Linear(experts.hidden_size, experts.num_experts, bias=False, **kwargs)
        self.experts = Experts(experts, impl=impl, device=device, dtype=dtype)
        if router.scoring == "sigmoid":
            bias_E = torch.zeros(router.num_experts, device=device, dtype=torch.float32)
            self.register_buffer("e_score_correction_bias", bias_E)

    def route(self, hidden_TH: Tensor) -> Routing:
        """The routing of hidden states (T, H)."""
        bias_E = getattr(self, "e_score_correction_bias", None)
        logits_TE = self.gate(hidden_TH)
        return route(logits_TE, self.router, bias_E=bias_E, counters=self.experts.counters)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The layer's output, same shape (..., H) and dtype as `hidden_states`."""
        hidden_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        routing = self.route(hidden_TH)
        out_TH: Tensor = self.experts(hidden_TH, routing.topk_ids_TK, routing.topk_weights_TK)
        return out_TH.view_as(hidden_states)


def attach(model: nn.Module, **options: Any) -> Any:
    """Run a loaded transformers model through moesaic: `integrations.attach.attach`, which has the
    options, the result and the errors.

    Raises:
        ImportError: transformers is missing.
    """
    return _attaching().attach(model, **options)


def detach(model: nn.Module) -> None:
    """Put back what `attach` changed: `integrations.attach.detach`."""
    _attaching().detach(model)


def _attaching() -> Any:
    # transformers is needed by those who attach, and by nobody else.
    return import_module(".integrations.attach", __package__)
