"""Groups of experts on slices of their own: the bits of the unsliced layer; lanes never capture."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
from layer_cases import draw_ids, draw_layer

from moesaic import moe
from moesaic.hardware.green import GreenDevice, GreenUnavailable
from moesaic.packing import pack
from moesaic.parallel.expert_parallel import ExpertParallel, Options
from moesaic.runtime.seats import Seat, SeatedWork
from moesaic.runtime.sliced import SlicedExperts, group_ids, run_budgeted
from moesaic.types import ExpertSpec

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def layer_inputs(spec: ExpertSpec, tokens: int, top_k: int, dtype: torch.dtype, device, seed=0):
    generator = torch.Generator(device).manual_seed(seed)
    hidden = torch.randn(tokens, spec.hidden_size, device=device, generator=generator).to(dtype)
    ids = draw_ids("uniform", tokens, top_k, spec.num_experts, seed).to(device)
    share = torch.rand(tokens, top_k, device=device, generator=generator).softmax(-1)
    return hidden, ids.to(torch.int32), share


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["swiglu", "gpt_oss", "mlp3"]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(1, 40),
    st.integers(1, 4),
    st.randoms(use_true_random=False),
)
def test_any_grouping_has_the_bits_of_the_layer(kind, dtype, tokens, groups, rng) -> None:
    spec, weights = draw_layer(kind, 8, 64, 48, CPU, dtype)
    hidden, ids, share = layer_inputs(spec, tokens, 3, dtype, CPU, rng.randrange(1000))
    members = [[] for _ in range(groups)]
    for expert in range(8):
        members[rng.randrange(groups)].append(expert)
    sliced = SlicedExperts(weights, spec, members)
    assert torch.equal(sliced(hidden, ids, share), moe(hidden, ids, share, weights, spec))


def test_groups_that_are_no_partition_are_refused() -> None:
    for groups in ([[0, 1]], [[0, 1], [1, 2]], [[0, 1, 2, 3]]):
        with pytest.raises(ValueError, match="each of the 3 experts once"):
            group_ids(groups, 3)
    spec, weights = draw_layer("swiglu", 4, 64, 48, CPU, torch.float32)
    with pytest.raises(ValueError, match="2 groups need as many seats, got 1"):
        SlicedExperts(weights, spec, [[0, 1], [2, 3]], [Seat(8)])


def test_a_budget_is_refused_where_nothing_obeys_it() -> None:
    spec, weights = draw_layer("swiglu", 4, 64, 48, CPU, torch.float32)
    args = layer_inputs(spec, 5, 2, torch.float32, CPU)
    assert torch.equal(run_budgeted(*args, weights, spec), moe(*args, weights, spec))
    with pytest.raises(RuntimeError, match="obeys no SM budget"):
        run_budgeted(*args, weights, spec, num_sms=8)
    with pytest.raises(ValueError, match="positive"):
        run_budgeted(*args, weights, spec, num_sms=0)
    for impl in ("auto", "reference"):
        with pytest.raises(RuntimeError, match="obeys no SM budget"):
            moe(*args, weights, spec, num_sms=8, impl=impl)
    with pytest.raises(RuntimeError, match="obeys no SM budget"):
        moe(*args, pack(weights, spec), spec, num_sms=8)
    options = Options(expert_sms=8)
    layer = ExpertParallel(spec, None, weights, top_k=2, options=options, dtype=torch.float32)
    with torch.no_grad(), pytest.raises(RuntimeError, match="obeys no SM budget"):
        layer(*args)


def test_a_new_seat_chooses_among_graphs_and_never_captures() -> None:
    made: list[int] = []

    def capture(seat: Seat) -> str:
        made.append(seat.sms)
        return f"graph {seat.sms}"

    work = SeatedWork("decode", capture)
    with pytest.raises(RuntimeError, match="no seat yet"):
        _ = work.current
    for sms in (32, 64, 32):
        work.prepare(Seat(sms))
    assert [work.use(sms) for sms in (32, 64, 64, 32)] == [f"graph {n}" for n in (32, 64, 64, 32)]
    assert (made, work.captures, work.switches) == ([32, 64], 2, 3)
    with pytest.raises(KeyError, match="no graph for 48 SMs"):
        work.use(48)
    assert work.current == "graph 32" and work.captures == 2


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("kind", ["swiglu", "gpt_oss", "mlp3"])
@pytest.mark.parametrize("tokens", [1, 40, 700])
def test_slices_graphs_and_budgets_have_the_bits_of_the_layer(kind: str, tokens: int) -> None:
    cuda = torch.device("cuda")
    spec, weights = draw_layer(kind, 16, 512, 256, cuda, torch.bfloat16)
    args = layer_inputs(spec, tokens, 4, torch.bfloat16, cuda)
    whole = moe(*args, weights, spec)
    assert torch.equal(run_budgeted(*args, weights, spec, num_sms=24), whole)
    few = ExpertParallel(spec, None, weights, top_k=4, options=Options(expert_sms=24))
    with torch.no_grad():
        assert torch.equal(few(*args), whole)
    groups = [[0, 3], [1, *range(4, 14)], [2, 14, 15]]
    assert torch.equal(SlicedExperts(weights, spec, groups)(*args), whole)
    try:
        gpu = GreenDevice(0)
    except GreenUnavailable as error:
        pytest.skip(str(error))
    with gpu:
        for sizes in ([16, 88, 16], [64, 32, 24]):
            seats = [Seat(part.sms, part.stream) for part in gpu.carve(sizes)]
            sliced = SlicedExperts(weights, spec, groups, seats)
            assert torch.equal(sliced(*args), whole)
            graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
            torch.cuda.synchronize()
            with torch.cuda.graph(graph, stream=stream):
                out = sliced(*args)
            out.fill_(float("nan"))
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(out, whole)
            del graph
