"""Measured routing: rows by source rank and expert, and the placement planned from them."""

from __future__ import annotations

import pytest
import torch
from test_expert_parallel import SPEC, run_group, whole

from moesaic.parallel.counting import add_rows, measured_counts
from moesaic.parallel.expert_parallel import ExpertParallel


def test_ranks_measure_and_a_plan_from_it_is_better(tmp_path) -> None:
    for found in run_group(4, tmp_path, "measured"):
        assert len(found["measured"]) == 5
        assert all(found["measured"].values()), found["measured"]


def test_ids_of_nobody_are_not_counted() -> None:
    counts = torch.zeros(3, dtype=torch.int64)
    for dtype in (torch.int32, torch.int64):
        add_rows(counts, torch.tensor([[0, 2], [2, -1], [3, 1]], dtype=dtype))
    assert counts.tolist() == [2, 2, 4]
    add_rows(counts, torch.empty(0, 2, dtype=torch.int32))
    assert counts.tolist() == [2, 2, 4]


def test_one_process_counts_alone() -> None:
    layer = ExpertParallel(SPEC, None, whole(torch.Generator().manual_seed(0)), top_k=2)
    layer.count()
    ids = torch.tensor([[0, 1], [0, 3]], dtype=torch.int32)
    layer(torch.randn(2, 32), ids, torch.rand(2, 2))
    assert measured_counts([layer], None).tolist() == [[[2, 1, 0, 1]]]
    with pytest.raises(ValueError, match="call count"):
        measured_counts([], None)
