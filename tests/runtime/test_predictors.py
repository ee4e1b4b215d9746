"""Predictors: what they say of simple series, that they learn, never break, and replay exactly."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.runtime.predictors import NO_CONTEXT, Predictor, ewma, last, learned, linked, mixed
from moesaic.runtime.predictors import trend as trend_predictor

EVERY = [last(), ewma(0.3), trend_predictor(), linked(10.0, 0.1), learned(), learned(context=False)]


def guesses(predictor: Predictor, rows_nN: np.ndarray, context_nC: np.ndarray) -> np.ndarray:
    state, found = predictor.start(rows_nN.shape[1], context_nC.shape[1]), []
    for row_N, context_C in zip(rows_nN, context_nC, strict=True):
        found.append(predictor.predict(state, context_C))
        state = predictor.update(state, row_N, context_C)
    return np.stack(found)


def error(predictor: Predictor, rows: np.ndarray, context: np.ndarray | None = None) -> float:
    context = np.zeros((len(rows), 0)) if context is None else context
    return float(np.abs(guesses(predictor, rows, context) - rows)[32:].sum() / rows[32:].sum())


@pytest.mark.parametrize("predictor", EVERY, ids=lambda p: p.name)
def test_a_constant_is_foreseen(predictor: Predictor) -> None:
    rows = np.tile([3.0, 0.0, 7.0, 1.0], (40, 1))
    assert np.allclose(guesses(predictor, rows, np.ones((40, 2)))[5:], rows[5:], rtol=0.02)


def test_last_and_ewma_by_hand() -> None:
    rows = np.array([[4.0], [0.0], [8.0]])
    assert guesses(last(), rows, np.zeros((3, 0)))[:, 0].tolist() == [0.0, 4.0, 0.0]
    assert guesses(ewma(0.25), rows, np.zeros((3, 0)))[:, 0].tolist() == [0.0, 4.0, 3.0]
    for alpha in (0.0, 1.1, float("nan")):
        with pytest.raises(ValueError, match="alpha must be"):
            ewma(alpha)


def test_trend_learns_what_no_mean_can_say() -> None:
    # Every second step is like the one before the last.
    rng = np.random.default_rng(0)
    level = np.where(np.arange(300) % 2, 30.0, 10.0)[:, None] * rng.uniform(0.5, 2, 8)
    rows = rng.poisson(level).astype(float)
    means = min(error(ewma(a), rows) for a in (0.05, 0.1, 0.3, 0.5, 0.7, 1.0))
    assert error(trend_predictor(), rows) < 0.7 * means
    assert error(learned(), rows) < 0.75 * means


def test_linked_uses_the_context_and_only_what_is_in_it() -> None:
    rng = np.random.default_rng(1)
    context = rng.uniform(0, 20, (400, 6))
    rows = np.maximum(40 + context @ rng.normal(0, 1, (6, 5)), 0)
    plain = error(trend_predictor(), rows)
    assert error(linked(10.0, 0.1), rows, context) < 0.35 * plain
    assert error(learned(), rows, context) < 0.5 * plain
    # A context that has nothing to do with the rows must not help.
    shuffled = rng.permutation(context)
    assert error(linked(10.0, 0.1), rows, shuffled) > 0.95 * plain


def test_mixed_stays_near_the_better_member_when_it_changes() -> None:
    rng = np.random.default_rng(2)
    noisy = rng.poisson(50, (200, 4)).astype(float)
    steps = np.repeat(rng.uniform(10, 90, (20, 4)), 10, axis=0)
    for rows in (noisy, steps, np.concatenate([noisy, steps])):
        best = min(error(last(), rows), error(ewma(0.1), rows))
        assert error(mixed([last(), ewma(0.1)]), rows) < 1.12 * best


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_no_number_breaks_a_predictor(data: st.DataObject) -> None:
    predictor = data.draw(st.sampled_from(EVERY))
    number = st.one_of(st.floats(0, 1e6), st.sampled_from([np.nan, np.inf, -np.inf, 0.0]))
    state = predictor.start(3, 2)
    for _ in range(data.draw(st.integers(1, 12))):
        row = np.array(data.draw(st.lists(number, min_size=3, max_size=3)))
        context = np.array(data.draw(st.lists(number, min_size=2, max_size=2)))
        state = predictor.update(state, row, context)
        guess = predictor.predict(state, context)
        assert np.isfinite(guess).all() and (guess >= 0).all()


@pytest.mark.parametrize("predictor", EVERY, ids=lambda p: p.name)
def test_a_bad_row_leaves_the_state_as_it_was(predictor: Predictor) -> None:
    state = predictor.start(2, 0)
    for row in ([1.0, 5.0], [2.0, 4.0], [3.0, 3.0]):
        state = predictor.update(state, np.array(row), NO_CONTEXT)
    before = predictor.predict(state, NO_CONTEXT)
    after = predictor.update(state, np.array([np.nan, 1.0]), NO_CONTEXT)
    assert np.array_equal(predictor.predict(after, NO_CONTEXT), before)


def test_a_member_that_says_nan_counts_for_nothing() -> None:
    bad = Predictor("bad", lambda n, c: None, lambda s, c: np.full(2, np.nan), lambda s, v, c: None)
    both, alone = mixed([bad, last()]), mixed([bad])
    state = both.update(both.start(2, 0), np.array([1.0, 2.0]), NO_CONTEXT)
    assert both.predict(state, NO_CONTEXT).tolist() == [1.0, 2.0]
    with pytest.raises(ValueError, match="none of the predictors"):
        alone.predict(alone.start(2, 0), NO_CONTEXT)
    with pytest.raises(ValueError, match="at least one"):
        mixed([])


def test_the_same_run_gives_the_same_bits_and_leaves_old_states_alone() -> None:
    rng = np.random.default_rng(3)
    rows, context = rng.poisson(9, (60, 5)).astype(float), rng.uniform(0, 9, (60, 4))
    first, again = (guesses(learned(), rows, context) for _ in range(2))
    assert np.array_equal(first, again)
    predictor = learned()
    state = predictor.start(5, 4)
    for row, known in zip(rows, context, strict=True):
        kept = predictor.predict(state, known)
        after = predictor.update(state, row, known)
        assert np.array_equal(predictor.predict(state, known), kept)
        state = after
