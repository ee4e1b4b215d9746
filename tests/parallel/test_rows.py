"""What a rank computes: how much of a batch to expect."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from moesaic.parallel.rows import Share


@given(st.integers(1, 9000), st.integers(1, 16), st.integers(1, 32))
def test_a_share_has_as_many_slots_as_a_rank_gets_on_average(bound, top_k, ranks) -> None:
    share = Share.of(bound, top_k, ranks)
    assert 0 <= share.tokens * share.top_k - bound * top_k < share.top_k
    assert 1 <= share.top_k <= top_k
    if ranks == 1:
        assert share == (bound, top_k)
