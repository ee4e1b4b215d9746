"""Whole MoE blocks of transformers: router, experts and shared expert as one piece of code.

    T tokens · H hidden width · E experts · K top-k

Where a block whose router was fused does no more than `experts(x, *router(x))`, plus a shared
expert and that one's gate if it has them (see `known_blocks`), `fused_block` takes its place. It
goes from one op to the next without calling modules between, and in a CUDA graph the shared expert
runs beside the routed ones, on a stream of its own. The bits are those of the parts called one
after the other.

Modules that are not called see no hooks: while any part has a hook, a replaced forward, gradients,
counters or an observer, the block's own `forward` runs, with the fused router in it. So
`output_router_logits`, adapters and profilers work as before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

from ..ops import choose_op, experts_op, route_hidden_op
from ..types import ExpertSpec
from ..validate import values_wanted
from .layouts import ACTIVATIONS
from .routers import BIAS, PLAN, RouterPlan, fused_forward, product_outside
from .transformers import STATE

BLOCK = "_moesaic_block"
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
BESIDE = 512
"""Tokens up to which a shared expert runs beside the routed ones: with more it fills the GPU."""

torch.library.define(
    "moesaic::block",
    "(Tensor hidden, Tensor? logits, Tensor? router, Tensor? router_bias, Tensor? correction, "
    "Tensor?[] params, Tensor[] shared, str rule, bool fp32, bool as_logits, "
    "str spec, str impl, int? num_sms) -> Tensor",
)


class Parts(NamedTuple):
    """Names of a block's children: router, experts, shared expert and its gate, if any."""

    router: str
    experts: str
    shared: str | None = None
    shared_gate: str | None = None


@dataclass(frozen=True)
class BlockPlan:
    """What replaces a block's forward, read when it was attached.

    `names`: the experts' parameters in the order of `WEIGHT_NAMES`, "" where there is none.
    """

    parts: Parts
    spec: ExpertSpec
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]


@lru_cache(maxsize=64)
def _side_stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def shared_expert(hidden_TH: Tensor, shared: list[Tensor], rows: list[Tensor]) -> Tensor:
    """down(silu(gate(x)) * up(x)), times the sigmoid of its gate if any, into `rows`."""
    gate_TI, up_TI, out_TH = rows
    torch.mm(hidden_TH, shared[0].t(), out=gate_TI)
    torch.mm(hidden_TH, shared[1].t(), out=up_TI)
    torch.mm(F.silu(gate_TI, inplace=True).mul_(up_TI), shared[2].t(), out=out_TH)
    if len(shared) > 3:
        out_TH.mul_(F.linear(hidden_TH, shared[3]).sigmoid_())
    return out_TH


def _sum_with_shared(
    hidden_TH: Tensor, shared: list[Tensor], routed: Callable[[], Tensor]
) -> Tensor:
    """What `routed` gives plus the shared expert, beside each other in a CUDA graph."""
    width, tokens = shared[0].shape[0], hidden_TH.shape[0]
    rows = [hidden_TH.new_empty((tokens, n)) for n in (width, width, hidden_TH.shape[1])]
    if not (hidden_TH.is_cuda and tokens <= BESIDE and torch.cuda.is_current_stream_capturing()):
        return routed().add_(shared_expert(hidden_TH, shared, rows))
    here, side = torch.cuda.current_stream(), _side_stream(hidden_TH.device)
    side.wait_stream(here)
    with torch.cuda.stream(side):
        shared_expert(hidden_TH, shared, rows)
    out_TH = routed()
    here.wait_stream(side)
    return out_TH.add_(rows[2])


def _block(
    hidden: Tensor,
    logits: Tensor | None,
    router: Tensor | None,
    router_bias: Tensor | None,
    correction: Tensor | None,
    params: list[Tensor | None],
    shared: list[Tensor],
    rule: str,
    fp32: bool,
    as_logits: bool,
    spec: str,
    impl: str,
    num_sms: int | None,
) -> Tensor:
    budget = {} if num_sms is None else {"num_sms": num_sms}

    def routed() -> Tensor:
        if logits is not None:
            ids, weights = choose_op(logits, correction, rule, as_logits)
        else:
            _, ids, weights = route_hidden_op(
                hidden, router, router_bias, correction, rule, fp32, as_logits
            )
        return experts_op(hidden, ids, weights, *params, spec, impl, **budget)

    return _sum_with_shared(hidden, shared, routed) if shared else routed()


def _block_fake(hidden: Tensor, *_: object) -> Tensor:
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


for _device in ("CPU", "CUDA"):
    torch.library.impl("moesaic::block", _device, _block)
