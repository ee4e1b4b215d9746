"""Launches of a layer under ncu: the cases profiled, and a line per launch from what it printed.

A case is moesaic's whole layer or its dense twin, called a few times unprofiled first, so that
what a first call plans and compiles is not counted. Before each the last-level cache is filled with
lines of another buffer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .ceilings import dense_twin
from .counters import Case, counted
from .layers import Machine, load, make_work, ours
from .results import Line, make_line
from .suite import Cell
from .suites.launches import (
    COPIED_TOKENS,
    COPY,
    GPTOSS,
    METRICS,
    OURS,
    TWIN,
    kernel_name,
    line_values,
)
from .suites.layer import load_curve
from .workloads import MODELS, Model

SHAPES = MODELS | {GPTOSS: Model(GPTOSS, 128, 4, 2880, 2880)}
WARM_CALLS = 3


def layer_cases(
    cell: Cell,
    device: torch.device,
    seed: int,
    impl: str = "auto",
    models: Mapping[str, Model] = SHAPES,
) -> Iterator[Case]:
    """moesaic's layer, checked against the reference; cuBLAS on the dense twin; of many tokens also
    an elementwise pass that reads and writes as much as the combine does."""
    model, dtype = models[cell.model], getattr(torch, cell.dtype)
    machine = Machine(device, 1.0, 1)
    loaded = load(model, dtype, [ours(impl, OURS)], machine, seed)
    work = make_work(loaded, cell, machine, seed, curve=load_curve())
    forward, inputs = loaded.forwards[OURS][0], work.inputs[0]

    def layer() -> Tensor:
        out: Tensor = forward(*inputs)
        return out

    err = max(work.relative_error(layer()) for _ in range(WARM_CALLS))
    yield Case(cell, OURS, layer, err)
    twin = dense_twin(model.spec(), cell.tokens * model.top_k, dtype=dtype, device=device)
    yield Case(cell, TWIN, twin, 0.0)
    if cell.tokens >= COPIED_TOKENS:
        moved = cell.tokens * (model.top_k + 1) * model.hidden_size
        source = torch.randn(moved // 2, dtype=torch.float32, device=device).to(dtype)
        target = torch.empty_like(source)
        # A plain copy is no kernel, so nothing that ncu counts.
        yield Case(cell, COPY, lambda: torch.neg(source, out=target), 0.0)


def lines_from(text: str, labels: Sequence[dict[str, Any]], stamped: Line) -> list[Line]:
    """Lines of suite `launches`, one per launch, from ncu's CSV and the labels of the process."""
    fixed = stamped | {"suite": "launches", "clock": "counters", "mode": "eager"}
    lines = []
    for known, launches in counted(text, labels, METRICS):
        if not launches:
            lines.append(make_line(fixed, **known))
        for number, launch in enumerate(launches, 1):
            name = f"{known['impl']} {number}: {kernel_name(launch.name)}"
            values = known | {"impl": name, "samples": 1} | line_values(launch.values)
            lines.append(make_line(fixed, **values))
    return lines
