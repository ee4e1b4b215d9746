"""Whole MoE blocks of transformers: router, experts and shared expert as one piece of code.

    T tokens · H hidden width · E experts · K top-k

A block whose router was fused is looked at once: its own `forward` is run with stand-ins for its
parts, and where what it does with them is `experts(x, *router(x))`, plus a shared expert and that
one's gate if it has them, `fused_block` takes its place. That goes from one op to the next without
calling modules between, and in a CUDA graph the shared expert runs beside the routed ones, on a
stream of its own. The bits are those of the parts called one after the other. With few tokens a
last launch asks the L2 for what the next decoder layer reads first.

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

from ..nn import parameter_names
from ..ops import WEIGHT_NAMES, choose_op, experts_op, on_its_device, route_hidden_op
from ..types import ExpertSpec
from ..validate import values_wanted
from .layouts import ACTIVATIONS
from .routers import BIAS, PLAN, RouterPlan, fused_forward, product_outside

BLOCK = "_moesaic_block"
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
BESIDE = 512
"""Tokens up to which a shared expert runs beside the routed ones: with more it fills the GPU."""

AHEAD = 0
"""Tokens up to which the next layer's weights are fetched."""

torch.library.define(
    "moesaic::block",
    "(Tensor hidden, Tensor? logits, Tensor? router, Tensor? router_bias, Tensor? correction, "
    "Tensor?[] params, Tensor[] shared, Tensor[] ahead, str rule, bool fp32, bool as_logits, "
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
    `ahead`: the linear layers that run first after this block, of the next decoder layer.
    """

    parts: Parts
    spec: ExpertSpec
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    ahead: tuple[nn.Module, ...] = ()


@lru_cache(maxsize=64)
def _side_stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _shared_expert(hidden_TH: Tensor, shared: list[Tensor], rows: list[Tensor]) -> Tensor:
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
        return routed().add_(_shared_expert(hidden_TH, shared, rows))
    here, side = torch.cuda.current_stream(), _side_stream(hidden_TH.device)
    side.wait_stream(here)
    with torch.cuda.stream(side):
        _shared_expert(hidden_TH, shared, rows)
    out_TH = routed()
    here.wait_stream(side)
    return out_TH.add_(rows[2])


@on_its_device
def _fetch(_: Tensor, ahead: list[Tensor]) -> None:
    from ..kernels.ahead import fetch_ahead

    fetch_ahead(ahead)


def _block(
    hidden: Tensor,
    logits: Tensor | None,
    router: Tensor | None,
    router_bias: Tensor | None,
    correction: Tensor | None,
    params: list[Tensor | None],
    shared: list[Tensor],
    ahead: list[Tensor],
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

    out = _sum_with_shared(hidden, shared, routed) if shared else routed()
    if ahead and hidden.is_cuda and hidden.shape[0] <= AHEAD:
        _fetch(hidden, ahead)
    return out


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


def _plain_weights(modules: tuple[nn.Module, ...], like: Tensor) -> list[Tensor]:
    """Weights that are there as plain tensors on the device of `like`: not sharded, not away.

    None in an exported program, which would hold them a second time.
    """
    if torch.compiler.is_exporting():
        return []
    held = [module._parameters.get("weight") for module in modules]
    return [w for w in held if type(w) is nn.Parameter and w.device == like.device]


def _inputs(block: nn.Module, plan: BlockPlan, hidden_TH: Tensor) -> tuple[Any, ...] | None:
    """Everything that `block_op` takes after the hidden states; None: the block's own forward."""
    router, experts = block._modules[plan.parts.router], block._modules[plan.parts.experts]
    if router is None or experts is None or block.training or _has_any_global_hook():  # type: ignore[no-untyped-call]
        return None
    if not (_untouched(router) and _untouched(experts)) or "forward" in vars(experts):
        return None
    if getattr(vars(router).get("forward"), "__func__", None) is not fused_forward:
        return None
    state = vars(experts).get("_moesaic")
    if state is None or state.observe is not None or state.spread is not None:
        return None
    if "counters" in experts._buffers or "counters" in vars(experts):
        return None
    shared = _shared_weights(block, plan.parts)
    held = experts._parameters
    params = [held.get(name) if name else None for name in plan.names]
    weights = [p for p in params if p is not None]
    weight = router._parameters.get("weight")
    if shared is None or weight is None or len(weights) != len(plan.shapes):
        return None
    for tensor, shape in zip(weights, plan.shapes, strict=True):
        if tensor.shape != shape or tensor.dtype != hidden_TH.dtype:
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
    rule: RouterPlan = vars(router)[PLAN]
    correction = router._buffers.get(BIAS) if rule.spec.scoring == "sigmoid" else None
    correction = None if correction is None else correction.float()
    outside = product_outside(hidden_TH, weight, router_bias, rule.fp32)
    return (
        outside, None if outside is not None else weight, router_bias, correction, params, shared,
        _plain_weights(plan.ahead, hidden_TH), rule.spec.key(), rule.fp32, rule.as_logits,
        plan.spec.key(), state.impl, state.num_sms,
    )  # fmt: skip


def fused_block(self: nn.Module, hidden_states: Tensor) -> Tensor:
    """A block's `forward` from op to op: hidden states in, hidden states out, of any shape (.., H).

    With hooks, gradients, counters, an observer or values to check: the block's own forward.
    """
    plan: BlockPlan = vars(self)[BLOCK]
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


class _Stand(nn.Module):
    """A part that gives what it was made with and keeps what it was given."""

    def __init__(self, gives: Any) -> None:
        super().__init__()
        self.gives, self.given = gives, []  # type: ignore[var-annotated]

    def forward(self, *arguments: Any) -> Any:
        self.given.append(arguments)
        return self.gives


def _twin(module: nn.Module, children: dict[str, nn.Module]) -> nn.Module:
    """A module of the same class and attributes with other children, in eval mode."""
    twin: nn.Module = object.__new__(type(module))
    nn.Module.__init__(twin)
    for name, value in vars(module).items():
        if not name.startswith("_") and name != "forward":
            setattr(twin, name, value)
    for name, child in children.items():
        twin.add_module(name, child)
    return twin.eval()


def _shared_problem(shared: nn.Module) -> str | None:
    """Why a shared expert is not down(silu(gate(x)) * up(x)), or None; tried on small layers."""
    children = dict(shared.named_children())
    extra = sorted(children.keys() - {*PROJECTIONS, "act_fn"})
    if extra or not set(PROJECTIONS) <= children.keys():
        return f"its shared expert has the parts {sorted(children)}"
    if any(type(children[n]) is not nn.Linear or children[n].bias is not None for n in PROJECTIONS):
        return "the products of its shared expert are no plain ones"
    act = getattr(shared, "act_fn", None)
    if act is not F.silu and ACTIVATIONS.get(type(act).__name__) != "silu":
        return "the activation of its shared expert is not silu"
    generator = torch.Generator().manual_seed(0)
    small: dict[str, nn.Module] = {}
    for name, shape in zip(PROJECTIONS, ((16, 8), (16, 8), (8, 16)), strict=True):
        small[name] = nn.Linear(shape[1], shape[0], bias=False)
        small[name].weight = nn.Parameter(torch.randn(shape, generator=generator))
    if "act_fn" in children:
        small["act_fn"] = children["act_fn"]
    x_TH = torch.randn(5, 8, generator=generator)
    weights = [small[name].weight.data for name in PROJECTIONS]
    rows = [x_TH.new_empty((5, n)) for n in (16, 16, 8)]
    same = torch.allclose(_twin(shared, small)(x_TH), _shared_expert(x_TH, weights, rows))  # type: ignore[arg-type]
    return None if same else "its shared expert computes something else"


def _assign(block: nn.Module, router: nn.Module, experts: nn.Module) -> Parts | str:
    """Which child is what, or why one of them is unknown."""
    names = {id(child): name for name, child in block.named_children()}
    parts = Parts(names.pop(id(router)), names.pop(id(experts)))
    for name in names.values():
        child = block._modules[name]
        if type(child) is nn.Linear and child.out_features == 1 and child.bias is None:
            parts = parts._replace(shared_gate=name)
        elif child is not None and set(PROJECTIONS) <= set(dict(child.named_children())):
            parts = parts._replace(shared=name)
        else:
            return f"its part {name} is unknown"
    if parts.shared_gate and not parts.shared:
        return "it has a gate without a shared expert"
    return parts


@torch.no_grad()
def recognise_block(block: nn.Module, router: nn.Module, experts: nn.Module) -> Parts | str:
    """The parts of a block that `fused_block` can replace, or why it cannot."""
    if "forward" in vars(block):
        return "something else has replaced its forward"
    if block._parameters or block._buffers:
        return "it has parameters of its own"
    parts = _assign(block, router, experts)
    if isinstance(parts, str):
        return parts
    shared_expert = None if parts.shared is None else block.get_submodule(parts.shared)
    if shared_expert is not None and (problem := _shared_problem(shared_expert)):
        return problem
    generator = torch.Generator().manual_seed(0)
    hidden_BNH, routed, shared, scores = (
        torch.randn(shape, generator=generator) for shape in ((2, 3, 8), (6, 8), (6, 8), (6, 1))
    )
    choice = (torch.zeros(6, 4), torch.rand(6, 2, generator=generator), torch.ones(6, 2).int())
    wanted = routed.clone()
    stands = {parts.router: _Stand(choice), parts.experts: _Stand(routed)}
    if parts.shared is not None:
        # Blocks give their shared expert flat or unflattened states; both views hold the same.
        stands[parts.shared] = _Stand(shared)
        if parts.shared_gate is not None:
            stands[parts.shared_gate] = _Stand(scores)
        wanted = routed + (shared * scores.sigmoid() if parts.shared_gate else shared)
    problem = _run_stands(block, parts, stands, hidden_BNH, choice, wanted)
    if problem and parts.shared is not None:
        stands = {name: _Stand(stand.gives) for name, stand in stands.items()}
        stands[parts.shared].gives = shared.view(2, 3, 8)
        problem = _run_stands(block, parts, stands, hidden_BNH, choice, wanted)
    return problem or parts


def _run_stands(
    block: nn.Module, parts: Parts, stands: dict[str, _Stand], hidden_BNH: Tensor,
    choice: tuple[Tensor, ...], wanted: Tensor,
) -> str | None:  # fmt: skip
    """Run a block's own forward on stand-ins: why it does something else with them, or None."""
    try:
        found = _twin(block, dict(stands))(hidden_BNH.clone())
    except Exception as error:
        return f"it cannot run on stand-ins ({type(error).__name__}: {error})"[:200]
    if not isinstance(found, Tensor) or found.shape != hidden_BNH.shape:
        return "it does not return hidden states alone"
    if any(len(stand.given) != 1 for stand in stands.values()):
        return "it calls a part not once"
    flat = hidden_BNH.reshape(-1, hidden_BNH.shape[-1])
    for name, stand in stands.items():
        first, *others = stand.given[0]
        if not torch.equal(first.reshape(flat.shape), flat):
            return f"it gives {name} something else than its input"
        expected = [choice[2], choice[1]] if name == parts.experts else []
        if len(others) != len(expected) or any(
            a is not b for a, b in zip(others, expected, strict=True)
        ):
            return f"it gives {name} more than its input, or another routing"
    if not torch.allclose(found.reshape(wanted.shape), wanted, rtol=1e-6, atol=1e-6):
        return "it adds something else"
    return None


def read_next(model: nn.Module, block: str) -> tuple[nn.Module, ...]:
    """The linear layers of the decoder layer after that of a block, in order, but its own block's.

    After the last layer comes the first, of the next token. None, where decoder layers are no list.
    """
    layer, _, inside = block.rpartition(".")
    layers, _, number = layer.rpartition(".")
    if not number.isdigit() or not isinstance(held := model.get_submodule(layers), nn.ModuleList):
        return ()
    following = held[(int(number) + 1) % len(held)]
    return tuple(
        module for name, module in following.named_modules()
        if type(module) is nn.Linear and name.partition(".")[0] != inside
    )  # fmt: skip


def plan_block(parts: Parts, spec: ExpertSpec, ahead: tuple[nn.Module, ...] = ()) -> BlockPlan:
    """The plan of a recognised block."""
    shapes, named = spec.weight_shapes(), parameter_names(spec)
    return BlockPlan(
        parts, spec, tuple(named.get(name, "") for name in WEIGHT_NAMES),
        tuple(tuple(shapes[name]) for name in WEIGHT_NAMES if name in shapes), ahead,
    )  # fmt: skip
