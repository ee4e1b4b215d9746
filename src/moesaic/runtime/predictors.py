"""What the next step will bring: predictors of loads, from the last value to one that learns.

    N numbers predicted (rows of each expert, work of each group) · C numbers of context
    F features · M members

A predictor is three pure functions on frozen states: `start`, `predict` what comes next, `update`
with what came. Everything is sequential float64 arithmetic in a fixed order: a recorded run gives
the same predictions again.

`last`, `ewma`: the baselines. `trend`: ridge regression, fitted on line, of a value on its own past
(the last two values, exponential means of four speeds, the mean so far, a constant); all N share
the F coefficients, O(N F + F^3) a step. `linked`: `trend`, and recursive least squares that explain
its residuals by the context (what other layers counted), O(C^2 + C N) a step. `mixed`: members
weighted on line by their errors, with a fixed share for each (Herbster and Warmuth, Tracking the
Best Expert, 1998), so that it stays near the best one also when that changes.

A number that is not finite is never learned from: `update` then returns the state as it was.

>>> predictor = ewma(0.5)
>>> state = predictor.start(2, 0)
>>> for row in ([4.0, 0.0], [0.0, 4.0]):
...     state = predictor.update(state, np.array(row), NO_CONTEXT)
>>> predictor.predict(state, NO_CONTEXT).tolist()
[2.0, 2.0]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

NO_CONTEXT: Array = np.zeros(0)
SPEEDS = (0.03, 0.1, 0.3, 0.5)
"""Of the exponential means that `trend` looks at."""
FORGET = 0.998
"""Of what `trend` has learned, kept from one step to the next."""
RIDGE_TREND = 3.0
LEAST = 1e-9
"""A mean load up to this counts as none and is no scale: numbers over it would be infinite."""
RATE, SHARE = 3.0, 0.01
"""Of `mixed`: how fast errors change the weights; the part dealt out evenly at each step."""


def _scale(mean: float) -> float:
    return float(mean) if mean > LEAST else 1.0


@dataclass(frozen=True)
class Predictor:
    """A named predictor.

    `start(N, C)` gives the first state, `predict(state, context_C)` N numbers of 0 or more,
    `update(state, values_N, context_C)` the next state. The context of an update is the one with
    which these values were predicted.
    """

    name: str
    start: Callable[[int, int], Any]
    predict: Callable[[Any, Array], Array]
    update: Callable[[Any, Array, Array], Any]


def _usable(values_N: Array) -> bool:
    return bool(np.isfinite(values_N).all())


@dataclass(frozen=True)
class Level:
    """One smoothed value per number; `seen` values went into it."""

    value_N: Array
    seen: int = 0


def ewma(alpha: float) -> Predictor:
    """The exponential mean with weight `alpha` on the newest value.

    Raises:
        ValueError: alpha is outside (0, 1].
    """
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha must be in (0, 1], got {alpha}")

    def update(state: Level, values_N: Array, context_C: Array) -> Level:
        if not _usable(values_N):
            return state
        weight = alpha if state.seen else 1.0
        return Level(state.value_N + weight * (values_N - state.value_N), state.seen + 1)

    return Predictor(
        "last" if alpha == 1 else f"ewma{alpha:g}",
        lambda size, width: Level(np.zeros(size)),
        lambda state, context_C: state.value_N,
        update,
    )


def last() -> Predictor:
    """The newest value again."""
    return ewma(1.0)


@dataclass(frozen=True)
class Trend:
    """State of `trend`: the past as features, and what was learned about them."""

    newest_N: Array
    second_N: Array
    levels_AN: Array
    mean_N: Array
    scale: float
    gram_FF: Array
    moment_F: Array
    weights_F: Array
    """What `gram_FF` and `moment_F` say, solved once an update."""
    seen: int = 0


def _features(state: Trend) -> Array:
    """(N, F) in units of the scale."""
    own = np.stack([state.newest_N, state.second_N, *state.levels_AN, state.mean_N], axis=1)
    return np.concatenate([own / state.scale, np.ones((len(own), 1))], axis=1)


def _start_trend(size: int, width: int) -> Trend:
    features = len(SPEEDS) + 4
    # Before anything is learned: half of a slow and half of a faster exponential mean.
    prior_F = np.zeros(features)
    prior_F[3:5] = 0.5
    zeros = np.zeros(size)
    return Trend(
        newest_N=zeros, second_N=zeros, levels_AN=np.zeros((len(SPEEDS), size)), mean_N=zeros,
        scale=1.0, gram_FF=RIDGE_TREND * np.eye(features), moment_F=RIDGE_TREND * prior_F,
        weights_F=prior_F,
    )  # fmt: skip


def _predict_trend(state: Trend, context_C: Array) -> Array:
    if not state.seen:
        return state.newest_N
    guess_N: Array = np.maximum(_features(state) @ state.weights_F, 0.0) * state.scale
    return guess_N


def _update_trend(state: Trend, values_N: Array, context_C: Array) -> Trend:
    if not _usable(values_N):
        return state
    size = _scale(np.abs(values_N).mean())
    if not state.seen:
        levels = np.tile(values_N, (len(SPEEDS), 1))
        return replace(
            state, newest_N=values_N, second_N=values_N, levels_AN=levels, mean_N=values_N,
            scale=size, seen=1,
        )  # fmt: skip
    features_NF, target_N = _features(state), values_N / state.scale
    first, speeds_A = _start_trend(0, 0), np.array(SPEEDS)[:, None]
    gram_FF = FORGET * state.gram_FF + (1 - FORGET) * first.gram_FF
    moment_F = FORGET * state.moment_F + (1 - FORGET) * first.moment_F
    gram_FF, moment_F = gram_FF + features_NF.T @ features_NF, moment_F + features_NF.T @ target_N
    weights_F: Array = np.asarray(np.linalg.solve(gram_FF, moment_F), dtype=np.float64)
    return Trend(
        newest_N=values_N,
        second_N=state.newest_N,
        levels_AN=state.levels_AN + speeds_A * (values_N - state.levels_AN),
        mean_N=state.mean_N + (values_N - state.mean_N) / (state.seen + 1),
        scale=state.scale + 0.02 * (size - state.scale),
        gram_FF=gram_FF,
        moment_F=moment_F,
        weights_F=weights_F,
        seen=state.seen + 1,
    )


def trend() -> Predictor:
    """Ridge regression of a value on its own past, fitted on line, coefficients shared by all."""
    return Predictor("trend", _start_trend, _predict_trend, _update_trend)


@dataclass(frozen=True)
class Linked:
    """State of `linked`: a trend, the context's slow mean, and least squares on its deviation."""

    trend: Trend
    level_C: Array
    spread_CC: Array
    weights_CN: Array
    seen: int = 0


