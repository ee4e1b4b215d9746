"""One rank of a test group: `ep_worker.py RANK WORLD STORE CASE...`; prints one JSON line.

Every rank makes the same layer and all ranks' tokens from seeds, computes its own tokens in one
process with all experts, and compares bits with what the group gives.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass, field
from datetime import timedelta

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
import torch.distributed as dist

from moesaic.functional import moe
from moesaic.parallel.counting import measured_counts
from moesaic.parallel.exchange import memory
from moesaic.parallel.expert_parallel import ExpertParallel, Options, take_experts
from moesaic.parallel.links import busiest, link_times
from moesaic.parallel.placement import Placement, contiguous
from moesaic.parallel.planning import plan
from moesaic.parallel.topology import Topology
from moesaic.types import ExpertSpec, ExpertWeights


@dataclass(frozen=True)
class Case:
    experts: int
    top_k: int
    tokens: tuple[int, ...]
    """Of each rank, repeated over the ranks."""
    backends: tuple[str, ...] = ("gloo",)
    routing: str = "uniform"
    replicas: int = 0
    reverse: bool = False
    capacity: int = 64
    per_node: int | None = None
    dtype: torch.dtype = torch.float32
    hidden: int = 32
    sabotage: bool = False
    options: dict = field(default_factory=dict)


CASES = {
    "plain": Case(8, 2, (5, 3)),
    "one_each": Case(2, 1, (4, 4), backends=("gloo", "symmetric")),
    "symmetric": Case(4, 2, (5, 2), backends=("gloo", "symmetric"), reverse=True),
    "rounds": Case(4, 2, (7, 2), backends=("symmetric",), capacity=3),
    "empty_rank": Case(6, 3, (9, 0), backends=("gloo", "symmetric")),
    "nobody": Case(4, 2, (0,), backends=("gloo", "symmetric")),
    "all_to_one": Case(4, 1, (6, 6), backends=("gloo", "symmetric"), routing="one"),
    "replicas": Case(4, 2, (6, 5, 1), backends=("gloo", "symmetric"), replicas=2),
    "sixteen_bits": Case(8, 4, (6, 2), dtype=torch.bfloat16, backends=("gloo", "symmetric")),
    "many_experts": Case(64, 8, (11, 4, 0, 7)),
    "fewer_experts_than_ranks": Case(4, 2, (5, 3, 0, 8), replicas=1),
    "nodes": Case(16, 4, (12, 5, 9), backends=("gloo", "two_level"), per_node=2),
    "nodes_of_four": Case(32, 8, (12, 5, 9, 0), backends=("gloo", "two_level"), per_node=4),
    "odd": Case(17, 3, (4, 0, 6), backends=("gloo",)),
    "sabotage": Case(8, 2, (5, 3), backends=("gloo",), sabotage=True),
    "fp8": Case(8, 2, (5, 3), hidden=128, backends=("gloo", "symmetric"),
                options={"wire": "fp8"}),
    "fp8_nodes": Case(8, 2, (5, 3, 0, 4), hidden=128, backends=("gloo", "two_level", "symmetric"),
                      per_node=2, options={"wire": "fp8"}),
}  # fmt: skip


def place(case: Case, world: int) -> Placement:
    """Contiguous; or with replicas of the first experts; or backwards over the ranks."""
    hosts = [list(h) for h in contiguous(case.experts, world).layers[0]]
    for expert in range(case.replicas):
        hosts[expert] += [r for r in range(world - 1, -1, -1) if r not in hosts[expert]][:2]
    if case.reverse:
        hosts = [[world - 1 - r for r in h] for h in hosts]
    return Placement(ranks=world, layers=(tuple(tuple(h) for h in hosts),))


def draw(case: Case, world: int):
    generator = torch.Generator().manual_seed(11)
    spec = ExpertSpec(num_experts=case.experts, hidden_size=case.hidden, intermediate_size=48)
    weights = ExpertWeights(
        **{
            name: (torch.randn(shape, generator=generator) * 0.2).to(case.dtype)
            for name, shape in spec.weight_shapes().items()
        }
    )
    batches = []
    for rank in range(world):
        count = case.tokens[rank % len(case.tokens)]
        hidden = torch.randn(count, case.hidden, generator=generator).to(case.dtype)
        ids = torch.rand(count, case.experts, generator=generator).argsort(-1)[:, : case.top_k]
        if case.routing == "one":
            ids = torch.full_like(ids, case.experts - 1)
        share = torch.rand(count, case.top_k, generator=generator)
        batches.append((hidden, ids.to(torch.int32), share))
    return spec, weights, batches


def node_bytes(layer, world: int, rank: int, per_node: int) -> int:
    others = [r for r in range(world) if r // per_node != rank // per_node]
    return layer.exchange.wire.to(others) if hasattr(layer.exchange, "wire") else 0


def run(name: str, rank: int, world: int) -> dict:
    case = CASES[name]
    spec, weights, batches = draw(case, world)
    placement = place(case, world)
    hidden, ids, share = batches[rank]
    want = moe(hidden, ids, share, weights, spec) if len(hidden) else hidden
    bound = max(len(batch[0]) for batch in batches)
    own = take_experts(weights, placement, layer=0, rank=rank)
    held = len(placement.hosted(0)[rank])
    told: dict = {"backends": {}}
    for backend in case.backends:
        options = Options(
            backend=backend, capacity=case.capacity, per_node=case.per_node, timeout_s=240,
            **case.options,
        )  # fmt: skip
        layer = ExpertParallel(
            spec, placement, own if held else None, top_k=case.top_k, dtype=case.dtype,
            group=dist.group.WORLD, options=options,
        )  # fmt: skip
        if case.sabotage:
            layer.seat.place_E.copy_(layer.seat.place_E.flip(0))
        got = [layer(hidden, ids, share, bound=bound) for _ in range(2)]
        part = slice(0, 0) if case.capacity < bound else slice(None)
        step = layer.begin(hidden[part], ids[part], share[part], bound=min(bound, case.capacity))
        halves = layer.end(layer.experts(step))
        scale = float((got[0] - want).norm() / want.norm().clamp_min(1e-9))
        told["backends"][backend] = {
            "equal": torch.equal(got[0], want) and torch.equal(got[1], want),
            "halves": torch.equal(halves, got[0][part]),
            "error": scale,
            "tokens": len(hidden),
        }
        if case.per_node:
            told["backends"][backend]["node_bytes"] = node_bytes(layer, world, rank, case.per_node)
        dist.barrier()
    if case.per_node:
        told["expected"] = expected_bytes(case, placement, ids, rank)
    return told


def expected_bytes(case: Case, placement: Placement, ids, rank: int) -> dict[str, int]:
    """Dispatch bytes between nodes of three calls, counted token by token."""
    hosts = placement.destinations(0)[rank]
    row = case.hidden * case.dtype.itemsize + 4 * case.top_k
    flat = two_level = 0
    for token in ids.tolist():
        ranks = {int(hosts[e]) for e in token}
        away = {r for r in ranks if r // case.per_node != rank // case.per_node}
        flat += len(away)
        two_level += len({r // case.per_node for r in away})
    return {"gloo": 3 * flat * row, "two_level": 3 * two_level * row}


def control(rank: int, world: int) -> dict:
    """Between steps: other buffers, other replicas; what must not change is refused."""
    case = Case(4, 2, (7, 4), replicas=2, capacity=3)
    spec, weights, batches = draw(case, world)
    placement = place(case, world)
    hidden, ids, share = batches[rank]
    want = moe(hidden, ids, share, weights, spec)
    layer = ExpertParallel(
        spec, placement, take_experts(weights, placement, layer=0, rank=rank), top_k=2,
        dtype=case.dtype, group=dist.group.WORLD,
        options=Options(backend="symmetric", capacity=3, timeout_s=60),
    )  # fmt: skip
    told = {"small": torch.equal(layer(hidden, ids, share, bound=7), want)}
    before = layer.exchange.num_bytes
    layer.exchange.resize(7)
    told["resized"] = torch.equal(layer(hidden, ids, share, bound=7), want)
    told["bytes"] = layer.exchange.num_bytes > before
    starts = tuple(tuple(range(len(hosts))) for hosts in placement.layers[0])
    hosts = tuple(tuple(reversed(h)) for h in placement.layers[0])
    other = Placement(ranks=world, layers=(hosts,), starts=(starts,))
    table = layer.seat.place_E.clone()
    layer.follow(other)
    told["followed"] = torch.equal(layer(hidden, ids, share, bound=7), want)
    told["elsewhere"] = not torch.equal(table, layer.seat.place_E)
    like = ExpertParallel(
        spec, placement, layer.weights, top_k=2, group=dist.group.WORLD, like=layer
    )
    told["shared"] = torch.equal(like(hidden, ids, share, bound=7), want)
    told["again"] = torch.equal(layer(hidden, ids, share, bound=7), want)
    layer.exchange.resize(2)
    told["both resized"] = layer.exchange.num_bytes == like.exchange.num_bytes
    for name, one in {"first": layer, "like": like}.items():
        told[f"{name} after"] = torch.equal(one(hidden, ids, share, bound=7), want)
    told["refit bytes"] = layer.refit() == like.exchange.num_bytes
    told["refit"] = like.exchange.capacity == 64 and torch.equal(
        like(hidden, ids, share, bound=7), want
    )
    more, ids_more, share_more = (t.repeat(3, 1) for t in (hidden, ids, share))
    for name, call in {
        "moved": lambda: layer.follow(contiguous(4, world)),
        "too many": lambda: layer.exchange.send(more, ids_more, bound=7),
        "over the bound": lambda: layer(more, ids_more, share_more, bound=5),
    }.items():
        try:
            call()
            told[name] = False
        except ValueError as error:
            words = ("make the layer", "parts()", "the bound is 5")
            told[name] = any(w in str(error) for w in words)
    group = dist.group.WORLD
    met = [memory.meet(group, f"{rank}.{i}", 60.0) for i in range(5)]
    told["met"] = met == [[f"{r}.{i}" for r in range(world)] for i in range(5)]
    (name,) = memory.MET
    kept = dist.PrefixStore(name, memory._store(group))
    numbers = range(memory.MET[name])
    told["forgotten"] = [n for n in numbers if kept.check([f"{n}/{rank}"])] == [numbers[-1]]
    if rank == 0:
        memory.MADE.append(256)  # as if for a group that rank 1 is not in
    try:
        memory._by_torch(256, dist.group.WORLD, torch.device("cpu"), 60.0)
        told["uneven"] = False
    except RuntimeError as error:
        told["uneven"] = "196082" in str(error)
    return told


def measured(rank: int, world: int) -> dict:
    """Layers count what every source had; a plan from that is better, and bits are the same."""
    case = Case(8, 2, (20, 12))
    spec, weights, batches = draw(case, world)
    # Sources like experts of the other end of the ranks.
    batches = [
        (h, (ids % 2 + 2 * ((world - 1 - r) % 4)).to(torch.int32), s)
        for r, (h, ids, s) in enumerate(batches)
    ]
    hidden, ids, share = batches[rank]
    group, placement = dist.group.WORLD, contiguous(8, world)

    def made(where: Placement) -> ExpertParallel:
        own = take_experts(weights, where, layer=0, rank=rank)
        return ExpertParallel(spec, where, own, top_k=2, group=group)

    told: dict = {}
    layers = [made(placement), made(placement)]
    layers[0](hidden, ids, share)
    try:
        measured_counts(layers, group)
        told["not counting"] = False
    except ValueError as error:
        told["not counting"] = "call count" in str(error)
    for layer in layers:
        layer.count()
    for layer in (layers[0], layers[0], layers[1]):
        layer(hidden, ids, share)
    layers[1].end(layers[1].experts(layers[1].begin(hidden, ids, share)))
    counts = measured_counts(layers, group)
    twice = [(2 * torch.bincount(b[1].flatten(), minlength=8)).tolist() for b in batches]
    told["counts"] = counts.tolist() == [twice, twice]
    layers[0].count(False)
    layers[0](hidden, ids, share)
    layers[0].count()
    told["from zero"] = not measured_counts(layers, group)[0].any()
    topology = Topology(
        nodes=2, gpus_per_node=2, gpu_bytes_per_s=4e11, nics_per_node=2, nic_bytes_per_s=5e10
    )
    found = plan(counts, topology, row_bytes=64)
    before = busiest(link_times(placement.destinations(0), counts[0], topology, 64))[2]
    told["better"] = found.seconds[0] < 0.5 * before
    told["bits"] = torch.equal(
        made(found.placement)(hidden, ids, share), moe(hidden, ids, share, weights, spec)
    )
    return told


def lost(rank: int, world: int) -> dict:
    """Rank 0 goes alone: whatever it waits for ends with an error; the others wait till it is done.

    Last of a run, as nothing of the group can be used after it.
    """
    store = memory._store(dist.group.WORLD)
    if rank:
        store.wait(["rank 0 is done"], timedelta(seconds=60))
        return {}
    case = CASES["plain"]
    spec, weights, batches = draw(case, world)
    placement = place(case, world)
    own = take_experts(weights, placement, layer=0, rank=rank)
    told: dict = {}

    def layer(backend: str) -> ExpertParallel:
        return ExpertParallel(
            spec, placement, own, top_k=case.top_k, group=dist.group.WORLD,
            options=Options(backend=backend, capacity=8, timeout_s=1.0),
        )  # fmt: skip

    flat = layer("gloo")
    for name, call, words in (
        ("buffers", lambda: layer("symmetric"), "rank 1 did not come"),
        ("rendezvous", lambda: rendezvous_alone(), "for nothing"),
        ("counts", lambda: flat(*batches[0], bound=8), ""),
    ):
        start = time.perf_counter()
        try:
            call()
            told[name] = "did not raise"
        except RuntimeError as error:
            late = not 0.5 < time.perf_counter() - start < 15
            told[name] = str(error) if late or words not in str(error) else ""
    store.set("rank 0 is done", "")
    return told


def rendezvous_alone() -> None:
    """What torch does in a rendezvous that the others are not in: it waits for their keys."""
    with memory._patience(dist.group.WORLD, 1.0):
        try:
            memory._store(dist.group.WORLD).get("a key of another rank")
        except RuntimeError as error:
            raise RuntimeError("waited for nothing") from error


def main() -> None:
    rank, world = int(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{sys.argv[3]}", rank=rank, world_size=world,
        timeout=timedelta(seconds=240),
    )  # fmt: skip
    special = {"control": control, "measured": measured, "lost": lost}
    told = {
        n: special[n](rank, world) if n in special else run(n, rank, world) for n in sys.argv[4:]
    }
    print(json.dumps(told), flush=True)
    if "lost" in told:
        os._exit(0)  # there is no group left to leave
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
