"""What serving engines would offer on a cluster: every engine and layout, simulated on requests.

A copy lies within one node. Users who wait for their answers keep every copy alike busy, so one is
simulated (`batching`). Requests that come by themselves queue at all copies (`fleet`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from .batching import Served, serve
from .cluster import Cluster
from .engine_kernels import KNOWN_CARDS, source_of
from .fleet import queued
from .model import Model
from .requests import REPEATS, Asked, Load, Requests
from .scheduler import ENGINES
from .search import Question, over_cores
from .serving import Deployment
from .workload import Workload

# Steps of an engine do not follow those of a routing trace: with one they take this instead.
WITH_TRACE = "lognormal:0.4"
HEADS = ("engine", "layout", "copies", "requests", "output tok/s/GPU", "tok/s/GPU", "TTFT ms",
         "p95", "TPOT ms", "p95", "fits")  # fmt: skip


@dataclass(frozen=True)
class Offer:
    """One engine in one layout under one load; `served` is None where weights leave no cache.

    Args:
        copies: side by side in the cluster; `served` is of all of them.
        users: of a copy, each of whom waits for an answer; None: requests come by themselves.
        load: the requests in words.
        why: of the memory.
        kernels: whence the times of experts come.
    """

    deployment: Deployment
    copies: int
    users: int | None
    load: str
    served: Served | None
    why: str
    kernels: str

    @property
    def layout(self) -> str:
        """How a copy is cut: TP, DP for attention, EP for experts."""
        d = self.deployment
        parts = [f"{word}{count}" for word, count in (("TP", d.cut), ("DP", d.dp), ("EP", d.ep))
                 if count > 1]  # fmt: skip
        return " ".join(parts) or "1 GPU"

    @property
    def per_gpu(self) -> float:
        """Output tokens per second and GPU."""
        assert self.served is not None
        rate = self.served.output_tokens / self.served.seconds
        return rate / self.used

    @property
    def rank(self) -> tuple[bool, float]:
        """The lower the better: by output tokens of users who ask at once, else by latency."""
        if self.served is None:
            return True, 0.0
        return False, -self.per_gpu * self.used if self.users else self.served.latency_s

    @property
    def used(self) -> int:
        """GPUs of all copies."""
        return self.copies * self.deployment.gpus

    def keeps(self, workload: Workload) -> bool:
        """Whether it fits, and 95 of 100 requests keep the workload's limits."""
        x = self.served
        limits = workload.ttft_ms or math.inf, workload.tpot_ms or math.inf
        return x is not None and x.ttft_p95_s * 1e3 <= limits[0] and x.tpot_p95_s * 1e3 <= limits[1]


def layouts(model: Model, cluster: Cluster, asked: Asked, routing: str) -> Iterator[Deployment]:
    """Every engine on every number of GPUs, experts cut or whole, attention cut or per GPU."""
    card = (cluster.device or "").upper()
    sizes = asked.gpus or tuple(2**n for n in range(cluster.gpus_per_node.bit_length()))
    changes = {k: v for k in ("budget", "most", "memory") if (v := getattr(asked, k)) is not None}
    for name in asked.engines:
        engine = replace(ENGINES[name].on(card), **changes)
        for gpus in sizes:
            for dp, ep in dict.fromkeys(((1, 1), (1, gpus), (gpus, gpus))):
                cut = gpus // dp
                whole = model.experts.num_experts % ep == 0
                even = model.attention.heads % cut == 0
                parts = ep > 1 or model.experts.intermediate_size % gpus == 0
                if gpus <= cluster.gpus_per_node and whole and even and parts:
                    yield Deployment(
                        model=model, cluster=cluster, card=card if card in KNOWN_CARDS else None,
                        engine=engine, gpus=gpus, dp=dp, ep=ep, cache=asked.cache, routing=routing,
                    )  # fmt: skip


def offer_jobs(question: Question) -> list[tuple[Deployment, Workload, int | None]]:
    """Every layout with every number of users, None where requests come by themselves.

    Raises:
        ValueError: no layout is possible; names the line that asks.
    """
    w, cluster = question.workload, question.cluster
    asked = w.served
    assert asked is not None
    routing = w.routing if w.trace is None else WITH_TRACE
    found = [
        (d, w, users)
        for d in layouts(question.model, cluster, asked, routing)
        for users in asked.at_once or (None,)
    ]
    if not found:
        sizes = " or ".join(map(str, asked.gpus)) or "any"
        raise ValueError(
            f"{asked.where}: no layout of {', '.join(asked.engines)} on {sizes} of the "
            f"{cluster.gpus_per_node} GPUs of a node divides the model's heads and experts"
        )
    return found


def offers(
    question: Question, *, workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Offer]:  # fmt: skip
    """Every layout under every load, the best first, what does not fit last.

    Args:
        question: with `workload.served`.
        workers, progress: see `search.predict_all`.

    Raises:
        ValueError: no layout is possible.
    """
    jobs, found = offer_jobs(question), list[Offer]()
    for offer in over_cores(_offer, jobs, workers):
        found.append(offer)
        if progress is not None:
            progress(len(found), len(jobs))
    return sorted(found, key=lambda o: (o.rank, o.deployment.engine.name, o.layout, o.load))


