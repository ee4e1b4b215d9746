"""Which MoE blocks of transformers `blocks.fused_block` can replace, found out by running them.

A block is looked at once: its own `forward` is run with stand-ins for its parts, and what it does
with them must be what `fused_block` does.

    T tokens · H hidden width · K top-k
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..nn import parameter_names
from ..ops import WEIGHT_NAMES
from ..types import ExpertSpec
from .blocks import PROJECTIONS, BlockPlan, Parts, shared_expert
from .layouts import ACTIVATIONS


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
    same = torch.allclose(_twin(shared, small)(x_TH), shared_expert(x_TH, weights, rows))  # type: ignore[arg-type]
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


def plan_block(parts: Parts, spec: ExpertSpec) -> BlockPlan:
    """The plan of a recognised block."""
    shapes, named = spec.weight_shapes(), parameter_names(spec)
    return BlockPlan(
        parts, spec, tuple(named.get(name, "") for name in WEIGHT_NAMES),
        tuple(tuple(shapes[name]) for name in WEIGHT_NAMES if name in shapes),
    )  # fmt: skip
