"""Every strategy predicted, on all cores, and what to make of them.

Strategies of one shape share their sampled counts and placement, so they go to one worker together.
The order of the result depends on the predictions alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from .cluster import Cluster
from .exchange import NO_WAYS, Ways
from .kernels import ROOFLINE, KernelTable
from .model import Model
from .predict import Prediction, predict
from .routing import parse_routing
from .sampling import Sampler
from .strategies import Strategy, enumerate_strategies
from .workload import Workload

OURS = ("one-per-gpu", "literal")
MEMORY = "memory x2"
RESOURCES = ("memory bandwidth x2", "flops x2", "NVLink x2", "network bandwidth x2")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Question:
    """All that a prediction depends on but the strategy."""

    model: Model
    cluster: Cluster
    workload: Workload
    table: KernelTable = ROOFLINE
    sampled_layers: int = 4
    inside: Ways = NO_WAYS


@dataclass(frozen=True, kw_only=True)
class Change:
    """What one change of the cluster or the workload would do.

    Args:
        what: the change in words.
        gain: the recommended strategy's throughput per GPU after it over before; None where
            nothing is recommended.
        best: the strategy that would be best then; None: still none is within the limits.
        fastest_ms: the fastest step then of those that fit; None: nothing fits.
        kept: whether the recommended one is then still within memory and limits.
    """

    what: str
    gain: float | None
    best: str | None
    fastest_ms: float | None
    kept: bool = True

    def __str__(self) -> str:
        if self.gain is not None:
            over = "" if self.kept else ", over memory or limits"
            return f"{self.what}: x {self.gain:.2f}{over}, best then {self.best or 'none of them'}"
        if self.best is not None:
            return f"{self.what}: then {self.best} is within the limits"
        near = (
            "nothing fits" if self.fastest_ms is None else f"the fastest {self.fastest_ms:.1f} ms"
        )
        return f"{self.what}: still nothing within the limits, {near}"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The recommendation.

    Args:
        best: what to deploy; None where nothing is good enough.
        sentence: why, or why not.
        one_per_gpu: how one expert per GPU compares.
        changes: what would change the verdict.
    """

    best: Prediction | None
    sentence: str
    one_per_gpu: str
    changes: tuple[Change, ...] = ()

    @property
    def binds(self) -> str | None:
        """The resource that helps most when doubled, in words; None without changes to compare."""
        found = [c for c in self.changes if c.gain is not None and c.what in RESOURCES]
        if not found:
            return None
        most = max(found, key=lambda c: c.gain or 0.0)
        if most.gain is None or most.gain < 1.02:
            return "no resource alone"
        return f"{most.what.removesuffix(' x2')} (twice of it: x {most.gain:.2f})"


def _together(strategies: Sequence[Strategy]) -> list[list[Strategy]]:
    """Strategies that share counts and placement, the costliest groups first."""
    groups: dict[tuple[int, int, int], list[Strategy]] = {}
    for s in strategies:
        groups.setdefault((s.ranks, s.homes, s.replicas), []).append(s)
    return sorted(groups.values(), key=lambda g: (-g[0].homes * len(g), g[0].name))


def predict_group(question: Question, strategies: Sequence[Strategy]) -> list[Prediction]:
    """The predictions of strategies that share a shape."""
    found = []
    for one in each_batch(question):
        sampler = Sampler(one.model, one.cluster, one.workload, one.sampled_layers)
        found += [
            predict(one.model, one.cluster, one.workload, s,
                    sampler=sampler, table=one.table, inside=one.inside)
            for s in strategies
        ]  # fmt: skip
    return found


def each_batch(question: Question) -> list[Question]:
    """The question for each number of sequences that the workload wants tried."""
    w = question.workload
    return [
        replace(question, workload=replace(w, sequences=batch, batches=()))
        for batch in w.batches or (w.sequences,)
    ]


def over_cores(
    function: Callable[..., T], jobs: Sequence[tuple[Any, ...]], workers: int | None
) -> Iterator[T]:
    """What the function makes of every job, in the order in which processes are done with them.

    Args:
        workers: processes; None takes every core, 1 stays in this process.
    """
    count = min(workers or os.cpu_count() or 1, len(jobs))
    if count <= 1:
        yield from (function(*job) for job in jobs)
        return
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, mp_context=context) as pool:
        for done in as_completed([pool.submit(function, *job) for job in jobs]):
            yield done.result()


