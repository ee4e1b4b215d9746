"""What each group will have to do in the next step, learned from what the profiles showed.

    N groups · E experts · C numbers of context

Two ways lead there. The direct one predicts the groups' recorded work from its own past. The other
predicts the rows of every expert (with the context: what other layers counted), and *slice time*, a
regression fitted on line from a group's predicted rows to its work, which thereby also learns how
far predictions of rows mislead. Per group, whichever erred less of late is used.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..plan import Profile, SliceGroup
from ..predictors import NO_CONTEXT, Array, Predictor

FORGET = 0.97
"""Of the errors that decide between the two ways."""
FORGET_TIME, RIDGE_TIME = 0.998, 1e-3


@dataclass(frozen=True)
class Forecast:
    """State: both predictors, the regression's sums per group, errors, and what was expected.

    `named`: the groups by name and experts for which this was learned; `step`: the last one seen.
    """

    step: int
    named: tuple[tuple[str, tuple[int, ...]], ...]
    direct: Any
    counts: Any
    gram_NFF: Array
    moment_NF: Array
    errors_2N: Array
    features_NF: Array | None = None
    expected_2N: Array | None = None


def _names(groups: tuple[SliceGroup, ...]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((group.name, group.experts) for group in groups)


def start(profile: Profile, direct: Predictor, counts: Predictor | None) -> Forecast:
    """Nothing learned yet; every row of the profile is news."""
    size = len(profile.groups)
    experts = len(profile.counts_WE[0]) if profile.counts_WE else 0
    width = len(profile.context_VC[0]) if profile.context_VC else 0
    return Forecast(
        step=profile.step - len(profile.loads_WN),
        named=_names(profile.groups),
        direct=direct.start(size, 0),
        counts=counts.start(experts, width) if counts and experts else None,
        gram_NFF=np.tile(RIDGE_TIME * np.eye(4), (size, 1, 1)),
        moment_NF=np.zeros((size, 4)),
        errors_2N=np.zeros((2, size)),
    )


def _features(groups: tuple[SliceGroup, ...], counts_E: Array) -> Array:
    """(N, 4): one, and rows, active experts and squared rows of each group, per mean expert."""
    mean = float(counts_E.mean()) or 1.0
    found = np.ones((len(groups), 4))
    for n, group in enumerate(groups):
        rows = counts_E[list(group.experts)] / mean
        found[n, 1:] = rows.sum(), (rows > 0).sum(), (rows * rows).sum()
    return found


def _context(profile: Profile, row: int) -> Array:
    """The context of a row of the history; row W is the step to come."""
    if not profile.context_VC:
        return NO_CONTEXT
    return np.asarray(profile.context_VC[row], dtype=np.float64)


def _expect(
    state: Forecast, profile: Profile, row: int, direct: Predictor, counts: Predictor | None
) -> tuple[Array, Array | None]:
    """Both ways' work (2, N) for a row that is not looked at, and the features behind the second.

    Where there are no counts, or a group has no experts, the second way is the first.
    """
    guess_N = direct.predict(state.direct, NO_CONTEXT)
    if counts is None or state.counts is None:
        return np.stack([guess_N, guess_N]), None
    rows_E = counts.predict(state.counts, _context(profile, row))
    features_NF = _features(profile.groups, rows_E)
    mapped_N = guess_N.copy()
    for n, group in enumerate(profile.groups):
        if group.experts:
            weights_F = np.linalg.solve(state.gram_NFF[n], state.moment_NF[n])
            mapped_N[n] = max(0.0, float(features_NF[n] @ weights_F))
    return np.stack([guess_N, mapped_N]), features_NF


def _learn(
    state: Forecast, profile: Profile, row: int, direct: Predictor, counts: Predictor | None
) -> Forecast:
    """The state after one row of history."""
    loads_N = np.asarray(profile.loads_WN[row], dtype=np.float64)
    expected_2N, features_NF = state.expected_2N, state.features_NF
    if expected_2N is None:
        expected_2N, features_NF = _expect(state, profile, row, direct, counts)
    gram_NFF, moment_NF, errors_2N = state.gram_NFF, state.moment_NF, state.errors_2N
    if np.isfinite(loads_N).all():
        errors_2N = FORGET * errors_2N + np.abs(expected_2N - loads_N)
        if features_NF is not None:
            squares_NFF = features_NF[:, :, None] * features_NF[:, None, :]
            gram_NFF = FORGET_TIME * gram_NFF + squares_NFF
            moment_NF = FORGET_TIME * moment_NF + features_NF * loads_N[:, None]
    after = state.counts
    if counts is not None and state.counts is not None:
        rows_E = np.asarray(profile.counts_WE[row - len(profile.loads_WN)], dtype=np.float64)
        after = counts.update(state.counts, rows_E, _context(profile, row))
    return replace(
        state,
        step=state.step + 1,
        direct=direct.update(state.direct, loads_N, NO_CONTEXT),
        counts=after,
        gram_NFF=gram_NFF,
        moment_NF=moment_NF,
        errors_2N=errors_2N,
        features_NF=None,
        expected_2N=None,
    )


def forecast(
    profile: Profile, state: Forecast | None, direct: Predictor, counts: Predictor | None
) -> tuple[tuple[float, ...], Forecast]:
    """The work of each group in the next step, and the state for the next call.

    `counts` None: only the direct way. Learning starts afresh when the groups have changed.

    Raises:
        ValueError: the profile has no loads, or the prediction is not finite.
    """
    if not profile.loads_WN:
        raise ValueError("a forecast needs loads_WN, got none")
    if state is None or state.named != _names(profile.groups):
        state = start(profile, direct, counts)
    history = len(profile.loads_WN)
    missed = min(history, max(0, profile.step - state.step))
    for row in range(history - missed, history):
        state = _learn(state, profile, row, direct, counts)
    expected_2N, features_NF = _expect(state, profile, history, direct, counts)
    first_N = state.errors_2N[0] <= state.errors_2N[1]
    loads_N = np.where(first_N, expected_2N[0], expected_2N[1])
    if not np.isfinite(loads_N).all():
        raise ValueError(f"the predicted loads are {loads_N.tolist()}")
    known = replace(state, step=profile.step, features_NF=features_NF, expected_2N=expected_2N)
    return tuple(map(float, loads_N)), known
