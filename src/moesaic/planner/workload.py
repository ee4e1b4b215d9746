"""What is asked of a deployment, and which deployments to compare: the workload file.

    T tokens of a GPU in one step · G GPUs

A step of ``decode`` gives every sequence of a batch one token; a step of ``prefill`` takes the
tokens of whole prompts. With `arrival`, requests queue for both (docs/planner.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from ..trace import read_trace
from .documents import Block, parse, read
from .requests import Arrival, Asked, arrival_from, asked_from
from .routing import Counts, parse_routing

FAMILIES = ("one-per-gpu", "literal", "ep", "tp-pp", "tp-ep-dp", "disaggregated")
ENGINES = ("moesaic", "node-sums")
# Names of `runtime.policies.POLICIES`, and of the predictors that `sampling.WAYS` takes from there.
POLICIES = ("none", "static", "dynamic", "proportional", "adaptive")
PREDICTORS = ("last", "ewma0.1", "ewma0.3", "learned")
DEFAULT_BATCHES = (16, 64, 256)


@dataclass(frozen=True, kw_only=True)
class Space:
    """The strategies to try. `field_lines` says where the file asks for them, for messages."""

    families: tuple[str, ...] = FAMILIES
    ep: tuple[int, ...] = ()
    tp: tuple[int, ...] = (1, 2, 4, 8)
    pp: tuple[int, ...] = (1, 2, 4, 8)
    replicas: tuple[int, ...] = (0, 32)
    micro_batches: tuple[int, ...] = (1, 2)
    overlap: tuple[bool, ...] = (False, True)
    where: str = "the command line"
    asked_ep: bool = False


@dataclass(frozen=True, kw_only=True)
class Replan:
    """A new placement every `every` steps, for what a predictor of the runtime foresees."""

    every: int
    foresee: str = "ewma0.3"


@dataclass(frozen=True, kw_only=True)
class Serving:
    """What a serving engine adds to a step of kernels; docs/validation.md says from which rows.

    Args:
        step_s: of every step, for scheduling and sampling.
        layer_s: of every layer of a micro-batch, for small kernels and gaps between launches.
        share: of all that, for GPUs that wait for others' requests, and for caches that move.
    """

    step_s: float = 1e-3
    layer_s: float = 50e-6
    share: float = 0.12

    def seconds(self, step_s: float, layers: float) -> float:
        """What is added to a step of so many layers, counted once a micro-batch."""
        return (step_s + self.step_s + layers * self.layer_s) * (1 + self.share) - step_s


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One workload.

    Args:
        phase: what a step does.
        sequences: per GPU in decode (the batch), of the whole deployment when `total`.
        batches: further values of it that a search tries; empty for that one alone.
        prompt, output: tokens of a sequence.
        context: cached tokens of a sequence in a decode step.
        prefill_tokens: tokens of a GPU in a prefill step.
        routing: the distribution, or the name of the trace.
        trace: counts (steps, layers, experts) recorded.
        locality: how far sources disagree.
        wire_bytes: of a number dispatched (1 for fp8); combine always carries 2.
        engine: `moesaic` returns a row per (token, slot); `node-sums` adds them up in each node.
        forwarded: rows enter a node by the rail of their source.
        exchange_sms: SMs that an overlapped exchange takes from compute.
        policy: of the runtime, which divides the SMs between compute and an overlapped exchange;
            None: the exchange takes `exchange_sms`.
        replan: how often a placement is made anew; None: once.
        serving: what a serving engine adds; None: nothing, as in this project's own runtime.
        keep_cache: whether a prefill keeps the cache of its whole batch, or of one micro-batch.
        tpot_ms, ttft_ms: limits a recommendation must keep.
        arrival: requests that queue at what is recommended; served: serving engines to try.
    """

    phase: Literal["decode", "prefill"] = "decode"
    sequences: int = 64
    batches: tuple[int, ...] = ()
    total: bool = False
    prompt: int = 2048
    output: int = 512
    context: int = 2304
    prefill_tokens: int = 8192
    routing: str = "lognormal:0.4"
    trace: Counts | None = None
    locality: float = 0.0
    wire_bytes: float = 2.0
    engine: str = "moesaic"
    forwarded: bool = False
    exchange_sms: int = 0
    policy: str | None = None
    replan: Replan | None = None
    serving: Serving | None = None
    keep_cache: bool = True
    tpot_ms: float | None = None
    ttft_ms: float | None = None
    arrival: Arrival | None = None
    served: Asked | None = None
    space: Space = Space()
    seed: int = 0


def load_workload(path: str | Path | None, *, num_experts: int, layers: int) -> Workload:
    """A workload from a file; None gives the default one.

    Args:
        path: the file.
        num_experts, layers: of the model, which a trace must fit.

    Raises:
        OSError: the file, or a trace it names, is missing.
        ValueError: a field that is unknown or impossible; names the line.
    """
    block = parse("phase: decode", "default workload") if path is None else read(path)
    folder = Path() if path is None else Path(path).parent
    return workload_from(block, folder, num_experts=num_experts, layers=layers)