def predict_all(
    question: Question,
    strategies: Sequence[Strategy],
    *,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Prediction]:
    """Predict every strategy, best throughput of the whole cluster first.

    Args:
        question: model, cluster and workload.
        strategies: what to predict.
        workers: processes; None takes every core, 1 stays in this process.
        progress: called with how many are done, and of how many.
    """
    found: list[Prediction] = []
    jobs = [(question, group) for group in _together(strategies)]
    for more in over_cores(predict_group, jobs, workers):
        found.extend(more)
        if progress is not None:
            progress(len(found), len(strategies) * len(each_batch(question)))
    return sorted(found, key=lambda p: (-p.tokens_per_s, p.strategy.name, p.batch))


def search(
    question: Question,
    *,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Prediction]:
    """Predict the whole strategy space of the workload, see `predict_all`.

    Raises:
        ValueError: the space is empty.
    """
    space = question.workload.space
    strategies = enumerate_strategies(question.model, question.cluster, space)
    return predict_all(question, strategies, workers=workers, progress=progress)


def keeps_limits(p: Prediction, workload: Workload) -> bool:
    """Whether it fits memory and its steps are short enough."""
    limit = workload.tpot_ms if p.phase == "decode" else workload.ttft_ms
    return p.fits and (limit is None or p.step_s * 1e3 <= limit)


def pareto(predictions: Sequence[Prediction]) -> list[Prediction]:
    """Those that no other beats in both throughput per GPU and step time, fastest step first."""
    front: list[Prediction] = []
    for p in sorted(predictions, key=lambda p: (p.step_s, -p.per_gpu)):
        if not front or p.per_gpu > front[-1].per_gpu:
            front.append(p)
    return front


def judge(predictions: Sequence[Prediction], workload: Workload, gpus: int = 0) -> Verdict:
    """Recommend the most throughput within the limits, or say that nothing is within.

    Args:
        predictions: of one cluster.
        workload: with its limits.
        gpus: of the cluster, to tell those that stay idle; 0 leaves that out.
    """
    good = [p for p in predictions if keeps_limits(p, workload)]
    if not good:
        fits = [p for p in predictions if p.fits]
        limit = workload.tpot_ms if workload.phase == "decode" else workload.ttft_ms
        if fits:
            fastest = min(fits, key=lambda p: p.step_s)
            why = (
                f"no strategy keeps {limit:g} ms: the fastest, {fastest.strategy.name}, takes "
                f"{fastest.step_s * 1e3:.1f} ms a step; it waits for {fastest.binding}"
            )
        else:
            nearest = min(predictions, key=lambda p: p.memory.total)
            why = f"nothing fits: {nearest.strategy.name} needs {nearest.memory.why()}"
        lone = "One expert per GPU: nothing here is within memory and limits, with it or without."
        return Verdict(best=None, sentence=f"Don't: {why}.", one_per_gpu=lone)
    best = max(good, key=lambda p: p.tokens_per_s)
    idle = gpus - best.gpus if gpus else 0
    return Verdict(
        best=best,
        sentence=(
            f"{best.strategy.name}{_batch(best)}: {best.per_gpu:.0f} tokens/s per GPU, "
            f"{best.step_s * 1e3:.1f} ms a step; it waits for {best.binding}."
            + (f" {idle} of {gpus} GPUs stay idle: its copies do not need them." if idle else "")
        ),
        one_per_gpu=_one_per_gpu(good),
    )


def _batch(p: Prediction) -> str:
    """The batch in words, in decode."""
    return f" with {p.batch} sequences" if p.phase == "decode" else ""


def _one_per_gpu(predictions: Sequence[Prediction]) -> str:
    """How the best strategy with one expert a GPU compares with the best without."""
    ours = [p for p in predictions if p.strategy.family in OURS]
    others = [p for p in predictions if p.strategy.family not in OURS]
    if not ours:
        return "One expert per GPU: not possible here (too few GPUs, or over memory or limits)."
    mine = max(ours, key=lambda p: p.per_gpu)
    if not others:
        return (
            f"One expert per GPU is the only kind that is within the limits: {mine.strategy.name}."
        )
    rival = max(others, key=lambda p: p.per_gpu)
    ratio = mine.per_gpu / rival.per_gpu
    quick = min(ours, key=lambda p: p.step_s).step_s / min(others, key=lambda p: p.step_s).step_s
    if ratio >= 1:
        return (
            f"One expert per GPU pays: {mine.strategy.name} gives {ratio:.2f} times the throughput "
            f"per GPU of {rival.strategy.name}."
        )
    return (
        f"Don't use one expert per GPU for throughput: {mine.strategy.name} gives {ratio:.2f} "
        f"times that of {rival.strategy.name} per GPU (balancedness {mine.balancedness:.2f}, waits "
        f"for {mine.binding}). Its fastest step takes {quick:.2f} times the fastest of the others."
    )


