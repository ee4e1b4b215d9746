"""A layer that borrows SMs: its products use those of an idle neighbour and give them back.

A fixed split of the GPU leaves a tenant's SMs idle while it has nothing to do. Here the other
tenant's products are drawn tile by tile by two launches: the *owner's* on SMs of its own, and
*guests'* on the SMs lent by the neighbour. When the neighbour has work it raises a
flag (`Lending.want`); guests end after the tile that they are at, and the owner's launch draws
what they would have drawn. When the flag falls (`Lending.release`), the next guest comes in. So
the neighbour waits for one tile at most and has all its SMs while it computes, and nothing is cut
into pieces: the output bits are those of `moe`.

On the lent SMs a row of launches is queued for every product: a door (it sleeps while the SMs are
wanted and there are tiles left) and a guest behind it, `visits` times. Both use no host: raising
and lowering the flag are the neighbour's own stream's work.

    neighbour ─ want ─ step ─ release ─ ...             its SMs
    guests      door guest door guest ...               the same SMs, another stream
    owner     ─ sort, gather ─ up ─ down ─ combine      SMs of its own

T tokens · H hidden width · I intermediate width · K top-k · S = T*K routed rows
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..hardware.green import GreenDevice
from ..types import ExpertSpec, ExpertWeights
from .seats import Seat
from .sliced import arithmetic_of

VISITS = 1
"""Guests queued for a product: how often its tiles can be left and taken up again. One that comes
when no tile is left still has to find room on the lent SMs before the owner may go on."""
TALL = (256, 128, 4)
"""Rows, weight rows and stages of the tiles that are shared."""


class Lending:
    """The flag by which a tenant asks for its SMs back; one int32 on the device.

    `gpu` queues the writes, on the tenant's own stream: they take no SM.
    """

    def __init__(self, gpu: GreenDevice, device: torch.device) -> None:
        self._gpu = gpu
        self.wanted_1 = torch.zeros(1, dtype=torch.int32, device=device)

    def want(self, stream: Any) -> None:
        """From here on in the stream's work the lent SMs are wanted back."""
        self._gpu.write(stream.cuda_stream, self.wanted_1.data_ptr(), 1)

    def release(self, stream: Any) -> None:
        """From here on they are lent again."""
        self._gpu.write(stream.cuda_stream, self.wanted_1.data_ptr(), 0)


@dataclass(frozen=True)
class Grounds:
    """Where a borrowing layer runs: its own seat, the lent one, and the flag."""

    own: Seat
    lent: Seat
    lending: Lending
    visits: int = VISITS

    @property
    def programs(self) -> int:
        """Programs of all launches of one product."""
        return self.own.sms + self.visits * self.lent.sms


Piece = Callable[[], None]