def _deviation(state: Linked, context_C: Array) -> Array:
    if not state.seen or not len(state.level_C):
        return np.zeros_like(state.level_C)
    scale = _scale(state.level_C.mean())
    return np.nan_to_num((context_C - state.level_C) / scale, posinf=0.0, neginf=0.0)


def _predict_linked(state: Linked, context_C: Array) -> Array:
    shift_N = _deviation(state, context_C) @ state.weights_CN * state.trend.scale
    guess_N: Array = np.maximum(_predict_trend(state.trend, context_C) + shift_N, 0.0)
    return guess_N


def _update_linked(
    state: Linked, values_N: Array, context_C: Array, ridge: float, speed: float
) -> Linked:
    if not _usable(values_N) or not _usable(context_C):
        return state
    trend = _update_trend(state.trend, values_N, context_C)
    if not state.seen:
        return replace(state, trend=trend, level_C=context_C, seen=1)
    x_C = _deviation(state, context_C)
    scale = state.trend.scale
    wrong_N = (values_N - _predict_trend(state.trend, context_C)) / scale - x_C @ state.weights_CN
    reach_C = state.spread_CC @ x_C
    gain_C = reach_C / (1.0 + x_C @ reach_C)
    weights_CN = state.weights_CN + np.outer(gain_C, wrong_N)
    if not _usable(weights_CN):
        return _start_linked(len(values_N), len(context_C), ridge)
    return Linked(
        trend=trend,
        level_C=state.level_C + speed * (context_C - state.level_C),
        spread_CC=state.spread_CC - np.outer(gain_C, reach_C),
        weights_CN=weights_CN,
        seen=state.seen + 1,
    )


