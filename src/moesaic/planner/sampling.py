"""Counts and placements of a deployment, sampled once for equal questions.

    L sampled layers · G source ranks · E experts · W steps of a trace

A placement is planned by the runtime's planner from counts of the past and meets counts that came
later: of a distribution, two draws; of a recorded trace, its first half and steps of the second.
With `Workload.replan` a placement is made anew so often, from what the runtime's own predictors
foresee out of the steps before, and experts that move are copied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ..parallel.placement import Placement
from ..parallel.planning import plan
from ..runtime.predictors import NO_CONTEXT, Predictor, ewma, last, learned
from .cluster import Cluster
from .model import Model
from .routing import Counts, sample_counts
from .strategies import Strategy
from .workload import Workload

Floats = npt.NDArray[np.float64]
WAYS: dict[str, Callable[[], Predictor]] = {
    "last": last,
    "ewma0.1": lambda: ewma(0.1),
    "ewma0.3": lambda: ewma(0.3),
    "learned": lambda: learned(context=False),
}
# Of the past, so many times a step's rows: what a planner has seen is steadier than one step.
PAST = 16
MOMENTS = 4


def foresee(rows_WE: npt.NDArray[Any], way: str) -> Floats:
    """(E,) the next step's rows, as one of the runtime's predictors sees them after W steps."""
    predictor = WAYS[way]()
    state = predictor.start(rows_WE.shape[1], 0)
    for row_E in np.asarray(rows_WE, np.float64):
        state = predictor.update(state, row_E, NO_CONTEXT)
    return predictor.predict(state, NO_CONTEXT)


@dataclass
class Sampler:
    """See the module; with a trace, L counts some moments of every sampled layer.

    `deploy`: for a placement to write down, of every layer once, made from all steps of a trace.
    """

    model: Model
    cluster: Cluster
    workload: Workload
    layers: int = 4
    deploy: bool = False
    _counts: dict[Any, Counts] = field(default_factory=dict)
    _placements: dict[Any, tuple[Placement, float]] = field(default_factory=dict)

    def counts(self, homes: int, tokens: int) -> Counts:
        """(L, G, E) rows of one micro-batch for as many sampled layers."""
        key = (homes, tokens)
        if key not in self._counts:
            self._counts[key] = self._draw(homes, tokens)
        return self._counts[key]

    def placement(self, strategy: Strategy, tokens: int) -> Placement:
        """Where the sampled layers' experts live, planned as the runtime plans it."""
        return self._planned(strategy, tokens)[0]

    def moved_bytes(self, strategy: Strategy, tokens: int) -> float:
        """Bytes of a layer's experts that the busiest rank gets when it is planned anew."""
        return self._planned(strategy, tokens)[1]

    def _chosen(self) -> list[tuple[int, int, int]]:
        """(layer, step when it was placed, step that is looked at) of a trace.

        Looked at are steps of the second half.
        """
        assert self.workload.trace is not None
        steps, layers = self.workload.trace.shape[:2]
        some = np.linspace(0, layers - 1, min(self.layers, layers)).astype(int)
        if self.deploy:
            return [(int(layer), steps, steps - 1) for layer in some]
        half, replan = min(max(1, steps // 2), steps - 1), self.workload.replan
        every = replan.every if replan else steps
        seen = np.unique(np.linspace(half, steps - 1, MOMENTS).astype(int))
        # The same steps whatever `every`, so that ways to plan anew can be compared.
        return [
            (int(layer), half + (int(step) - half) // every * every, int(step))
            for step in seen
            for layer in some
        ]

    def _draw(self, homes: int, tokens: int, past: bool = False) -> Counts:
        w, experts, top_k = self.workload, self.model.experts.num_experts, self.model.top_k
        if w.trace is None:
            return sample_counts(
                w.routing, layers=self.layers, ranks=homes, experts=experts, top_k=top_k,
                tokens=tokens * PAST if past else tokens, locality=w.locality, seed=w.seed,
                draw=2 if past else 1,
            )  # fmt: skip
        # A trace says nothing of single sources: all lean alike, but every step leans its own way.
        random = np.random.default_rng([w.seed, int(past)])
        chosen = self._chosen()
        found = np.empty((len(chosen), homes, experts), np.int64)
        for number, (layer, placed, seen) in enumerate(chosen):
            if past:
                found[number] = self._foreseen(layer, placed, tokens)
                continue
            rows = w.trace[seen, layer].astype(float)
            share = rows / rows.sum() if rows.sum() else np.full(experts, 1 / experts)
            found[number] = random.multinomial(tokens * top_k, share, homes)
        return found

    def _foreseen(self, layer: int, step: int, tokens: int) -> Counts:
        """(E,) rows of a source that a placement made at this step of the trace is planned for."""
        assert self.workload.trace is not None
        rows = self.workload.trace[: max(1, step), layer].astype(float)
        replan = self.workload.replan
        load = foresee(rows, replan.foresee) if replan else rows.mean(axis=0)
        load = np.maximum(load, 1e-9)
        found: Counts = np.rint(load / load.sum() * tokens * PAST * self.model.top_k).astype(int)
        return found

    def _planned(self, strategy: Strategy, tokens: int) -> tuple[Placement, float]:
        key = (strategy.ranks, strategy.homes, strategy.replicas)
        if key not in self._placements:
            past = self._draw(strategy.homes, tokens, past=True)
            found = self._plan(past, strategy)
            moved = 0.0
            if self.workload.trace is not None and self.workload.replan is not None:
                moved = self._moved(found, strategy, tokens)
            self._placements[key] = (found, moved)
        return self._placements[key]

    def _plan(self, counts: Counts, strategy: Strategy) -> Placement:
        slots = -(-(self.model.experts.num_experts + strategy.replicas) // strategy.ranks)
        topology = self.cluster.topology(strategy.ranks, forwarded=self.workload.forwarded)
        return plan(
            on_ranks(counts, strategy), topology, row_bytes=self.model.hidden * 2.0,
            per_rank=slots, replicas=strategy.replicas, rounds=60, kicks=0,
        ).placement  # fmt: skip

    def _moved(self, now: Placement, strategy: Strategy, tokens: int) -> float:
        """Mean over layers of the bytes into the busiest rank, against the placement before."""
        replan = self.workload.replan
        assert replan is not None
        counts = [
            np.tile(self._foreseen(layer, placed - replan.every, tokens), (strategy.homes, 1))
            for layer, placed, _ in self._chosen()
        ]
        before = self._plan(np.stack(counts), strategy)
        new = []
        for layer in range(now.num_layers):
            pairs = zip(before.hosted(layer), now.hosted(layer), strict=True)
            new.append(max(len(set(after) - set(old)) for old, after in pairs))
        return float(np.mean(new)) * self.model.expert_bytes


def on_ranks(counts: Counts, strategy: Strategy) -> Counts:
    """Counts by expert rank: where attention has GPUs of its own, neighbours are put together."""
    if not strategy.attention:
        return counts
    layers, homes, experts = counts.shape
    found: Counts = counts.reshape(layers, strategy.ranks, homes // strategy.ranks, experts).sum(2)
    return found
