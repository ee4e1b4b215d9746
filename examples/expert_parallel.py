"""One MoE layer over the processes that torchrun starts, on GPUs or on CPUs.

    torchrun --nproc-per-node 4 examples/expert_parallel.py
    torchrun --nproc-per-node 2 examples/expert_parallel.py --experts 2 --tokens 100

Every rank brings tokens of its own, as many as its rank says; the output is compared, bit for bit,
with one process that has all the experts. Exit code 1 if a bit differs.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from moesaic import ExpertSpec, ExpertWeights, moe
from moesaic.parallel.expert_parallel import ExpertParallel, Options, take_experts
from moesaic.parallel.placement import contiguous


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--intermediate", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64, help="Of the rank that has most.")
    parser.add_argument("--backend", default="auto")
    args = parser.parse_args()

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(kind, int(os.environ["LOCAL_RANK"]) if kind == "cuda" else 0)
    if kind == "cuda":
        torch.cuda.set_device(device)
    mesh = init_device_mesh(kind, (int(os.environ["WORLD_SIZE"]),), mesh_dim_names=("ep",))
    rank, ranks = mesh.get_rank(), mesh.size()

    spec = ExpertSpec(
        num_experts=args.experts,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
    )
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if kind == "cuda" else torch.float32
    weights = ExpertWeights(
        **{
            name: (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(device, dtype)
            for name, shape in spec.weight_shapes().items()
        }
    )
    tokens = args.tokens * (rank + 1) // ranks
    hidden = torch.randn(tokens, args.hidden).to(device, dtype)
    share, ids = torch.rand(tokens, args.experts).topk(args.top_k)
    share, ids = share.softmax(-1).to(device), ids.to(device)

    placement = contiguous(args.experts, ranks)
    mine = take_experts(weights, placement, layer=0, rank=rank)
    held = len(placement.hosted(0)[rank])
    layer = ExpertParallel(
        spec, placement, mine if held else None, top_k=args.top_k, dtype=dtype, device=device,
        group=mesh, options=Options(backend=args.backend, capacity=args.tokens),
    )  # fmt: skip
    out = layer(hidden, ids, share, bound=args.tokens)
    same = torch.equal(out, moe(hidden, ids, share, weights, spec))
    name = type(layer.exchange).__name__
    print(f"rank {rank}: {tokens} tokens, {held} experts, {name}, same bits: {same}", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main())
