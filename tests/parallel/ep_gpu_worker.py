"""One GPU of a test group, started by torchrun; prints one JSON line of what is not as it should.

Every rank has all experts and all ranks' tokens from seeds: `moe` on one GPU is the answer.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from moesaic.functional import moe
from moesaic.parallel.counting import measured_counts
from moesaic.parallel.exchange import memory
from moesaic.parallel.exchange.base import ExpertRows, combine, dispatch, seat_of
from moesaic.parallel.exchange.collective import FlatExchange
from moesaic.parallel.exchange.symmetric import SymmetricExchange
from moesaic.parallel.expert_parallel import ExpertParallel, Options, take_experts
from moesaic.parallel.placement import Placement, contiguous
from moesaic.types import ExpertSpec, ExpertWeights

BF16 = torch.bfloat16
# experts, K, H, I, dtype, tokens of the ranks in turn, routing
LAYERS = {
    "one a rank": (4, 1, 1024, 512, BF16, (64,), "uniform"),
    "uneven": (16, 4, 1024, 512, BF16, (300, 7, 0, 129), "uniform"),
    "few tokens": (16, 8, 2048, 512, BF16, (1, 3, 2, 1), "uniform"),
    "skewed": (64, 8, 2048, 512, BF16, (2000, 1500, 2048, 77), "zipf"),
    "all to one": (8, 2, 1024, 512, BF16, (700, 20), "one"),
    "fp32": (8, 2, 1024, 512, torch.float32, (100, 33, 4, 0), "uniform"),
}


def placements(experts: int, ranks: int) -> dict[str, Placement]:
    home = [e * ranks // experts if experts > ranks else e % ranks for e in range(experts)]
    backwards = tuple((ranks - 1 - h,) for h in home)
    found = {
        "contiguous": contiguous(experts, ranks),
        "backwards": Placement(ranks=ranks, layers=(backwards,)),
    }
    if ranks > 1:
        twice = tuple((h, (h + 1) % ranks) if e % 3 == 0 else (h,) for e, h in enumerate(home))
        found["replicas"] = Placement(ranks=ranks, layers=(twice,))
    return found


def kinds(bound: int, ranks: int) -> dict[str, Options]:
    if ranks == 1:
        return {"local": Options("local")}
    third = max(1, bound // 3)
    return {
        "nccl": Options("nccl"),
        "two levels": Options("two_level", per_node=max(1, ranks // 2)),
        "symmetric": Options("symmetric", capacity=bound),
        "few SMs": Options("symmetric", capacity=bound, num_sms=16, expert_sms=64),
        "rounds": Options("symmetric", capacity=third),
    }


def draw(name: str, ranks: int, device: torch.device):
    experts, top_k, hidden, inter, dtype, tokens, routing = LAYERS[name]
    generator = torch.Generator(device).manual_seed(5)
    spec = ExpertSpec(num_experts=experts, hidden_size=hidden, intermediate_size=inter)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, generator=generator)

    weights = ExpertWeights(
        **{n: (random(*s) * s[-1] ** -0.5).to(dtype) for n, s in spec.weight_shapes().items()}
    )
    batches = []
    for rank in range(ranks):
        count = tokens[rank % len(tokens)]
        score = torch.rand(count, experts, device=device, generator=generator)
        if routing == "zipf":
            score /= torch.arange(1, experts + 1, device=device)
        if routing == "one":
            score[:, 0] += 9
        share = torch.rand(count, top_k, device=device, generator=generator)
        batches.append((random(count, hidden).to(dtype), score.topk(top_k).indices.int(), share))
    return spec, top_k, weights, batches


def say(rank: int, what: object) -> None:
    """How far rank 0 is, for whoever must end a run early."""
    if rank == 0:
        print(f"{time.perf_counter():.1f} {json.dumps(what)}", file=sys.stderr, flush=True)


def faults_of(layer: ExpertParallel, batch, bound: int, want, other) -> list[str]:
    """How this layer differs from `want`: eager, again, in halves, in a graph, on new input."""
    hidden, ids, share = batch
    faults = []
    for turn in range(3):
        if not torch.equal(layer(hidden, ids, share, bound=bound), want):
            faults.append(f"call {turn}")
    if layer.options.backend in ("symmetric", "local"):
        if layer.options.capacity >= bound:
            halves = layer.end(layer.experts(layer.begin(hidden, ids, share, bound=bound)))
            if not torch.equal(halves, want):
                faults.append("halves")
        torch.cuda.synchronize()
        dist.barrier()
        held, graph = hidden.clone(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer(held, ids, share, bound=bound)
        dist.barrier()
        for turn in range(3):
            out.zero_()
            graph.replay()
            if not torch.equal(out, want):
                faults.append(f"replay {turn}")
        held.copy_(hidden.flip(0))
        graph.replay()
        if not torch.equal(out, other):
            faults.append("replay on new input")
        if layer.options.backend == "symmetric":
            layer.exchange.check()
    return faults


def bits(rank: int, ranks: int, device: torch.device) -> dict[str, list[str]]:
    told = {}
    for name in LAYERS:
        spec, top_k, weights, batches = draw(name, ranks, device)
        hidden, ids, share = batches[rank]
        want = moe(hidden, ids, share, weights, spec)
        other = moe(hidden.flip(0).contiguous(), ids, share, weights, spec)
        bound = max(len(batch[0]) for batch in batches)
        for where, placement in placements(spec.num_experts, ranks).items():
            held = bool(placement.hosted(0)[rank])
            own = take_experts(weights, placement, layer=0, rank=rank) if held else None
            for kind, options in kinds(bound, ranks).items():
                if where != "contiguous" and kind in ("few SMs", "rounds"):
                    continue
                if kind == "two levels" and name not in ("uneven", "fp32"):
                    continue  # each makes communicators of its own
                layer = ExpertParallel(
                    spec, placement, own, top_k=top_k, group=dist.group.WORLD, options=options,
                    dtype=hidden.dtype, device=device,
                )  # fmt: skip
                told[f"{name}, {where}, {kind}"] = faults_of(
                    layer, batches[rank], bound, want, other
                )
                say(rank, f"{name}, {where}, {kind}")
                dist.barrier()
                del layer
    return told


def narrow_wire(
    rank: int, ranks: int, device: torch.device, backends: tuple[str, ...]
) -> dict[str, list[str]]:
    """fp8 on the wire: the same from every exchange, near the exact answer but not it."""
    spec, top_k, weights, batches = draw("uneven", ranks, device)
    hidden, ids, share = batches[rank]
    want = moe(hidden, ids, share, weights, spec).float()
    bound = max(len(batch[0]) for batch in batches)
    placement = contiguous(spec.num_experts, ranks)
    own = take_experts(weights, placement, layer=0, rank=rank)
    got = {}
    for backend in backends:
        nodes = max(1, ranks // 2) if backend == "two_level" else None
        layer = ExpertParallel(
            spec, placement, own, top_k=top_k, group=dist.group.WORLD,
            options=Options(backend, capacity=bound, per_node=nodes, wire="fp8"),  # type: ignore[arg-type]
        )  # fmt: skip
        got[backend] = layer(hidden, ids, share, bound=bound).float()
        dist.barrier()
    first = got[backends[0]]
    error = float((first - want).norm() / want.norm().clamp_min(1e-9))
    faults = [] if 0.005 < error < 0.08 or not len(hidden) else [f"error {error}"]
    faults += [f"{b} differs" for b in backends if not torch.equal(first, got[b])]
    return {"fp8 on the wire": faults}


def between_steps(rank: int, ranks: int, device: torch.device) -> dict[str, list[str]]:
    """Other buffers, budgets and replicas between steps; rows counted at every replay."""
    spec, top_k, weights, batches = draw("uneven", ranks, device)
    hidden, ids, share = batches[rank]
    want, faults = moe(hidden, ids, share, weights, spec), []
    bound, group = max(len(batch[0]) for batch in batches), dist.group.WORLD
    placement = placements(spec.num_experts, ranks)["replicas"]
    layer = ExpertParallel(
        spec, placement, take_experts(weights, placement, layer=0, rank=rank), top_k=top_k,
        group=group, options=Options("symmetric", capacity=bound // 2),
    )  # fmt: skip

    def check(what: str) -> None:
        if not torch.equal(layer(hidden, ids, share, bound=bound), want):
            faults.append(what)
        dist.barrier()

    check("rounds")
    before = layer.exchange.num_bytes
    layer.exchange.resize(bound)
    check("resized")
    if layer.exchange.num_bytes <= before:
        faults.append("no more bytes")
    if layer.refit() != layer.exchange.num_bytes or not bound < layer.exchange.capacity < 2 * bound:
        faults.append("refit")
    check("refitted")
    layer.exchange.limit(16)
    check("few SMs")
    layer.exchange.limit(None)
    turned = tuple(tuple(reversed(hosts)) for hosts in placement.layers[0])
    layer.follow(Placement(ranks=ranks, layers=(turned,)))
    check("followed")
    layer.count()
    torch.cuda.synchronize()
    dist.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(hidden, ids, share, bound=bound)
    dist.barrier()
    for _ in range(3):
        graph.replay()
    if not torch.equal(out, want):
        faults.append("replays")
    drawn = [torch.bincount(batch[1].flatten(), minlength=spec.num_experts) for batch in batches]
    if measured_counts([layer], group)[0].tolist() != [(3 * own).tolist() for own in drawn]:
        faults.append("counts")
    return {"between steps": faults}


def lost_peer(rank: int, ranks: int, device: torch.device) -> dict[str, list[str]]:
    """Rank 0 goes alone: it must come back, with NaN and an error."""
    seat = seat_of(contiguous(ranks, ranks), 0, rank=rank, device=device)
    row = (1024, BF16)
    exchange = SymmetricExchange(
        seat, dist.group.WORLD, top_k=1, row=row, back=row, capacity=4, timeout_s=0.5
    )
    faults = []
    if rank == 0:
        rows = torch.ones(4, 1024, dtype=BF16, device=device)
        ids = torch.zeros(4, 1, dtype=torch.int32, device=device)
        start = time.perf_counter()
        received = dispatch(exchange, rows, ids, bound=4)
        nothing = torch.full_like(received.ids_RJ, -1)
        returned = combine(exchange, ExpertRows(rows, nothing), received.handle)
        torch.cuda.synchronize()
        if not 0.4 < time.perf_counter() - start < 5:
            faults.append("took other than half a second")
        if not returned.rows_XH.isnan().all():
            faults.append("no NaN")
        try:
            exchange.check()
            faults.append("check did not raise")
        except RuntimeError as error:
            if "sent nothing" not in str(error):
                faults.append(str(error))
    dist.barrier()
    return {"lost peer": faults}


def alone(rank: int, ranks: int, device: torch.device) -> dict[str, list[str]]:
    """Rank 0 alone makes buffers, enters torch's rendezvous, sends by NCCL: each ends in time.

    Last of a run, as nothing of the group can be used after it.
    """
    store = memory._store(dist.group.WORLD)
    if rank:
        store.wait(["rank 0 is done"], timedelta(seconds=60))
        return {}
    group, seat = dist.group.WORLD, seat_of(contiguous(ranks, ranks), 0, rank=0, device=device)
    row, faults = (1024, BF16), []
    flat = FlatExchange(seat, group, timeout_s=1.0)
    ids = torch.arange(4, dtype=torch.int32, device=device)[:, None] % ranks
    rows = torch.ones(4, 1024, dtype=BF16, device=device)
    for name, call in {
        "buffers": lambda: SymmetricExchange(
            seat, group, top_k=1, row=row, back=row, capacity=4, timeout_s=1.0
        ),
        "rendezvous": lambda: memory.rendezvous(1 << 20, group, device, 1.0),
        "counts": lambda: flat.send(rows, ids),
    }.items():
        start = time.perf_counter()
        try:
            call()
            faults.append(f"{name} did not raise")
        except RuntimeError as error:
            seconds = time.perf_counter() - start
            if not 0.5 < seconds < 10:
                faults.append(f"{name} took {seconds:.1f} s: {error}")
    store.set("rank 0 is done", "")
    return {"alone": faults}


def main() -> None:
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    dist.init_process_group("nccl", device_id=device)
    told: dict[str, list[str]] = {}
    if ranks > 1:
        told |= narrow_wire(rank, ranks, device, ("nccl", "two_level", "symmetric"))
        say(rank, told)
    told |= bits(rank, ranks, device)
    if ranks > 1:
        told |= between_steps(rank, ranks, device)
        say(rank, told["between steps"])
        told |= lost_peer(rank, ranks, device)
    gathered: list = [None] * ranks
    dist.all_gather_object(gathered, told)
    say(rank, gathered)
    if ranks > 1:
        gathered[rank] |= alone(rank, ranks, device)
    if rank == 0:
        print(json.dumps(gathered), flush=True)
    sys.stdout.flush()
    os._exit(0)  # symmetric memory of other ranks may still be mapped


if __name__ == "__main__":
    main()
