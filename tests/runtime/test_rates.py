"""Smoothed loads, hysteresis, and a drift test whose false alarms are what it says."""

from __future__ import annotations

import doctest

import numpy as np
import pytest

from moesaic.runtime import rates as room
from moesaic.runtime.rates import Settings, advance, drift_p_value, start, temperatures

CALM = Settings(window=0)


def test_docstring_examples() -> None:
    found = doctest.testmod(room)
    assert found.attempted and not found.failed


def test_the_smoothed_load_has_no_bias_and_the_given_half_life() -> None:
    state = advance(start(2), [10, 0], 1, CALM)
    assert state.load_E.tolist() == [10, 0], "the first step is the mean of one step"
    settings = Settings(half_life=5, window=0)
    state = start(1)
    for _ in range(200):
        state = advance(state, [8], 1, settings)
    for _ in range(5):
        state = advance(state, [0], 1, settings)
    assert state.load_E[0] == pytest.approx(4.0)
    whole, parts = advance(state, [70], 7, settings), state
    for _ in range(7):
        parts = advance(parts, [10], 1, settings)
    assert whole.load_E[0] == pytest.approx(parts.load_E[0])


def test_hot_and_cold_have_hysteresis() -> None:
    none: frozenset[int] = frozenset()
    settings = Settings()
    load = np.array([2.1, 0.2, 1.0, 0.7])
    hot, cold = temperatures(load, none, none, settings)
    assert (hot, cold) == ({0}, {1})
    between = np.array([1.7, 0.45, 1.0, 0.85])
    assert temperatures(between, hot, cold, settings) == (hot, cold)
    assert temperatures(between, none, none, settings) == (none, none)
    calm = np.array([1.3, 0.8, 1.0, 0.9])
    assert temperatures(calm, hot, cold, settings) == (none, none)
    assert temperatures(np.zeros(4), hot, cold, settings) == (none, none)
    # Noise around one threshold: without the second threshold the class would flip at every step.
    rng = np.random.default_rng(0)
    flips = {True: 0, False: 0}
    for hysteresis in flips:
        s = Settings() if hysteresis else Settings(hot_until=2.0, cold_until=0.25)
        before = none
        for noise in rng.normal(0, 0.1, 300):
            x = 2.0 + noise
            now, _ = temperatures(np.array([x, *[(4 - x) / 3] * 3]), before, none, s)
            flips[hysteresis] += now != before
            before = now
    assert flips[True] <= 1 and flips[False] > 50


def steps_of(rng: np.random.Generator, share: np.ndarray, number: int, spread: float) -> np.ndarray:
    """Rows of `number` steps of 256 tokens whose own shares scatter around `share`."""
    own = rng.dirichlet(share * spread, size=number)
    return np.stack([rng.multinomial(256, p) for p in own]).astype(float)


def false_alarms(spread: float, tests: int, p: float) -> tuple[float, float]:
    """How often this test, and one that takes tokens for independent, find what is not there."""
    rng = np.random.default_rng(int(spread))
    share = rng.dirichlet(np.ones(16))
    ours = naive = 0
    for seed in range(tests):
        a, b = steps_of(rng, share, 8, spread), steps_of(rng, share, 8, spread)
        ours += drift_p_value(a, b, permutations=99, seed=seed) <= p
        table = np.stack([a.sum(0), b.sum(0)])
        expected = table.sum(0) * 0.5
        x2 = ((table - expected) ** 2 / np.maximum(expected, 1e-9)).sum()
        naive += x2 > 25.0  # the 5 % point of chi-squared with 15 degrees of freedom
    return ours / tests, naive / tests


@pytest.mark.parametrize("spread", [30.0, 1e6])
def test_false_alarms_are_as_stated_whatever_a_step_does_inside(spread: float) -> None:
    ours, naive = false_alarms(spread, tests=600, p=0.05)
    assert 0.02 <= ours <= 0.075, "the test is exact, neither blind nor nervous"
    assert (naive > 0.9) == (spread == 30.0), "tokens of a step agree: counting them is no test"


def test_drift_is_found_and_the_window_after_it_is_the_new_reference() -> None:
    settings = Settings(window=64, block=4)
    found = false = 0
    for seed in range(10):
        rng = np.random.default_rng(seed)
        one, two = (rng.dirichlet(np.ones(16) * 2) for _ in range(2))
        state, alarms = start(16), []
        for number, share in enumerate((one, one, one, two, two, two)):
            for rows in steps_of(rng, share, 64, 50.0):
                state = advance(state, rows, 1, settings)
                if state.drifted:
                    alarms.append(number)
        assert (state.tests, state.drifts) == (5, len(alarms))
        found += 3 in alarms
        false += len(set(alarms) - {3})
    assert found == 10 and false <= 2


def test_windows_may_be_empty_or_merged() -> None:
    settings = Settings(window=64, block=4)
    state = start(4)
    for _ in range(256):
        state = advance(state, [0, 0, 0, 0], 1, settings)
    assert state.tests == 3 and state.p_value == 1.0 and not state.hot
    state = start(4)
    for _ in range(64):
        state = advance(state, [90, 10, 10, 10], 10, settings)
    assert state.tests == 3 and state.drifts == 0


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        ({"hot_at": 1.0}, "ascend"),
        ({"cold_until": 1.6}, "ascend"),
        ({"half_life": 0.0}, "positive"),
        ({"window": 10}, "multiple"),
        ({"p": 0.001}, "permutations"),
    ],
)
def test_settings_without_meaning_are_refused(bad: dict[str, float], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Settings(**bad)  # type: ignore[arg-type]
