"""Serving engines as schedulers: how many tokens and requests a step may have, what a host costs.

>>> engine = ENGINES["vllm"].on("H200")
>>> engine.budget, engine.most
(8192, 1024)
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Engine:
    """How an engine schedules, and what its host costs; defaults of its server.

    Args:
        budget: tokens of a step; most: requests that run at once; both of all groups together.
        mixed: prompts and other requests share steps; else prompts go first.
        graph: requests of the largest decode step that is a CUDA graph.
        step_s: of the host, between steps; request_s: for every running request.
        layer_s: of the host, to launch a layer that is not in a graph.
        small_s: of every layer, for kernels that have no model: norms, rotations, sorting, casts.
        drag: share that steps take longer than their kernels alone, one after the other.
        front_s: to take in a request, one after the other.
        memory: share of a GPU's memory that weights and cache may fill.
    """

    name: str
    budget: int = 8192
    most: int = 1024
    mixed: bool = True
    graph: int = 512
    step_s: float = 1e-3
    request_s: float = 0.0
    layer_s: float = 150e-6
    small_s: float = 30e-6
    drag: float = 0.3
    front_s: float = 1e-3
    memory: float = 0.9

    def on(self, card: str) -> Engine:
        """The engine on a card: vLLM has smaller limits on an A100."""
        if self.name == "vllm" and card == "A100":
            return replace(self, budget=2048, most=256)
        return self


# Limits: vLLM from 0.9 (get_batch_defaults), SGLang 0.5 (server_args), TensorRT-LLM 1.0.
# Host: vLLM's loop 0.54 ms a step and 12.7 us a running request (openfabric-systems/simllm 204),
# its first engine 5 ms (vllm-project/vllm 6854), SGLang 0.31 ms (tenstorrent/tt-inference-server
# 3560). `small_s` and `drag` were chosen from rounds 2 to 5 of the validation page: published times
# of kernels are of one alone, tuned for its shape, with even routing, and leave out waiting for
# the slowest rank. `layer_s` and `front_s` are estimates.
ENGINES = {
    "vllm": Engine(name="vllm", step_s=0.54e-3, request_s=12.7e-6),
    "sglang": Engine(name="sglang", most=4096, mixed=False, step_s=0.31e-3, memory=0.85),
    "vllm-v0": Engine(name="vllm-v0", budget=8192, most=256, mixed=False, graph=256, step_s=5e-3),
    "trtllm": Engine(name="trtllm", most=2048, step_s=0.54e-3),
}
