"""Which routers of transformers can be replaced by the fused `route`, found out by trying.

    T tokens · H hidden width · E experts · K top-k

A family's router is code, not data: which of the scoring rules of `RouterSpec` it follows cannot be
read off its attributes alone. So a copy of it with random weights is run on random hidden states,
in fp32 and in bf16, beside every rule that its attributes allow; the router is replaced only where
one rule gives the same logits, ids and weights. The replacement is the router's own `forward`
alone: parameters, hooks and the triple that it returns (logits, weights, ids) stay, so that
`output_router_logits` and recorders work. Its ids are int32, best first.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..functional import route
from ..ops import choose_op, one_launch, route_hidden_op
from ..types import RouterSpec
from ..validate import values_wanted

PLAN = "_moesaic_router"
TOKENS = 64
HALF = (torch.bfloat16, torch.float16)
BIAS = "e_score_correction_bias"
GROUPS = ("n_group", "num_group")


@dataclass(frozen=True)
class RouterPlan:
    """How a router computes: the rule, if logits are fp32, if weights take the dtype of logits."""

    spec: RouterSpec
    fp32: bool
    as_logits: bool


def fused_forward(self: nn.Module, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A router's `forward` by one product and one launch: logits (T, E), weights, ids (T, K)."""
    plan: RouterPlan = getattr(self, PLAN)
    weight: Tensor = self.get_parameter("weight")
    bias = getattr(self, "bias", None)
    hidden_TH = hidden_states.reshape(-1, weight.shape[1])
    correction = getattr(self, BIAS, None) if plan.spec.scoring == "sigmoid" else None
    correction = None if correction is None else correction.float()
    if _without_gradients(hidden_TH, weight, bias):
        rule = (plan.spec.key(), plan.fp32, plan.as_logits)
        outside = product_outside(hidden_TH, weight, bias, plan.fp32)
        if outside is not None:
            ids_TK, weights_TK = choose_op(outside, correction, rule[0], plan.as_logits)
            return outside, weights_TK, ids_TK
        logits_TE, ids_TK, weights_TK = route_hidden_op(hidden_TH, weight, bias, correction, *rule)
        return logits_TE, weights_TK, ids_TK
    logits_TE = _product(hidden_TH, weight, bias, plan.fp32)
    routing = route(logits_TE, plan.spec, bias_E=correction)
    dtype = logits_TE.dtype if plan.as_logits else torch.float32
    return logits_TE, routing.topk_weights_TK.to(dtype), routing.topk_ids_TK


def _product(hidden_TH: Tensor, weight_EH: Tensor, bias_E: Tensor | None, fp32: bool) -> Tensor:
    """Logits (T, E); `fp32`: in fp32, whatever it is given."""
    if fp32:
        hidden_TH, weight_EH = hidden_TH.float(), weight_EH.float()
        bias_E = None if bias_E is None else bias_E.float()
    return F.linear(hidden_TH, weight_EH, bias_E)


def product_outside(
    hidden_TH: Tensor, weight_EH: Tensor, bias_E: Tensor | None, fp32: bool
) -> Tensor | None:
    """Logits (1, E) of a single token that is compiled, else None: the op makes them.

    A compiler that is told to tune writes products of one row itself, fused with the norm before,
    which is faster where the op would not make product and choice in one launch. Logits in fp32 of
    16-bit states are the op's, by the tensor cores.
    """
    if fp32 or not torch.compiler.is_compiling() or hidden_TH.shape[0] != 1:
        return None
    if one_launch(1, len(weight_EH)):
        return None
    return _product(hidden_TH, weight_EH, bias_E, fp32)


