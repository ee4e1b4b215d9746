"""The witness counts what an executor computes, and sees every way to lose or misplace a row."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moesaic import ExpertSpec, ExpertWeights, moe
from moesaic.models import eager_experts
from moesaic.reference import moe_reference
from moesaic.run.facts import Rows
from moesaic.run.witness import count_rows

SPEC = ExpertSpec(num_experts=8, hidden_size=16, intermediate_size=24)
T, K = 37, 2


@pytest.fixture
def ids_TK() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(T, 8, generator=generator).topk(K).indices.to(torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("experts", [moe, moe_reference, eager_experts])
def test_true_executors_compute_every_row_once(
    ids_TK: Tensor, experts: object, dtype: torch.dtype
) -> None:
    assert count_rows(experts, ids_TK, SPEC, dtype) == Rows(T * K, T * K, 0)  # type: ignore[arg-type]


def dropping(hidden: Tensor, ids: Tensor, scale: Tensor, w: ExpertWeights, s: ExpertSpec) -> Tensor:
    scale = scale.clone()
    scale[-1, -1] = 0
    return moe_reference(hidden, ids, scale, w, s)


def doubling(hidden: Tensor, ids: Tensor, scale: Tensor, w: ExpertWeights, s: ExpertSpec) -> Tensor:
    scale = scale.clone()
    scale[3, 0] = 2
    return moe_reference(hidden, ids, scale, w, s)


def misrouting(
    hidden: Tensor, ids: Tensor, scale: Tensor, w: ExpertWeights, s: ExpertSpec
) -> Tensor:
    ids = ids.clone()
    ids[5, 1] = (ids[5].max() + 1) % 8 if ids[5].max() < 7 else (ids[5].min() + 7) % 8
    return moe_reference(hidden, ids, scale, w, s)


def swapping(hidden: Tensor, ids: Tensor, scale: Tensor, w: ExpertWeights, s: ExpertSpec) -> Tensor:
    return moe_reference(hidden, ids.flip(0), scale, w, s)


def capacity(hidden: Tensor, ids: Tensor, scale: Tensor, w: ExpertWeights, s: ExpertSpec) -> Tensor:
    kept = torch.zeros_like(scale)
    for e in range(s.num_experts):
        kept.view(-1)[(ids.view(-1) == e).nonzero()[:6]] = 1
    return moe_reference(hidden, ids, scale * kept, w, s)


def poisoned(hidden: Tensor, ids: Tensor, scale: Tensor, w: ExpertWeights, s: ExpertSpec) -> Tensor:
    return torch.full_like(hidden, float("nan"))


@pytest.mark.parametrize(
    ("experts", "computed"),
    [
        (dropping, T * K - 1),
        (doubling, T * K + 1),
        (misrouting, T * K),
        (swapping, T * K),
        (poisoned, 0),
        (capacity, None),
    ],
)
def test_every_defect_is_seen(ids_TK: Tensor, experts: object, computed: int | None) -> None:
    rows = count_rows(experts, ids_TK, SPEC, torch.float32)  # type: ignore[arg-type]
    assert rows.routed == T * K
    assert rows.wrong > 0
    assert computed is None or rows.computed == computed
    if experts is capacity:
        assert rows.computed == T * K - rows.wrong


def test_what_it_cannot_witness_is_refused(ids_TK: Tensor) -> None:
    for spec in (replace(SPEC, activation="gelu"), replace(SPEC, num_experts=24)):
        with pytest.raises(ValueError, match="the witness needs"):
            count_rows(moe_reference, ids_TK, spec, torch.float32)
