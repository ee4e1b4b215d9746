"""What moesaic is measured against, each at its best: one function a baseline, one signature.

    T tokens · H hidden width · I intermediate width · E experts · K top-k · S = T*K routed rows

A baseline builds, from a model and its weights, a function of (hidden, ids, weights). The weights
are shared, never copied. `prepare` gives ids and routing weights in the dtypes that the baseline
likes best, outside the timing.

- `transformers-eager`, `-grouped_mm`, `-batched_mm`: the model family's own experts class.
- `torch-grouped-mm`: the leanest layer of `torch.nn.functional.grouped_mm`, two products (three for
  three-layer experts), sorted without a host sync, so that it can be captured.
- `liger-fused-moe`: Liger Kernel's fused experts, where that package is installed.
- `torch-loop`: one sort, one read of the counts, then expert after expert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cost import expert_weight_elements
from ..kernels.activation import activate_ref, pointwise_ref
from ..types import ExpertSpec, ExpertWeights
from .workloads import Inputs, Model

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]
Build = Callable[[Model, ExpertWeights], Forward]

LIGER = "liger-fused-moe"
TRANSFORMERS_CLASSES = {
    "mixtral": ("mixtral", "MixtralExperts"),
    "qwen3_moe": ("qwen3_moe", "Qwen3MoeExperts"),
    "deepseek_v3": ("deepseek_v3", "DeepseekV3Experts"),
    "gpt_oss": ("gpt_oss", "GptOssExperts"),
    "olmoe": ("olmoe", "OlmoeExperts"),
}


class Unavailable(RuntimeError):
    """A baseline cannot run here; the message is the reason."""


@dataclass(frozen=True)
class Baseline:
    """A named baseline; `refuses` says why it cannot run a model at so many tokens, or None."""

    name: str
    build: Build
    refuses: Callable[[Model, int, torch.dtype, int], str | None]


def prepare(inputs: Inputs) -> Inputs:
    """Inputs as models of the field pass them: int64 ids, routing weights in the model's dtype."""
    hidden_TH, ids_TK, weights_TK = inputs
    return Inputs(hidden_TH, ids_TK.long(), weights_TK.to(hidden_TH.dtype))


def transformers_experts(model: Model, weights: ExpertWeights, implementation: str) -> nn.Module:
    """The experts module of the model's family, `weights` installed without a copy.

    Raises:
        Unavailable: transformers is not installed or has no such class.
    """
    if model.family not in TRANSFORMERS_CLASSES:
        raise Unavailable(f"transformers has no {model.family} experts")
    package, name = TRANSFORMERS_CLASSES[model.family]
    try:
        module = import_module(f"transformers.models.{package}.modeling_{package}")
        experts_class = getattr(module, name)
    except (ImportError, AttributeError) as error:
        raise Unavailable(f"transformers with {name} is not installed: {error}") from error
    config = SimpleNamespace(
        num_experts=model.num_experts,
        num_local_experts=model.num_experts,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        moe_intermediate_size=model.intermediate_size,
        hidden_act="silu",
        # Read by GptOssExperts in newer versions; before, constants of the class.
        swiglu_alpha=model.spec().alpha,
        swiglu_limit=model.spec().limit,
        _experts_implementation=implementation,
    )
    with torch.device("meta"):
        experts: nn.Module = experts_class(config)
    names = {"up": "gate_up_proj", "down": "down_proj"}
    names |= {f"{ours}_bias": f"{theirs}_bias" for ours, theirs in names.items()}
    for ours, tensor in weights.named().items():
        wanted = tuple(experts.get_parameter(names[ours]).shape)
        if wanted != tuple(tensor.shape):
            raise Unavailable(f"{name}.{names[ours]} is {wanted}, ours {tuple(tensor.shape)}")
        setattr(experts, names[ours], nn.Parameter(tensor, requires_grad=False))
    left = [n for n, p in experts.named_parameters() if p.is_meta]
    if left:
        raise Unavailable(f"{name} has parameters without weights: {', '.join(left)}")
    return experts


def _transformers(implementation: str) -> Build:
    def build(model: Model, weights: ExpertWeights) -> Forward:
        experts: Any = transformers_experts(model, weights, implementation)
        return lambda hidden_TH, ids_TK, weights_TK: experts(hidden_TH, ids_TK, weights_TK)

    return build


def _activate(product_SU: Tensor, spec: ExpertSpec) -> Tensor:
    """The activation in as few launches as torch has for it."""
    if not spec.gated and spec.activation == "relu":
        return product_SU.relu_()
    if spec.gated and spec.activation == "silu" and not spec.interleaved and spec.alpha == 1.0:
        gate_SI, up_SI = product_SU.chunk(2, dim=-1)
        return F.silu(gate_SI).mul_(up_SI)
    return activate_ref(
        product_SU,
        activation=spec.activation,
        gated=spec.gated,
        interleaved=spec.interleaved,
        limit=spec.limit,
        alpha=spec.alpha,
        up_offset=spec.up_offset,
    )


