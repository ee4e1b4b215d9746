from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moesaic import moe
from moesaic.runtime.size_classes import SizeClassExperts, class_ids, count_slots
from moesaic.types import ExpertSpec, ExpertWeights

SPEC = ExpertSpec(num_experts=8, hidden_size=16, intermediate_size=24)


def layer() -> tuple[ExpertWeights, tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = SPEC.weight_shapes().items()
    weights = ExpertWeights(**{n: torch.randn(s, generator=generator) * 0.3 for n, s in shapes})
    hidden_TH = torch.randn(60, 16, generator=generator)
    # Expert 0 in every token, the others now and then.
    ids_TK = torch.stack([torch.zeros(60), torch.randint(1, 8, (60,), generator=generator)], 1)
    return weights, (hidden_TH, ids_TK.int(), torch.rand(60, 2, generator=generator))


def test_the_bits_are_those_of_the_layer_whatever_the_bounds() -> None:
    weights, inputs = layer()
    want = moe(*inputs, weights, SPEC)
    for bounds in ((8,), (4, 16), (1, 9, 50), (10_000,)):
        assert torch.equal(SizeClassExperts(weights, SPEC, bounds=bounds)(*inputs), want)


def test_classes_partition_the_experts_by_their_rows() -> None:
    _, (_, ids_TK, _) = layer()
    counts_E = count_slots(ids_TK, 8)
    assert torch.equal(counts_E, ids_TK.flatten().long().bincount(minlength=8))
    ids_CE = class_ids(counts_E, torch.tensor([8, 60]))
    assert ((ids_CE >= 0).sum(0) == 1).all() and ids_CE.dtype == torch.int32
    for low, high, row in zip((0, 8, 60), (8, 60, 999), ids_CE, strict=True):
        assert all(low <= counts_E[e] < high for e in row[row >= 0].tolist())
    assert count_slots(torch.tensor([[-1, 8], [3, 3]]), 8).tolist() == [0, 0, 0, 2, 0, 0, 0, 0]


@pytest.mark.parametrize("bounds", [(), (8, 4), (0, 4), (1, 2, 3, 4)])
def test_bounds_without_meaning_are_refused(bounds: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="bounds must be one to three"):
        SizeClassExperts(layer()[0], SPEC, bounds=bounds)