def workload_from(block: Block, folder: Path, *, num_experts: int, layers: int) -> Workload:
    """The workload that a document describes."""
    base = Workload()
    phase = block.text("phase", "decode", among=("decode", "prefill"))
    routing = block.text("routing", base.routing)
    trace = _trace(block, folder, num_experts, layers)
    if trace is None:
        try:
            parse_routing(routing)
        except ValueError as error:
            raise ValueError(f"{block.where('routing')}: {error}") from error
    batches = _batches(block, phase)
    arrival = arrival_from(block.block("arrival"), folder)
    for field in ("arrival", "served"):
        if field in block and phase == "prefill":
            raise ValueError(f"{block.where(field)}: {field} needs phase decode, requests end")
    prompt, output = block.integer("prompt", base.prompt), block.integer("output", base.output)
    found = Workload(
        phase=phase,
        sequences=batches[len(batches) // 2],
        batches=batches if len(batches) > 1 else (),
        total=block.text("sequences_of", "gpu", among=("gpu", "deployment")) == "deployment",
        prompt=prompt,
        output=output,
        context=block.integer("context", prompt + output // 2),
        prefill_tokens=block.integer("prefill_tokens", max(base.prefill_tokens, prompt)),
        routing=routing,
        trace=trace,
        locality=block.number("locality", base.locality),
        wire_bytes=block.number("wire_bytes", base.wire_bytes, low=0.5, high=4),
        engine=block.text("engine", base.engine, among=ENGINES),
        forwarded=block.boolean("forwarded", phase == "prefill"),
        keep_cache=block.boolean("keep_cache", base.keep_cache),
        exchange_sms=block.integer("exchange_sms", base.exchange_sms, low=0, high=128),
        policy=_policy(block),
        replan=_replan(block.block("replan"), block, trace),
        serving=_serving(block.block("serving")),
        tpot_ms=block.number("tpot_ms", None, above=True),
        ttft_ms=block.number("ttft_ms", None, above=True),
        arrival=arrival,
        served=asked_from(block.block("served"), folder, arrival),
        space=_space(block.block("strategies"), num_experts),
        seed=block.integer("seed", 0, low=0),
    )
    block.done()
    return found


def _batches(block: Block, phase: str) -> tuple[int, ...]:
    """The sequences to try: the file's number or list; without one several, for decode."""
    if "sequences" not in block:
        return DEFAULT_BATCHES if phase == "decode" else (Workload().sequences,)
    if block.is_list("sequences"):
        return tuple(sorted(set(block.integers("sequences"))))
    return (int(block.integer("sequences")),)


def _trace(block: Block, folder: Path, experts: int, layers: int) -> Counts | None:
    """(steps, layers, E) recorded counts; another model's trace is refused."""
    name = block.text("trace", None)
    if name is None:
        return None
    try:
        trace = read_trace(folder / name, num_experts=experts)
    except ValueError as error:
        raise ValueError(f"{block.where('trace')}: {error}") from error
    if trace.info.layers != layers:
        raise block.wrong("trace", f"of {layers} MoE layers, as the model has", trace.info.layers)
    steps = 1 + max(row.step for row in trace.rows)
    counts = np.zeros((steps, layers, experts), np.int64)
    for row in trace.rows:
        counts[row.step, row.layer] = row.counts_E
    return counts


def _policy(block: Block) -> str | None:
    """A policy of the runtime; SMs given by hand leave it nothing to divide."""
    policy: str | None = block.text("policy", None, among=POLICIES)
    if policy is not None and "exchange_sms" in block:
        raise block.wrong("policy", "left out where exchange_sms is given", policy)
    return policy


def _replan(block: Block | None, outer: Block, trace: Counts | None) -> Replan | None:
    if block is None:
        return None
    if trace is None:
        raise ValueError(
            f"{outer.where('replan')}: replan needs a trace; a distribution does not change"
        )
    every = block.integer("every")
    if every >= len(trace):
        raise block.wrong("every", f"less than the {len(trace)} steps of the trace", every)
    way = block.text("foresee", Replan(every=1).foresee, among=PREDICTORS)
    block.done()
    return Replan(every=every, foresee=way)


def _serving(block: Block | None) -> Serving | None:
    if block is None:
        return None
    base = Serving()
    found = Serving(
        step_s=block.number("step_ms", base.step_s * 1e3, low=0.0) * 1e-3,
        layer_s=block.number("layer_us", base.layer_s * 1e6, low=0.0) * 1e-6,
        share=block.number("share", base.share, low=0.0),
    )
    block.done()
    return found


def _space(block: Block | None, experts: int) -> Space:
    if block is None:
        return Space()
    base = Space()
    overlap = block.texts("overlap", ("false", "true"), among=("true", "false"))
    found = Space(
        families=block.texts("families", FAMILIES, among=FAMILIES),
        ep=block.integers("ep", ()),
        tp=block.integers("tp", base.tp),
        pp=block.integers("pp", base.pp),
        replicas=block.integers("replicas", base.replicas, low=0),
        micro_batches=block.integers("micro_batches", base.micro_batches),
        overlap=tuple(word == "true" for word in overlap),
        where=f"{block.source}:{block.line}",
        asked_ep="ep" in block,
    )
    for size in found.ep:
        if size < experts and all((experts + more) % size for more in found.replicas):
            slots = " or ".join(str(experts + more) for more in found.replicas)
            raise block.wrong("ep", f"a divisor of {slots} (experts and replicas)", size)
    block.done()
    return found