def torch_grouped_mm(model: Model, weights: ExpertWeights) -> Forward:
    """Sort, gather, two or three `grouped_mm`, weighted sum: no host sync, capturable."""
    spec, named = model.spec(), weights.named()
    experts_E = torch.arange(spec.num_experts, device=weights.up.device)

    def linear(rows: Tensor, name: str, offsets_E: Tensor, ids_S: Tensor) -> Tensor:
        matrix = named[name] if spec.transposed else named[name].transpose(-2, -1)
        out = F.grouped_mm(rows, matrix, offs=offsets_E)
        bias = named.get(f"{name}_bias")
        return out if bias is None else out.add_(bias[ids_S])

    def forward(hidden_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        tokens, top_k = ids_TK.shape
        ids_S, order_S = ids_TK.reshape(-1).sort()
        offsets_E = torch.searchsorted(ids_S, experts_E, right=True, out_int32=True)
        rows = linear(hidden_TH[order_S // top_k], "up", offsets_E, ids_S)
        rows = _activate(rows, spec)
        if spec.layers == 3:
            rows = _activate(linear(rows, "mid", offsets_E, ids_S), spec)
        rows_SH = linear(rows, "down", offsets_E, ids_S)
        position_S = torch.empty_like(order_S)
        position_S[order_S] = torch.arange(order_S.numel(), device=order_S.device)
        slots_TKH = rows_SH[position_S].view(tokens, top_k, -1)
        return torch.bmm(weights_TK[:, None, :], slots_TKH)[:, 0]

    return forward


def torch_loop(model: Model, weights: ExpertWeights) -> Forward:
    """Expert after expert over its contiguous rows, after one sort and one read of the counts."""
    spec, named = model.spec(), weights.named()

    def linear(rows: Tensor, name: str, e: int) -> Tensor:
        matrix = named[name][e] if spec.transposed else named[name][e].T
        bias = named.get(f"{name}_bias")
        return rows @ matrix if bias is None else torch.addmm(bias[e], rows, matrix)

    def expert(rows: Tensor, e: int) -> Tensor:
        if spec.layers == 3:
            first = pointwise_ref(linear(rows, "up", e), spec.activation, spec.alpha)
            return linear(pointwise_ref(linear(first, "mid", e), spec.activation), "down", e)
        return linear(_activate(linear(rows, "up", e), spec), "down", e)

    def forward(hidden_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        top_k = ids_TK.shape[1]
        flat_S = ids_TK.reshape(-1)
        order_S = flat_S.argsort()
        tokens_S = order_S // top_k
        scales_S = weights_TK.reshape(-1)[order_S]
        out_TH = torch.zeros_like(hidden_TH)
        start = 0
        for e, count in enumerate(flat_S.bincount(minlength=spec.num_experts).tolist()):
            if count:
                here = slice(start, start + count)
                rows_RH = expert(hidden_TH[tokens_S[here]], e)
                out_TH.index_add_(0, tokens_S[here], rows_RH.mul_(scales_S[here, None]))
                start += count
        return out_TH

    return forward


def liger_fused(model: Model, weights: ExpertWeights) -> Forward:
    """Liger Kernel's fused experts: gather, product and SwiGLU in one Triton launch, then down.

    It tunes itself once for a pair of widths, on the first call it sees: here 1024 tokens.

    Raises:
        Unavailable: liger-kernel is not installed, or the experts are no plain SwiGLU.
    """
    if model.kind != "swiglu":
        raise Unavailable("liger-kernel's fused experts are plain SwiGLU")
    try:
        fused: Any = import_module("liger_kernel.ops.fused_moe").LigerFusedMoEFunction
    except ImportError as error:
        raise Unavailable(f"liger-kernel is not installed: {error}") from error

    def forward(hidden_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        out_TH: Tensor = fused.apply(hidden_TH, weights.up, weights.down, ids_TK, weights_TK)
        return out_TH

    up = weights.up
    slots = torch.arange(1024 * model.top_k, dtype=torch.int32, device=up.device)
    ids_TK = (slots % model.num_experts).view(1024, model.top_k)
    with torch.no_grad():
        forward(
            torch.randn(1024, model.hidden_size, dtype=up.dtype, device=up.device), ids_TK,
            torch.full(ids_TK.shape, 1 / model.top_k, device=up.device),
        )  # fmt: skip
    return forward


def _never(model: Model, tokens: int, dtype: torch.dtype, limit_bytes: int) -> str | None:
    return None


def _gathers_weights(model: Model, tokens: int, dtype: torch.dtype, limit_bytes: int) -> str | None:
    """batched_mm copies an expert's weights for every routed row."""
    slots = tokens * model.top_k
    needed = slots * expert_weight_elements(model.spec()) * dtype.itemsize
    if needed <= limit_bytes:
        return None
    gib = 2**30
    return (
        f"gathers the weights of {slots} rows, {needed / gib:.1f} GiB, "
        f"over the limit of {limit_bytes / gib:.1f} GiB"
    )


BASELINES: dict[str, Baseline] = {
    b.name: b
    for b in (
        Baseline("transformers-eager", _transformers("eager"), _never),
        Baseline("transformers-grouped_mm", _transformers("grouped_mm"), _never),
        Baseline("transformers-batched_mm", _transformers("batched_mm"), _gathers_weights),
        Baseline("torch-grouped-mm", torch_grouped_mm, _never),
        Baseline("torch-loop", torch_loop, _never),
        Baseline(LIGER, liger_fused, _never),
    )
}


def baselines_of(model: Model) -> list[Baseline]:
    """The baselines that know the model's arithmetic, best known first."""
    if model.family in TRANSFORMERS_CLASSES:
        names = [n for n in BASELINES if n not in ("torch-loop", LIGER)]
    else:
        names = ["torch-grouped-mm", "torch-loop"]
    return [BASELINES[name] for name in names]
