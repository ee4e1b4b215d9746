"""One chunk through one candidate: logits, clocks, routing; nothing is decided or summed up here.

    B windows · N positions · T = B*N tokens · E experts · K top-k · L layers · V = 256 bytes

Two candidates share the weights: *moesaic* (`moesaic.route`, `moesaic.moe`) and the *baseline* (the
router and the eager experts loop of transformers, in PyTorch). The clock of a pass covers the whole
forward; a second one covers the routed experts alone.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..functional import moe
from ..models import ByteMoELM, eager_experts
from ..models.byte_lm import START_BYTE, ExpertsFn
from ..types import ExpertSpec, ExpertWeights, RouterSpec, Routing
from .facts import ChunkFacts, PassFacts, Rows
from .plan import Chunk
from .witness import count_rows

LN2 = 0.6931471805599453


def eager_route(logits_TE: Tensor, spec: RouterSpec) -> Routing:
    """The router of transformers' softmax MoE models; it counts nothing, so neither does this."""
    scores_TE = F.softmax(logits_TE, dim=-1, dtype=torch.float32)
    weights_TK, ids_TK = torch.topk(scores_TE, spec.top_k, dim=-1)
    if spec.renormalize:
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    return Routing(ids_TK, weights_TK, ids_TK.new_empty(0))


class Stopwatch:
    """Seconds between starts and stops, without waiting for the device until `seconds` is read."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[float] = []
        self._events: list[torch.cuda.Event] = []

    def mark(self) -> None:
        """A start or, every second time, a stop."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._events.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> float:
        """The sum of all intervals; on CUDA the device must have been synchronised."""
        if self._cuda:
            pairs = zip(self._events[::2], self._events[1::2], strict=True)
            return float(sum(start.elapsed_time(stop) for start, stop in pairs)) / 1e3
        return sum(self._marks[1::2]) - sum(self._marks[::2])


@dataclass(frozen=True)
class Candidate:
    """A model and the experts function it runs."""

    name: str
    model: ByteMoELM
    experts: ExpertsFn


@dataclass(frozen=True)
class Pass:
    """What one candidate made of one chunk; `ids_LTK` are the router's choices."""

    logits_TV: Tensor
    ids_LTK: tuple[Tensor, ...]
    seconds: float
    experts_seconds: float


def candidates(model: ByteMoELM, experts: ExpertsFn = moe) -> tuple[Candidate, Candidate]:
    """moesaic and the baseline on the same weights; `experts` is moesaic's executor."""
    baseline = copy.copy(model)
    baseline.route_impl = eager_route
    return Candidate("moesaic", model, experts), Candidate("baseline", baseline, eager_experts)


def windows_of(data: bytes, before: int | None, chunk: Chunk) -> tuple[Tensor, Tensor]:
    """Inputs and targets (B, N) of a chunk's bytes; `before` is the byte that precedes them."""
    first = START_BYTE if before is None else before
    stream = torch.frombuffer(bytearray([first]) + data, dtype=torch.uint8).long()
    shape = (chunk.windows, chunk.width)
    return stream[:-1].reshape(shape), stream[1:].reshape(shape)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def forward(candidate: Candidate, ids_BN: Tensor) -> Pass:
    """Run one chunk; the clock starts and stops with an idle device."""
    watch = Stopwatch(ids_BN.device)
    chosen: list[Tensor] = []

    def timed(
        hidden_TH: Tensor,
        topk_ids_TK: Tensor,
        topk_weights_TK: Tensor,
        weights: ExpertWeights,
        spec: ExpertSpec,
    ) -> Tensor:
        watch.mark()
        out_TH = candidate.experts(hidden_TH, topk_ids_TK, topk_weights_TK, weights, spec)
        watch.mark()
        return out_TH

    def observe(layer: int, routing: Routing) -> None:
        chosen.append(routing.topk_ids_TK)

    _wait(ids_BN.device)
    start = time.perf_counter()
    with torch.no_grad():
        logits_BNV = candidate.model(ids_BN, experts_impl=timed, observe=observe)
    _wait(ids_BN.device)
    seconds = time.perf_counter() - start
    return Pass(logits_BNV.flatten(0, 1), tuple(chosen), seconds, watch.seconds())


def _facts(candidate: Candidate, done: Pass, targets_T: Tensor) -> PassFacts:
    """Bits by a softmax in fp32 summed in fp64; rows by the witness, layer by layer."""
    config = candidate.model.config
    rows = Rows()
    with torch.no_grad():
        nats_T = F.cross_entropy(done.logits_TV.float(), targets_T, reduction="none")
        for ids_TK in done.ids_LTK:
            dtype = candidate.model.head.weight.dtype
            rows += count_rows(candidate.experts, ids_TK, config.expert_spec(), dtype)
    bits = float(nats_T.double().sum()) / LN2
    return PassFacts(done.seconds, done.experts_seconds, bits, rows)


def moved_slots(ours_LTK: tuple[Tensor, ...], theirs_LTK: tuple[Tensor, ...]) -> Tensor:
    """Per token (T), how many of our slots, over all layers, went to an expert not among theirs."""
    moved_T = torch.zeros(len(ours_LTK[0]), dtype=torch.long, device=ours_LTK[0].device)
    for ours_TK, theirs_TK in zip(ours_LTK, theirs_LTK, strict=True):
        shared_TK = (ours_TK.long()[:, :, None] == theirs_TK.long()[:, None, :]).any(-1)
        moved_T += (~shared_TK).sum(-1)
    return moved_T


def differences(ours: Pass, theirs: Pass, chunk: Chunk) -> tuple[float, float, int]:
    """Largest logit difference, the same where routing has been equal so far, and moved slots.

    A near tie in a router, decided otherwise by a rounding, changes a token's experts and with them
    everything after it in its window, in PyTorch as here; nothing before it.
    """
    worst_T = (ours.logits_TV.float() - theirs.logits_TV.float()).abs().amax(-1)
    moved_T = moved_slots(ours.ids_LTK, theirs.ids_LTK)
    equal_T = moved_T.view(chunk.windows, chunk.width).cumsum(1).flatten() == 0
    same = torch.where(equal_T, worst_T, torch.zeros_like(worst_T)).max()
    return float(worst_T.max()), float(same), int(moved_T.sum())


def run_chunk(
    pair: tuple[Candidate, Candidate], chunk: Chunk, inputs_BN: Tensor, targets_BN: Tensor
) -> tuple[ChunkFacts, tuple[Tensor, ...]]:
    """Both candidates over one chunk, in its order; the facts and moesaic's ids per layer."""
    by_name = {candidate.name: candidate for candidate in pair}
    passes = {name: forward(by_name[name], inputs_BN) for name in chunk.order}
    ours, theirs = passes["moesaic"], passes["baseline"]
    targets_T = targets_BN.flatten()
    experts = by_name["moesaic"].model.config.num_experts
    largest, same, rerouted = differences(ours, theirs, chunk)
    facts = ChunkFacts(
        chunk=chunk,
        moesaic=_facts(by_name["moesaic"], ours, targets_T),
        baseline=_facts(by_name["baseline"], theirs, targets_T),
        max_difference=largest,
        same_difference=same,
        flipped=int((ours.logits_TV.argmax(-1) != theirs.logits_TV.argmax(-1)).sum()),
        rerouted=rerouted,
        counts_LE=tuple(
            tuple(torch.bincount(ids.flatten().long(), minlength=experts).tolist())
            for ids in ours.ids_LTK
        ),
    )
    return facts, ours.ids_LTK