def _leaders(predictions: Iterable[Prediction]) -> dict[str, Prediction]:
    """The first of every family."""
    found: dict[str, Prediction] = {}
    for p in predictions:
        found.setdefault(p.strategy.family, p)
    return found


def explain(question: Question, predictions: Sequence[Prediction], verdict: Verdict) -> Verdict:
    """The verdict with what each doubled resource, a changed batch, and even routing would do.

    Tried again are the best of every family, what misses only memory, and, where nothing is
    recommended, the fastest and the smallest.
    """
    tight = _leaders(p for p in predictions if not p.fits)
    tried = list(_leaders(p for p in predictions if keeps_limits(p, question.workload)).values())
    if verdict.best is None:
        orders = (lambda p: p.step_s, lambda p: p.memory.total)
        tried = [p for by in orders for p in _leaders(sorted(predictions, key=by)).values()]
    rows: dict[str, list[Prediction]] = {}
    for leader in tried + list(tight.values()):
        work = replace(question.workload, sequences=leader.batch, batches=())
        for what, changed in _changed(replace(question, workload=work), verdict.best is None):
            if leader in tried or what == MEMORY:
                rows.setdefault(what, []).extend(predict_group(changed, [leader.strategy]))
    changes = []
    for what, again in rows.items():
        good = [p for p in again if keeps_limits(p, question.workload)]
        then = max(good, key=lambda p: p.tokens_per_s, default=None)
        gain, kept = None, True
        if verdict.best is not None:
            same = next(p for p in again if p.strategy == verdict.best.strategy)
            gain, kept = same.per_gpu / verdict.best.per_gpu, keeps_limits(same, question.workload)
        best = None if then is None else then.strategy.name
        fastest = min((p.step_s * 1e3 for p in again if p.fits), default=None)
        changes.append(Change(what=what, gain=gain, best=best, fastest_ms=fastest, kept=kept))
    return replace(verdict, changes=tuple(changes))


def _changed(q: Question, halved: bool) -> list[tuple[str, Question]]:
    """What could be otherwise; with `halved` the batch too is tried at half."""
    c, gpu = q.cluster, q.cluster.gpu
    found = [
        (MEMORY, replace(c, gpu=replace(gpu, memory_bytes=2 * gpu.memory_bytes))),
        ("memory bandwidth x2", replace(c, gpu=replace(gpu, bytes_per_s=2 * gpu.bytes_per_s))),
        (
            "flops x2",
            replace(c, gpu=replace(gpu, flops=2 * gpu.flops, fp8_flops=2 * gpu.fp8_flops)),
        ),
        ("NVLink x2", replace(c, nvlink_bytes_per_s=2 * c.nvlink_bytes_per_s)),
    ]
    if c.network is not None and c.nodes > 1:
        twice = replace(c.network, bytes_per_s=2 * c.network.bytes_per_s)
        found.append(("network bandwidth x2", replace(c, network=twice)))
        near = replace(c.network, latency_s=c.network.latency_s / 2, step_s=c.network.step_s / 2)
        found.append(("network latency / 2", replace(c, network=near)))
    changed = [(what, replace(q, cluster=cluster)) for what, cluster in found]
    if q.workload.trace is not None or parse_routing(q.workload.routing)[0] != "uniform":
        even = replace(q.workload, routing="uniform", trace=None, replan=None)
        changed.append(("even routing", replace(q, workload=even)))
    w = q.workload
    double = replace(w, sequences=2 * w.sequences, prefill_tokens=2 * w.prefill_tokens)
    changed.append(("twice the batch", replace(q, workload=double)))
    if halved:
        half = replace(w, sequences=max(1, w.sequences // 2),
                       prefill_tokens=max(w.prompt, w.prefill_tokens // 2))  # fmt: skip
        changed.append(("half the batch", replace(q, workload=half)))
    return changed
