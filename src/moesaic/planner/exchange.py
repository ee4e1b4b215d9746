"""All-to-all inside a node, read off measured tables.

    G GPUs · bytes of one GPU, its own part included

One latency and one bandwidth fit such exchanges poorly over six orders of magnitude, so times are
interpolated between measured sizes, and between measured numbers of GPUs, on logarithms. Beyond
the largest size the time grows with the bytes; below the smallest it stays.

>>> table = ExchangeTable({2: ((1e3, 5e-6), (1e6, 10e-6))}, "by hand")
>>> round(table.seconds(2, 1e9) * 1e3, 3), round(table.seconds(2, 10) * 1e6, 3)
(10.0, 5.0)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class ExchangeTable:
    """Per number of GPUs, rising (bytes, seconds)."""

    points: dict[int, tuple[tuple[float, float], ...]]
    source: str

    def __bool__(self) -> bool:
        return bool(self.points)

    def _at(self, gpus: int, num_bytes: float) -> float:
        sizes, seconds = zip(*self.points[gpus], strict=True)
        if num_bytes >= sizes[-1]:
            return float(seconds[-1] * num_bytes / sizes[-1])
        found = np.interp(math.log(max(num_bytes, 1.0)), np.log(sizes), np.log(seconds))
        return float(math.exp(found))

    def seconds(self, gpus: int, num_bytes: float) -> float:
        """Seconds of an exchange of `gpus` GPUs; the nearest measured number beyond the ends."""
        known = sorted(self.points)
        low = max((g for g in known if g <= gpus), default=known[0])
        high = min((g for g in known if g >= gpus), default=known[-1])
        first, last = self._at(low, num_bytes), self._at(high, num_bytes)
        if low == high:
            return first
        share = math.log(gpus / low) / math.log(high / low)
        return math.exp((1 - share) * math.log(first) + share * math.log(last))


NO_TABLE = ExchangeTable({}, "none")


def table_from(rows: list[tuple[int, float, float]], source: str) -> ExchangeTable:
    """A table from (GPUs, bytes, seconds) in any order."""
    points: dict[int, list[tuple[float, float]]] = {}
    for gpus, num_bytes, seconds in rows:
        points.setdefault(gpus, []).append((num_bytes, seconds))
    return ExchangeTable({g: tuple(sorted(p)) for g, p in sorted(points.items())}, source)


def measured_exchange(
    lines: list[dict[str, Any]], clock: str, impl: str = "moesaic"
) -> list[tuple[int, float, float]]:
    """(GPUs, bytes, seconds) of this project's lines of suite `ep`: even routing, in a graph.

    Args:
        lines: of benchmarks/results.
        clock: ``dispatch`` or ``combine``.
        impl: whose.
    """
    widths = {"rows-7168": 7168, "rows-2048": 2048}
    return [
        (int(x["ranks"]), 2.0 * widths[x["model"]] * x["tokens"], x["ms"] / 1e3)
        for x in lines
        if x["suite"] == "ep" and x["clock"] == clock and x["impl"] == impl and x.get("ranks")
        and x["model"] in widths and x["routing"] == "even" and x["ms"] and not x.get("wrong")
    ]  # fmt: skip


def leaving_bytes(ranks: int, rows: float, row_bytes: float) -> float:
    """Bytes that leave a GPU which sends its rows evenly to all ranks, itself among them."""
    return rows * row_bytes * (ranks - 1) / ranks


@dataclass(frozen=True)
class Ways:
    """Seconds of an exchange by the bytes off the busiest GPU, either way."""

    dispatch: ExchangeTable
    combine: ExchangeTable

    def __bool__(self) -> bool:
        return bool(self.dispatch) and bool(self.combine)

    def seconds(self, clock: str, ranks: int, num_bytes: float) -> float:
        """Seconds of clock ``dispatch`` or ``combine`` over so many ranks."""
        table: ExchangeTable = getattr(self, clock)
        last = max(table.points)
        return table.seconds(ranks, num_bytes) + max(0.0, math.log2(ranks / last)) * _step(table)


def _step(table: ExchangeTable) -> float:
    """Seconds that a doubling of the ranks adds to the smallest exchange."""
    if len(table.points) < 2:
        return 0.0
    low, high = sorted(table.points)[-2:]
    more = table.points[high][0][1] - table.points[low][0][1]
    return max(0.0, more) / math.log2(high / low)


NO_WAYS = Ways(NO_TABLE, NO_TABLE)


def measured_ways(lines: Sequence[dict[str, Any]], *, ranks: Iterable[int] = (2, 4, 8)) -> Ways:
    """The tables from this project's lines of suite `ep` over so many ranks."""
    known = set(ranks)
    tables = [
        table_from(
            [
                (gpus, leaving_bytes(gpus, 1, whole), seconds)
                for gpus, whole, seconds in measured_exchange(list(lines), clock)
                if gpus in known
            ],
            f"suite ep, {clock}",
        )
        for clock in ("dispatch", "combine")
    ]
    return Ways(*tables)
