"""What every launch of a decoder layer waits for, by hardware counters: a step of one layer.

The cells of suite `transformers`, cut to one decoder layer, which is compiled as in the suite's
fastest way; embedding and head are there too. `benchmarks/ncu_counters.py --suite transformers`
runs the steps under ncu, where each launch runs alone, several times over, every time with empty
caches: no weight of a real step is in the L2 either, while rows that the launch before wrote are.
So the times of clocks `model` and `parts` are the times; this says what a launch waits for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .counters import Case, counted
from .results import Line, make_line
from .suite import Cell
from .suites import transformers as timed
from .suites.launches import METRICS, kernel_name, line_values
from .suites.transformers import OURS, tunes
from .whole_models import (
    CONTEXT,
    layer_forward,
    make_step,
    moe_blocks,
    moe_inputs,
    random_model,
    tidy,
    typical_error,
)

__all__ = ["CACHES", "CLOCK", "METRICS", "SUITE", "lines_from", "step_cases"]

CLOCK, CACHES = "counters", "all"
WARM_CALLS = 3
ORDER = (1, 8192, 128, 16, 64)
"""Tokens of a step: a single sequence, prefill and large batches first."""


def cells() -> list[Cell]:
    """The suite's, in `ORDER`."""
    return sorted(timed.cells(), key=lambda cell: ORDER.index(cell.tokens))


SUITE = replace(timed.SUITE, cells=cells)


def step_cases(
    cell: Cell, device: torch.device, seed: int, backend: str | None = "inductor", **sizes: Any
) -> Iterator[Case]:
    """A step of one layer with moesaic, its block held against grouped_mm's on the same inputs."""
    from ..integrations.attach import selected

    tidy(device)
    torch._dynamo.reset()
    model = random_model(cell.model, device, 1, **sizes)
    decode = cell.routing == "decode"
    batch, length = (cell.tokens, 1) if decode else (1, cell.tokens)
    shape = (batch, length, CONTEXT if decode else length)
    plain = make_step(model, *shape, layer_forward(model, None), seed)
    with selected(model, "grouped_mm"):
        inputs = moe_inputs(plain)
        theirs = moe_blocks(model, inputs)()
    forward = layer_forward(model, backend, tunes(cell))
    step = make_step(model, *shape, forward, seed, any_batch=not tunes(cell))
    with selected(model, OURS):
        err = typical_error(moe_blocks(model, inputs)(), theirs)
        for _ in range(WARM_CALLS):
            step()

        def once() -> Tensor:
            return step()

        yield Case(cell, OURS, once, err)


def lines_from(text: str, labels: Sequence[dict[str, Any]], stamped: Line) -> list[Line]:
    """Lines of suite `transformers`, one per launch, numbered in the order of the step."""
    fixed = stamped | {"suite": SUITE.name, "clock": CLOCK, "mode": "eager", "layers": 1}
    lines = []
    for known, launches in counted(text, labels, METRICS):
        if not launches:
            lines.append(make_line(fixed, **known))
        for number, launch in enumerate(launches, 1):
            name = f"{known['impl']} {number:02d}: {kernel_name(launch.name)[:60]}"
            values = known | {"impl": name, "samples": 1} | line_values(launch.values)
            lines.append(make_line(fixed, **values))
    return lines
