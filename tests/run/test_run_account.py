"""Sums and statistics against numbers worked out by hand, and every verdict in its failing form."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from moesaic.run.account import Account, layer_load, measure
from moesaic.run.facts import ChunkFacts, PassFacts, Rows
from moesaic.run.plan import Plan

CHUNKS = list(Plan(size=45, context=10, windows=1).chunks())
COUNTS = ((6, 4, 10, 0),)


def facts(index: int, seconds: float = 1.0) -> ChunkFacts:
    size = CHUNKS[index].size
    rows = Rows(2 * size, 2 * size, 0)
    ours = PassFacts(seconds, seconds / 2, 2.0 * size, rows)
    return ChunkFacts(
        CHUNKS[index], ours, PassFacts(3.0, 2.0, 2.0 * size, rows), 0.5, 0.2, 1, 2, COUNTS
    )


def filled() -> Account:
    account = Account(1, 4)
    for index, seconds in enumerate((1.0, 2.0, 4.0, 5.0, 0.001)):
        account.add(facts(index, seconds))
    return account


def test_measure_interpolates() -> None:
    found = measure([5.0, 1.0, 2.0, 4.0, 3.0, 6.0])
    assert (found.median, found.p20, found.p80, found.samples) == (3.5, 2.0, 5.0, 6)
    assert measure([7.0]).p80 == 7.0


def test_layer_load() -> None:
    load = layer_load(3, [6, 4, 10, 0])
    assert load.hot == (2, 0, 1)
    assert load.cold == (3, 1, 0)
    assert load.balancedness == 0.5
    assert load.load_E == (1.2, 0.8, 2.0, 0.0)
    assert layer_load(0, [0, 0]).balancedness == 1.0


def test_document_of_known_chunks() -> None:
    document = filled().document()
    assert document["bytes"] == 45
    # The short chunk at the end counts for bits and rows, not for speeds.
    assert (document["chunks"], document["timed_chunks"]) == (5, 4)
    assert document["moesaic"]["tokens_per_s"]["median"] == 10 * (1 / 2 + 1 / 4) / 2
    assert document["speedup"]["median"] == (3 / 2 + 3 / 4) / 2
    assert document["experts_speedup"]["median"] == (2 / 1 + 2 / 2) / 2
    assert document["moesaic"]["bits_per_byte"] == 2.0
    assert document["moesaic"]["rows_routed"] == document["moesaic"]["rows_computed"] == 90
    assert document["top_byte_differs"] == 5
    assert document["slots_routed_differently"] == 10
    assert document["layers"][0]["load_E"] == (1.2, 0.8, 2.0, 0.0)
    assert document["ok"]


@pytest.mark.parametrize("rows", [Rows(20, 19, 1), Rows(20, 20, 2), Rows(20, 21, 1)])
@pytest.mark.parametrize("side", ["moesaic", "baseline"])
def test_a_lost_row_is_not_ok(rows: Rows, side: str) -> None:
    account, last = filled(), facts(0)
    account.add(replace(last, **{side: replace(getattr(last, side), rows=rows)}))
    assert not account.document()["rows_agree"]
    assert not account.document()["ok"]


def test_other_answers_are_not_ok() -> None:
    account, last = filled(), facts(0)
    account.add(replace(last, moesaic=replace(last.moesaic, bits=20.2)))
    assert not account.document()["bits_agree"]
    assert not account.document()["ok"]


def test_no_number_is_said_and_stays() -> None:
    account = filled()
    account.add(replace(facts(0), max_difference=math.nan))
    account.add(facts(1))
    document = account.document()
    assert document["max_logit_difference"] is None
    assert document["max_logit_difference_same_experts"] == 0.2
    assert not document["ok"]


def test_nothing_scored() -> None:
    with pytest.raises(ValueError, match="nothing was scored"):
        Account(1, 4).document()
