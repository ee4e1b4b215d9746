"""Counters of routed tokens, rows and tiles: what the kernels add, and the bits they must not move.

Line 0 of the counters is the router's, lines 1 and 2 are rows and tiles.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from layer_cases import draw_layer

from moesaic.kernels import sorting
from moesaic.kernels.batching import batch_rows, tile_height
from moesaic.kernels.combine import combine
from moesaic.kernels.experts import experts_triton
from moesaic.kernels.routing import route

BEFORE = 7


def counters_of(experts: int, device: torch.device) -> torch.Tensor:
    """Counters that hold something already."""
    return torch.full((3, experts), BEFORE, dtype=torch.int32, device=device)


@pytest.mark.parametrize("tokens", [1, 5, 70])
def test_the_router_adds_its_counts_and_keeps_its_bits(
    kernel_device: torch.device, tokens: int
) -> None:
    logits = torch.randn(tokens, 24, generator=torch.Generator().manual_seed(tokens))
    logits = logits.to(kernel_device)
    how: dict[str, Any] = {"top_k": 3, "scoring": "softmax"}
    plain = route(logits, **how)
    counters = counters_of(24, kernel_device)
    for times in (1, 2):
        counted = route(logits, counters=counters, **how)
        assert all(torch.equal(a, b) for a, b in zip(plain, counted, strict=True))
        assert torch.equal(counters[0], BEFORE + times * plain[2])
    assert bool((counters[1:] == BEFORE).all())


@pytest.mark.parametrize(("launches", "order"), [(1, "index"), (1, "mixed"), (3, "mixed")])
def test_the_sort_adds_rows_and_tiles(
    kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch, launches: int, order: Any
) -> None:
    if launches == 3:
        monkeypatch.setattr(sorting, "ONE_LAUNCH_SLOTS", 8)
    experts, heights = 9, (4, 8)
    ids = torch.randint(-1, experts + 1, (60, 2), generator=torch.Generator().manual_seed(0))
    ids[ids == 4] = 3
    counters = counters_of(experts, kernel_device)
    on_device = ids.to(kernel_device)
    plain = batch_rows(on_device, experts, heights=heights, order=order)
    counted = batch_rows(on_device, experts, heights=heights, order=order, counters=counters)
    assert torch.equal(plain[0].order_S, counted[0].order_S)
    assert torch.equal(plain[1].tile_end_N, counted[1].tile_end_N)
    rows = [int((ids == e).sum()) for e in range(experts)]
    tiles = [-(-n // tile_height(n, heights)) for n in rows]
    assert rows[4] == 0 and max(tiles) > 1
    assert counters.tolist() == [
        [BEFORE] * experts,
        [BEFORE + n for n in rows],
        [BEFORE + n for n in tiles],
    ]


def test_the_combine_counts_a_single_token(kernel_device: torch.device) -> None:
    gen = torch.Generator().manual_seed(0)
    rows = torch.randn(4, 200, generator=gen).to(kernel_device)
    position = torch.arange(4, dtype=torch.int32, device=kernel_device)[None]
    weights = torch.rand(1, 4, generator=gen).to(kernel_device)
    ids = torch.tensor([3, 0, 3, 6], dtype=torch.int32, device=kernel_device)  # 6: of nobody
    counters = counters_of(5, kernel_device)
    plain = combine(rows, position, weights)
    assert torch.equal(plain, combine(rows, position, weights, counted=(ids, counters)))
    added = [[0] * 5, [1, 0, 0, 2, 0], [1, 0, 0, 2, 0]]
    assert (counters - BEFORE).tolist() == added


@pytest.mark.parametrize("kind", ["swiglu", "mlp3"])
def test_the_layer_counts_without_changing_its_bits(kernel_device: torch.device, kind: str) -> None:
    spec, weights = draw_layer(kind, 6, 32, 16, kernel_device, torch.float32)
    gen = torch.Generator().manual_seed(1)
    hidden = torch.randn(11, 32, generator=gen).to(kernel_device)
    ids = torch.randint(0, 5, (11, 2), generator=gen).to(kernel_device)
    share = torch.rand(11, 2, generator=gen).to(kernel_device)
    how = {"activation": spec.activation, "gated": spec.gated, **weights.named()}
    counters = counters_of(6, kernel_device)
    plain = experts_triton(hidden, ids, share, **how)
    assert torch.equal(plain, experts_triton(hidden, ids, share, counters=counters, **how))
    rows = torch.bincount(ids.reshape(-1).cpu(), minlength=6)
    assert torch.equal(counters[1].cpu() - BEFORE, rows.int())
    assert torch.equal(counters[2].cpu() - BEFORE, (rows > 0).int())
