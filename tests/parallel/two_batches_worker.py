"""One rank of a test group: `two_batches_worker.py RANK WORLD STORE BACKEND`; prints one JSON line.

Two batches go through three layers side by side, and one after the other; bits are compared, also
under a plan's budgets where the backend obeys them.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
import torch.distributed as dist

from moesaic.parallel.expert_parallel import ExpertParallel, Options, take_experts
from moesaic.parallel.placement import contiguous
from moesaic.parallel.two_batches import follow_plan, side_by_side
from moesaic.runtime.plan import Plan, Share
from moesaic.types import ExpertSpec, ExpertWeights

LAYERS, TOKENS = 3, ((5, 3), (4, 6))
SPEC = ExpertSpec(num_experts=4, hidden_size=32, intermediate_size=16)


def main(rank: int, world: int, store: str, backend: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    weights = ExpertWeights(
        **{n: torch.randn(s, generator=generator) for n, s in SPEC.weight_shapes().items()}
    )
    place = contiguous(SPEC.num_experts, world, LAYERS)
    own = take_experts(weights, place, layer=0, rank=rank)
    made = []
    for _ in range(2):
        options = Options(backend, capacity=8)
        first = ExpertParallel(SPEC, place, own, top_k=2, group=dist.group.WORLD, options=options)
        others = [
            ExpertParallel(SPEC, place, own, top_k=2, group=dist.group.WORLD, layer=n, like=first)
            for n in range(1, LAYERS)
        ]
        made.append([first, *others])
    layers = list(zip(*made, strict=True))
    inputs = [torch.randn(TOKENS[b][rank % 2], 32, generator=generator) for b in (0, 1)]
    turns: list[tuple[int, int]] = []

    def route(number: int, batch: int, hidden: torch.Tensor):
        turns.append((number, batch))
        drawn = torch.Generator().manual_seed(100 * number + 10 * batch + rank)
        ids = torch.rand(hidden.shape[0], 4, generator=drawn).topk(2).indices.int()
        return ids, torch.rand(hidden.shape[0], 2, generator=drawn)

    alone = []
    for b, hidden in enumerate(inputs):
        for number in range(LAYERS):
            hidden = layers[number][b](hidden, *route(number, b, hidden), bound=8)
        alone.append(hidden)
    turns.clear()
    both = side_by_side(layers, inputs, route, bound=8)
    told = {"equal": all(map(torch.equal, both, alone)), "turns": [*turns], "budgets": None}
    try:
        for pair in layers:
            for layer in pair:
                follow_plan(
                    layer, plan := Plan(policy="t", reason="", shares=(Share("exchange", 2),))
                )
        sms = {layer.exchange.num_sms for pair in layers for layer in pair}
        told["budgets"] = [sorted(sms), [*plan.sizes.values()]]
        again = side_by_side(layers, inputs, route, bound=8)
        told["equal"] &= all(map(torch.equal, again, alone))
    except RuntimeError as error:
        told["budgets"] = str(error)
    print(json.dumps(told), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
