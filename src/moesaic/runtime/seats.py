"""The same work captured once per slice size, so that a new plan only chooses among graphs.

A CUDA graph keeps the SMs of the stream on which it was captured, and a persistent kernel the grid
that it was captured with. So `SeatedWork` holds one graph for every seat (a number of SMs and a
stream) that a plan may give its group; a new plan changes which of them is replayed. Nothing is
ever captured in the hot path: a seat that was not prepared is refused by `use`, and the work stays
where it is.

>>> work = SeatedWork("decode", capture=lambda seat: f"graph on {seat.sms} SMs")
>>> work.prepare(Seat(sms=32)), work.prepare(Seat(sms=64)), work.prepare(Seat(sms=32))
(True, True, False)
>>> work.use(32), work.current_seat.sms
('graph on 32 SMs', 32)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

Graph = TypeVar("Graph")


@dataclass(frozen=True)
class Seat:
    """Where work runs: its SMs (0: no limit) and the stream that keeps it there, or None.

    `label` tells seats of one size apart: the same SMs on an ordinary stream, say.
    """

    sms: int
    stream: Any = field(default=None, compare=False, repr=False)
    label: str = ""


class SeatedWork(Generic[Graph]):
    """One group's work and its graphs; `capture` is called once for each seat prepared.

    `captures` counts graphs made, `switches` changes of the seat.
    """

    def __init__(self, name: str, capture: Callable[[Seat], Graph]) -> None:
        self.name = name
        self.captures = 0
        self.switches = 0
        self._capture = capture
        self._graphs: dict[tuple[int, str], tuple[Seat, Graph]] = {}
        self._seat: Seat | None = None

    def prepare(self, seat: Seat) -> bool:
        """Capture for a seat, outside the hot path; False when that was done before."""
        if self.prepared(seat.sms, seat.label):
            return False
        self._graphs[seat.sms, seat.label] = (seat, self._capture(seat))
        self.captures += 1
        return True

    @property
    def sizes(self) -> tuple[tuple[int, str], ...]:
        """SMs and labels of the seats prepared, ascending."""
        return tuple(sorted(self._graphs))

    def prepared(self, sms: int, label: str = "") -> bool:
        """Whether there is a graph for a seat."""
        return (sms, label) in self._graphs

    @property
    def current_seat(self) -> Seat:
        """Where the work runs now.

        Raises:
            RuntimeError: no seat was chosen yet.
        """
        if self._seat is None:
            raise RuntimeError(f"{self.name!r} has no seat yet: call use(sms) first")
        return self._seat

    @property
    def current(self) -> Graph:
        """The graph of the present seat; raises as `current_seat`."""
        seat = self.current_seat
        return self._graphs[seat.sms, seat.label][1]

    def use(self, sms: int, label: str = "") -> Graph:
        """Change to a prepared seat and give its graph; a look-up, nothing is captured.

        Raises:
            KeyError: it was not prepared; the work stays where it was.
        """
        if not self.prepared(sms, label):
            raise KeyError(f"{self.name!r} has no graph for {sms} SMs {label!r}, only {self.sizes}")
        seat, graph = self._graphs[sms, label]
        if seat is not self._seat:
            self.switches += 1
            self._seat = seat
        return graph
