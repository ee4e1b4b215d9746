"""The placement value: what it refuses, its file, and who serves whom."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.parallel.placement import Placement, contiguous, even_starts, from_json


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    """Any sound placement of a few layers."""
    ranks = draw(st.integers(1, 9))
    num_experts = draw(st.integers(1, 6))
    hosts = st.lists(st.integers(0, ranks - 1), min_size=1, max_size=ranks, unique=True).map(tuple)
    layer = st.tuples(*[hosts] * num_experts)
    layers = tuple(draw(st.lists(layer, min_size=1, max_size=3)))
    if draw(st.booleans()):
        return Placement(ranks=ranks, layers=layers)

    def cuts(n: int) -> tuple[int, ...]:
        pool = st.integers(1, ranks - 1) if ranks > 1 else st.nothing()
        rest = draw(st.lists(pool, min_size=n - 1, max_size=n - 1, unique=True)) if n > 1 else []
        return (0, *sorted(rest))

    starts = tuple(tuple(cuts(len(h)) for h in one) for one in layers)
    return Placement(ranks=ranks, layers=layers, starts=starts)


@given(placements())
def test_every_source_is_served_by_a_rank_that_holds_the_expert(placement: Placement) -> None:
    for number, layer in enumerate(placement.layers):
        table = placement.destinations(number)
        hosted = placement.hosted(number)
        assert table.shape == (placement.ranks, placement.num_experts)
        for expert, hosts in enumerate(layer):
            assert set(table[:, expert].tolist()) == set(hosts)
            assert all(expert in hosted[host] for host in hosts)
        assert sum(map(len, hosted)) == sum(map(len, layer))


@given(placements())
def test_a_file_gives_the_same_value_back(placement: Placement) -> None:
    assert from_json(json.loads(json.dumps(placement.to_json()))) == placement


@given(st.integers(1, 20), st.integers(0, 40))
def test_even_starts_differ_by_one_source_at_most(replicas: int, more: int) -> None:
    ranks = replicas + more
    blocks = np.diff([*even_starts(replicas, ranks), ranks])
    assert blocks.min() >= 1 and blocks.max() - blocks.min() <= 1


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"ranks": 0, "layers": (((0,),),)}, "ranks must be in"),
        ({"ranks": 2, "layers": ()}, "at least one layer"),
        ({"ranks": 2, "layers": (((0,), ()),)}, "layer 0 expert 1 must be on at least one rank"),
        ({"ranks": 2, "layers": (((2,),),)}, r"on ranks in \[0, 2\), got \[2\]"),
        ({"ranks": 2, "layers": (((1, 1),),)}, "two replicas on one rank"),
        ({"ranks": 1, "layers": (((0, 0),),)}, "two replicas on one rank"),
        ({"ranks": 2, "layers": (((0,),), ((0,), (1,)))}, "layer 1 must be 1 experts"),
        ({"ranks": 2, "layers": (((0, 1),),), "starts": (((0, 0),),)}, "rising source ranks"),
        ({"ranks": 2, "layers": (((0, 1),),), "starts": (((1, 0),),)}, "begin with 0"),
        ({"ranks": 2, "layers": (((0, 1),),), "starts": (((0,),),)}, "2 rising source ranks"),
    ],
)
def test_a_broken_placement_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Placement(**values)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "moesaic-placement-0"}, "format must be"),
        ({"ranks": 2.0}, "ranks must be an integer"),
        ({"experts": 3}, "experts must be 2"),
        ({"layers": [[[0], "1"]]}, "layers of layer 0 expert 1 must be a list of integers"),
        ({"layers": [[[0], [True]]]}, "must be a list of integers"),
        ({"layers": 7}, "list of layers"),
        ({"note": 1}, "fields must be among"),
    ],
)
def test_a_broken_file_is_refused_by_name(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "placement.json"
    contiguous(2, 2).save(path)
    assert Placement.load(path, ranks=2, num_experts=2) == contiguous(2, 2)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=words) as caught:
        Placement.load(path)
    assert str(path) in str(caught.value)


def test_a_placement_of_another_group_or_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "placement.json"
    contiguous(4, 2).save(path)
    with pytest.raises(ValueError, match="over 8 ranks, got 2"):
        Placement.load(path, ranks=8)
    with pytest.raises(ValueError, match="of 8 experts, got 4"):
        Placement.load(path, num_experts=8)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"placement\.json"):
        Placement.load(path)


def test_contiguous_is_one_expert_a_rank_when_there_are_ranks_enough() -> None:
    assert contiguous(4, 6).at_most_one
    assert not contiguous(7, 6).at_most_one
    assert contiguous(7, 3, num_layers=2).slots(1) == 3
