"""The experts of an attached transformers model over the ranks of a mesh, attention data-parallel.

    T tokens of this rank · K top-k · H hidden width · G ranks

Every rank loads the model and runs its own batch; only the rows of tokens travel, to the ranks of
their experts and back. Ranks must run equally many forwards (`generate(synced_gpus=True)`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..parallel.backends import Options, group_of
from ..parallel.expert_parallel import ExpertParallel, take_experts
from ..parallel.placement import Placement, contiguous
from ..types import ExpertSpec, ExpertWeights
from .layouts import UnsupportedExperts, weights_of

Tokens = Literal["agree", "equal"]


@dataclass
class Bound:
    """The most tokens that any rank brings in a forward: agreed on, or said to be equal.

    "agree" asks all ranks once a forward, in its first MoE layer, and reads the answer on the host;
    "equal" trusts that every rank brings as many as this one, and can be captured.
    """

    group: dist.ProcessGroup | None
    tokens: Tokens
    value: int = 0

    def of(self, hidden_TH: Tensor, first: bool) -> int:
        """The bound of this forward; `first`: this is its first MoE layer."""
        if self.tokens == "equal" or self.group is None:
            return hidden_TH.shape[0]
        if first:
            most = torch.tensor([hidden_TH.shape[0]], device=hidden_TH.device)
            dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self.group)
            self.value = int(most.item())
        return self.value


@dataclass
class SpreadLayer:
    """One MoE layer of an attached model as it runs over the ranks."""

    layer: ExpertParallel
    bound: Bound
    first: bool

    def __call__(self, hidden_states: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The output of the experts, same shape and dtype as `hidden_states`."""
        hidden_TH = hidden_states.reshape(-1, hidden_states.shape[-1]).to(self.layer.shape[1])
        bound = self.bound.of(hidden_TH, self.first)
        scales_TK = weights if weights.dtype == hidden_TH.dtype else weights.float()
        out_TH: Tensor = self.layer(hidden_TH.contiguous(), ids, scales_TK, bound=bound)
        return out_TH.view(hidden_states.shape).to(hidden_states.dtype)


def own_weights(
    weights: ExpertWeights, placement: Placement, *, layer: int, rank: int
) -> ExpertWeights | None:
    """This rank's experts: views where they are neighbours, else copies; None where it has none."""
    own = placement.hosted(layer)[rank]
    if not own:
        return None
    if own == tuple(range(own[0], own[0] + len(own))):
        part = slice(own[0], own[0] + len(own))
        return ExpertWeights(**{n: t.detach()[part] for n, t in weights.named().items()})
    plain = ExpertWeights(**{n: t.detach() for n, t in weights.named().items()})
    return take_experts(plain, placement, layer=layer, rank=rank)


def spread_layers(
    layers: Sequence[tuple[nn.Module, ExpertSpec | None, int | None]],
    *,
    mesh: DeviceMesh | dist.ProcessGroup,
    placement: Placement | None = None,
    options: Options | None = None,
    tokens: Tokens = "agree",
    impl: str = "auto",
) -> list[SpreadLayer]:
    """The layers of a model over the ranks of `mesh`; they share exchanges where they can.

    Args:
        layers: of each layer its experts module, spec and K.
        placement: over the ranks, of as many layers as the model has, or of one for all of them;
            None: contiguous.
        options: how to exchange; the capacity is in tokens of a rank.
        tokens: see `Bound`.

    Raises:
        UnsupportedExperts: a layer has no spec.
        ValueError: placement, mesh, options or `tokens` do not fit.
    """
    if tokens not in get_args(Tokens):
        raise ValueError(f"tokens must be one of {get_args(Tokens)}, got {tokens!r}")
    group = group_of(mesh)
    assert group is not None
    rank, bound = dist.get_rank(group), Bound(group, tokens)
    made: dict[tuple[object, ...], ExpertParallel] = {}
    found = []
    for index, (module, spec, top_k) in enumerate(layers):
        if spec is None or top_k is None:
            raise UnsupportedExperts(f"MoE layer {index} has no experts that can be spread")
        where = placement or contiguous(spec.num_experts, dist.get_world_size(group))
        if where.num_layers not in (1, len(layers)):
            raise ValueError(
                f"the placement must have 1 or {len(layers)} layers, got {where.num_layers}"
            )
        number = index if where.num_layers > 1 else 0
        weights = weights_of(module)
        key = (spec.hidden_size, weights.up.dtype, top_k, where.slots(number), weights.up.device)
        layer = ExpertParallel(
            spec,
            where,
            own_weights(weights, where, layer=number, rank=rank),
            top_k=top_k,
            dtype=weights.up.dtype,
            device=weights.up.device,
            layer=number,
            group=group,
            options=options,
            impl=impl,  # type: ignore[arg-type]
            like=made.get(key),
        )
        made.setdefault(key, layer)
        found.append(SpreadLayer(layer, bound, index == 0))
    return found
