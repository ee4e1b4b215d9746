"""Profiles are a pure function of counted steps: read live or replayed from a trace, the same."""

from __future__ import annotations

import random

import numpy as np
import pytest

from moesaic.runtime.counters import ROWS, Sample
from moesaic.runtime.observe import LayerInfo, nothing_yet, observe, replay
from moesaic.runtime.rates import Settings
from moesaic.trace import Trace, TraceInfo, TraceRow

LAYERS = [LayerInfo("layer0", 4, 2), LayerInfo("layer1", 4, 2)]
INFO = TraceInfo(model="t", num_experts=4, top_k=2, layers=2, text_sha256="0" * 64)


def drawn(steps: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    rng = random.Random(0)
    return [
        tuple(tuple(2 * rng.randrange(9) for _ in range(4)) for _ in LAYERS) for _ in range(steps)
    ]


def sample(step: int, counts) -> Sample:
    made = [np.zeros((3, 4), dtype=np.int64) for _ in counts]
    for layer, counts_E in zip(made, counts, strict=True):
        layer[ROWS] = counts_E
    return Sample(step, 1, 0, tuple(made))


def test_a_replayed_trace_shows_what_the_job_showed() -> None:
    steps = drawn(25)
    observed, live = nothing_yet(LAYERS), []
    for first in range(0, 25, 4):
        samples = [sample(first + n, counts) for n, counts in enumerate(steps[first : first + 4])]
        observed, profile = observe(observed, LAYERS, samples, Settings())
        live.append(profile)
    rows = tuple(
        TraceRow(n, layer, counts[layer]) for n, counts in enumerate(steps) for layer in (0, 1)
    )
    assert list(replay(Trace(INFO, rows), every=4)) == live
    assert [p.steps for p in live] == [4] * 6 + [1] and observed.steps == 25
    total = np.array(steps).sum(axis=0)
    assert [t[ROWS].tolist() for t in observed.totals] == total.tolist()


def test_nothing_that_was_observed_before_is_changed() -> None:
    before = nothing_yet(LAYERS)
    first = observe(before, LAYERS, [sample(0, drawn(1)[0])], Settings())
    again = observe(before, LAYERS, [sample(0, drawn(1)[0])], Settings())
    assert first[1] == again[1] and before.steps == 0
    assert not any(total.any() for total in before.totals)


@pytest.mark.parametrize(
    ("layers", "complaint"), [((0, 0), "layer by layer"), ((0, 1, 0), "has 1 of 2 layers")]
)
def test_a_step_without_a_layer_is_refused(layers, complaint: str) -> None:
    rows = tuple(TraceRow(n // 2, layer, (2, 0, 0, 0)) for n, layer in enumerate(layers))
    with pytest.raises(ValueError, match=complaint):
        list(replay(Trace(INFO, rows)))
    with pytest.raises(ValueError, match="at least 1"):
        list(replay(Trace(INFO, rows), every=0))