def _start_linked(size: int, width: int, ridge: float) -> Linked:
    return Linked(
        _start_trend(size, 0), np.zeros(width), np.eye(width) / ridge, np.zeros((width, size))
    )


def linked(ridge: float, speed: float) -> Predictor:
    """`trend`, corrected by what the context explains of its residuals."""
    return Predictor(
        f"linked{ridge:g}-{speed:g}",
        lambda size, width: _start_linked(size, width, ridge),
        _predict_linked,
        lambda state, values_N, context_C: _update_linked(state, values_N, context_C, ridge, speed),
    )


@dataclass(frozen=True)
class Mixed:
    """State of `mixed`: its members' states and weights, and the usual size of an error."""

    members: tuple[Any, ...]
    weights_M: Array
    scale: float = 0.0


def mixed(members: Sequence[Predictor], *, name: str = "mixed") -> Predictor:
    """The members' mean, weighted by how well each has predicted of late.

    A member that predicts a number that is not finite counts for nothing at that step.

    Raises:
        ValueError: there are no members; (`predict`) none of them predicts finite numbers.
    """
    if not members:
        raise ValueError("mixed needs at least one member")

    def start(size: int, width: int) -> Mixed:
        even = np.full(len(members), 1 / len(members))
        return Mixed(tuple(member.start(size, width) for member in members), even)

    def guesses(state: Mixed, context_C: Array) -> Array:
        pairs = zip(members, state.members, strict=True)
        return np.stack([member.predict(held, context_C) for member, held in pairs])

    def predict(state: Mixed, context_C: Array) -> Array:
        guess_MN = guesses(state, context_C)
        finite_M = np.array([_usable(guess_N) for guess_N in guess_MN])
        weights_M = np.where(finite_M, state.weights_M, 0.0)
        if not finite_M.any():
            raise ValueError("none of the predictors gives finite numbers")
        guess_N: Array = weights_M @ np.where(finite_M[:, None], guess_MN, 0.0) / weights_M.sum()
        return guess_N

    def update(state: Mixed, values_N: Array, context_C: Array) -> Mixed:
        if not _usable(values_N):
            return state
        loss_M = np.abs(guesses(state, context_C) - values_N).sum(axis=1)
        loss_M = loss_M / _scale(np.abs(values_N).sum())
        loss_M = np.minimum(np.nan_to_num(loss_M, nan=1e3, posinf=1e3), 1e3)
        usual = float(np.median(loss_M))
        scale = state.scale + 0.02 * (usual - state.scale) if state.scale else usual
        held = zip(members, state.members, strict=True)
        after = tuple(member.update(old, values_N, context_C) for member, old in held)
        weights_M = state.weights_M * np.exp(-RATE * (loss_M - loss_M.min()) / (scale or 1.0))
        weights_M = (1 - SHARE) * weights_M / weights_M.sum() + SHARE / len(members)
        return Mixed(after, weights_M, scale)

    return Predictor(name, start, predict, update)


def learned(*, context: bool = True) -> Predictor:
    """The plain ones and `trend`, with `context` also `linked`, mixed on line."""
    members = [last(), *(ewma(speed) for speed in SPEEDS), trend()]
    if context:
        members += [linked(10.0, 0.1), linked(100.0, 0.1)]
    return mixed(members, name="learned")