def _offer(d: Deployment, w: Workload, users: int | None) -> Offer:
    """One layout under one load: `users` at once on every copy, or requests that come."""
    assert w.served is not None
    copies = d.cluster.nodes * (d.cluster.gpus_per_node // d.gpus)
    if users is None:
        requests = coming(w)
        words = f"{len(requests)} in {requests.seconds_R[-1]:.0f} s"
        longest = int((requests.prompt_R + requests.output_R).max())
    else:
        total = w.served.requests or REPEATS * users
        load = load_of(w, total, users)
        words, longest = f"{users} at once", sum(int(n.max()) for n in load.lengths(w.seed))
    have, weights = d.engine.memory * d.cluster.gpu.memory_bytes, d.weight_bytes / d.gpus
    why, served = f"{weights / 1e9:.0f} GB of weights in {have / 1e9:.0f} GB", None
    if d.free_bytes > 0:
        why += f", cache for {d.room():.0f} tokens"
        if longest > d.room():
            why += f", a request has {longest}"
        else:
            served = queued(d, requests, copies) if users is None else _copies(d, load, w, copies)
    kernels = source_of(d.card, d.engine.name, d.model.dtype)
    return Offer(d, copies, users, words, served, why, kernels)


def _copies(d: Deployment, load: Load, w: Workload, copies: int) -> Served:
    """One copy under a load, and as many more that do the same."""
    one = serve(d, load, seed=w.seed)
    return replace(one, requests=copies * one.requests, prompt_tokens=copies * one.prompt_tokens,
                   output_tokens=copies * one.output_tokens)  # fmt: skip


def load_of(w: Workload, total: int, users: int | None = None) -> Load:
    """So many requests of the workload's lengths."""
    assert w.served is not None
    return Load(total=total, prompt=w.prompt, output=w.output, at_once=users,
                spread=w.served.spread, longest=8 * (w.prompt + w.output))  # fmt: skip


def coming(w: Workload) -> Requests:
    """The requests of the trace, or those that `arrival` draws."""
    assert w.served is not None
    if w.served.trace is not None:
        return w.served.trace
    assert w.arrival is not None
    times = w.arrival.drawn(w.seed)
    return Requests(np.array(times) - times[0], *load_of(w, len(times)).lengths(w.seed))


def judged(found: list[Offer], workload: Workload) -> str:
    """The best of them in words, or why none is."""
    good = [o for o in found if o.keeps(workload)]
    if not good:
        fits = any(o.served is not None for o in found)
        return (
            "No serving engine keeps the limits in 95 of 100 requests."
            if fits
            else f"No serving engine has room in a node: {found[0].why}."
        )
    best = min(good, key=lambda o: o.rank)
    x = best.served
    assert x is not None
    return (
        f"Of serving engines {best.deployment.engine.name} {best.layout} with {best.load}: "
        f"{best.per_gpu:.0f} output tokens/s per GPU, first token {x.ttft_s * 1e3:.0f} ms (p95 "
        f"{x.ttft_p95_s * 1e3:.0f})"
        + (f", then {x.tpot_s * 1e3:.1f} ms each (p95 {x.tpot_p95_s * 1e3:.1f})." if x.tpot_s
           else ", the only one.")
    )  # fmt: skip


def shown_offers(found: Sequence[Offer], limit: int = 24) -> list[Offer]:
    """The best that fit, and every layout that does not once."""
    fit = [o for o in found if o.served is not None][:limit]
    tight = {(o.deployment.engine.name, o.layout): o for o in found if o.served is None}
    return [*fit, *list(tight.values())[: limit // 2]]


def cells(o: Offer) -> tuple[str, ...]:
    """An offer as text under `HEADS`."""
    x, head = o.served, (o.deployment.engine.name, o.layout, str(o.copies), o.load)
    if x is None:
        return (*head, "-", "-", "-", "-", "-", "-", f"no: {o.why}")
    whole = (x.prompt_tokens + x.output_tokens) / x.seconds / o.used
    # Answers of one token have none after the first.
    times = (f"{s * 1e3:.1f}" if s else "-"
             for s in (x.ttft_s, x.ttft_p95_s, x.tpot_s, x.tpot_p95_s))  # fmt: skip
    return (*head, f"{o.per_gpu:.0f}", f"{whole:.0f}", *times, "yes")


def offer_entry(o: Offer) -> dict[str, Any]:
    """An offer as JSON; seconds and tokens are of all copies together."""
    return {
        "engine": o.deployment.engine.name, "layout": o.layout, "gpus": o.deployment.gpus,
        "copies": o.copies, "load": o.load, "fits": o.served is not None, "memory": o.why,
        "kernels": o.kernels,
        "served": None if o.served is None else asdict(o.served) | o.served.figures(),
    }  # fmt: skip
