"""The frozen values of a run: what was counted and clocked in one chunk.

E experts · L layers
"""

from __future__ import annotations

from dataclasses import dataclass

from .plan import Chunk


@dataclass(frozen=True)
class Rows:
    """Rows that were routed, rows that came back, and the (token, expert) pairs that differ."""

    routed: int = 0
    computed: int = 0
    wrong: int = 0

    def __add__(self, other: Rows) -> Rows:
        return Rows(
            self.routed + other.routed, self.computed + other.computed, self.wrong + other.wrong
        )


@dataclass(frozen=True)
class PassFacts:
    """One candidate, one chunk: seconds of the forward and of its experts, bits spent, rows."""

    seconds: float
    experts_seconds: float
    bits: float
    rows: Rows


@dataclass(frozen=True)
class ChunkFacts:
    """The numbers of one chunk.

    `counts_LE` are moesaic's tokens per expert; `rerouted` the slots whose expert the baseline did
    not choose for that token; `same_difference` the largest difference before the first of them in
    each window; `flipped` the positions whose most likely byte differs.
    """

    chunk: Chunk
    moesaic: PassFacts
    baseline: PassFacts
    max_difference: float
    same_difference: float
    flipped: int
    rerouted: int
    counts_LE: tuple[tuple[int, ...], ...]
