"""Every byte is scored exactly once, whatever the sizes, and nobody always goes first."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.models.byte_lm import byte_windows
from moesaic.run.execute import windows_of
from moesaic.run.plan import CANDIDATES, Plan, plan_text

SIZES = {"size": st.integers(1, 500), "context": st.integers(1, 40), "windows": st.integers(1, 5)}


@settings(deadline=None)
@given(**SIZES)
def test_chunks_tile_the_text(size: int, context: int, windows: int) -> None:
    chunks = list(Plan(size=size, context=context, windows=windows).chunks())
    assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
    position = 0
    for chunk in chunks:
        assert chunk.start == position
        assert 1 <= chunk.windows <= windows
        assert 1 <= chunk.width <= context
        assert chunk.full == (chunk.size == context * windows)
        position += chunk.size
    assert position == size


@settings(deadline=None)
@given(**SIZES)
def test_windows_are_those_of_the_model(size: int, context: int, windows: int) -> None:
    data = bytes(i % 251 for i in range(size))
    expected = [(i.tolist(), t.tolist()) for i, t in byte_windows(data, context)]
    seen = []
    for chunk in Plan(size=size, context=context, windows=windows).chunks():
        before = data[chunk.start - 1] if chunk.start else None
        piece = data[chunk.start : chunk.start + chunk.size]
        inputs_BN, targets_BN = windows_of(piece, before, chunk)
        seen += list(zip(inputs_BN.tolist(), targets_BN.tolist(), strict=True))
    assert seen == expected


def test_who_goes_first_alternates() -> None:
    orders = [chunk.order for chunk in Plan(size=40, context=10, windows=1).chunks()]
    assert orders == [CANDIDATES, CANDIDATES[::-1], CANDIDATES, CANDIDATES[::-1]]


def test_short_texts_get_smaller_chunks() -> None:
    assert plan_text(10, 1024, most_tokens=4096).windows == 1
    assert plan_text(32 * 1024, 1024, most_tokens=4096).windows == 2
    assert plan_text(10**9, 1024, most_tokens=4096).windows == 4


def test_no_chunk_is_larger_than_allowed() -> None:
    plan = plan_text(10**9, 1 << 20, most_tokens=4096)
    assert (plan.context, plan.windows) == (4096, 1)


def test_nothing_to_plan() -> None:
    with pytest.raises(ValueError, match="positive"):
        Plan(size=0, context=1, windows=1)
