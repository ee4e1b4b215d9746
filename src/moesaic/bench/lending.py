"""Co-location with borrowed SMs: the other tenant's work uses what the watched one leaves idle.

As a split into two green contexts, but the watched tenant's part has two streams: its own, and one
for guests of the other tenant's products (see `runtime.borrowing`). A step raises the flag before
it and lowers it behind it, on its own stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..runtime.borrowing import BorrowingLayer, BorrowingStack, Grounds, Lending
from ..runtime.seats import Seat
from .stacks import Replays, Stack
from .tenants import EventMark, GpuLine

LEND = "lend"
PRIORITY = -5
"""Of steps and of guests: a guest that finds no tile left must not wait for steps to leave."""


class WantingLine(GpuLine):
    """Graphs replayed in turn, each between raising and lowering the flag."""

    def __init__(self, replays: Replays, lending: Lending, base: Any) -> None:
        super().__init__(replays.graphs, replays.stream, base)
        self._lending, self._on = lending, replays.stream

    def launch(self) -> EventMark:
        """Raise the flag, replay the next graph, lower the flag; the mark is the graph's end."""
        self._lending.want(self._on)
        end = super().launch()
        self._lending.release(self._on)
        return end


class StackLine(GpuLine):
    """A borrowing stack launched again and again."""

    def __init__(self, stack: BorrowingStack, stream: Any, base: Any) -> None:
        super().__init__([], stream, base)
        self._stack = stack

    def launch(self) -> EventMark:
        """Queue all layers on both seats."""
        self._stack.launch()
        return self.mark()


@dataclass(frozen=True)
class LendingStep:
    """The watched tenant on a part that it lends."""

    replays: Replays
    lending: Lending

    @property
    def stream(self) -> Any:
        """Where its steps run."""
        return self.replays.stream

    def line(self, base: Any) -> WantingLine:
        """Its steps."""
        return WantingLine(self.replays, self.lending, base)


@dataclass(frozen=True)
class Borrower:
    """The other tenant, borrowing."""

    stack: BorrowingStack
    stream: Any

    def line(self, base: Any) -> StackLine:
        """Its work."""
        return StackLine(self.stack, self.stream, base)


def borrower_of(stack: Stack, grounds: Grounds) -> Borrower:
    """A tenant's layers on its only turn, compiled and captured to borrow."""
    hidden_TH, layers = stack.inputs[0][0].hidden_TH, []
    for weights, inputs in zip(stack.weights, stack.inputs[0], strict=True):
        layers.append(
            BorrowingLayer(
                hidden_TH, inputs.topk_ids_TK, inputs.topk_weights_TK, weights, stack.spec, grounds
            )
        )
        hidden_TH = layers[-1].out_TH
    made = BorrowingStack(layers, whole=True)
    made.prepare()
    return Borrower(made, grounds.own.stream)


def lend(
    gpu: Any, step: Stack, other: Stack, parts: tuple[Any, Any]
) -> tuple[LendingStep, Borrower]:
    """Both tenants on the two parts of a split, the first of which is lent."""
    device = step.weights[0].up.device
    steps, guests = (gpu.second_stream(parts[0], priority=PRIORITY) for _ in range(2))
    lending = Lending(gpu, device)
    grounds = Grounds(Seat(parts[1].sms, parts[1].stream), Seat(parts[0].sms, guests), lending)
    step.work.prepare(Seat(parts[0].sms, steps, LEND))
    return (
        LendingStep(step.work.use(parts[0].sms, LEND), lending),
        borrower_of(other, grounds),
    )


def answers_differ(expected: torch.Tensor, borrower: Borrower, lending: Lending) -> int:
    """How many of two answers differ in any bit: SMs lent throughout, and wanted throughout."""
    found = 0
    for wanted in (0, 1):
        lending.wanted_1.fill_(wanted)
        out_TH = borrower.stack.layers[-1].out_TH
        out_TH.fill_(float("nan"))
        torch.cuda.synchronize()
        borrower.stack.launch()
        borrower.stream.synchronize()
        found += not torch.equal(out_TH, expected)
    lending.wanted_1.fill_(0)
    torch.cuda.synchronize()
    return found
