"""Zeros in device memory that launches draw numbers from and leave as zeros.

>>> Tickets(torch.device("cpu")).take(3).tolist()
[0, 0, 0]
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from .device import for_good

MAX_BLOCKS = 256
RESERVE = 4096


class Tickets:
    """Zeros that launches count on and leave as zeros; no two launches at once share them.

    Launches of one stream follow each other, so a stream has one set. A captured launch may run
    beside any other, so each has a set of its own: from a reserve made outside captures, or, where
    there is none left, made, and filled with zeros at every replay, inside. Nobody says when a
    graph that holds such addresses has gone, so a reserve is kept when it is used up.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.streams: dict[int, Tensor] = {}
        self.reserves: list[Tensor] = []
        self.reserve = torch.empty(0, dtype=torch.int32, device=device)
        self._lock = threading.Lock()

    def _zeros(self, blocks: int) -> Tensor:
        return torch.zeros(blocks, dtype=torch.int32, device=self.device)

    def take(self, blocks: int) -> Tensor:
        """At least this many zeros for one launch on the current stream."""
        if self.device.type != "cuda":
            return self._zeros(blocks)
        if torch.cuda.is_current_stream_capturing():
            with self._lock:
                taken, rest = self.reserve[:blocks], self.reserve[blocks:]
                if len(taken) == blocks:
                    self.reserve = rest
                    return taken
            return self._zeros(blocks)
        if len(self.reserve) < RESERVE:
            fresh = for_good(lambda: self._zeros(4 * RESERVE), self.device)
            with self._lock:
                self.reserves.append(fresh)
                self.reserve = fresh
        stream = torch.cuda.current_stream(self.device).cuda_stream
        found = self.streams.get(stream)
        if found is None:
            found = for_good(lambda: self._zeros(MAX_BLOCKS), self.device)
            found = self.streams.setdefault(stream, found)
        return found