torch.library.register_fake("moesaic::block", _block_fake)
block_op: Callable[..., Tensor] = torch.ops.moesaic.block.default


def _untouched(module: nn.Module) -> bool:
    """Whether calling a module would run its forward and nothing else."""
    return not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
        or module._backward_pre_hooks
    )  # fmt: skip


def _weight(linear: nn.Module | None) -> Tensor | None:
    """The weight of a plain linear layer without bias and hooks, else None."""
    if type(linear) is not nn.Linear or linear.bias is not None or not _untouched(linear):
        return None
    return None if "forward" in vars(linear) else linear._parameters["weight"]


def _silu(shared: nn.Module) -> bool:
    """Whether the activation of a shared expert is silu, and calling it would do nothing else."""
    act = shared._modules.get("act_fn") or vars(shared).get("act_fn")
    if not isinstance(act, nn.Module):
        return act is F.silu
    known = ACTIVATIONS.get(type(act).__name__) == "silu"
    return known and _untouched(act) and "forward" not in vars(act)


def _shared_weights(block: nn.Module, parts: Parts) -> list[Tensor] | None:
    """Weights of the shared expert and its gate; None where something else is there now."""
    if parts.shared is None:
        return []
    shared = block._modules[parts.shared]
    if shared is None or not _untouched(shared) or "forward" in vars(shared):
        return None
    if not _silu(shared):
        return None
    found = [_weight(shared._modules.get(name)) for name in PROJECTIONS]
    if parts.shared_gate is not None:
        found.append(_weight(block._modules[parts.shared_gate]))
    there = [weight for weight in found if weight is not None]
    return there if len(there) == len(found) else None


def _inputs(block: nn.Module, plan: BlockPlan, hidden_TH: Tensor) -> tuple[Any, ...] | None:
    """Everything that `block_op` takes after the hidden states; None: the block's own forward."""
    router, experts = getattr(block, plan.parts.router), getattr(block, plan.parts.experts)
    if block.training or _has_any_global_hook():  # type: ignore[no-untyped-call]
        return None
    if not (_untouched(router) and _untouched(experts)) or "forward" in vars(experts):
        return None
    # Attributes as anybody reads them: not every version of torch traces lookups in `vars` alike.
    if getattr(router.forward, "__func__", None) is not fused_forward:
        return None
    state = getattr(experts, STATE, None)
    if state is None or state.observe is not None or state.spread is not None:
        return None
    if getattr(experts, "counters", None) is not None:
        return None
    shared = _shared_weights(block, plan.parts)
    held = experts._parameters
    params = [held.get(name) if name else None for name in plan.names]
    weights = [p for p in params if p is not None]
    weight = router._parameters.get("weight")
    if shared is None or weight is None or len(weights) != len(plan.shapes):
        return None
    for tensor, shape in zip(weights, plan.shapes, strict=True):
        if tuple(tensor.shape) != shape or tensor.dtype != hidden_TH.dtype:
            return None
    router_bias = router._parameters.get("bias")
    leaves = () if router_bias is None else (router_bias,)
    tensors = (hidden_TH, weight, *leaves, *weights, *shared)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return None
    if torch.is_autocast_enabled(hidden_TH.device.type):
        return None
    if any(tensor.dtype != hidden_TH.dtype for tensor in shared):
        return None
    rule: RouterPlan = getattr(router, PLAN)
    correction = router._buffers.get(BIAS) if rule.spec.scoring == "sigmoid" else None
    correction = None if correction is None else correction.float()
    outside = product_outside(hidden_TH, weight, router_bias, rule.fp32)
    return (
        outside, None if outside is not None else weight, router_bias, correction, params, shared,
        rule.spec.key(), rule.fp32, rule.as_logits,
        plan.spec.key(), state.impl, state.num_sms,
    )  # fmt: skip


def fused_block(self: nn.Module, hidden_states: Tensor) -> Tensor:
    """A block's `forward` from op to op: hidden states in, hidden states out, of any shape (.., H).

    With hooks, gradients, counters, an observer or values to check: the block's own forward.
    """
    plan: BlockPlan = getattr(self, BLOCK)
    hidden_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
    checked = not torch.compiler.is_compiling() and values_wanted()
    inputs = None if checked else _inputs(self, plan, hidden_TH)
    if inputs is None:
        own: Tensor = type(self).forward(self, hidden_states)
        return own
    run = block_op if torch.compiler.is_compiling() else _block
    return run(hidden_TH, *inputs).view(hidden_states.shape)


# Bound methods are pickled by name: a block that is unpickled finds its class's own forward.
fused_block.__name__ = "forward"
