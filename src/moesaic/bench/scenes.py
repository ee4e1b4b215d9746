"""Recorded or made-up routing as work for slice groups: what the policies suite replays.

    n steps · L layers · E experts · N groups · C numbers of context

The experts are given the widths of Mixtral-8x7B's, in bf16: an expert takes the longer of the time
to read its weights and the time of its products (`cost`), each at the ceilings named here. The half
of the experts that had more rows during the warm-up is *hot*, the other half *cold*. A group whose
experts then were mostly bound by their products slows down on fewer SMs as a matrix product does,
else as a copy does. Scene `layer` adds a shared expert that every token passes, scene `tenant`
another tenant's products, which come and go.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from ..cost import H200_READ_BYTES_PER_S, expert_flops, expert_weight_elements
from ..runtime.plan import Curve, Curves, SliceGroup
from ..runtime.policies.replay import WINDOW, Step
from ..trace import read_trace
from ..types import ExpertSpec
from .results import ResultsError, read_lines
from .walks import WALKS, tenant_ms, walk

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
FLOPS_PER_S = 770e12
"""What cuBLAS reaches on an H200 with random bf16 data."""
WIDTHS = ExpertSpec(num_experts=16, hidden_size=4096, intermediate_size=14336)
READ_MS = 1e3 * 2 * expert_weight_elements(WIDTHS) / H200_READ_BYTES_PER_S
ROW_MS = 1e3 * expert_flops(WIDTHS, 1) / FLOPS_PER_S
TOP_K = 2
FEEDBACK = "adaptive, measured times fed back"
"""What the lines call the adaptive policy when it is told how long its steps took."""

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Scene:
    """Groups and steps of one layer."""

    groups: tuple[SliceGroup, ...]
    steps: tuple[Step, ...]


def recorded() -> list[str]:
    """Names of the recorded traces."""
    return sorted(path.stem for path in (BENCHMARKS / "traces").glob("*.parquet"))


@cache
def counts_of(name: str) -> Counts:
    """Rows per expert (n, L, E) of a recorded trace, or of the walk `synthetic-...`.

    Raises:
        ValueError: there is no such walk, or the trace is damaged.
        OSError: there is no such trace here.
    """
    if name.startswith("synthetic-"):
        return walk(name.removeprefix("synthetic-"))
    trace = read_trace(BENCHMARKS / "traces" / f"{name}.parquet")
    rows = np.array([row.counts_E for row in trace.rows])
    return rows.reshape(-1, trace.info.layers, trace.info.num_experts)


def names() -> list[str]:
    """Every trace and walk."""
    return [*recorded(), *(f"synthetic-{name}" for name in WALKS)]


def expert_ms(rows: Counts) -> NDArray[np.float64]:
    """Milliseconds of experts with these rows on the whole GPU."""
    return np.where(rows > 0, np.maximum(READ_MS, ROW_MS * rows), 0.0)


def bound_by(rows: Counts) -> str:
    """`gemm` where the products of experts with these rows take longer than reading their weights,
    else `copy`.
    """
    return "gemm" if ROW_MS * float(rows.mean()) > READ_MS else "copy"


def context_of(counts_nLE: Counts, layer: int, *, layers_before: bool) -> NDArray[np.float64]:
    """What is known before each step (n, C): all counts of the step before; with `layers_before`,
    those of the layers before this one are of the same step.
    """
    counts = counts_nLE.astype(np.float64)
    before = np.concatenate([np.full_like(counts[:1], counts[0].mean()), counts[:-1]])
    if layers_before:
        before[:, :layer] = counts[:, :layer]
    return before.reshape(len(before), -1)


def scene(
    name: str, layer: int, kind: str, *, times: int = 1, layers_before: bool = False
) -> Scene:
    """One layer of a trace as work.

    Args:
        name: of the trace or walk.
        layer: which of its layers.
        kind: `layer` or `tenant`.
        times: every recorded row stands for so many.
        layers_before: whether the context holds what earlier layers of the same step counted.

    Raises:
        ValueError: there is no such kind; or as `counts_of`.
    """
    counts_nLE = counts_of(name)
    rows_nE = times * counts_nLE[:, layer]
    order_E = np.argsort(-rows_nE[:WINDOW].sum(axis=0), kind="stable")
    half = len(order_E) // 2
    hot, cold = (tuple(sorted(map(int, part))) for part in (order_E[:half], order_E[half:]))
    time_nE = expert_ms(rows_nE)
    groups = [
        SliceGroup(name="hot", kind="hot", curve=bound_by(rows_nE[:WINDOW, hot]), experts=hot),
        SliceGroup(name="cold", kind="cold", curve=bound_by(rows_nE[:WINDOW, cold]), experts=cold),
    ]
    work = [time_nE[:, hot].sum(axis=1), time_nE[:, cold].sum(axis=1)]
    if kind == "layer":
        tokens_n = rows_nE.sum(axis=1) // TOP_K
        groups.append(SliceGroup(name="shared", kind="shared", curve=bound_by(tokens_n[:WINDOW])))
        work.append(expert_ms(tokens_n))
    elif kind == "tenant":
        groups.append(SliceGroup(name="tenant", kind="tenant", curve="gemm"))
        half_ms = 0.5 * float(time_nE.sum(axis=1).mean())
        work.append(tenant_ms(half_ms, steps=len(rows_nE), seed=crc32(name.encode())))
    else:
        raise ValueError(f"kind must be layer or tenant, got {kind!r}")
    context_nC = context_of(counts_nLE, layer, layers_before=layers_before)
    steps = [
        Step(loads_N=tuple(loads), counts_E=tuple(rows), context_C=tuple(context))
        for loads, rows, context in zip(
            np.stack(work, axis=1).tolist(), rows_nE.tolist(), context_nC.tolist(), strict=True
        )
    ]
    return Scene(tuple(groups), tuple(steps))


def curve(work: str, sms: list[int], ms: list[float]) -> Curve:
    """A curve whose load counts milliseconds on the whole GPU; a time that rises with the SMs is
    taken to be that of fewer.
    """
    falling = np.minimum.accumulate(np.array(ms) / ms[-1]).tolist()
    falling = [max(1.0, value) for value in falling]
    return Curve(work=work, sms=tuple(sms), ms=tuple(falling))


def committed_curves() -> tuple[Curves, str]:
    """time(SMs) of `gemm` and `copy` work, and where they are from.

    Those that the GPU part of this suite measured on grouped products, where they are committed;
    else a matrix product and a copy.

    Raises:
        ResultsError: neither can be read.
    """
    path = BENCHMARKS / "results" / "h200" / "policies.jsonl"
    if path.exists():
        points: dict[str, dict[int, float]] = {}
        for line in read_lines(path):
            if line["clock"] == "curve" and line["ms"]:
                points.setdefault(line["work"], {})[int(line["sms"])] = line["ms"]
        if {"gemm", "copy"} <= set(points):
            made = {
                work: curve(work, sorted(found), [found[n] for n in sorted(found)])
                for work, found in points.items()
            }
            return made, "results/h200/policies.jsonl"
    path = BENCHMARKS / "curves" / "h200.json"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        made = {work: curve(work, value["sms"], value[work]) for work in ("gemm", "copy")}
    except (OSError, ValueError, KeyError) as error:
        raise ResultsError(f"{path}: {error}; run in a checkout of the repository") from error
    return made, "curves/h200.json"
