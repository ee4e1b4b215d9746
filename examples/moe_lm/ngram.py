"""Byte n-gram baselines: counts of the training text, smoothing chosen on the validation text.

    n = order: a byte is predicted from the n - 1 bytes before it, so a 3-gram sees two

Two smoothings compete and the better one on the validation text counts: additive,
``(C(cb) + a) / (C(c) + 256 a)``, and interpolated absolute discounting (Ney et al. 1994),
``max(C(cb) - d, 0) / C(c) + d N(c) / C(c) * p_shorter(b)``, where N(c) is the number of different
bytes seen after c.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ADDITIVE = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
DISCOUNTS = (0.2, 0.4, 0.6, 0.75, 0.85, 0.95)

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Table:
    """Counts of one order: sorted codes of n bytes, and the totals of their n-1-byte contexts."""

    order: int
    codes: Ints
    counts: Ints
    contexts: Ints
    totals: Ints
    distinct: Ints


def codes_of(text: bytes, order: int) -> Ints:
    """The code of the last `order` bytes at each position, positions before the text being zero."""
    values = np.frombuffer(text, dtype=np.uint8).astype(np.int64)
    padded = np.concatenate([np.zeros(order - 1, dtype=np.int64), values])
    codes = np.zeros(len(values), dtype=np.int64)
    for i in range(order):
        codes = (codes << 8) | padded[i : i + len(values)]
    return codes


def count(text: bytes, order: int) -> Table:
    """The table of `text`."""
    codes, counts = np.unique(codes_of(text, order), return_counts=True)
    contexts, first = np.unique(codes >> 8, return_index=True)
    distinct = np.diff(np.append(first, len(codes)))
    return Table(order, codes, counts, contexts, np.add.reduceat(counts, first), distinct)


def _lookup(keys: Ints, values: Ints, wanted: Ints) -> Ints:
    """`values` at `wanted`, zero where it is not among the sorted `keys`."""
    at = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)


def _found(table: Table, text: bytes) -> tuple[Ints, Ints, Ints]:
    """For each byte of `text`: count with its context, count and variety of the context."""
    codes = codes_of(text, table.order)
    return (
        _lookup(table.codes, table.counts, codes),
        _lookup(table.contexts, table.totals, codes >> 8),
        _lookup(table.contexts, table.distinct, codes >> 8),
    )


def additive(table: Table, text: bytes, alpha: float) -> Floats:
    """Probability of each byte of `text` under additive smoothing."""
    counts, totals, _ = _found(table, text)
    return np.asarray((counts + alpha) / (totals + 256 * alpha))


def discounted(table: Table, text: bytes, discount: float, shorter: Floats) -> Floats:
    """Probability of each byte of `text`, the discounted mass spread as `shorter` says."""
    counts, totals, distinct = _found(table, text)
    seen = np.maximum(totals, 1)
    mixed = (np.maximum(counts - discount, 0) + discount * distinct * shorter) / seen
    return np.where(totals > 0, mixed, shorter)


def bits(probabilities: Floats) -> float:
    """Mean bits per byte."""
    return float(-np.log2(probabilities).mean())


def baselines(
    train: bytes, validation: bytes, heldout: bytes, orders: int = 5
) -> list[dict[str, object]]:
    """Bits per byte on the held-out text of the best n-gram of each order up to `orders`.

    Returns:
        One row an order: order, smoothing, parameter, validation_bpb, heldout_bpb.
    """
    rows: list[dict[str, object]] = []
    short_v = np.full(len(validation), 1 / 256)
    short_h = np.full(len(heldout), 1 / 256)
    for order in range(1, orders + 1):
        table = count(train, order)
        trials: list[tuple[float, str, float]] = []
        for alpha in ADDITIVE:
            trials.append((bits(additive(table, validation, alpha)), "additive", alpha))
        tried = {d: discounted(table, validation, d, short_v) for d in DISCOUNTS}
        trials += [(bits(p), "absolute discounting", d) for d, p in tried.items()]
        best_discount = min(DISCOUNTS, key=lambda d: bits(tried[d]))
        next_h = discounted(table, heldout, best_discount, short_h)
        score, smoothing, parameter = min(trials)
        chosen = next_h if smoothing != "additive" else additive(table, heldout, parameter)
        rows.append(
            {
                "order": order,
                "smoothing": smoothing,
                "parameter": parameter,
                "validation_bpb": score,
                "heldout_bpb": bits(chosen),
            }
        )
        short_v, short_h = tried[best_discount], next_h
    return rows
