"""One rank of an attached model: `spread_worker.py RANK WORLD STORE`; prints one JSON line."""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import moesaic
from moesaic.parallel.counting import measured_counts
from moesaic.parallel.expert_parallel import Options
from moesaic.parallel.placement import Placement
from moesaic.parallel.planning import plan
from moesaic.parallel.topology import Topology


def make_model() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, moe_intermediate_size=24,
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        num_experts=8, num_experts_per_tok=2, decoder_sparse_step=1, max_position_embeddings=64,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).eval()


def scattered(ranks: int) -> Placement:
    """Expert e on rank e % G, the first one also on the last rank: no rank's are neighbours."""
    hosts = [(e % ranks,) for e in range(8)]
    hosts[0] = (0, ranks - 1)
    return Placement(ranks=ranks, layers=(tuple(hosts),) * 3)


@torch.no_grad()
def main() -> None:
    rank, world = int(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{sys.argv[3]}", rank=rank, world_size=world,
        timeout=timedelta(seconds=240),
    )  # fmt: skip
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("ep",))
    model = make_model()
    prompt = torch.randint(0, 96, (1 + rank, 5 + 2 * rank), generator=torch.manual_seed(rank))
    moesaic.attach(model)
    want = model(prompt).logits
    tokens = model.generate(prompt, max_new_tokens=4, do_sample=False)
    moesaic.detach(model)
    keys = list(model.state_dict())
    told: dict = {}
    for name, more in {
        "mesh": {"mesh": mesh},
        "scattered": {"mesh": mesh["ep"], "placement": scattered(world)},
        "symmetric": {"mesh": mesh, "options": Options(backend="symmetric", capacity=8)},
    }.items():
        attachment = moesaic.attach(model, **more)
        got = model(prompt).logits
        told[name] = {"logits": torch.equal(got, want)}
        layers = [state.spread.layer for state in attachment.layers]
        held = [0 if layer.weights is None else len(layer.weights.up) for layer in layers]
        shared = len({id(getattr(x.exchange, "wire", None) or x.exchange.window) for x in layers})
        told[name] |= {"held": held, "exchanges": shared}
        if name == "symmetric":
            for layer in layers:
                layer.count()
            model(prompt)
            counts = measured_counts(layers, dist.group.WORLD)
        if name == "mesh":
            again = model.generate(prompt, max_new_tokens=4, do_sample=False, synced_gpus=True)
            told[name]["tokens"] = torch.equal(again, tokens)
            view = layers[0].weights.up.untyped_storage().data_ptr()
            whole = model.model.layers[0].mlp.experts.gate_up_proj
            told[name]["no copy"] = view == whole.untyped_storage().data_ptr()
        moesaic.detach(model)
        told[name]["keys"] = list(model.state_dict()) == keys
        told[name]["back"] = not any("_moesaic" in k for m in model.modules() for k in vars(m))
        dist.barrier()
    told["planned"] = {"counts": counts.sum(axis=2).tolist() == [[2 * 5, 2 * 2 * 7]] * 3}
    topology = Topology(nodes=1, gpus_per_node=world, gpu_bytes_per_s=4e11)
    found = plan(counts, topology, row_bytes=4 * 32).placement
    moesaic.attach(model, mesh=mesh, placement=found)
    told["planned"]["logits"] = torch.equal(model(prompt).logits, want)
    moesaic.detach(model)
    moesaic.attach(model)
    told["after"] = {"logits": torch.equal(model(prompt).logits, want)}
    try:
        moesaic.detach(model)
        moesaic.attach(model, mesh=mesh, tokens="guess")
    except ValueError as error:
        told["refused"] = {"tokens": "agree" in str(error)}
    print(json.dumps(told), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
