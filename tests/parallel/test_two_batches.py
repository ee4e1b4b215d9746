"""Two batches in flight have the bits of each alone; plans become budgets of the exchange."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from test_expert_parallel import run_group

from moesaic.parallel.expert_parallel import ExpertParallel, Options
from moesaic.parallel.two_batches import follow_plan, options_of, side_by_side, sides
from moesaic.runtime.plan import Curve, GroupProfile, MachineSlices, Plan, Share
from moesaic.runtime.policies import POLICIES
from moesaic.types import ExpertSpec, ExpertWeights

WORKER = Path(__file__).parent / "two_batches_worker.py"
SLICED = Plan(policy="t", reason="", shares=(Share("exchange", 16), Share("experts", 112)))


@pytest.mark.parametrize("backend", ["gloo", "symmetric"])
def test_two_ranks(tmp_path: Path, backend: str) -> None:
    for found in run_group(2, tmp_path, backend, worker=WORKER):
        assert found["equal"]
        # The second batch is on its way before the first comes back, and so on.
        assert found["turns"] == [[n, b] for n in range(3) for b in (0, 1)]
        if backend == "symmetric":
            assert found["budgets"] == [[2], [2]]
        else:
            assert "obeys no SM budget" in found["budgets"]


def test_one_exchange_cannot_hold_two_batches() -> None:
    spec = ExpertSpec(num_experts=2, hidden_size=8, intermediate_size=8)
    weights = ExpertWeights(**{n: torch.ones(s) for n, s in spec.weight_shapes().items()})
    layer = ExpertParallel(spec, None, weights, top_k=1)
    with pytest.raises(ValueError, match="two exchanges"):
        side_by_side([(layer, layer)], [torch.ones(1, 8)] * 2, lambda *_: (None, None))
    with pytest.raises(RuntimeError, match="LocalExchange obeys no SM budget"):
        follow_plan(layer, SLICED)
    assert layer.options.expert_sms is None


def test_a_plan_becomes_budgets_and_not_to_slice_takes_them_away() -> None:
    given = options_of(SLICED, Options("symmetric", capacity=9))
    assert (given.num_sms, given.expert_sms, given.capacity) == (16, 112, 9)
    whole = options_of(Plan(policy="t", reason=""), given)
    assert (whole.num_sms, whole.expert_sms) == (None, None)


@pytest.mark.parametrize(("exchange_ms", "sliced"), [(1.0, True), (0.001, False)])
def test_policies_size_the_exchange_by_its_curve_or_do_not_slice(exchange_ms, sliced) -> None:
    """An exchange that needs few SMs is worth hiding, unless it takes next to no time."""
    curves = {
        "exchange": Curve(work="exchange", sms=(8, 16, 132), ms=(2.0, 1.0, 1.0), load=1.0),
        "experts": Curve(work="experts", sms=(66, 116, 132), ms=(2.0, 1.1, 1.0), load=1.0),
    }
    profile = GroupProfile(step=8, groups=sides(), loads_WN=((exchange_ms, 1.5),) * 8)
    for name in ("static", "adaptive"):
        plan = POLICIES[name](profile, curves, MachineSlices(), None)
        assert plan.sliced == sliced, name
        if sliced:
            assert 8 <= plan.sizes["exchange"] <= 24 and plan.sizes["experts"] >= 104
