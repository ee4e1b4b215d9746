"""More ranks than GPUs, started by torchrun; prints one JSON line of what is not as it should.

Several ranks share a GPU, which NCCL refuses and symmetric memory allows: what more GPUs would do,
slower. Ranks are cut into groups of two, then stand together, as two nodes too, then in twos again;
rows cross in fp8; then two of them make memory that the others do not know of.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from ep_gpu_worker import LAYERS, draw, faults_of, narrow_wire, placements, say

from moesaic.bench.ranks import cut_into
from moesaic.functional import moe
from moesaic.parallel.exchange.base import seat_of
from moesaic.parallel.exchange.symmetric import SymmetricExchange
from moesaic.parallel.expert_parallel import ExpertParallel, Options, take_experts
from moesaic.parallel.placement import contiguous

NAME = "uneven"
TIMEOUT_S = 40.0


def spread(group: dist.ProcessGroup, where: str, kind: str, device: torch.device) -> list[str]:
    """A layer over a group: how it differs from one process."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    spec, top_k, weights, batches = draw(NAME, ranks, device)
    hidden, ids, share = batches[rank]
    want = moe(hidden, ids, share, weights, spec)
    other = moe(hidden.flip(0).contiguous(), ids, share, weights, spec)
    bound = max(len(batch[0]) for batch in batches)
    capacity = max(1, bound // 3) if kind == "rounds" else bound
    placement = placements(spec.num_experts, ranks)[where]
    options = Options("symmetric", capacity=capacity, num_sms=64, timeout_s=TIMEOUT_S)
    if kind == "two levels":
        options = Options("two_level", per_node=ranks // 2, timeout_s=TIMEOUT_S)
    layer = ExpertParallel(
        spec, placement, take_experts(weights, placement, layer=0, rank=rank),
        top_k=top_k, group=group, options=options,
    )  # fmt: skip
    return faults_of(layer, batches[rank], bound, want, other)


def strangers(rank: int, device: torch.device) -> list[str]:
    """Ranks 0 and 1 alone make memory, then all: refused in time on every rank."""
    seat = seat_of(contiguous(2, 2), 0, rank=rank % 2, device=device)
    row = (1024, torch.bfloat16)

    def make(group: dist.ProcessGroup, own) -> SymmetricExchange:
        return SymmetricExchange(
            own, group, top_k=1, row=row, back=row, capacity=4, timeout_s=TIMEOUT_S
        )

    two = dist.new_group([0, 1])
    if rank < 2:
        make(two, seat)
    dist.barrier()
    ranks, start = dist.get_world_size(), time.perf_counter()
    world = seat_of(contiguous(ranks, ranks), 0, rank=rank, device=device)
    try:
        make(dist.group.WORLD, world)
        return ["all ranks were let in"]
    except RuntimeError as error:
        late = time.perf_counter() - start > TIMEOUT_S
        return [str(error)] if late or "196082" not in str(error) else []


def main() -> None:
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    assert LAYERS[NAME][0] >= ranks
    twos, world = cut_into(2, ranks), dist.group.WORLD
    told: dict[str, list[str]] = {}
    for name, group, where, kind in (
        ("twos", twos, "contiguous", "whole"),
        ("all", world, "contiguous", "whole"),
        ("all, in rounds", world, "contiguous", "rounds"),
        ("all, replicas", world, "replicas", "whole"),
        ("all, two levels", world, "replicas", "two levels"),
        ("twos again", twos, "backwards", "whole"),
    ):
        told[name] = spread(group, where, kind, device)
        dist.barrier()
        say(rank, {name: told[name]})
    told |= narrow_wire(rank, ranks, device, ("two_level", "symmetric"))
    say(rank, told)
    told["strangers"] = strangers(rank, device)
    gathered: list = [None] * ranks
    dist.all_gather_object(gathered, told)
    if rank == 0:
        print(json.dumps(gathered), flush=True)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # symmetric memory of other ranks may still be mapped


if __name__ == "__main__":
    main()
