"""A layer without rounding, and a cache of graphs over it on the fake capturer."""

from __future__ import annotations

from typing import Any

import torch
from fake_capture import FakeCapturer
from torch import Tensor, nn

from moesaic.runtime.graphs import GraphCache, GraphConfig, GraphCounts, GraphStore

EAGER_SOON = GraphConfig(min_calls=3, min_tokens=1, stable_calls=1, warmups=1)


class Layer(nn.Module):
    """Rows times a matrix, in arithmetic that does not depend on the number of rows."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randint(-3, 4, (8, 8), generator=generator).float()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.calls = 0

    def forward(self, rows: Tensor) -> Tensor:
        self.calls += 1
        return (rows[:, :, None] * self.weight).sum(1)


def cache_of(
    layer: Any, config: GraphConfig = EAGER_SOON, **capturer: Any
) -> tuple[GraphCache, FakeCapturer]:
    fake = FakeCapturer(module=layer if isinstance(layer, nn.Module) else None, **capturer)
    return GraphCache(layer, store=GraphStore(config, fake)), fake


def call(cache: GraphCache, tokens: int, seed: int = 0, **kwargs: Any) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(-9, 10, (tokens, 8), generator=generator).float()
    return rows, cache(rows, **kwargs)


def wanted(rows: Tensor, layer: Layer) -> Tensor:
    return (rows[:, :, None] * layer.weight).sum(1)


def tally(counts: GraphCounts) -> tuple[int, int, int]:
    return counts.captured, counts.replayed, counts.eager