class BorrowingLayer:
    """One layer on fixed inputs whose products borrow SMs; `capture` once, then `launch`.

    Args:
        hidden_TH: as in `moe`; read anew by every launch, like the next two.
        topk_ids_TK: as in `moe`.
        topk_weights_TK: as in `moe`.
        weights: of the layer, on Hopper.
        spec: two-layer experts without biases.
        grounds: where it runs.

    Raises:
        ValueError: experts that the Hopper kernels do not compute.
    """

    def __init__(
        self,
        hidden_TH: Tensor,
        topk_ids_TK: Tensor,
        topk_weights_TK: Tensor,
        weights: ExpertWeights,
        spec: ExpertSpec,
        grounds: Grounds,
    ) -> None:
        if spec.layers != 2 or spec.bias or spec.interleaved or spec.transposed:
            raise ValueError("borrowing needs two-layer experts without biases, stored as rows")
        self.inputs = (hidden_TH, topk_ids_TK, topk_weights_TK)
        self.weights, self.spec, self.grounds = weights, spec, grounds
        slots, new = topk_ids_TK.numel(), hidden_TH.new_empty
        self.act_SI = new((slots, spec.intermediate_size))
        self.rows_SH = new((slots, spec.hidden_size))
        self.out_TH = torch.empty_like(hidden_TH)
        counters = torch.zeros((2, 2), dtype=torch.int32, device=hidden_TH.device)
        counters[:, 1] = grounds.programs
        self._counters = counters
        self._sorted: Any = None
        self._graphs: list[tuple[Any, Seat]] = []
        self._events: list[torch.cuda.Event] = []

    def _front(self) -> None:
        """Sort the slots, map the tiles, copy the rows together."""
        from ..kernels.batching import batch_rows
        from ..kernels.gather import gather_rows

        hidden_TH, ids_TK, _ = self.inputs
        sort, tasks = batch_rows(ids_TK, self.spec.num_experts, heights=(TALL[0],))
        gathered_SH = gather_rows(hidden_TH, sort.order_S, ids_TK.shape[1])
        self._sorted = (sort, tasks, gathered_SH)

    def _product(self, down: bool, guest: bool) -> None:
        """One launch of a product, by the owner or by a guest."""
        from ..kernels.hopper.launch import HopperConfig, SharedTiles, grouped_mm_hopper

        _, tasks, gathered_SH = self._sorted
        x, weight, out = (
            (self.act_SI, self.weights.down, self.rows_SH)
            if down
            else (gathered_SH, self.weights.up, self.act_SI)
        )
        seat = self.grounds.lent if guest else self.grounds.own
        grouped_mm_hopper(
            x, weight, tasks, out,
            config=HopperConfig("tall", *TALL), num_sms=seat.sms,
            ticket=SharedTiles(
                self._counters[int(down)], self.grounds.lending.wanted_1,
                "guest" if guest else "owner",
            ),
            **({} if down else arithmetic_of(self.spec)),
        )  # fmt: skip

    def _guests(self, down: bool) -> None:
        """Doors and guests of a product, in turn."""
        from ..kernels.door import wait_at_door

        width = self.spec.hidden_size if down else self.spec.intermediate_size
        tile_columns = TALL[1] // (1 if down or not self.spec.gated else 2)
        tasks = self._sorted[1]
        for _ in range(self.grounds.visits):
            wait_at_door(
                self.grounds.lending.wanted_1, self._counters[int(down)], tasks.total_2,
                -(-width // tile_columns),
            )  # fmt: skip
            self._product(down, guest=True)

    def _tail(self) -> None:
        from ..kernels.combine import combine

        _, ids_TK, weights_TK = self.inputs
        position_TK = self._sorted[0].position_S.view_as(ids_TK)
        combine(self.rows_SH, position_TK, weights_TK.contiguous(), out=self.out_TH)

    def _pieces(self) -> list[tuple[Piece, Seat]]:
        """What is captured, in order: guests of a product stand behind their owner."""
        own, lent = self.grounds.own, self.grounds.lent
        return [
            (self._front, own),
            (lambda: self._product(False, guest=False), own),
            (lambda: self._guests(False), lent),
            (lambda: self._product(True, guest=False), own),
            (lambda: self._guests(True), lent),
            (self._tail, own),
        ]

    def warm_up(self) -> Tensor:
        """Compile under the primary context, one piece after the other; the output (T, H)."""
        for piece, _ in self._pieces():
            piece()
        torch.cuda.synchronize()
        return self.out_TH

    def capture(self) -> None:
        """A graph of every piece on the stream of its seat, and the events between them."""
        self._graphs = []
        for piece, seat in self._pieces():
            graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            with torch.cuda.stream(seat.stream):
                graph.capture_begin()
                try:
                    piece()
                finally:
                    graph.capture_end()
            self._graphs.append((graph, seat))
        self._events = [torch.cuda.Event() for _ in range(4)]  # type: ignore[no-untyped-call]

    def launch(self) -> None:
        """Queue everything on both seats; the output is there when the own stream comes here.

        Raises:
            RuntimeError: `capture` was not called.
        """
        if not self._graphs:
            raise RuntimeError("nothing was captured yet: call capture() first")
        self._queue([(graph.replay, seat) for graph, seat in self._graphs])

    def queue(self) -> None:
        """Queue everything without graphs of its own: for a capture that goes on around it."""
        self._events = [torch.cuda.Event() for _ in range(4)]  # type: ignore[no-untyped-call]
        self._queue(self._pieces())

    def _queue(self, pieces: Sequence[tuple[Piece, Seat]]) -> None:
        front, *products, tail = pieces
        own, lent = self.grounds.own.stream, self.grounds.lent.stream
        _run(front)
        for place in (0, 2):
            ready, helped = self._events[place], self._events[place + 1]
            ready.record(own)
            _run(products[place])
            lent.wait_event(ready)
            _run(products[place + 1])
            helped.record(lent)
            own.wait_event(helped)
        _run(tail)


def _run(piece: tuple[Piece, Seat]) -> None:
    with torch.cuda.stream(piece[1].stream):
        piece[0]()


class BorrowingStack:
    """Layers one after the other, each the input of the next: a tenant's work that borrows.

    `whole`: one graph of all layers and both seats, instead of graphs of pieces with events in
    between, of which the host queues six a layer.
    """

    def __init__(self, layers: Sequence[BorrowingLayer], *, whole: bool = False) -> None:
        self.layers, self.whole = list(layers), whole
        self._graph: Any = None

    def prepare(self) -> None:
        """Compile and capture all layers."""
        for layer in self.layers:
            layer.warm_up()
        if self.whole:
            self._capture_whole()
            return
        for layer in self.layers:
            layer.capture()

    def _capture_whole(self) -> None:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.stream(self.layers[0].grounds.own.stream):
            graph.capture_begin()
            try:
                for layer in self.layers:
                    layer.queue()
            finally:
                graph.capture_end()
        self._graph = graph

    def launch(self) -> Tensor:
        """Queue all layers; the output of the last."""
        if self._graph is not None:
            _run((self._graph.replay, self.layers[0].grounds.own))
            return self.layers[-1].out_TH
        for layer in self.layers:
            layer.launch()
        return self.layers[-1].out_TH
