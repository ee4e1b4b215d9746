"""One layer, or one exchange, over the GPUs of a host, as suite `ep` measures them.

    T tokens · E experts · K top-k · G ranks · H hidden

The experts of the fullest rank take what `kernels` says. An exchange takes what others have taken
that moved as many bytes off (or onto) their busiest GPU: that, not the number of ranks, is what a
push through NVLink waits for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from ..types import ExpertSpec
from .cluster import Gpu
from .exchange import Ways, leaving_bytes
from .kernels import KernelTable, Measured, expert_layer_s, path_of
from .routing import sample_counts

WIDTHS = {"rows-7168": 7168, "rows-2048": 2048}


def busiest_rows(ranks: int, rows: int, routing: str) -> float:
    """Expected rows that cross the busiest GPU when each rank has `rows` rows for some rank.

    Routings as in suite `ep`: ``even``, ``uniform``, ``zipf1`` (rank r wanted as 1 / r).
    """
    order = np.arange(1, ranks + 1, dtype=np.float64)
    share = order**-1.0 if routing == "zipf1" else np.ones(ranks)
    share /= share.sum()
    if routing == "uniform":
        drawn = np.random.default_rng(0).multinomial(rows, share, (101, ranks))
        crossing = drawn * (1 - np.eye(ranks))
        return float(np.median(np.maximum(crossing.sum(1).max(-1), crossing.sum(2).max(-1))))
    into, out = (ranks - 1) * rows * share, rows * (1 - share)
    return float(max(into.max(), out.max()))


def exchange_cell_s(
    ways: Ways, clock: str, ranks: int, rows: int, width: int, routing: str
) -> float:
    """Seconds of an exchange of suite `ep`: `rows` bf16 rows of every rank, each to one rank."""
    return ways.seconds(clock, ranks, 2.0 * width * busiest_rows(ranks, rows, routing))


def ranks_of_token(spec: ExpertSpec, top_k: int, ranks: int) -> float:
    """Expected ranks, of those a token does not live on, that its K experts are on."""
    experts, own = spec.num_experts, spec.num_experts // ranks
    missed = math.comb(experts - own, top_k) / math.comb(experts, top_k)
    return (ranks - 1) * (1 - missed)


def exchanges_s(spec: ExpertSpec, top_k: int, tokens: int, ranks: int, ways: Ways) -> float:
    """Seconds of dispatch and combine of a layer over `ranks` GPUs, uniform routing."""
    if ranks == 1:
        return 0.0
    own, row = tokens / ranks, 2.0 * spec.hidden_size
    out = own * row * ranks_of_token(spec, top_k, ranks)
    back = leaving_bytes(ranks, own * top_k, row)
    return ways.seconds("dispatch", ranks, out) + ways.seconds("combine", ranks, back)


def layer_s(
    gpu: Gpu, spec: ExpertSpec, top_k: int, tokens: int, ranks: int, table: KernelTable,
    ways: Ways,
) -> float:  # fmt: skip
    """Seconds of a layer over `ranks` GPUs that bring `tokens` tokens together, uniform routing."""
    counts = sample_counts("uniform", layers=9, ranks=1, experts=spec.num_experts, top_k=top_k,
                           tokens=tokens)[:, 0]  # fmt: skip
    held = counts.reshape(len(counts), ranks, -1)
    rows, active = held.sum(2), (held > 0).sum(2)
    seconds = expert_layer_s(gpu, spec, rows, active, 2, table).max(axis=1)
    return float(np.median(seconds)) + exchanges_s(spec, top_k, tokens, ranks, ways)


def experts_of_layers(
    lines: Iterable[dict[str, Any]], shapes: dict[str, tuple[ExpertSpec, int]], ways: Ways,
    *, ranks: Iterable[int],
) -> list[Measured]:  # fmt: skip
    """What the experts of one GPU took in layers over several: the time without the exchanges."""
    clocks = {f"layer-ep{r}": r for r in ranks if r > 1}
    found = []
    for x in lines:
        over = clocks.get(str(x["clock"]), 0)
        ours = x["suite"] == "ep" and (x["impl"], x["mode"]) == ("moesaic", "graph")
        if not over or not ours or not x["ms"] or x.get("wrong") or x["model"] not in shapes:
            continue
        spec, top_k = shapes[x["model"]]
        seconds = x["ms"] / 1e3 - exchanges_s(spec, top_k, x["tokens"], over, ways)
        found.append(Measured(model=x["model"], spec=spec, top_k=top_k, tokens=x["tokens"],
                              seconds=seconds, suite="ep", path=path_of(spec),
                              ranks=over))  # fmt: skip
    return found
