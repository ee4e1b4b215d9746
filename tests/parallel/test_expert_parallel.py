"""A layer over several processes has the bits of one, whatever the exchange and the placement."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moesaic.parallel.exchange.base import Received, seat_of
from moesaic.parallel.exchange.collective import first_of_each
from moesaic.parallel.exchange.local import LocalExchange
from moesaic.parallel.exchange.symmetric import fitting_capacity
from moesaic.parallel.expert_parallel import ExpertParallel, Options, choose_backend, take_experts
from moesaic.parallel.placement import Placement, contiguous
from moesaic.parallel.wire import pack_fp8, unpack_fp8
from moesaic.types import ExpertSpec, ExpertWeights

WORKER = Path(__file__).parent / "ep_worker.py"
SOURCE = Path(__file__).resolve().parents[2] / "src"


def run_group(world: int, folder: Path, *cases: str, worker: Path = WORKER) -> list[dict]:
    """What each rank of a group of processes says of the cases."""
    environment = os.environ | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(worker)]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(folder / "store"), *cases],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        outs = [rank.communicate(timeout=600) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, (process, (_, errors)) in enumerate(zip(ranks, outs, strict=True)):
        assert process.returncode == 0, f"rank {rank}: {errors[-2000:]}"
    return [json.loads(out.splitlines()[-1]) for out, _ in outs]


def assert_same(told: list[dict], *cases: str) -> None:
    for rank, found in enumerate(told):
        for case in cases:
            for backend, result in found[case]["backends"].items():
                assert result["equal"] and result["halves"], (rank, case, backend, result)


def test_two_ranks(tmp_path) -> None:
    same = ("plain", "one_each", "symmetric", "rounds", "empty_rank", "nobody", "sixteen_bits")
    same += ("many_experts", "all_to_one")
    told = run_group(2, tmp_path, *same, "sabotage", "fp8", "control", "lost")
    assert_same(told, *same)
    for found in told:
        assert all(found["control"].values()), found["control"]
    assert told[0]["lost"] == {"buffers": "", "rendezvous": "", "counts": ""}
    for found in told:
        assert not found["sabotage"]["backends"]["gloo"]["equal"], "a wrong table must show"
    assert_near(told, "fp8")


def assert_near(told, name: str) -> None:
    """Near the exact answer, not it, and no further off by one exchange than by another."""
    for found in told:
        results = list(found[name]["backends"].values())
        assert len({result["error"] for result in results}) == 1
        if results[0]["tokens"]:
            assert not results[0]["equal"] and 0.005 < results[0]["error"] < 0.08


def test_four_ranks_two_nodes_and_replicas(tmp_path) -> None:
    same = ("all_to_one", "replicas", "many_experts", "nodes", "plain", "odd")
    told = run_group(4, tmp_path, *same, "fp8_nodes")
    assert_near(told, "fp8_nodes")
    assert_same(told, *same)
    assert_bytes(told, "nodes")


def assert_bytes(told: list[dict], case: str) -> None:
    """Between nodes the dispatch of two levels sends each token once a node, as counted."""
    sent = {
        backend: sum(found[case]["backends"][backend]["node_bytes"] for found in told)
        for backend in ("gloo", "two_level")
    }
    expected = {
        backend: sum(found[case]["expected"][backend] for found in told) for backend in sent
    }
    assert expected["two_level"] < expected["gloo"]
    # What comes back is one row a slot in both, so that the difference is that of the dispatch.
    assert sent["gloo"] - sent["two_level"] == expected["gloo"] - expected["two_level"]
    assert sent["two_level"] > expected["two_level"]


@pytest.mark.slow
def test_sixteen_ranks_as_four_nodes(tmp_path) -> None:
    same = ("many_experts", "nodes_of_four", "fewer_experts_than_ranks", "all_to_one", "empty_rank")
    same += ("replicas",)
    told = run_group(16, tmp_path, *same)
    assert_same(told, *same)
    assert_bytes(told, "nodes_of_four")


@pytest.mark.slow
def test_seventeen_ranks(tmp_path) -> None:
    same = ("odd", "plain", "many_experts", "replicas", "all_to_one", "fewer_experts_than_ranks")
    assert_same(run_group(17, tmp_path, *same), *same)


SPEC = ExpertSpec(num_experts=4, hidden_size=32, intermediate_size=48)


def whole(generator: torch.Generator) -> ExpertWeights:
    shapes = SPEC.weight_shapes()
    return ExpertWeights(**{n: torch.randn(s, generator=generator) for n, s in shapes.items()})


def test_one_process_needs_no_group() -> None:
    from moesaic.functional import moe

    generator = torch.Generator().manual_seed(0)
    weights = whole(generator)
    layer = ExpertParallel(SPEC, None, weights, top_k=2)
    hidden = torch.randn(5, 32, generator=generator)
    ids, share = torch.randint(0, 4, (5, 2), generator=generator), torch.rand(5, 2)
    assert torch.equal(layer(hidden, ids, share), moe(hidden, ids, share, weights, SPEC))
    with pytest.raises(RuntimeError, match="no gradients"):
        layer(hidden.requires_grad_(), ids, share)


def test_what_does_not_fit_is_refused() -> None:
    weights = whole(torch.Generator().manual_seed(0))
    two = contiguous(4, 2)
    with pytest.raises(ValueError, match="over 1 ranks"):
        ExpertParallel(SPEC, two, take_experts(weights, two, layer=0, rank=0), top_k=2)
    with pytest.raises(ValueError, match="needs a placement over 1 rank"):
        LocalExchange(seat_of(two, 0, rank=1))
    with pytest.raises(ValueError, match="needs a process group"):
        choose_backend("symmetric", None, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"config\.max_ctas"):
        ExpertParallel(SPEC, None, weights, top_k=2, options=Options(num_sms=32))
    with pytest.raises(ValueError, match="backend must be one of"):
        choose_backend("carrier pigeon", None, torch.device("cpu"))
    with pytest.raises(ValueError, match="weights must be exactly"):
        ExpertParallel(SPEC, None, ExpertWeights(weights.up, weights.up, mid=weights.up), top_k=2)
    with pytest.raises(ValueError, match="multiple of 128"):
        pack_fp8(torch.zeros(1, 64))
    with pytest.raises(ValueError, match="rank and layer must be in"):
        seat_of(two, 1, rank=0)


def test_seats_follow_the_replica_that_serves_a_source() -> None:
    placement = Placement(ranks=3, layers=(((0,), (2, 1), (0,)),))
    places = [seat_of(placement, 0, rank=r).place_E.tolist() for r in range(3)]
    assert places == [[0, 4, 1], [0, 4, 1], [0, 2, 1]]


def test_counts_of_local_experts() -> None:
    ids_RJ = torch.tensor([[0, 2], [-1, 2], [-1, -1]], dtype=torch.int32)
    assert Received(torch.zeros(3, 8), ids_RJ, None).counts_L(3).tolist() == [1, 0, 2]


def test_capacity_follows_what_was_seen() -> None:
    assert fitting_capacity([900, 1000, 1010]) == 1280
    assert fitting_capacity([]) == fitting_capacity([0]) == 64


def test_a_token_goes_once_to_each_destination() -> None:
    dest = torch.tensor([[1, 1, 0, 1], [-1, 2, -1, 2]])
    assert first_of_each(dest).tolist() == [[True, False, True, False], [False, True, False, False]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_rows_come_back_close(dtype) -> None:
    rows = torch.randn(6, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
    rows[0] = 0
    rows[1, :128] *= 1e4
    back = unpack_fp8(pack_fp8(rows), 256, dtype)
    assert torch.equal(back[0], rows[0])
    assert float(((back - rows).float().abs() / (rows.float().abs() + 1e-3)).median()) < 0.04
    assert Options().wire == "exact"
