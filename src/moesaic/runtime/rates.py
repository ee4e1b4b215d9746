"""Smoothed loads, hot and cold experts, drift: pure functions of counted steps.

    E experts · W steps of a window

`advance(state, rows_E, steps)` takes what one layer counted and gives the next state; nothing here
knows clocks, devices or threads, so that a recorded trace gives what the running job gave.

*Load*: an exponentially weighted mean of rows a step (half-life in steps), without bias towards the
first step. *Hot* is an expert whose load reaches `hot_at` times the mean load, until it falls below
`hot_until`; *cold* one that falls to `cold_at`, until it rises above `cold_until`: two thresholds
each, so that noise around one does not flip a policy.

*Drift*: have the shares of the experts changed since the reference window? The test is a
permutation test over blocks of steps. Its statistic is Pearson's distance between the two windows'
shares, ``sum (p - q)**2 / (p + q)``; its p-value is the rank of what was seen among the same
statistic after exchanging blocks at random. If blocks are exchangeable, and only then, the chance
of an alarm is at most `p` for each layer and test, whatever the router does within a block (tokens
of one text agree, which makes a test that counts tokens as independent cry wolf). `block` must
therefore be longer than steps resemble their neighbours.

>>> state = start(4)
>>> for _ in range(50):
...     state = advance(state, [9, 1, 1, 1], 1)
>>> sorted(state.hot), state.load_E.round(3).tolist(), state.drifted
([0], [9.0, 1.0, 1.0, 1.0], False)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Thresholds, windows and the false-alarm rate; `window` 0 tests no drift.

    Raises:
        ValueError: thresholds are out of order, or a number is out of range.
    """

    half_life: float = 20.0
    hot_at: float = 2.0
    hot_until: float = 1.5
    cold_at: float = 0.25
    cold_until: float = 0.5
    window: int = 256
    block: int = 16
    permutations: int = 199
    p: float = 0.005

    def __post_init__(self) -> None:
        order = (0.0, self.cold_at, self.cold_until, self.hot_until, self.hot_at)
        if list(order) != sorted(order) or self.cold_until >= self.hot_until:
            raise ValueError(
                "thresholds must ascend: 0 <= cold_at <= cold_until < hot_until <= hot_at, "
                f"got {order[1:]}"
            )
        if self.half_life <= 0 or self.window < 0 or self.block < 1:
            raise ValueError(f"half_life and block must be positive, window 0 or more, got {self}")
        if self.window % self.block or (self.window and self.window < 4 * self.block):
            raise ValueError(
                f"window must be a multiple of block, at least 4 of them, "
                f"got {self.window} and {self.block}"
            )
        if not 1 / (self.permutations + 1) <= self.p < 1:
            raise ValueError(
                f"p must be in [1 / (permutations + 1), 1), got {self.p} and {self.permutations}"
            )


@dataclass(frozen=True, eq=False)
class LayerState:
    """What is remembered of one layer; `drifts` counts alarms, `drifted` is the last step's.

    `reference` and `recent` are rows by block: (blocks, E), and how many steps the block that is
    being filled still lacks.
    """

    sum_E: Floats
    weight: float
    hot: frozenset[int]
    cold: frozenset[int]
    reference: Floats
    recent: Floats
    filled: int
    tests: int = 0
    drifts: int = 0
    drifted: bool = False
    p_value: float = 1.0

    @property
    def load_E(self) -> Floats:
        """Smoothed rows a step; zeros before the first."""
        return self.sum_E / self.weight if self.weight else self.sum_E


def start(num_experts: int) -> LayerState:
    """The state before the first step."""
    none = np.zeros((0, num_experts))
    return LayerState(np.zeros(num_experts), 0.0, frozenset(), frozenset(), none, none, 0)


