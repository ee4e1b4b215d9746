"""Losses of a few training steps of tiny models, sharded by FSDP2 over gloo ranks.

    python tools/hf_fsdp.py WORLD FAMILY ...     prints one JSON object: family -> losses

One process a rank on this machine; WORLD 1 trains without sharding. A family that cannot be trained
has words instead of losses, and they begin with "grouped_mm cannot either" where that is so.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

STEPS = 3
Losses = list[float] | str


def train(family: str, world: int, name: str = "moesaic") -> list[float]:
    """Losses of plain SGD steps on a fixed random batch, the same on every rank."""
    from hf_checks import output, select, token_ids
    from hf_families import decoder_layers, tiny_model
    from torch.distributed.fsdp import fully_shard

    model = select(tiny_model(family), name).train()
    ids_BN = token_ids(model, 2, 12)
    if world > 1:
        for layer in decoder_layers(model):
            fully_shard(layer)
        fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(STEPS):
        logits_BNV = output(model, ids_BN)
        target_BN = ids_BN % logits_BNV.shape[-1]
        loss = torch.nn.functional.cross_entropy(logits_BNV.flatten(0, 1), target_BN.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def tried(family: str, world: int) -> Losses:
    """`train`, or what went wrong, and whether it does with grouped_mm too."""
    try:
        return train(family, world)
    except Exception as error:
        told = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        try:
            train(family, world, "grouped_mm")
        except Exception:
            return f"grouped_mm cannot either ({told})"
        return told


def rank_main(rank: int, world: int, port: int, families: list[str]) -> None:
    """One rank; rank 0 prints."""
    if world > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world
        )
    losses = {family: tried(family, world) for family in families}
    if rank == 0:
        print(json.dumps(losses))
    if world > 1:
        torch.distributed.destroy_process_group()


def launch(world: int, families: list[str], timeout_s: float = 240.0) -> dict[str, Losses]:
    """The losses of every family over so many ranks, or what went wrong.

    Raises:
        RuntimeError: a rank failed; the message ends with its last lines.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tools = Path(__file__).resolve().parent
    paths = [str(tools.parent / "src"), str(tools)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--rank"]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(port), *families],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env,
        )
        for rank in range(world)
    ]  # fmt: skip
    try:
        texts = [rank.communicate(timeout=timeout_s) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, (_, error) in zip(ranks, texts, strict=True):
        if rank.returncode:
            raise RuntimeError(error[-2000:])
    losses: dict[str, Losses] = json.loads(texts[0][0].splitlines()[-1])
    return losses


if __name__ == "__main__":
    if sys.argv[1] == "--rank":
        rank_main(int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5:])
        # Threads of gloo may still be joinable when the interpreter goes, which aborts the process.
        sys.stdout.flush()
        os._exit(0)
    else:
        print(json.dumps(launch(int(sys.argv[1]), sys.argv[2:])))
