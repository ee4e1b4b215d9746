"""Requests through one serving engine: who waits, who runs, what a step holds, what users see.

    R requests, in the order in which they come

Requests queue, are let in while there is room for their cache and fewer than the engine's most are
running, and share every step's budget of tokens: prompts in chunks, one token of every other
request. `vllm` and `trtllm` put both into one step, `sglang` prefills first. The last requests of a
burst decode alone. Equal steps in a row are taken at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .requests import Floats, Ints, Load
from .scheduler import Engine
from .serving import Deployment


@dataclass(frozen=True)
class Served:
    """What a benchmark reports; seconds are means over requests but for medians and `p95`."""

    seconds: float
    prompt_tokens: int
    output_tokens: int
    requests: int
    ttft_s: float
    ttft_median_s: float
    ttft_p95_s: float
    tpot_s: float
    tpot_median_s: float
    tpot_p95_s: float
    latency_s: float

    def figures(self) -> dict[str, float]:
        """By the names that published figures have."""
        return {
            "output_tokens_per_s": self.output_tokens / self.seconds,
            "input_tokens_per_s": self.prompt_tokens / self.seconds,
            "total_tokens_per_s": (self.prompt_tokens + self.output_tokens) / self.seconds,
            "requests_per_s": self.requests / self.seconds,
            "ttft_ms": 1e3 * self.ttft_s,
            "ttft_median_ms": 1e3 * self.ttft_median_s,
            "tpot_ms": 1e3 * self.tpot_s,
            "tpot_median_ms": 1e3 * self.tpot_median_s,
            "itl_ms": 1e3 * self.tpot_s,
            "latency_ms": 1e3 * self.latency_s,
        }


@dataclass(frozen=True)
class Step:
    """A step under way, or so many equal ones: who gets a token, and parts of prompts in it."""

    decoding: Ints
    chunk: list[tuple[int, int]]
    seconds: float
    repeats: int


class Run:
    """An engine at work: who waits, who runs, what each has left and was given.

    Args:
        d: the engine and its GPUs.
        prompt_R, output_R: tokens of requests.
        ready_R: when each may be let in.
        sent: how many of them have been sent; the others come when one is answered.
    """

    def __init__(
        self, d: Deployment, prompt_R: Ints, output_R: Ints, ready_R: Floats, sent: int
    ) -> None:
        self.d, self.total, self.sent = d, len(prompt_R), sent
        self.prompt_R, self.output_R, self.ready_R = prompt_R, output_R, ready_R
        self.left_R, self.given_R = prompt_R.copy(), np.zeros(self.total, np.int64)
        self.first_R, self.last_R = np.zeros(self.total), np.zeros(self.total)
        self.room, self.budget = d.room(), d.engine.budget
        self.running: list[int] = []
        self.now, self.used, self.next, self.done = 0.0, 0.0, 0, 0
        self.check(prompt_R, output_R)

    def check(self, prompt_R: Ints, output_R: Ints) -> None:
        """Refuse requests whose cache does not fit at all."""
        longest = int((prompt_R + output_R).max(initial=0))
        if longest > self.room:
            raise ValueError(
                f"{self.d.model.name} on {self.d.gpus} {self.d.card or 'GPUs'} has room for "
                f"{self.room:.0f} tokens of cache, a request has {longest}"
            )

    @property
    def waits(self) -> bool:
        """Whether the next request that was sent is not ready yet."""
        return self.next < self.sent and bool(self.ready_R[self.next] > self.now)

    def size(self, request: int) -> float:
        """Tokens of cache that a request ends with."""
        return float(self.prompt_R[request] + self.output_R[request])

    def admitted(self, tokens: int) -> list[tuple[int, int]]:
        """Requests let in now, each with as much of its prompt as the step still takes."""
        chunk = []
        while (
            self.next < self.sent
            and self.ready_R[self.next] <= self.now
            and len(self.running) < self.d.engine.most
            and tokens < self.budget
            and self.used + self.size(self.next) <= self.room
        ):
            part = int(min(self.left_R[self.next], self.budget - tokens))
            chunk.append((self.next, part))
            self.running.append(self.next)
            self.used += self.size(self.next)
            tokens += part
            self.next += 1
        return chunk

    def scheduled(self) -> tuple[Ints, list[tuple[int, int]]]:
        """Requests that get one more token in the next step, and parts of prompts in it."""
        run = np.array(self.running, np.int64)
        prefilling, decoding = run[self.left_R[run] > 0], run[self.left_R[run] == 0]
        tokens = len(decoding) if self.d.engine.mixed else 0
        chunk: list[tuple[int, int]] = []
        for r in prefilling:
            part = int(min(self.left_R[r], self.budget - tokens))
            if part > 0:
                chunk.append((int(r), part))
                tokens += part
        chunk += self.admitted(tokens)
        return (decoding[:0] if chunk and not self.d.engine.mixed else decoding), chunk

    def begin(self) -> Step:
        """The next step, or as many as pass until a request ends or comes."""
        decoding, chunk = self.scheduled()
        pairs = sum(p * (float(self.prompt_R[r] - self.left_R[r]) + p / 2) for r, p in chunk)
        finished = sum(self.left_R[r] == p for r, p in chunk)
        count, prompt = len(decoding), sum(p for _, p in chunk)
        before = (self.prompt_R + self.given_R)[decoding]
        context = float(before.mean()) if count else 0.0
        seconds, repeats = self.d.step_s(count, context, prompt, pairs, int(finished)), 1
        if not chunk:
            repeats = int((self.output_R - self.given_R)[decoding].min())
            if self.waits:
                until = float(self.ready_R[self.next]) - self.now
                repeats = max(1, min(repeats, -int(-until // seconds)))
            seconds = self.d.step_s(count, context + (repeats - 1) / 2, 0, 0.0, 0)
        return Step(decoding, chunk, seconds, repeats)

    def end(self, step: Step, repeats: int) -> None:
        """What so many of the steps gave; those that have all their tokens go."""
        self.now += repeats * step.seconds
        finished = [r for r, p in step.chunk if self.left_R[r] == p]
        for r, part in step.chunk:
            self.left_R[r] -= part
        self.first_R[finished] = self.now
        self.given_R[finished] = 1
        self.given_R[step.decoding] += repeats
        self.leave([*step.decoding.tolist(), *finished])

    def leave(self, had: list[int]) -> None:
        """Those of `had` that have all their tokens go; for each a user sends the next."""
        over = [r for r in had if self.given_R[r] >= self.output_R[r]]
        gone = set(over)
        if gone:
            self.running = [r for r in self.running if r not in gone]
        for r in over:
            self.last_R[r] = self.now
            self.used -= self.size(r)
            if self.sent < self.total:
                self.ready_R[self.sent] = max(self.now, self.ready_R[self.sent])
                self.sent += 1
        self.done += len(over)


def serve(d: Deployment, load: Load, *, seed: int = 0) -> Served:
    """Run the benchmark step by step.

    Raises:
        ValueError: a request whose cache does not fit at all.
    """
    prompt_R, output_R = load.lengths(seed)
    sent = load.total if load.at_once is None else min(load.at_once, load.total)
    run = Run(d, prompt_R, output_R, _ready(load, d.engine, seed), sent)
    while run.done < run.total:
        if not run.running and run.waits:
            run.now = float(run.ready_R[run.next])
        step = run.begin()
        run.end(step, step.repeats)
    sent_R = run.ready_R if load.at_once is not None or load.rate else np.zeros(load.total)
    return summed([run], [sent_R], run.now)


def summed(runs: Sequence[Run], sent: Sequence[Floats], seconds: float) -> Served:
    """What users of several copies saw together, `sent` being when they asked."""
    sent_R, prompt_R = np.concatenate(sent), np.concatenate([r.prompt_R for r in runs])
    first_R = np.concatenate([r.first_R for r in runs])
    last_R = np.concatenate([r.last_R for r in runs])
    output_R = np.concatenate([r.output_R for r in runs])
    wait_R, rest_R = first_R - sent_R, last_R - first_R
    pace_R = (rest_R / np.maximum(output_R - 1, 1))[output_R > 1]
    pace_R = pace_R if len(pace_R) else np.zeros(1)
    return Served(
        seconds=seconds, prompt_tokens=int(prompt_R.sum()), requests=len(sent_R),
        output_tokens=int(output_R.sum()), ttft_s=float(wait_R.mean()),
        ttft_median_s=float(np.median(wait_R)), ttft_p95_s=float(np.percentile(wait_R, 95)),
        tpot_s=float(pace_R.mean()), tpot_median_s=float(np.median(pace_R)),
        tpot_p95_s=float(np.percentile(pace_R, 95)), latency_s=float((last_R - sent_R).mean()),
    )  # fmt: skip


def _ready(load: Load, engine: Engine, seed: int) -> Floats:
    """When each request could be let in: a front end takes them in one by one."""
    if load.rate:
        random = np.random.default_rng(seed)
        gaps_R = random.exponential(1 / load.rate, load.total)
        return np.asarray(gaps_R.cumsum(), dtype=np.float64)
    found: Floats = np.arange(1, load.total + 1, dtype=np.float64) * engine.front_s
    if load.at_once is not None:
        found[load.at_once :] = 0.0
    return found