def _without_gradients(hidden_TH: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the op without gradients may choose: 16 bits, no autocast, no values to check."""
    if not torch.compiler.is_compiling() and values_wanted():
        return False
    if hidden_TH.dtype != weight.dtype or hidden_TH.dtype not in HALF:
        return False
    leaves = (hidden_TH, weight) if bias is None else (hidden_TH, weight, bias)
    if torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves):
        return False
    return not torch.is_autocast_enabled(hidden_TH.device.type)


# Bound methods are pickled by name: a router that is unpickled finds its class's own forward.
fused_forward.__name__ = "forward"


def _shape_problem(router: nn.Module) -> str | None:
    """Why a router cannot be one of ours by its outside, or None."""
    if "forward" in vars(router):
        return "something else has replaced its forward"
    names = {name for name, _ in router.named_parameters()}
    if not {"weight"} <= names <= {"weight", "bias"}:
        return f"it has the parameters {sorted(names)}"
    buffers = {name for name, _ in router.named_buffers()}
    if not buffers <= {BIAS}:
        return f"it has the buffers {sorted(buffers)}"
    weight = router.get_parameter("weight")
    if weight.dim() != 2 or type(weight.data) is not Tensor:
        return "its weight is no plain matrix"
    if not isinstance(getattr(router, "top_k", None), int):
        return "it has no top_k"
    needed = [
        p for p in inspect.signature(type(router).forward).parameters.values()
        if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
    ]  # fmt: skip
    return None if len(needed) == 2 else "its forward takes more than hidden states"


def _apart(experts: int, width: int) -> Tensor:
    """A matrix (E, H) whose every column holds E different bf16 numbers in random order.

    Unit vectors as hidden states then give logits without ties, which bf16 has many of otherwise.
    """
    steps = torch.arange(768, dtype=torch.int32) + (torch.tensor(0.0625).view(torch.int32) >> 16)
    above = (steps << 16).view(torch.float32)
    values = torch.cat((-above.flip(0), above))
    chosen = values[torch.linspace(0, len(values) - 1, experts).long()]
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(experts, width, generator=generator).argsort(0)
    return chosen[order]


def _copy(router: nn.Module, weight: Tensor, noise: float) -> nn.Module:
    """A copy on the CPU, without hooks, with this weight; its bias and buffers are noise."""
    twin: nn.Module = object.__new__(type(router))
    nn.Module.__init__(twin)
    for name, value in vars(router).items():
        if not name.startswith("_"):
            setattr(twin, name, value)
    generator = torch.Generator().manual_seed(0)
    twin.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    if "bias" in router._parameters:
        bias = noise * torch.randn(len(weight), generator=generator)
        twin.register_parameter("bias", nn.Parameter(bias.to(weight.dtype), requires_grad=False))
    for name, tensor in router.named_buffers():
        twin.register_buffer(name, torch.randn(tensor.shape, generator=generator))
    return twin


def _specs(router: nn.Module, experts: int) -> Iterator[RouterSpec]:
    """Every rule that the attributes of a router allow."""
    top_k: int = router.top_k  # type: ignore[assignment]
    groups = next((g for name in GROUPS if (g := getattr(router, name, None))), 1)
    best = getattr(router, "topk_group", None) or 1
    factors = {v for v in vars(router).values() if isinstance(v, float)}
    for scale in (1.0, *sorted(factors - {1.0}), 1.0 / top_k):
        for scoring in ("sigmoid", "softmax", "topk_softmax"):
            for renormalize in (True, False):
                try:
                    yield RouterSpec(
                        num_experts=experts, top_k=top_k, scoring=scoring,
                        renormalize=renormalize, scale=scale,
                        n_group=groups if scoring == "sigmoid" else 1,
                        topk_group=best if scoring == "sigmoid" else 1,
                    )  # fmt: skip
                except ValueError:
                    continue


def _same(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> bool:
    """Same logits to the bit, same experts, same weight for each, same dtypes."""
    if ours[0].dtype != theirs[0].dtype or ours[1].dtype != theirs[1].dtype:
        return False
    if not torch.equal(ours[0], theirs[0]) or ours[2].shape != theirs[2].shape:
        return False
    dense = [
        torch.zeros(w.shape[0], logits.shape[1]).scatter(1, ids.long(), w.float())
        for logits, w, ids in (ours, theirs)
    ]
    tolerance = 1e-5 if ours[1].dtype == torch.float32 else 1e-2
    return torch.allclose(dense[0], dense[1], rtol=tolerance, atol=tolerance * 1e-2)


def _follows(plan: RouterPlan, twins: list[nn.Module], wanted: list[tuple[Tensor, ...]],
             hidden: list[Tensor]) -> bool:  # fmt: skip
    for twin, want, states_TH in zip(twins, wanted, hidden, strict=True):
        setattr(twin, PLAN, plan)
        if not _same(fused_forward(twin, states_TH), want):
            return False
    return True


@torch.no_grad()
def recognise(router: nn.Module) -> RouterPlan | str:
    """The plan by which `fused_forward` replaces a router's own, or why there is none."""
    problem = _shape_problem(router)
    if problem:
        return problem
    experts, width = router.get_parameter("weight").shape
    tokens = min(TOKENS, width)
    generator = torch.Generator().manual_seed(1)
    weight_EH = torch.randn(experts, width, generator=generator)
    apart_EH = _apart(experts, width).bfloat16()
    twins = [_copy(router, weight_EH, 1.0), _copy(router, apart_EH, 0.0)]
    states_TH = torch.randn(tokens, width, generator=generator)
    hidden = [states_TH, torch.eye(width, dtype=torch.bfloat16)[:tokens]]
    try:
        wanted = [type(t).forward(t, h) for t, h in zip(twins, hidden, strict=True)]
    except Exception as error:
        return f"a copy of it cannot run alone ({type(error).__name__}: {error})"[:200]
    if any(not isinstance(w, tuple) or len(w) != 3 for w in wanted):
        return "it does not return logits, weights and ids"
    for spec in _specs(router, experts):
        for fp32 in (False, True):
            for as_logits in (False, True):
                plan = RouterPlan(spec, fp32, as_logits)
                if _follows(plan, twins, wanted, hidden):
                    return plan
    return "it follows no rule of RouterSpec"
