"""The stages of the layer one by one: time, and the bytes that each must move over that time.

    T tokens · H hidden width · E experts · K top-k · S = T*K routed rows

Routing (logits to ids, weights and counts), experts (ids to rows) and aggregation (rows to output),
by moesaic and by PyTorch. Bytes are counted, not measured: what a stage must read and write once.
Where they fit into the cache they need not come from DRAM, so a rate is one of work, and the `dram`
activity of the energy windows is what the memory really did.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...cost import expert_weight_elements
from ...functional import route
from ...types import RouterSpec
from ..layers import Loaded, Machine, make_work
from ..suite import Cell
from ..timing import (
    Call,
    GraphError,
    Sampler,
    capture,
    cpu_sampler,
    eager_sampler,
    graph_sampler,
    interleave,
    reason,
)
from .executor import ExpertRows, combine_slots, sort_slots
from .executors.fastermoe import fastermoe_rows

STAGES = ("routing", "experts", "aggregation")
OURS, THEIRS = "moesaic", "torch"
Values = dict[tuple[str, str], dict[str, Any]]


@dataclass(frozen=True)
class Stage:
    """One stage by one implementation: its calls over rotating inputs, the bytes of one call."""

    impl: str
    calls: list[Call]
    num_bytes: int


def torch_route(logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax, top-k, division and counts in PyTorch, without a host sync."""
    weights_TK, ids_TK = logits_TE.softmax(-1, dtype=torch.float32).topk(top_k, dim=-1)
    weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    flat_S = ids_TK.flatten()
    counts_E = flat_S.new_zeros(logits_TE.shape[1])
    return ids_TK, weights_TK, counts_E.scatter_add_(0, flat_S, torch.ones_like(flat_S))


def torch_aggregate(rows_SH: Tensor, tokens_S: Tensor, scales_S1: Tensor, out_TH: Tensor) -> Tensor:
    """Scale the rows and add them to their tokens, as the sequential loop does for each expert."""
    return out_TH.zero_().index_add_(0, tokens_S, rows_SH * scales_S1)


def rows_by_moesaic(loaded: Loaded, number: int) -> Callable[[Tensor, Tensor], ExpertRows]:
    """The static batch of moesaic up to its rows, for weight set `number`."""
    from ...kernels.batching import batch_rows
    from .triton_rows import config_of, heights_of, mlp_rows, new_buffers

    model, weights = loaded.model, loaded.sets[number]

    def rows(hidden_TH: Tensor, ids_TK: Tensor) -> ExpertRows:
        config = config_of(model, weights, hidden_TH, ids_TK)
        sort, tasks = batch_rows(ids_TK, model.num_experts, heights=heights_of(config))
        buffers, top_k = new_buffers(model, ids_TK.numel(), hidden_TH), ids_TK.shape[1]
        out_SH = mlp_rows(hidden_TH, weights, sort, tasks, config, top_k=top_k, buffers=buffers)
        return ExpertRows(out_SH, sort.position_S.view(ids_TK.shape))

    return rows


def stages_of(loaded: Loaded, cell: Cell, machine: Machine, seed: int) -> list[Stage]:
    """Every stage that the device can run; on a CPU those of PyTorch and moesaic's routing."""
    model, work = loaded.model, make_work(loaded, cell, machine, seed)
    item, t, k, h = loaded.dtype.itemsize, cell.tokens, model.top_k, model.hidden_size
    spec = RouterSpec(num_experts=model.num_experts, top_k=k)
    gpu = machine.device.type == "cuda"
    calls: dict[tuple[str, str], list[Call]] = {}
    for number, (hidden_TH, ids_TK, weights_TK) in enumerate(work.inputs):
        one = number % len(loaded.sets)
        logits_TE = torch.randn(t, model.num_experts, device=machine.device)
        logits_TE = logits_TE.to(loaded.dtype)
        slots = sort_slots(ids_TK)
        rows_SH = torch.randn(t * k, h, device=machine.device).to(loaded.dtype)
        scales_S1 = weights_TK.flatten()[slots.order_S, None].to(loaded.dtype)
        out_TH = torch.empty_like(hidden_TH)
        theirs = fastermoe_rows(model, loaded.sets[one])
        position_TK = slots.position_TK.int()
        made: dict[tuple[str, str], Call] = {
            (OURS, "routing"): partial(route, logits_TE, spec),
            (THEIRS, "routing"): partial(torch_route, logits_TE, k),
            (THEIRS, "experts"): partial(theirs, hidden_TH, ids_TK),
            (OURS, "aggregation"): partial(combine_slots, rows_SH, position_TK, weights_TK),
            (THEIRS, "aggregation"): partial(
                torch_aggregate, rows_SH, slots.order_S // k, scales_S1, out_TH
            ),
        }
        if gpu:
            made[OURS, "experts"] = partial(rows_by_moesaic(loaded, one), hidden_TH, ids_TK)
        for key, call in made.items():
            calls.setdefault(key, []).append(call)
    weights = work.active * expert_weight_elements(model.spec()) * item
    num_bytes = {
        "routing": item * t * model.num_experts + 8 * t * k + 4 * model.num_experts,
        "experts": round(weights) + item * (t * h + t * k * h) + 4 * t * k,
        "aggregation": item * (t * k * h + t * h) + 8 * t * k,
    }
    return [
        Stage(f"{impl}-{stage}", some, num_bytes[stage]) for (impl, stage), some in calls.items()
    ]


def measure_stages(stages: Sequence[Stage], machine: Machine, budget_s: float, seed: int) -> Values:
    """Values of lines by (impl, mode): time, spread, bytes and their rate, or the error."""
    samplers: dict[tuple[str, str], Sampler] = {}
    found: Values = {}
    for stage in stages:
        try:
            stage.calls[0]()
            if machine.device.type != "cuda":
                samplers[stage.impl, "eager"] = cpu_sampler(stage.calls, min_ms=1.0)
                continue
            samplers[stage.impl, "eager"] = eager_sampler(stage.calls, target_ms=2.0, whole=False)
            samplers[stage.impl, "graph"] = graph_sampler(capture(stage.calls))
        except GraphError as error:
            found[stage.impl, "graph"] = {"error": f"no graph: {error}"}
    timed = interleave(samplers, budget_s=budget_s, min_samples=3, seed=seed)
    sizes = {stage.impl: stage.num_bytes for stage in stages}
    for key, m in timed.measured.items():
        found[key] = {
            "ms": m.median, "ms_p20": m.p20, "ms_p80": m.p80, "samples": m.samples,
            "bytes": sizes[key[0]], "gbps": sizes[key[0]] / m.median / 1e6,
        }  # fmt: skip
    return found | {key: {"error": text} for key, text in timed.errors.items()}


def measure_launches(device: torch.device, count: int = 256) -> Values:
    """Milliseconds per launch of a kernel that does next to nothing: by the host, in a graph."""
    one = torch.zeros(1, device=device)
    launches: list[Call] = [lambda: one.add_(1)] * count
    if device.type != "cuda":
        return {("launch", "eager"): {"error": "skipped: launches are measured on a CUDA device"}}
    samplers = {("launch", "eager"): eager_sampler(launches)}
    try:
        samplers["launch", "graph"] = graph_sampler(capture(launches))
    except GraphError as error:
        return {("launch", "graph"): {"error": reason(error)}}
    timed = interleave(samplers, budget_s=0.2, min_samples=5)
    return {
        key: {"ms": m.median, "ms_p20": m.p20, "ms_p80": m.p80, "samples": m.samples}
        for key, m in timed.measured.items()
    }
