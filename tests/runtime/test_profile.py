"""Profiles: derived numbers, the JSON line and back, and values that cannot be."""

from __future__ import annotations

from typing import Any

import pytest

from moesaic.runtime.profile import LayerProfile, Profile, layer_profile


def test_derived_numbers() -> None:
    first = layer_profile([6, 1, 1, 0], top_k=2, steps=2, hot=frozenset({0}), cold=frozenset({3}))
    second = layer_profile([2, 2, 2, 2], layer=1, top_k=2, steps=2)
    profile = Profile(step=9, steps=2, seconds=0.5, layers=(first, second))
    assert (first.rows, first.tokens, first.num_experts) == (8, 4, 4)
    assert first.ewma_E == (3.0, 0.5, 0.5, 0.0)
    assert first.share_E == (0.75, 0.125, 0.125, 0.0)
    assert first.balancedness == pytest.approx(1 / 3) and second.balancedness == 1.0
    assert profile.tokens_per_s == 8.0
    assert profile.balancedness == pytest.approx(2 / 3)
    assert layer_profile([0, 0]).share_E == (0.5, 0.5)


def test_a_json_line_gives_the_same_profile() -> None:
    layer = layer_profile([3, 1], routed_E=(3, 1), tiles_E=(1, 1), hot=frozenset({0}), drifted=True)
    profile = Profile(step=4, steps=1, seconds=0.25, layers=(layer,))
    line = profile.to_json()
    assert "\n" not in line and Profile.from_json(line) == profile


@pytest.mark.parametrize("line", ["{", "[]", '{"step": 1}', '{"layers": [{}], "step": 0}'])
def test_another_line_is_refused(line: str) -> None:
    with pytest.raises(ValueError):
        Profile.from_json(line)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"counts_E": (1, -1)}, "counts must be"),
        ({"ewma_E": (1.0,)}, "ewma_E must hold 2"),
        ({"tiles_E": (1,)}, "tiles_E must hold 2"),
        ({"hot": frozenset({0}), "cold": frozenset({0})}, "disjoint"),
        ({"hot": frozenset({2})}, "disjoint"),
        ({"counts_E": (), "ewma_E": ()}, "has experts"),
    ],
)
def test_impossible_values_are_refused(change: dict[str, Any], complaint: str) -> None:
    good: dict[str, Any] = {"layer": 0, "name": "l", "top_k": 1}
    good |= {"counts_E": (1, 2), "ewma_E": (1.0, 2.0)}
    assert LayerProfile(**good).rows == 3
    with pytest.raises(ValueError, match=complaint):
        LayerProfile(**(good | change))
