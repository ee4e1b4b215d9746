"""Made-up routing, step by step: loads that stay, drift, burst or change at once.

    n steps · L layers · E experts · K top-k · T tokens of a step

Every walk draws rows per expert from shares (a softmax of preferences) that move as its name says;
the same seed gives the same walk. Rows are drawn independently, so a step may give one token the
same expert twice: these are loads, no routings.

>>> rows_nLE = walk("phases", steps=4, layers=1, seed=1)
>>> rows_nLE.shape, int(rows_nLE[0, 0].sum())
((4, 1, 16), 2048)
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Rng = np.random.Generator

SPREAD = 0.6
"""Standard deviation of the experts' preferences."""
PHASE = 64
"""Steps of a phase."""


def stationary(rng: Rng, steps: int, experts: int) -> Array:
    """Preferences (n, E) that never change."""
    return np.tile(rng.normal(0, SPREAD, experts), (steps, 1))


def drifting(rng: Rng, steps: int, experts: int) -> Array:
    """Preferences that wander, each pulled back to nought (an Ornstein-Uhlenbeck process)."""
    kept, moved = 0.98, SPREAD * (1 - 0.98**2) ** 0.5
    now_E = rng.normal(0, SPREAD, experts)
    rows = []
    for _ in range(steps):
        rows.append(now_E)
        now_E = kept * now_E + rng.normal(0, moved, experts)
    return np.stack(rows)


def bursty(rng: Rng, steps: int, experts: int) -> Array:
    """Constant preferences; now and then a quarter of the experts is wanted four times as much."""
    base_E, hot_E, left = rng.normal(0, SPREAD, experts), np.zeros(experts), 0
    rows = []
    for _ in range(steps):
        if left == 0 and rng.random() < 0.08:
            left = int(rng.geometric(0.15))
            hot_E = np.zeros(experts)
            hot_E[rng.choice(experts, max(1, experts // 4), replace=False)] = np.log(4.0)
        rows.append(base_E + (hot_E if left else 0.0))
        left = max(0, left - 1)
    return np.stack(rows)


def phases(rng: Rng, steps: int, experts: int) -> Array:
    """New preferences, all at once, every `PHASE` steps."""
    count = -(-steps // PHASE)
    return np.repeat(rng.normal(0, SPREAD, (count, experts)), PHASE, axis=0)[:steps]


WALKS: dict[str, Callable[[Rng, int, int], Array]] = {
    "stationary": stationary,
    "drifting": drifting,
    "bursty": bursty,
    "phases": phases,
}


def walk(
    name: str,
    *,
    steps: int = 400,
    layers: int = 2,
    experts: int = 16,
    top_k: int = 2,
    tokens: int = 1024,
    seed: int = 0,
) -> NDArray[np.int64]:
    """Rows per expert (n, L, E) of a walk.

    Raises:
        ValueError: there is no walk of that name.
    """
    if name not in WALKS:
        raise ValueError(f"walk must be one of {', '.join(WALKS)}, got {name!r}")
    rng = np.random.default_rng([seed, list(WALKS).index(name)])
    found = []
    for _ in range(layers):
        wanted_nE = np.exp(WALKS[name](rng, steps, experts))
        share_nE = wanted_nE / wanted_nE.sum(axis=1, keepdims=True)
        found.append(np.stack([rng.multinomial(tokens * top_k, s_E) for s_E in share_nE]))
    return np.stack(found, axis=1)


def tenant_ms(mean_ms: float, *, steps: int, seed: int) -> Array:
    """Work (n,) of another tenant that comes and goes: six times as much while it is there."""
    rng = np.random.default_rng([seed, 99])
    there, found = False, []
    for _ in range(steps):
        if rng.random() < (0.1 if there else 0.05):
            there = not there
        found.append((1.2 if there else 0.2) * rng.lognormal(0.0, 0.2) * mean_ms)
    return np.array(found)
