"""DRAM bytes by hardware counters: the cases that ncu profiles, and lines from what it printed.

    T tokens · E experts · K top-k

One process runs under the profiler (`profile`), which is switched on around each case only. A case
begins with a launch of torch's spin kernel, the marker at which `ncu.split` cuts. Before
it the last-level cache is filled with clean lines of another buffer, so that nothing a case reads
is there already and none of the evictions are its fault.

Every case is checked against the reference before it is counted.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..functional import route
from ..kernels.routing_ref import route_ref
from ..types import RouterSpec
from . import ncu
from .baselines import BASELINES, prepare
from .layers import ERROR_BOUNDS, Candidate, Machine, load, make_work, ours
from .results import Line, make_line, write_atomic
from .suite import Cell
from .suites.bytes import EXPERTS, FUSED, METRICS, ROUTERS, UNFUSED
from .timing import check_device, reason
from .workloads import MODELS, Model


@dataclass(frozen=True)
class Case:
    """One sequence of launches to count: its cell, who computes it, the call and its error."""

    cell: Cell
    impl: str
    call: Callable[[], Any]
    err: float


MakeCases = Callable[[Cell, torch.device, int], Iterator[Case]]


def unfused_route(logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The PyTorch sequence of a softmax router: softmax in fp32, top-k, division, counts."""
    scores_TE = torch.softmax(logits_TE, dim=-1, dtype=torch.float32)
    weights_TK, ids_TK = scores_TE.topk(top_k, dim=-1)
    weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    counts_E = torch.bincount(ids_TK.flatten(), minlength=logits_TE.shape[1])
    return ids_TK, weights_TK, counts_E


def route_error(logits_TE: Tensor, top_k: int, got: Sequence[Tensor], checked: int = 512) -> float:
    """Relative error of the routing weights laid out over E, on the first tokens; infinite when the
    counts are not those of the ids."""
    ids_TK, weights_TK, counts_E = got
    experts = logits_TE.shape[1]
    counted = torch.bincount(ids_TK.flatten().long(), minlength=experts)
    if not torch.equal(counted, counts_E.long()):
        return float("inf")

    def spread(ids_RK: Tensor, weights_RK: Tensor) -> Tensor:
        dense = torch.zeros(ids_RK.shape[0], experts, dtype=torch.float64, device=ids_RK.device)
        return dense.scatter_(1, ids_RK.long(), weights_RK.double())

    want = route_ref(logits_TE[:checked].float(), top_k=top_k)
    got_RE, want_RE = spread(ids_TK[:checked], weights_TK[:checked]), spread(*want[:2])
    # Sorted, because the PyTorch sequence may choose another one of equal logits.
    sorted_got = got_RE.sort(-1).values
    sorted_want = want_RE.sort(-1).values
    return float((sorted_got - sorted_want).norm() / sorted_want.norm())


def routing_cases(cell: Cell, device: torch.device, seed: int) -> Iterator[Case]:
    """moesaic's router and the PyTorch sequence on the same random logits."""
    experts, top_k = ROUTERS[cell.model]
    generator = torch.Generator(device).manual_seed(seed)
    logits_TE = torch.randn(cell.tokens, experts, generator=generator, device=device)
    logits_TE = logits_TE.to(getattr(torch, cell.dtype))
    spec = RouterSpec(num_experts=experts, top_k=top_k)
    calls: dict[str, Callable[[], Sequence[Tensor]]] = {
        FUSED: lambda: route(logits_TE, spec),
        UNFUSED: lambda: unfused_route(logits_TE, top_k),
    }
    for impl, call in calls.items():
        yield Case(cell, impl, call, route_error(logits_TE, top_k, call()))


def expert_cases(
    cell: Cell,
    device: torch.device,
    seed: int,
    impl: str = "triton",
    models: dict[str, Model] = MODELS,
) -> Iterator[Case]:
    """The three-layer expert layer by moesaic, by a loop of launches, by torch's grouped_mm."""
    model = models[EXPERTS[cell.model]]
    loop, grouped = BASELINES["torch-loop"], BASELINES["torch-grouped-mm"]
    candidates = [
        ours(impl, FUSED),
        Candidate(UNFUSED, loop.build, prepare),
        Candidate(grouped.name, grouped.build, prepare),
    ]
    machine = Machine(device, 1.0, 1)
    loaded = load(model, getattr(torch, cell.dtype), candidates, machine, seed)
    work = make_work(loaded, cell, machine, seed)
    for candidate in candidates:
        inputs = candidate.prepare(work.inputs[0])
        forward = loaded.forwards[candidate.name][0]

        def call(forward: Any = forward, inputs: Any = inputs) -> Tensor:
            out: Tensor = forward(*inputs)
            return out

        yield Case(cell, candidate.name, call, work.relative_error(call()))


