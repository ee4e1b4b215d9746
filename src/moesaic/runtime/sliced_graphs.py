"""A sliced layer as graphs: one for each group on its seat, joined by events.

One graph over streams of several green contexts runs its branches one after the other; graphs that
are launched on the contexts' own streams run side by side. So each group's rows are a graph of
their own, and so are what comes before them (which group sees which slot) and after them (the sum).

T tokens · H hidden width · K top-k · S = T*K routed rows · G groups
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .sliced import SlicedExperts


class SlicedGraphs:
    """`SlicedExperts` captured on fixed inputs, whose contents `replay` reads anew.

    Args:
        sliced: the layer; every seat has a stream.
        hidden_TH, topk_ids_TK, topk_weights_TK: as in `moe`.
        stream: where `replay` is called; what comes before and after the groups runs there.

    Raises:
        ValueError: a seat has no stream.
    """

    def __init__(
        self,
        sliced: SlicedExperts,
        hidden_TH: Tensor,
        topk_ids_TK: Tensor,
        topk_weights_TK: Tensor,
        stream: Any,
    ) -> None:
        if any(seat.stream is None for seat in sliced.seats):
            raise ValueError("graphs of groups need a stream for every seat, got one without")
        self.sliced, self.stream = sliced, stream
        self._inputs = (hidden_TH, topk_ids_TK, topk_weights_TK)
        slots = topk_weights_TK.numel()
        self._rows_GSH = hidden_TH.new_empty((len(sliced.seats), slots, hidden_TH.shape[1]))
        self._ids_GTK = topk_ids_TK
        self._positions: list[Tensor] = []
        self.out_TH = hidden_TH
        sliced(*self._inputs)
        self._front = self._capture(stream, self._assign)
        self._groups = [
            self._capture(seat.stream, partial(self._group, g))
            for g, seat in enumerate(sliced.seats)
        ]
        self._tail = self._capture(stream, self._sum)
        self._events = [torch.cuda.Event() for _ in range(len(sliced.seats) + 1)]  # type: ignore[no-untyped-call]

    def _capture(self, stream: Any, piece: Callable[[], None]) -> Any:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.no_grad(), torch.cuda.stream(stream):
            graph.capture_begin()
            try:
                piece()
            finally:
                graph.capture_end()
        return graph

    def _assign(self) -> None:
        self._ids_GTK = self.sliced.ids_of(self._inputs[1])

    def _group(self, g: int) -> None:
        self._positions.append(
            self.sliced.group_rows(g, self._inputs[0], self._ids_GTK[g], self._rows_GSH)
        )

    def _sum(self) -> None:
        self.out_TH = self.sliced.sum_rows(self._rows_GSH, self._positions, self._inputs[2])

    def replay(self) -> None:
        """Everything once, from and to `stream`; the output is `out_TH`."""
        start, *ends = self._events
        with torch.cuda.stream(self.stream):
            self._front.replay()
            start.record(self.stream)
        for graph, seat, end in zip(self._groups, self.sliced.seats, ends, strict=True):
            with torch.cuda.stream(seat.stream):
                seat.stream.wait_event(start)
                graph.replay()
                end.record(seat.stream)
        with torch.cuda.stream(self.stream):
            for end in ends:
                self.stream.wait_event(end)
            self._tail.replay()
