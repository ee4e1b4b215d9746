"""transformers: importing this module registers `experts_implementation="moesaic"`.

    T tokens · H hidden width · E experts · K top-k

    import moesaic.integrations.transformers
    model = AutoModelForCausalLM.from_pretrained(path, experts_implementation="moesaic")

The registered function takes the place of the loop over experts in every family that uses
transformers' experts interface; parameters keep their names and layouts, so checkpoints, sharding
and adapters are what they were. `moesaic.attach` does the same to a loaded model and more.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..dispatch import Impl
from ..functional import moe
from ..types import ExpertWeights
from .layouts import spec_of, unsupported, weights_of

NAME = "moesaic"
TESTED = ((5, 17), (5, 24))  # from the first to before the second; both ends were run
STATE = "_moesaic"
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


def _local_slots(
    module: nn.Module, experts: int, topk_ids_TK: Tensor, topk_weights_TK: Tensor
) -> tuple[Tensor, Tensor]:
    """Ids and weights with the slots of other ranks' experts as weight 0 of expert 0.

    Under transformers' expert parallelism a slot whose expert is elsewhere has the id E.
    """
    config = getattr(module, "config", None)
    whole = any(getattr(config, name, None) == experts for name in EXPERT_COUNTS)
    if whole and not getattr(module, "_is_expert_parallel", False):
        return topk_ids_TK, topk_weights_TK
    here_TK = topk_ids_TK < experts
    return topk_ids_TK * here_TK, topk_weights_TK * here_TK


def _computing_dtype(hidden_TH: Tensor, weights: ExpertWeights) -> torch.dtype:
    """Autocast's dtype inside autocast, else that of the weights, as transformers' grouped_mm."""
    kind = hidden_TH.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return weights.up.dtype


def moesaic_experts(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The output (T, H) of an experts module; the signature is transformers'.

    Raises:
        UnsupportedExperts: the module has an activation, a gate, a dtype or a width without kernel.
        TypeError, ValueError: see `moesaic.moe`.
    """
    state = getattr(self, STATE, None)
    if state is not None and state.fallback is not None:
        instead = fallback_function(self, state.fallback)
        fallen_TH: Tensor = instead(self, hidden_states, top_k_index, top_k_weights)
        return fallen_TH
    if state is not None and state.spread is not None:
        if state.observe is not None and not torch.compiler.is_compiling():
            state.observe(state, top_k_index)
        spread_TH: Tensor = state.spread(hidden_states, top_k_index, top_k_weights)
        return spread_TH
    weights = weights_of(self)
    spec = spec_of(self, weights)
    dtype = _computing_dtype(hidden_states, weights)
    if weights.up.dtype != dtype:
        weights = ExpertWeights(**{k: v.to(dtype) for k, v in weights.named().items()})
    if state is not None and state.observe is not None and not torch.compiler.is_compiling():
        state.observe(state, top_k_index)
    ids_TK, scales_TK = _local_slots(self, weights.down.shape[0], top_k_index, top_k_weights)
    if scales_TK.dtype not in (torch.float32, dtype):
        scales_TK = scales_TK.float()
    hidden_TH = hidden_states.reshape(-1, hidden_states.shape[-1]).to(dtype)
    impl: Impl = "auto" if state is None else state.impl
    counters = getattr(self, "counters", None)
    num_sms = None if state is None else state.num_sms
    out_TH = moe(
        hidden_TH, ids_TK, scales_TK, weights, spec, impl=impl, counters=counters, num_sms=num_sms
    )
    return out_TH.view(hidden_states.shape).to(hidden_states.dtype)


def fallback_function(module: nn.Module, name: str) -> Any:
    """The experts function that the user asked for by name, for a layer that moesaic cannot run.

    Raises:
        ValueError: transformers has none of that name.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if name == "eager":
        return type(module).forward.__wrapped__  # type: ignore[attr-defined]
    if name == NAME or name not in ALL_EXPERTS_FUNCTIONS:
        known = ["eager", *sorted(n for n in ALL_EXPERTS_FUNCTIONS if n != NAME)]
        raise ValueError(f"fallback must be one of {known}, got {name!r}")
    return ALL_EXPERTS_FUNCTIONS[name]


def moesaic_fp8_experts(self: nn.Module, *arguments: Any) -> Tensor:
    """Refuses: there are no FP8 kernels yet.

    Raises:
        UnsupportedExperts: always.
    """
    raise unsupported(self, "weights", "are FP8 blocks, for which moesaic has no kernels yet")


def check_version(version: str) -> None:
    """Warn when a version of transformers lies outside the tested range."""
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if not TESTED[0] <= numbers < TESTED[1]:
        low, high = (".".join(map(str, bound)) for bound in TESTED)
        warnings.warn(
            f"moesaic is tested with transformers >= {low}, < {high}, this is {version}; compare "
            "the logits of your model with experts_implementation='eager' once",
            stacklevel=3,
        )


def register() -> None:
    """Register the name in both of transformers' registries; again and again is harmless.

    Raises:
        ImportError: transformers is missing or has no experts interface; says which it needs.
    """
    try:
        from transformers import __version__
        from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface
        from transformers.integrations.moe import ExpertsInterface
    except ImportError as error:
        raise ImportError(
            f"moesaic.integrations.transformers needs transformers >= 5.17 ({error}); "
            "pip install 'moesaic[transformers]'"
        ) from error
    ExpertsInterface.register(NAME, moesaic_experts)
    FP8ExpertsInterface.register(NAME, moesaic_fp8_experts)
    check_version(__version__)


register()
