"""Experts over ranks for a model that runs whole on every rank: each takes a part of the tokens.

    T tokens, the same on every rank · K top-k · H hidden width · G ranks

Rank r sends the r-th part of the tokens through the spread experts; then every rank gets all parts.
The function has the signature of `moe`, so any model that takes its experts as a function can use
it: `torchrun --nproc-per-node N -m moesaic run` does.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..types import ExpertSpec, ExpertWeights
from .expert_parallel import ExpertParallel, Options, take_experts
from .placement import contiguous


class SpreadExperts:
    """`moe` over the ranks of a group, every layer's experts placed contiguously.

    Args:
        group: all ranks; each calls with the same tokens.
        most_tokens: the most tokens of a call.
        options: how to exchange; the capacity is set from `most_tokens`.
    """

    def __init__(
        self, group: dist.ProcessGroup, *, most_tokens: int, options: Options | None = None
    ) -> None:
        self.group, self.rank = group, dist.get_rank(group)
        self.ranks = dist.get_world_size(group)
        capacity = -(-most_tokens // self.ranks)
        self.options = (options or Options())._replace(capacity=capacity)
        self.layers: dict[int, ExpertParallel] = {}

    def _layer(self, weights: ExpertWeights, spec: ExpertSpec, top_k: int) -> ExpertParallel:
        """The spread layer of these weights, made when they are first seen."""
        key = weights.up.data_ptr()
        if key not in self.layers:
            placement = contiguous(spec.num_experts, self.ranks)
            plain = ExpertWeights(**{n: t.detach() for n, t in weights.named().items()})
            held = placement.hosted(0)[self.rank]
            self.layers[key] = ExpertParallel(
                spec,
                placement,
                take_experts(plain, placement, layer=0, rank=self.rank) if held else None,
                top_k=top_k,
                dtype=weights.up.dtype,
                device=weights.up.device,
                group=self.group,
                options=self.options,
                like=next(iter(self.layers.values()), None),
            )
        return self.layers[key]

    def __call__(
        self,
        hidden_TH: Tensor,
        topk_ids_TK: Tensor,
        topk_weights_TK: Tensor,
        weights: ExpertWeights,
        spec: ExpertSpec,
    ) -> Tensor:
        """The output (T, H), on every rank; see `moe`."""
        layer = self._layer(weights, spec, topk_ids_TK.shape[1])
        tokens = hidden_TH.shape[0]
        share = -(-tokens // self.ranks)
        mine = slice(min(self.rank * share, tokens), min((self.rank + 1) * share, tokens))
        own_TH = layer(
            hidden_TH[mine].contiguous(), topk_ids_TK[mine], topk_weights_TK[mine], bound=share
        )
        padded_TH = own_TH.new_zeros((share, own_TH.shape[1]))
        padded_TH[: own_TH.shape[0]] = own_TH
        whole_TH: Tensor = own_TH.new_empty((self.ranks * share, own_TH.shape[1]))
        dist.all_gather(list(whole_TH.chunk(self.ranks)), padded_TH, group=self.group)
        return whole_TH[:tokens]


def backend_for(device: torch.device) -> str:
    """The backend of a group whose tensors are on a device."""
    return "nccl" if device.type == "cuda" else "gloo"
