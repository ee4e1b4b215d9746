"""One GPU of an attached transformers model, started by torchrun; prints one JSON line a group.

Every rank has the model and a batch of its own; the answer is the same model attached without a
mesh, on this GPU alone.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import moesaic
from moesaic.parallel.expert_parallel import Options
from moesaic.parallel.placement import Placement


def make_model(device: torch.device) -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=96, hidden_size=256, intermediate_size=256, moe_intermediate_size=128,
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        num_experts=16, num_experts_per_tok=4, decoder_sparse_step=1, max_position_embeddings=64,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).to(device, torch.bfloat16).eval()


def scattered(ranks: int) -> Placement:
    """Expert e on rank e % G, the first one also on the last rank: no rank's are neighbours."""
    hosts = [(e % ranks,) for e in range(16)]
    hosts[0] = (0, ranks - 1)
    return Placement(ranks=ranks, layers=(tuple(hosts),) * 3)


@torch.no_grad()
def main() -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device, timeout=timedelta(seconds=60))
    mesh = init_device_mesh("cuda", (world,), mesh_dim_names=("ep",))
    model = make_model(device)
    prompt = torch.randint(0, 96, (1 + rank, 5 + 2 * rank), generator=torch.manual_seed(rank))
    prompt = prompt.to(device)
    moesaic.attach(model)
    want = model(prompt).logits
    tokens = model.generate(prompt, max_new_tokens=6, do_sample=False)
    moesaic.detach(model)
    told: dict[str, dict[str, bool]] = {}
    few = Options(backend="symmetric", capacity=8)
    for name, more in {
        "auto": {"mesh": mesh},
        "scattered": {"mesh": mesh["ep"], "placement": scattered(world)},
        "rounds": {"mesh": mesh, "options": few},
        "nccl": {"mesh": mesh, "options": Options(backend="nccl")},
    }.items():
        attachment = moesaic.attach(model, **more)
        told[name] = {"logits": torch.equal(model(prompt).logits, want)}
        again = model.generate(prompt, max_new_tokens=6, do_sample=False, synced_gpus=True)
        told[name]["tokens"] = torch.equal(again, tokens)
        exchange = attachment.layers[0].spread.layer.exchange
        kind = "FlatExchange" if name == "nccl" else "SymmetricExchange"
        told[name]["exchange"] = type(exchange).__name__ == kind
        moesaic.detach(model)
        dist.barrier()
    moesaic.attach(model)
    told["after"] = {"logits": torch.equal(model(prompt).logits, want)}
    gathered: list = [None] * world
    dist.all_gather_object(gathered, told)
    if rank == 0:
        print(json.dumps(gathered), flush=True)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # symmetric memory of other ranks may still be mapped


if __name__ == "__main__":
    main()
