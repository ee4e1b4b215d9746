"""The ring of counters: nothing is lost when the host is late, and torn slots are never shown."""

from __future__ import annotations

import doctest
import random

import pytest
import torch

from moesaic.runtime import counters as room
from moesaic.runtime.counters import ROWS, Ring, new_counters

CPU = torch.device("cpu")


def test_docstring_example() -> None:
    found = doctest.testmod(room, extraglobs={"torch": torch})
    assert found.attempted and not found.failed


@pytest.mark.parametrize("every", [1, 3])
def test_a_late_reader_loses_no_count(every: int) -> None:
    rng = random.Random(every)
    layers = [new_counters(4, CPU), new_counters(6, CPU)]
    layers[1][ROWS, 5] = 2**31 - 3
    ring = Ring(layers, slots=8, every=every)
    totals = [torch.zeros(3, 4, dtype=torch.int64), torch.zeros(3, 6, dtype=torch.int64)]
    pending = [t.clone() for t in totals]
    seen = [t.clone() for t in totals]
    step, steps_seen = 0, 0
    for round_ in range(60):
        for _ in range(rng.choice([0, 1, 2, 40])):
            for layer, want in zip(layers, pending, strict=True):
                add = torch.randint(0, 9, layer.shape, dtype=torch.int32)
                layer += add
                want += add
            ring.publish()
            step += 1
            if step % every == 0:
                for total, fresh in zip(totals, pending, strict=True):
                    total += fresh
                    fresh.zero_()
        for sample in ring.read():
            steps_seen += sample.steps
            assert sample.step == steps_seen - 1 and sample.time_ns > 0
            for have, got in zip(seen, sample.counts, strict=True):
                have += torch.from_numpy(got)
        assert steps_seen == step // every * every, round_
        assert all(torch.equal(a, b) for a, b in zip(seen, totals, strict=True))
        assert ring.read() == []
    assert ring.merged > 0
    assert int(layers[1][ROWS, 5]) < 0, "the counter must have passed 2**31"


def test_a_slot_that_is_being_written_again_is_not_shown() -> None:
    layer = new_counters(2, CPU)
    ring = Ring([layer], slots=4)
    for _ in range(4):
        layer[ROWS] += 1
        ring.publish()
    # The device begins its fifth publication: some words of slot 0 are of it, the others are not.
    ring._words[0, -2:] = (5 << 32) + 99
    samples = ring.read()
    assert [s.step for s in samples] == [2, 3] and ring.merged == 2
    assert [s.steps for s in samples] == [3, 1]
    assert samples[0].counts[0][ROWS].tolist() == [3, 3]


def test_a_slot_whose_words_are_not_all_there_waits() -> None:
    layer = new_counters(2, CPU)
    ring = Ring([layer], slots=4)
    ring.publish()
    late = ring._words[0, 5].copy()
    ring._words[0, 5] = 0
    assert ring.read() == []
    ring._words[0, 5] = late
    assert [s.step for s in ring.read()] == [0] and ring.merged == 0


def test_numbers_of_publications_may_pass_2_to_the_32() -> None:
    layer = new_counters(2, CPU)
    ring = Ring([layer], slots=4)
    ring._next = 2**32 - 3
    ring._state[:, 1] = ring._next
    for _ in range(4):
        layer[ROWS] += 1
        ring.publish()
    assert [s.counts[0][ROWS].tolist() for s in ring.read()] == [[1, 1]] * 4
    assert ring.merged == 0


def test_steps_that_wait_for_others_are_published_at_the_end() -> None:
    layer = new_counters(2, CPU)
    ring = Ring([layer], every=4)
    for _ in range(6):
        layer[ROWS] += 1
        ring.publish()
    assert [s.steps for s in ring.read()] == [4]
    ring.flush()
    ring.flush()
    (last,) = ring.read()
    assert (last.step, last.steps, last.counts[0][ROWS].tolist()) == (5, 2, [2, 2])
    for _ in range(4):
        ring.publish()
    assert [(s.step, s.steps) for s in ring.read()] == [(9, 4)]


def test_counters_that_hold_something_start_at_zero() -> None:
    layer = new_counters(2, CPU)
    layer[ROWS] += 5
    ring = Ring([layer])
    layer[ROWS] += 1
    ring.publish()
    (sample,) = ring.read()
    assert sample.counts[0][ROWS].tolist() == [1, 1]


def test_bad_rings_are_refused() -> None:
    with pytest.raises(ValueError, match="one device"):
        Ring([])
    with pytest.raises(ValueError, match="slots"):
        Ring([new_counters(2, CPU)], slots=2)