def temperatures(
    load_E: Floats, hot: frozenset[int], cold: frozenset[int], settings: Settings
) -> tuple[frozenset[int], frozenset[int]]:
    """The hot and the cold experts, given which of them were so before.

    >>> mild = np.array([1.7, 0.4, 1.0, 0.9])
    >>> temperatures(mild, frozenset(), frozenset(), Settings())
    (frozenset(), frozenset())
    >>> temperatures(mild, frozenset({0}), frozenset({1}), Settings())
    (frozenset({0}), frozenset({1}))
    """
    mean = load_E.mean()
    if mean <= 0:
        return frozenset(), frozenset()
    s, relative = settings, (load_E / mean).tolist()
    now_hot = (e for e, r in enumerate(relative) if r >= (s.hot_until if e in hot else s.hot_at))
    now_cold = (
        e for e, r in enumerate(relative) if r <= (s.cold_until if e in cold else s.cold_at)
    )
    return frozenset(now_hot), frozenset(now_cold)


def drift_p_value(
    reference_BE: Floats, recent_BE: Floats, *, permutations: int, seed: int = 0
) -> float:
    """The p-value of the permutation test at the head of this module, at least 1 / (1 + n).

    >>> steady, other = np.array([[8.0, 2.0]] * 8), np.array([[2.0, 8.0]] * 8)
    >>> drift_p_value(steady, steady, permutations=99)
    1.0
    >>> drift_p_value(steady, other, permutations=99)
    0.01
    """
    blocks_BE = np.concatenate([reference_BE, recent_BE])
    blocks_BE = blocks_BE[:, blocks_BE.any(axis=0)]
    first = len(reference_BE)
    if not blocks_BE.size:
        return 1.0
    order = np.random.default_rng(seed).permuted(
        np.tile(np.arange(len(blocks_BE)), (permutations, 1)), axis=1
    )
    chosen = np.zeros((permutations + 1, len(blocks_BE)))
    chosen[0, :first] = 1
    np.put_along_axis(chosen[1:], order[:, :first], 1.0, axis=1)
    total_E = blocks_BE.sum(axis=0)
    left = chosen @ blocks_BE
    right = total_E - left
    p = left / np.maximum(left.sum(axis=1, keepdims=True), 1.0)
    q = right / np.maximum(right.sum(axis=1, keepdims=True), 1.0)
    distance = ((p - q) ** 2 / np.maximum(p + q, 1e-300)).sum(axis=1)
    as_far = distance[1:] >= distance[0] * (1 - 1e-9)
    return float(1 + as_far.sum()) / (permutations + 1)


def _watch_drift(state: LayerState, rows_E: Floats, steps: int, s: Settings) -> dict[str, Any]:
    """The fields of the next state that the drift test decides."""
    recent, filled = state.recent, state.filled
    if filled:
        recent = np.concatenate([recent[:-1], recent[-1:] + rows_E])
    else:
        recent = np.concatenate([recent, rows_E[None]])
    filled += steps
    if filled < s.block:
        return {"recent": recent, "filled": filled, "drifted": False}
    blocks = s.window // s.block
    changed: dict[str, Any] = {"recent": recent, "filled": 0, "drifted": False}
    if len(recent) < blocks:
        return changed
    changed["recent"] = recent[:0]
    if not len(state.reference):
        return changed | {"reference": recent}
    p_value = drift_p_value(state.reference, recent, permutations=s.permutations, seed=state.tests)
    changed |= {"tests": state.tests + 1, "p_value": p_value}
    if p_value <= s.p:
        changed |= {"drifted": True, "drifts": state.drifts + 1, "reference": recent}
    return changed


def advance(
    state: LayerState,
    rows: Sequence[int] | NDArray[Any],
    steps: int,
    settings: Settings | None = None,
) -> LayerState:
    """The state after `steps` more steps in which the experts computed `rows` (E,) rows together.

    A sample of several steps counts as so many steps of its mean; for the drift test it is one
    block when it is longer than one.
    """
    s = settings or Settings()
    rows_E = np.asarray(rows, dtype=np.float64)
    keep = 0.5 ** (steps / s.half_life)
    weight = state.weight * keep + (1 - keep)
    sum_E = state.sum_E * keep + rows_E / steps * (1 - keep)
    hot, cold = temperatures(sum_E / weight, state.hot, state.cold, s)
    more = _watch_drift(state, rows_E, steps, s) if s.window else {}
    return replace(state, sum_E=sum_E, weight=weight, hot=hot, cold=cold, **more)
