"""From counted steps to profiles, as pure functions: of a running job, or of a recorded trace.

    E experts · K top-k

>>> from moesaic.trace import Trace, TraceInfo, TraceRow
>>> info = TraceInfo(model="tiny", num_experts=2, top_k=1, layers=1, text_sha256="0" * 64)
>>> trace = Trace(info, tuple(TraceRow(step, 0, (9, 1)) for step in range(5)))
>>> *_, last = replay(trace, every=2)
>>> last.step, last.steps, last.layers[0].counts_E, last.layers[0].balancedness
(4, 1, (9, 1), 0.5555555555555556)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..trace import Trace
from .counters import ROUTED, ROWS, TILES, Counts, Sample, loads_of
from .profile import LayerProfile, Profile
from .rates import LayerState, Settings, advance, start


@dataclass(frozen=True)
class LayerInfo:
    """What is known of a watched layer before it runs."""

    name: str
    num_experts: int
    top_k: int


@dataclass(frozen=True, eq=False)
class Observed:
    """What is remembered between profiles; `totals` are (3, E) of each layer since the start."""

    states: tuple[LayerState, ...]
    totals: tuple[Counts, ...]
    steps: int = 0
    seconds: float = 0.0
    time_ns: int = 0


def nothing_yet(layers: Sequence[LayerInfo]) -> Observed:
    """Before the first step."""
    return Observed(
        tuple(start(layer.num_experts) for layer in layers),
        tuple(np.zeros((3, layer.num_experts), dtype=np.int64) for layer in layers),
    )


def observe(
    before: Observed, layers: Sequence[LayerInfo], samples: Sequence[Sample], settings: Settings
) -> tuple[Observed, Profile]:
    """The profile of some samples, of which there is one at least, and what to remember."""
    states = list(before.states)
    sums: list[Counts] = [np.zeros_like(total) for total in before.totals]
    for sample in samples:
        for index, counts in enumerate(sample.counts):
            sums[index] += counts
            states[index] = advance(states[index], loads_of(counts), sample.steps, settings)
    last, steps = samples[-1], sum(sample.steps for sample in samples)
    seconds = max(0, last.time_ns - before.time_ns) / 1e9 if before.time_ns else 0.0
    after = Observed(
        tuple(states),
        tuple(total + counts for total, counts in zip(before.totals, sums, strict=True)),
        before.steps + steps,
        before.seconds + seconds,
        last.time_ns,
    )
    every = zip(layers, sums, before.states, states, strict=True)
    profiles = tuple(_layer(index, *parts) for index, parts in enumerate(every))
    return after, Profile(step=last.step, steps=steps, seconds=seconds, layers=profiles)


def _layer(
    index: int, info: LayerInfo, counts: Counts, before: LayerState, state: LayerState
) -> LayerProfile:
    return LayerProfile(
        layer=index,
        name=info.name,
        top_k=info.top_k,
        counts_E=tuple(loads_of(counts).tolist()),
        ewma_E=tuple(state.load_E.tolist()),
        routed_E=tuple(counts[ROUTED].tolist()),
        tiles_E=tuple(counts[TILES].tolist()),
        hot=state.hot,
        cold=state.cold,
        drifted=state.drifts > before.drifts,
    )


def samples_of(trace: Trace) -> Iterator[Sample]:
    """The steps of a routing trace, as a ring would have given them; times are not known.

    Raises:
        ValueError: a step lacks a layer.
    """
    layers = trace.info.layers
    held: list[Counts] = []
    for row in trace.rows:
        if row.layer != len(held):
            raise ValueError(f"step {row.step}: rows must be layer by layer, got {row.layer}")
        counts = np.zeros((3, trace.info.num_experts), dtype=np.int64)
        counts[ROWS] = row.counts_E
        held.append(counts)
        if len(held) == layers:
            yield Sample(row.step, 1, 0, tuple(held))
            held = []
    if held:
        raise ValueError(f"the last step has {len(held)} of {layers} layers")


def replay(trace: Trace, *, every: int = 1, settings: Settings | None = None) -> Iterator[Profile]:
    """The profiles that polling every `every` steps would have given while a trace was recorded.

    Raises:
        ValueError: `every` is under 1, or see `samples_of`.
    """
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}")
    info, settings = trace.info, settings or Settings()
    layers = [LayerInfo(f"layer{n}", info.num_experts, info.top_k) for n in range(info.layers)]
    observed = nothing_yet(layers)
    held: list[Sample] = []
    for sample in samples_of(trace):
        held.append(sample)
        if len(held) == every:
            observed, profile = observe(observed, layers, held, settings)
            yield profile
            held = []
    if held:
        yield observe(observed, layers, held, settings)[1]
