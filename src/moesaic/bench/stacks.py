"""A tenant's work for co-location: a few MoE layers one after the other, captured per seat.

    T tokens · L layers

A *stack* is L layers of a model, each with weights of its own, the output of one being the input of
the next: their experts alone, or whole decoder layers where a tenant has `heads`. Its inputs and
routings are drawn afresh for each of `turns` graphs, which are replayed in turn. Every graph holds
the persistent launches to the SMs of its seat.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..runtime.seats import Seat, SeatedWork
from ..runtime.sliced import run_budgeted
from ..types import ExpertWeights
from .whole_layers import Heads, WholeLayer
from .workloads import Inputs, Model, make_inputs, make_weights


@dataclass(frozen=True)
class Tenant:
    """What a tenant runs: a model's layers on so many tokens; `turns` different inputs.

    `heads`: of the attention of whole layers; None: the experts alone, routed at random.
    """

    model: Model
    tokens: int
    layers: int
    turns: int
    heads: Heads | None = None


@dataclass
class Replays:
    """Graphs of one seat, one a turn, their outputs, and the stream they were captured on."""

    graphs: list[Any]
    outputs: list[Tensor]
    stream: Any
    keep: list[Any] = field(default_factory=list)


class Stack:
    """A tenant's weights and inputs on a device, and its graphs per seat."""

    def __init__(
        self, tenant: Tenant, device: torch.device, dtype: torch.dtype, seed: int, impl: str
    ) -> None:
        generator = torch.Generator(device).manual_seed(seed)
        self.tenant, self.spec, self.impl = tenant, tenant.model.spec(), impl
        self.weights: list[ExpertWeights] = [
            make_weights(self.spec, dtype=dtype, generator=generator) for _ in range(tenant.layers)
        ]
        self.inputs: list[list[Inputs]] = [
            [
                make_inputs(
                    tenant.model, tenant.tokens, "uniform", dtype=dtype, generator=generator
                )
                for _ in range(tenant.layers)
            ]
            for _ in range(tenant.turns)
        ]
        self.whole: list[WholeLayer] = [
            WholeLayer(tenant.model, tenant.heads, tenant.tokens, weights, dtype, generator)
            for weights in self.weights
            if tenant.heads
        ]
        self.work: SeatedWork[Replays] = SeatedWork(tenant.model.name, self._capture)

    def forward(self, turn: int, num_sms: int | None) -> Tensor:
        """The output (T, H) of all layers on the inputs of a turn."""
        hidden_TH = self.inputs[turn][0].hidden_TH
        if self.whole:
            return self._forward_whole(hidden_TH, num_sms)
        for weights, inputs in zip(self.weights, self.inputs[turn], strict=True):
            hidden_TH = run_budgeted(
                hidden_TH, inputs.topk_ids_TK, inputs.topk_weights_TK, weights, self.spec,
                num_sms=num_sms, impl=self.impl,  # type: ignore[arg-type]
            )  # fmt: skip
        return hidden_TH

    def _forward_whole(self, hidden_TH: Tensor, num_sms: int | None) -> Tensor:
        behind_TH: Tensor | None = None
        with torch.no_grad():
            for layer in self.whole:
                hidden_TH, behind_TH = layer(hidden_TH, behind_TH, num_sms)
            return hidden_TH if behind_TH is None else hidden_TH + behind_TH

    def warm_up(self) -> None:
        """Compile and load every kernel under the primary context, before any seat is used."""
        for turn in range(self.tenant.turns):
            self.forward(turn, None)
        torch.cuda.synchronize()

    def _capture(self, seat: Seat) -> Replays:
        replays = Replays([], [], seat.stream or torch.cuda.Stream())  # type: ignore[no-untyped-call]
        for turn in range(self.tenant.turns):
            graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            with torch.cuda.stream(replays.stream):
                graph.capture_begin()
                try:
                    out_TH = self.forward(turn, seat.sms or None)
                finally:
                    graph.capture_end()
            replays.graphs.append(graph)
            replays.outputs.append(out_TH)
        return replays


def replay(replays: Replays) -> list[Tensor]:
    """The outputs of one replay of every graph, written afresh.

    Waits for the stream itself: `torch.cuda.synchronize` has been seen to return before graphs on
    a green context's stream had ended.
    """
    for out_TH in replays.outputs:
        out_TH.fill_(float("nan"))
    replays.stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(replays.stream):
        for graph in replays.graphs:
            graph.replay()
    replays.stream.synchronize()
    return replays.outputs


def differing(expected: Sequence[Tensor], replays: Replays) -> int:
    """How many of a seat's outputs differ in any bit from those expected, after one replay each."""
    found = replay(replays)
    return sum(not torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def time_ms(graphs: Sequence[Any], stream: Any, *, repeats: int = 3) -> float:
    """Median milliseconds of one replay, over `repeats` rounds of all graphs, alone on the GPU."""
    times = []
    for _ in range(repeats + 1):
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000)  # type: ignore[no-untyped-call]
            start.record()
            for graph in graphs:
                graph.replay()
            end.record()
        end.synchronize()
        times.append(float(start.elapsed_time(end)) / len(graphs))
    return sorted(times[1:])[(len(times) - 1) // 2]
