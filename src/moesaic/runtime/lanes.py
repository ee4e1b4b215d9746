"""Lanes: the same work captured once per slice size, so that a new plan only chooses among graphs.

A CUDA graph keeps the SMs of the stream on which it was captured, and a persistent kernel the grid
that it was captured with. So a lane holds one graph for every size (and the whole GPU) that a plan
may give its group; changing the plan changes which of them is replayed. Nothing is ever captured in
the hot path: a size that was not prepared is refused by `use`, and the lane stays as it is.

>>> lane = Lane("decode", capture=lambda seat: f"graph on {seat.sms} SMs")
>>> lane.prepare(Seat(sms=32)), lane.prepare(Seat(sms=64))
(True, True)
>>> lane.use(32).graph, lane.current.sms
('graph on 32 SMs', 32)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Seat:
    """Where a graph runs: how many SMs, and the stream that keeps it there (None: the default).

    `label` tells seats of one size apart (one SM count can be had in different ways).
    """

    sms: int
    stream: Any = field(default=None, compare=False)
    label: str = ""

    @property
    def key(self) -> tuple[int, str]:
        """What names this seat within a lane."""
        return self.sms, self.label


@dataclass(frozen=True)
class Ready:
    """A captured graph and its seat."""

    seat: Seat
    graph: Any

    @property
    def sms(self) -> int:
        """SMs of the seat."""
        return self.seat.sms


class Lane:
    """One group's work, captured per seat; `capture` is called once for each seat prepared.

    `switches` counts changes of the seat, `captures` graphs made.
    """

    def __init__(self, name: str, capture: Callable[[Seat], Any]) -> None:
        self.name = name
        self.switches = 0
        self.captures = 0
        self._capture = capture
        self._ready: dict[tuple[int, str], Ready] = {}
        self._current: Ready | None = None

    def prepare(self, seat: Seat) -> bool:
        """Capture for a seat; False when that was done before. Outside the hot path only."""
        if seat.key in self._ready:
            return False
        self._ready[seat.key] = Ready(seat, self._capture(seat))
        self.captures += 1
        return True

    @property
    def seats(self) -> tuple[tuple[int, str], ...]:
        """Keys of the seats prepared, by size."""
        return tuple(sorted(self._ready))

    @property
    def current(self) -> Ready:
        """What is replayed now.

        Raises:
            RuntimeError: no seat was chosen yet.
        """
        if self._current is None:
            raise RuntimeError(f"lane {self.name!r} has no seat yet: call use(sms) first")
        return self._current

    def use(self, sms: int, label: str = "") -> Ready:
        """Choose a prepared seat; a dictionary look-up, nothing is captured.

        Raises:
            KeyError: it was not prepared; the lane stays as it was.
        """
        try:
            ready = self._ready[sms, label]
        except KeyError:
            raise KeyError(
                f"lane {self.name!r} has no graph for {sms} SMs {label!r}, only {self.seats}"
            ) from None
        if ready is not self._current:
            self.switches += 1
            self._current = ready
        return ready

    def forget(self) -> None:
        """Drop every graph."""
        self._ready.clear()
        self._current = None
