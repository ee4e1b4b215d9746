"""One way to foresee the work of the next step, and what following it would have cost.

    N groups · E experts · C numbers of context · K recent errors · F = 4 features

A *way* predicts the groups' recorded work from its own past; or it predicts the rows of every
expert (with the context: what other layers counted) and from them the work, by *slice times*: a
regression fitted on line from a group's predicted rows to its work, which thereby also learns how
far predictions of rows mislead.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..plan import GroupProfile, SliceGroup
from ..predictors import NO_CONTEXT, Array, Predictor

ERRORS, WARM = 64, 4
"""Recent errors that are kept: what a plan is prepared for; rows before the first one counts."""
FORGET_TIME, RIDGE_TIME, FEATURES = 0.998, 1e-3, 4


@dataclass(frozen=True)
class Way:
    """A predictor of the groups' work and, where given, of experts' rows and so of their groups'.

    Groups without experts, and profiles without counts, always go by `loads`.
    """

    name: str
    loads: Predictor
    counts: Predictor | None = None


@dataclass(frozen=True)
class Learned:
    """State of a way: the predictors', the regression's sums, what it expected, recent errors."""

    loads: Any
    counts: Any
    gram_NFF: Array
    moment_NF: Array
    errors_KN: Array
    expected_N: Array | None = None
    features_NF: Array | None = None
    seen: int = 0


def start(way: Way, profile: GroupProfile) -> Learned:
    """Nothing learned yet."""
    size = len(profile.groups)
    width = len(profile.context_VC[0]) if profile.context_VC else 0
    counted = way.counts is not None and len(profile.counts_WE) == len(profile.loads_WN) > 0
    return Learned(
        loads=way.loads.start(size, 0),
        counts=way.counts.start(len(profile.counts_WE[0]), width)
        if way.counts and counted
        else None,
        gram_NFF=np.tile(RIDGE_TIME * np.eye(FEATURES), (size, 1, 1)),
        moment_NF=np.zeros((size, FEATURES)),
        errors_KN=np.zeros((0, size)),
    )


def _features(groups: tuple[SliceGroup, ...], counts_E: Array) -> Array:
    """(N, F): one, and rows, active experts and squared rows of each group, per mean expert."""
    mean = float(counts_E.mean()) or 1.0
    found = np.ones((len(groups), FEATURES))
    for n, group in enumerate(groups):
        rows = counts_E[list(group.experts)] / mean
        found[n, 1:] = rows.sum(), (rows > 0).sum(), (rows * rows).sum()
    return found


def _context(profile: GroupProfile, row: int) -> Array:
    """The context of a row of the history; row W is the step to come."""
    if not profile.context_VC:
        return NO_CONTEXT
    return np.asarray(profile.context_VC[row], dtype=np.float64)


def expect(way: Way, state: Learned, profile: GroupProfile, row: int) -> Learned:
    """The state with what is expected of a row of the history; row W is the step to come."""
    guess_N = way.loads.predict(state.loads, NO_CONTEXT)
    if way.counts is None or state.counts is None:
        return replace(state, expected_N=guess_N)
    rows_E = way.counts.predict(state.counts, _context(profile, row))
    features_NF = _features(profile.groups, rows_E)
    weights_NF = np.linalg.solve(state.gram_NFF, state.moment_NF[:, :, None])[:, :, 0]
    mapped_N = np.maximum((features_NF * weights_NF).sum(axis=1), 0.0)
    manned_N = np.array([bool(group.experts) for group in profile.groups])
    expected_N = np.where(manned_N, mapped_N, guess_N)
    return replace(state, expected_N=expected_N, features_NF=features_NF)


def learn(way: Way, state: Learned, profile: GroupProfile, row: int) -> Learned:
    """The state after a row of the history; a row that is not finite is passed over."""
    loads_N = np.asarray(profile.loads_WN[row], dtype=np.float64)
    if not np.isfinite(loads_N).all():
        return replace(state, expected_N=None, features_NF=None)
    if state.expected_N is None:
        state = expect(way, state, profile, row)
    assert state.expected_N is not None, "expect sets it"
    gram_NFF, moment_NF, counts = state.gram_NFF, state.moment_NF, state.counts
    if state.features_NF is not None:
        squares_NFF = state.features_NF[:, :, None] * state.features_NF[:, None, :]
        gram_NFF = FORGET_TIME * gram_NFF + squares_NFF
        moment_NF = FORGET_TIME * moment_NF + state.features_NF * loads_N[:, None]
    if way.counts is not None and counts is not None:
        rows_E = np.asarray(profile.counts_WE[row], dtype=np.float64)
        counts = way.counts.update(counts, rows_E, _context(profile, row))
    errors_KN = state.errors_KN
    if state.seen >= WARM:
        error_1N = (loads_N - state.expected_N)[None]
        errors_KN = np.concatenate([errors_KN, error_1N])[-ERRORS:]
    return Learned(
        loads=way.loads.update(state.loads, loads_N, NO_CONTEXT),
        counts=counts,
        gram_NFF=gram_NFF,
        moment_NF=moment_NF,
        errors_KN=errors_KN,
        seen=state.seen + 1,
    )


def possible(state: Learned) -> Array:
    """Loads (K, N) that may come: what is expected, shifted by each recent error, 0 at least.

    Raises:
        ValueError: the prediction is not finite.
    """
    assert state.expected_N is not None, "call expect first"
    if not np.isfinite(state.expected_N).all():
        raise ValueError(f"the predicted loads are {state.expected_N.tolist()}")
    if not len(state.errors_KN):
        return state.expected_N[None]
    loads_KN: Array = np.maximum(state.expected_N + state.errors_KN, 0.0)
    return loads_KN