def label(case: Case) -> dict[str, Any]:
    """What `lines_from` needs to know of a case."""
    wrong = not case.err <= ERROR_BOUNDS[case.cell.dtype]
    values = {"model": case.cell.model, "tokens": case.cell.tokens, "routing": case.cell.routing}
    err = case.err if case.err < float("inf") else None
    return values | {"dtype": case.cell.dtype, "impl": case.impl, "err": err, "wrong": wrong}


def cases(cell: Cell, device: torch.device, seed: int) -> Iterator[Case]:
    """The cases of one cell of suite `bytes`."""
    make = routing_cases if cell.model in ROUTERS else expert_cases
    return make(cell, device, seed)


def profile(
    cells: Sequence[Cell], out: Path, make: MakeCases, *, seed: int = 0, budget_s: float = 1e9
) -> None:
    """Run every case once between a marker and the profiler's stop; write the labels to `out`.

    A case that raises is labelled with its error and the others go on; a cell that `budget_s` does
    not reach is named on stdout.

    Raises:
        DeviceLost: the GPU answers no more; the labels so far are written.
    """
    device, began = torch.device("cuda"), time.perf_counter()
    clean = torch.ones(2**28, device=device)
    labels: list[dict[str, Any]] = []
    try:
        for cell in cells:
            if time.perf_counter() - began > budget_s:
                print(f"out of time: {cell.model} {cell.tokens} {cell.routing}", flush=True)
                continue
            profile_cell(cell, partial(make, cell, device, seed), labels, clean)
            gc.collect()
            torch.cuda.empty_cache()
    finally:
        write_atomic(out, json.dumps(labels))


def profile_cell(
    cell: Cell,
    make: Callable[[], Iterator[Case]],
    labels: list[dict[str, Any]],
    clean: Tensor,
) -> None:
    """Count the cases of one cell, adding a label for each that got a marker or an error."""
    impl = FUSED
    try:
        with torch.no_grad():
            for case in make():
                impl = case.impl
                case.call()
                clean.sum()
                torch.cuda.synchronize()
                count_one(case, labels)
    except Exception as error:
        text = reason(error)
        known = {"model": cell.model, "tokens": cell.tokens, "routing": cell.routing}
        known |= {"dtype": cell.dtype, "impl": impl}
        if labels and labels[-1].items() >= known.items():
            labels[-1]["error"] = text
        else:
            labels.append(known | {"error": text, "marked": False})
        check_device(text)


def count_one(case: Case, labels: list[dict[str, Any]]) -> None:
    """Marker and case with the profiler on; the label stands as soon as the marker is launched."""
    torch.cuda.profiler.start()  # type: ignore[no-untyped-call]
    try:
        torch.cuda._sleep(1)  # type: ignore[no-untyped-call]
        labels.append(label(case))
        case.call()
        torch.cuda.synchronize()
    finally:
        torch.cuda.profiler.stop()  # type: ignore[no-untyped-call]


def counted(
    text: str, labels: Sequence[dict[str, Any]], metrics: Mapping[str, ncu.Units]
) -> list[tuple[dict[str, Any], list[ncu.Launch]]]:
    """Every label with its launches from ncu's CSV: none for one that got no marker.

    Raises:
        ValueError: there are not as many marked parts as labels that were marked.
    """
    marked = [x for x in labels if x.get("marked", True)]
    parts = ncu.split(ncu.parse_csv(text, metrics))
    if len(parts) != len(marked):
        raise ValueError(f"ncu saw {len(parts)} marked cases, the program ran {len(marked)}")
    left = iter(parts)
    return [
        ({k: v for k, v in x.items() if k != "marked"}, next(left) if x.get("marked", True) else [])
        for x in labels
    ]


def lines_from(text: str, labels: Sequence[dict[str, Any]], stamped: Line) -> list[Line]:
    """Lines of suite `bytes`, one per case, from ncu's CSV and the labels of the process."""
    fixed = stamped | {"suite": "bytes", "clock": "counters", "mode": "eager"}
    lines = []
    for known, launches in counted(text, labels, METRICS):
        summed = {
            "bytes_read": sum(x.values["dram__bytes_read.sum"] for x in launches),
            "bytes_written": sum(x.values["dram__bytes_write.sum"] for x in launches),
            "launches": len(launches),
            "samples": 1,
        }
        lines.append(make_line(fixed, **known, **(summed if launches else {})))
    return lines
