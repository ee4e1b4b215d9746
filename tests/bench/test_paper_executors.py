"""The executors of the paper's layer: one answer, and the bits that they owe each other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from layer_cases import ROUTINGS, draw, draw_ids, draw_layer

from moesaic.bench.layers import Loaded
from moesaic.bench.paper.bits import compare_bits
from moesaic.bench.paper.executor import OURS, combine_slots, registry
from moesaic.bench.paper.slicing import plan_groups
from moesaic.bench.paper.triton_rows import map_entries
from moesaic.bench.suite import Cell
from moesaic.bench.workloads import Inputs, Model
from moesaic.functional import moe
from moesaic.kernels.batching import batch_rows_ref
from moesaic.kernels.experts import experts_triton
from moesaic.reference import moe_reference

MODEL = Model("tiny", 5, 2, 24, 40, kind="relu3", family="paper")
PLAIN = ("fastermoe-style", "tutel-style", "torch-grouped-mm", "expert-streams", "loop")
KERNELS = ("triton-experts", "expert-graphs", "fused-expert")


def exact_inputs(routing: str, tokens: int = 37) -> tuple[Inputs, object]:
    """Inputs and weights whose fp32 sums are exact in any order: a difference of bits is a term
    too many or too few."""
    device = torch.device("cpu")
    _, weights = draw_layer("mlp3", 5, 24, 40, device, torch.float32)
    ids_TK = draw_ids(routing, tokens, 2, 5)
    hidden_TH = draw(tokens, 24, device=device, dtype=torch.float32, seed=9)
    share_TK = torch.tensor([0.75, 0.25]).expand(tokens, 2).contiguous()
    return Inputs(hidden_TH, ids_TK, share_TK), weights


@pytest.mark.parametrize("routing", [r for r in ROUTINGS if r != "sentinel"])
def test_every_torch_executor_has_the_bits_of_the_oracle_where_sums_are_exact(routing: str) -> None:
    inputs, weights = exact_inputs(routing)
    want = moe_reference(*inputs, weights, MODEL.spec())
    for name in PLAIN:
        executor = registry()[name]
        for build in filter(None, (executor.build, executor.exact)):
            assert torch.equal(build(MODEL, weights)(*executor.inputs(inputs)), want), name


@pytest.mark.parametrize("routing", [r for r in ROUTINGS if r != "sentinel"])
def test_executors_of_our_kernels_have_the_bits_of_the_static_batch(
    kernel_device, poisoned_empty, routing: str
) -> None:
    dtype = torch.bfloat16 if kernel_device.type == "cuda" else torch.float32
    _, weights = draw_layer("mlp3", 5, 24, 40, kernel_device, dtype)
    hidden_TH = torch.randn(19, 24, generator=torch.Generator().manual_seed(3))
    share_TK = torch.rand(19, 2, generator=torch.Generator().manual_seed(4)).softmax(-1)
    ids_TK = draw_ids(routing, 19, 2, 5).to(kernel_device)
    inputs = Inputs(hidden_TH.to(kernel_device, dtype), ids_TK, share_TK.to(kernel_device))
    want = experts_triton(*inputs, **weights.named(), activation="relu", gated=False)
    sliced = ("slices", "slices-streams") if kernel_device.type == "cuda" else ()
    for name in (*KERNELS, *sliced):
        executor = registry()[name]
        assert executor.ours and executor.exact is executor.build
        assert torch.equal(executor.build(MODEL, weights)(*inputs), want), name


def test_a_plan_halves_the_load_and_shares_the_sms_by_it() -> None:
    plan = plan_groups([5, 40, 7, 8], sms=132)
    assert plan.groups == ((1,), (0, 2, 3)) and plan.budgets == (92, 40)
    for loads in ([64, 0], [1, 1], [0, 0, 0], [3] * 64):
        plan = plan_groups(loads, sms=132)
        assert sorted(e for group in plan.groups for e in group) == list(range(len(loads)))
        assert all(plan.groups) and all(n >= 8 and n % 8 == 0 for n in plan.sms)
        assert sum(plan.budgets) == 132
    with pytest.raises(ValueError, match="two experts or more, got 1"):
        plan_groups([4], sms=132)


@pytest.mark.parametrize("routing", [r for r in ROUTINGS if r != "sentinel"])
def test_slices_have_the_bits_of_the_layer(routing: str) -> None:
    inputs, weights = exact_inputs(routing)
    sliced = registry()["slices"].build(MODEL, weights)
    want = moe(*inputs, weights, MODEL.spec())
    assert torch.equal(sliced(*inputs), want)
    other, _ = exact_inputs("uniform")
    assert torch.equal(sliced(*other), moe(*other, weights, MODEL.spec()))


def test_map_entries_cover_every_tile_once() -> None:
    _, tasks = batch_rows_ref(draw_ids("empty", 200, 2, 6), 6, heights=(16, 64))
    entries = map_entries(tasks)
    filled = int(tasks.total_2[0])
    assert sum(int(e.total_2[1]) for e in entries) == int(tasks.total_2[1])
    assert [int(e.task_N) for e in entries[:filled]] == tasks.task_N[:filled].tolist()
    assert all(e.tile_end_N.data_ptr() % 16 == 0 for e in entries)
    assert [int(e.rows_N) for e in entries] == tasks.rows_N.tolist()


def loaded_with(names: tuple[str, ...]) -> Loaded:
    _, weights = exact_inputs("uniform")
    forwards = {name: [registry()[name].build(MODEL, weights)] for name in names}
    return Loaded(MODEL, torch.float32, [weights], forwards)


def test_bits_are_compared_with_their_own_kind_and_with_moesaic() -> None:
    names = ("fastermoe-style", "expert-streams", OURS)
    executors = [registry()[name] for name in names]
    found = compare_bits(loaded_with(names), Cell("tiny", 64, dtype="float32"), executors, seed=1)
    assert found[OURS]["bits_differ_ours"] == 0 and found[OURS]["elements"] == 64 * 24
    assert found["expert-streams"]["bits_differ"] == 0


def test_a_dropped_slot_shows_in_the_bits() -> None:
    good = registry()["fastermoe-style"]

    def dropping(model, weights):
        forward = good.exact(model, weights)
        return lambda h, ids, w: forward(h, ids, torch.where(ids == ids.max(), 0.0, w))

    bad = replace(good, name="expert-streams", exact=dropping)
    loaded = loaded_with(("fastermoe-style", "expert-streams"))
    found = compare_bits(loaded, Cell("tiny", 64, dtype="float32"), [good, bad], seed=1)
    assert found["fastermoe-style"]["bits_differ"] == 0
    assert found["expert-streams"]["bits_differ"] > 0


def test_an_executor_that_fails_says_so_and_the_others_are_compared() -> None:
    def failing(model, weights):
        raise RuntimeError("no such product")

    good = registry()["fastermoe-style"]
    bad = replace(registry()["tutel-style"], exact=failing)
    loaded = loaded_with(("fastermoe-style", "tutel-style"))
    found = compare_bits(loaded, Cell("tiny", 8, dtype="float32"), [bad, good], seed=1)
    assert found["tutel-style"] == {"bits_error": "RuntimeError: no such product"}
    assert found["fastermoe-style"]["bits_differ"] == 0


def test_the_common_combine_is_the_one_of_moesaic() -> None:
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    out = combine_slots(rows, torch.tensor([[2, 0], [1, -1]]), torch.tensor([[0.5, 2.0], [1, 9]]))
    assert out.tolist() == [[4.5, 7.0], [3.0, 4.0]]


def test_the_registry_is_ordered_and_kernels_need_a_gpu() -> None:
    found = registry()
    assert list(found) == sorted(found, key=lambda name: (found[name].order, name))
    assert {"loop", "torch-grouped-mm", OURS, *PLAIN, *KERNELS} <= set(found)
    _, weights = exact_inputs("uniform")
    for name in (*KERNELS, "slices", "slices-streams"):
        with pytest.raises(RuntimeError, match="needs a cuda device, got cpu"):
            found[name].candidate().build(MODEL, weights)
