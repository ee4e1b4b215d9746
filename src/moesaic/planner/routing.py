"""Sampled routing: how many rows each source rank has for each expert, layer by layer.

    L layers · G source ranks · E experts · K top-k · T tokens of a rank

An average hides what a step waits for: the fullest expert. So counts are drawn, from a distribution
of expert popularity (``uniform``, ``zipf:s``, ``lognormal:sigma``) that every layer permutes anew,
and from each source's own leaning (`locality`): the larger, the less two sources agree.

>>> counts = sample_counts("lognormal:0.6", layers=2, ranks=4, experts=8, top_k=2, tokens=16)
>>> counts.shape, counts.sum(axis=2).tolist()[0]
((2, 4, 8), [32, 32, 32, 32])
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
KINDS = ("uniform", "zipf:<exponent>", "lognormal:<sigma>")


def parse_routing(text: str) -> tuple[str, float]:
    """The kind and the parameter of a routing's name.

    Raises:
        ValueError: not one of `KINDS`.
    """
    kind, _, number = str(text).partition(":")
    try:
        value = float(number) if number else math.nan
    except ValueError:
        kind, value = "", math.nan
    if kind == "uniform" and not number:
        return kind, 0.0
    if kind in ("zipf", "lognormal") and 0 <= value <= 10:
        return kind, value
    raise ValueError(
        f"routing must be one of {', '.join(KINDS)} (parameter in [0, 10]), got {text!r}"
    )


def shares(routing: str, experts: int, random: np.random.Generator) -> Floats:
    """(E,) the expected share of the rows of each expert, in random order."""
    kind, value = parse_routing(routing)
    if kind == "zipf":
        weights = np.arange(1, experts + 1, dtype=np.float64) ** -value
    elif kind == "lognormal":
        weights = random.lognormal(0.0, value, experts)
    else:
        weights = np.ones(experts)
    weights = random.permutation(weights)
    total: Floats = weights / weights.sum()
    return total


def capped(share_E: Floats, top_k: int) -> Floats:
    """The shares with none over 1 / K: a token chooses an expert once at most."""
    share, limit = share_E.copy(), 1.0 / top_k
    for _ in range(len(share)):
        over = share > limit
        if not over.any():
            break
        rest = ~over & (share < limit)
        spare = 1.0 - limit * (len(share) - rest.sum())
        share[~rest] = limit
        share[rest] *= spare / share[rest].sum()
    return share


def sample_counts(
    routing: str,
    *,
    layers: int,
    ranks: int,
    experts: int,
    top_k: int,
    tokens: int,
    locality: float = 0.0,
    seed: int = 0,
    draw: int = 1,
) -> Counts:
    """(L, G, E) rows, drawn; every source rank has exactly ``tokens * top_k``.

    Args:
        routing: see `KINDS`.
        layers, ranks, experts, top_k: the sizes.
        tokens: T of every source rank.
        locality: 0 for sources that lean alike; otherwise the spread of their leanings (the inverse
            concentration of a Dirichlet distribution around the shares, times E).
        seed: of the draws; equal arguments give equal counts.
        draw: another number gives other counts of the same popularity.
    """
    counts = np.empty((layers, ranks, experts), np.int64)
    for layer in range(layers):
        # A layer's popularity depends on the seed alone, however many tokens are drawn: a placement
        # made for one batch must meet the same hot experts in the next.
        share = capped(shares(routing, experts, np.random.default_rng([seed, layer])), top_k)
        random = np.random.default_rng([seed, layer, draw])
        leaning = share
        if locality > 0:
            leaning = random.dirichlet(np.maximum(share, 1e-9) * experts / locality, ranks)
        counts[layer] = random.multinomial(tokens * top_k, leaning, ranks)
    return counts
