"""Sums and statistics of a run: facts of chunks in, one plain document out; nothing is computed on
tensors or written here.

    E experts · L layers

Speeds are medians over full chunks (all of the same shape), with the 20th and 80th percentile;
the speed-up is the median of the ratios of passes that ran next to each other. Bits and rows cover
every byte.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..cost import balancedness
from ..types import Measurement
from .facts import ChunkFacts, PassFacts, Rows

SHOWN = 3


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value below which `share` of sorted values lie, linear between neighbours."""
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def measure(values: Sequence[float]) -> Measurement:
    """Median, 20th and 80th percentile.

    >>> measure([1.0, 2.0, 3.0]).median
    2.0
    """
    ordered = sorted(values)
    median, p20, p80 = (percentile(ordered, share) for share in (0.5, 0.2, 0.8))
    return Measurement(median=median, p20=p20, p80=p80, samples=len(ordered))


@dataclass(frozen=True, kw_only=True)
class LayerLoad:
    """How one layer's tokens spread over its experts; `hot` and `cold` are ids, most extreme first.

    `load_E` is each expert's share of the tokens relative to an even spread: 1 is the mean.
    """

    layer: int
    balancedness: float
    hot: tuple[int, ...]
    cold: tuple[int, ...]
    load_E: tuple[float, ...]


def layer_load(layer: int, counts_E: Sequence[int]) -> LayerLoad:
    """The load of one layer; ties go to the lowest id."""
    mean = sum(counts_E) / len(counts_E)
    load_E = tuple(count / mean if mean else 0.0 for count in counts_E)
    coldest = sorted(range(len(counts_E)), key=lambda e: (counts_E[e], e))
    hottest = sorted(range(len(counts_E)), key=lambda e: (-counts_E[e], e))
    return LayerLoad(
        layer=layer,
        balancedness=balancedness(list(counts_E)),
        hot=tuple(hottest[:SHOWN]),
        cold=tuple(coldest[:SHOWN]),
        load_E=load_E,
    )


@dataclass
class Clocks:
    """Seconds and bits of one candidate, chunk by chunk."""

    forward: array[float] = field(default_factory=lambda: array("d"))
    experts: array[float] = field(default_factory=lambda: array("d"))
    bits: array[float] = field(default_factory=lambda: array("d"))
    rows: Rows = field(default_factory=Rows)

    def add(self, facts: PassFacts) -> None:
        """Append one chunk."""
        self.forward.append(facts.seconds)
        self.experts.append(facts.experts_seconds)
        self.bits.append(facts.bits)
        self.rows += facts.rows


def finite(value: float) -> float | None:
    """`value`, or None for NaN and infinity, which JSON has no words for."""
    return value if math.isfinite(value) else None


def larger(a: float, b: float) -> float:
    """The larger of two; NaN, once seen, stays."""
    return a if math.isnan(a) or a >= b else b


class Account:
    """Accumulates chunks; memory grows by a few numbers a chunk, whatever the text.

    Args:
        layers: L.
        experts: E.
        tolerance: by how much, relatively, the bits per byte of the two may differ.
    """

    def __init__(self, layers: int, experts: int, *, tolerance: float = 1e-3) -> None:
        self.tolerance = tolerance
        self.size = self.flipped = self.rerouted = 0
        self.max_difference = self.same_difference = 0.0
        self.counts_LE = [[0] * experts for _ in range(layers)]
        self.moesaic, self.baseline = Clocks(), Clocks()
        self.sizes: array[int] = array("q")

    def add(self, facts: ChunkFacts) -> None:
        """Add one chunk."""
        self.size += facts.chunk.size
        self.flipped += facts.flipped
        self.rerouted += facts.rerouted
        self.max_difference = larger(self.max_difference, facts.max_difference)
        self.same_difference = larger(self.same_difference, facts.same_difference)
        self.sizes.append(facts.chunk.size)
        self.moesaic.add(facts.moesaic)
        self.baseline.add(facts.baseline)
        for total, counts in zip(self.counts_LE, facts.counts_LE, strict=True):
            for expert, count in enumerate(counts):
                total[expert] += count

    @property
    def all_finite(self) -> bool:
        """Whether every logit and every sum was a number."""
        bits = math.fsum((*self.moesaic.bits, *self.baseline.bits))
        return math.isfinite(self.max_difference) and math.isfinite(bits)

    @property
    def rows_agree(self) -> bool:
        """Whether both computed every routed row exactly once."""
        return all(
            c.rows.wrong == 0 and c.rows.computed == c.rows.routed
            for c in (self.moesaic, self.baseline)
        )

    @property
    def bits_agree(self) -> bool:
        """Whether both found the text equally likely; False when a sum is not a number."""
        ours, theirs = math.fsum(self.moesaic.bits), math.fsum(self.baseline.bits)
        return abs(ours - theirs) <= self.tolerance * theirs

    def _timed(self) -> list[int]:
        """Indices of the chunks whose time counts: those of the largest size."""
        largest = max(self.sizes)
        return [i for i, size in enumerate(self.sizes) if size == largest]

    def candidate(self, clocks: Clocks) -> dict[str, Any]:
        """Speeds, bits and rows of one candidate."""
        timed = self._timed()
        return {
            "tokens_per_s": asdict(measure([self.sizes[i] / clocks.forward[i] for i in timed])),
            "experts_tokens_per_s": asdict(
                measure([self.sizes[i] / clocks.experts[i] for i in timed])
            ),
            "bits_per_byte": finite(math.fsum(clocks.bits) / self.size),
            "rows_routed": clocks.rows.routed,
            "rows_computed": clocks.rows.computed,
            "rows_wrong": clocks.rows.wrong,
        }

    def document(self) -> dict[str, Any]:
        """Everything that happened, as plain data.

        Raises:
            ValueError: no chunk was added.
        """
        if not self.sizes:
            raise ValueError("nothing was scored, so there is nothing to report")
        ours, theirs = self.moesaic, self.baseline

        def ratio(a: array[float], b: array[float]) -> dict[str, Any]:
            return asdict(measure([a[i] / b[i] for i in self._timed()]))

        return {
            "bytes": self.size,
            "chunks": len(self.sizes),
            "timed_chunks": len(self._timed()),
            "tokens_per_chunk": max(self.sizes),
            "moesaic": self.candidate(ours),
            "baseline": self.candidate(theirs),
            "speedup": ratio(theirs.forward, ours.forward),
            "experts_speedup": ratio(theirs.experts, ours.experts),
            "max_logit_difference": finite(self.max_difference),
            "max_logit_difference_same_experts": finite(self.same_difference),
            "top_byte_differs": self.flipped,
            "slots_routed_differently": self.rerouted,
            "rows_agree": self.rows_agree,
            "bits_agree": self.bits_agree,
            "ok": self.rows_agree and self.bits_agree and self.all_finite,
            "layers": [
                asdict(layer_load(i, counts_E)) for i, counts_E in enumerate(self.counts_LE)
            ],
        }
