"""What is measured: named models as shapes, routings as generators, fresh random data.

    T tokens · H hidden width · I intermediate width · E experts · K top-k

Every routing gives K different experts per token. `uniform`: all sets alike likely. `zipf1`
(`zipf<s>`): popularity 1 / rank^s over a random order of the experts, drawn without replacement.
`worst`: every token to the same K experts. `curve`: the popularity is a recorded load curve,
resampled to E.

>>> ids = routing_ids("worst", tokens=3, num_experts=8, top_k=2, generator=torch.Generator())
>>> ids.shape, len(ids.unique())
(torch.Size([3, 2]), 2)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..cost import expert_weight_elements
from ..types import ExpertSpec, ExpertWeights

Kind = Literal["swiglu", "gpt-oss", "relu3"]


@dataclass(frozen=True)
class Model:
    """The MoE layer of a model: E, K, H, I, its arithmetic, and its family in transformers."""

    name: str
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    kind: Kind = "swiglu"
    family: str = "mixtral"

    def spec(self) -> ExpertSpec:
        """The expert spec of this layer."""
        e, h, i = self.num_experts, self.hidden_size, self.intermediate_size
        if self.kind == "relu3":
            return ExpertSpec(
                num_experts=e, hidden_size=h, intermediate_size=i,
                activation="relu", gated=False, layers=3, bias=True,
            )  # fmt: skip
        if self.kind == "gpt-oss":
            return ExpertSpec(
                num_experts=e, hidden_size=h, intermediate_size=i, interleaved=True,
                transposed=True, bias=True, limit=7.0, alpha=1.702, up_offset=1.0,
            )  # fmt: skip
        return ExpertSpec(num_experts=e, hidden_size=h, intermediate_size=i)


MODELS: dict[str, Model] = {
    m.name: m
    for m in (
        Model("Mixtral-8x7B", 8, 2, 4096, 14336, family="mixtral"),
        Model("Qwen3-30B-A3B", 128, 8, 2048, 768, family="qwen3_moe"),
        Model("Qwen3-235B-A22B", 128, 8, 4096, 1536, family="qwen3_moe"),
        Model("DeepSeek-V3", 256, 8, 7168, 2048, family="deepseek_v3"),
        Model("gpt-oss-120b", 128, 4, 2880, 2880, kind="gpt-oss", family="gpt_oss"),
        Model("OLMoE", 64, 8, 2048, 1024, family="olmoe"),
        Model("paper-small", 8, 2, 512, 1024, kind="relu3", family="paper"),
        Model("paper-medium", 16, 2, 1024, 2048, kind="relu3", family="paper"),
        Model("paper-large", 32, 4, 2048, 4096, kind="relu3", family="paper"),
    )
}


class Inputs(NamedTuple):
    """One call's input: hidden (T, H), ids (T, K) int32, weights (T, K) fp32 that sum to one."""

    hidden_TH: Tensor
    topk_ids_TK: Tensor
    topk_weights_TK: Tensor


def popularity(routing: str, num_experts: int, curve: Sequence[float] | None = None) -> Tensor:
    """The share (E,) fp32, best first, in which a routing wants the experts.

    Raises:
        ValueError: the routing has no such name, or `curve` is asked for and missing.
    """
    ranks_E = torch.arange(1, num_experts + 1, dtype=torch.float64)
    if routing == "uniform":
        shares_E = torch.ones_like(ranks_E)
    elif routing.startswith("zipf"):
        shares_E = ranks_E ** -float(routing.removeprefix("zipf") or 1)
    elif routing == "curve":
        if not curve:
            raise ValueError("routing 'curve' needs a recorded load curve (loads per expert)")
        shares_E = resample(curve, num_experts)
    else:
        raise ValueError(f"routing must be uniform, zipf<s>, worst or curve, got {routing!r}")
    return (shares_E / shares_E.sum()).float()


def resample(curve: Sequence[float], num_experts: int) -> Tensor:
    """Sorted loads of another number of experts as a curve (E,) over `num_experts`, best first."""
    sorted_loads = torch.tensor(sorted(curve, reverse=True), dtype=torch.float64)[None, None]
    return torch.nn.functional.interpolate(
        sorted_loads, size=num_experts, mode="linear", align_corners=True
    )[0, 0].clamp_min(1e-9)


def routing_ids(
    routing: str,
    *,
    tokens: int,
    num_experts: int,
    top_k: int,
    generator: torch.Generator,
    curve: Sequence[float] | None = None,
) -> Tensor:
    """Ids (T, K) int32 on the generator's device, K different experts per token."""
    device = generator.device
    order_E = torch.randperm(num_experts, generator=generator, device=device)
    if routing == "worst":
        return order_E[:top_k].to(torch.int32).expand(tokens, top_k).contiguous()
    shares_E = popularity(routing, num_experts, curve).to(device)
    uniform_TE = torch.rand(tokens, num_experts, generator=generator, device=device)
    # The K largest of log p + Gumbel noise are a draw without replacement.
    noise_TE = -torch.log(-torch.log(uniform_TE.clamp(1e-20, 1 - 1e-7)))
    chosen_TK = (shares_E.log() + noise_TE).topk(top_k, dim=-1).indices
    return order_E[chosen_TK].to(torch.int32)


def make_inputs(
    model: Model,
    tokens: int,
    routing: str,
    *,
    dtype: torch.dtype,
    generator: torch.Generator,
    curve: Sequence[float] | None = None,
) -> Inputs:
    """Fresh random hidden states and a routing, on the generator's device."""
    device = generator.device
    hidden_TH = torch.randn(
        tokens, model.hidden_size, generator=generator, device=device, dtype=torch.float32
    ).to(dtype)
    ids_TK = routing_ids(
        routing,
        tokens=tokens,
        num_experts=model.num_experts,
        top_k=model.top_k,
        generator=generator,
        curve=curve,
    )
    logits_TK = torch.randn(tokens, model.top_k, generator=generator, device=device)
    return Inputs(hidden_TH, ids_TK, logits_TK.softmax(-1))


def make_weights(
    spec: ExpertSpec, *, dtype: torch.dtype, generator: torch.Generator
) -> ExpertWeights:
    """Fresh normal weights of variance 1 / fan-in and small biases, on the generator's device."""
    tensors: dict[str, Tensor] = {}
    for name, shape in spec.weight_shapes().items():
        fan_in = shape[1 if spec.transposed else -1]
        std = 0.02 if name.endswith("_bias") else fan_in**-0.5
        empty = torch.empty(shape, dtype=dtype, device=generator.device)
        tensors[name] = empty.normal_(0.0, std, generator=generator)
    return ExpertWeights(**tensors)


def weight_bytes(spec: ExpertSpec, itemsize: int) -> int:
    """Bytes of all experts' weights."""
    return spec.num_experts * expert_weight_elements(spec) * itemsize
