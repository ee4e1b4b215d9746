"""Bits of executors: who gives exactly the output of whom, on the same fresh inputs.

moesaic's own executors must agree in every bit. The others take the dispatch and the products of a
library; with one combine for all, what differs is the library's product alone, and it is counted
against the plainest of them (`REFERENCE`) and against moesaic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..layers import Loaded
from ..suite import Cell
from ..timing import capture, check_device, reason
from ..workloads import make_inputs
from .executor import OURS, Executor

REFERENCE = "fastermoe-style"


def differing(a: Tensor, b: Tensor) -> int:
    """Elements whose bits differ; NaN is different from NaN."""
    return int((a != b).sum())


def compare_bits(
    loaded: Loaded, cell: Cell, executors: Sequence[Executor], seed: int
) -> dict[str, dict[str, Any]]:
    """By executor: `bits_differ` from its own kind, `bits_differ_ours` from moesaic, of `elements`;
    moesaic's value is that of its graph against its eager call. A failure is `bits_error`."""
    weights, device = loaded.sets[0], loaded.sets[0].up.device
    generator = torch.Generator(device).manual_seed(seed)
    inputs = make_inputs(
        loaded.model, cell.tokens, cell.routing, dtype=loaded.dtype, generator=generator
    )
    outputs: dict[str, Tensor] = {}
    found: dict[str, dict[str, Any]] = {}
    for executor in executors:
        if executor.exact is None or executor.name not in loaded.forwards:
            continue
        try:
            forward, given = executor.exact(loaded.model, weights), executor.inputs(inputs)
            # The weights of the router in fp32 for all: their dtype is part of the arithmetic.
            given = given._replace(topk_weights_TK=inputs.topk_weights_TK)
            outputs[executor.name] = forward(*given).clone()
        except Exception as error:
            found[executor.name] = {"bits_error": reason(error)}
            check_device(reason(error))
    mine = outputs.get(OURS)
    for executor in executors:
        output = outputs.get(executor.name)
        if output is None:
            continue
        kin = outputs.get(OURS if executor.ours else REFERENCE)
        values = {"elements": output.numel()}
        if kin is not None:
            values["bits_differ"] = differing(output, kin)
        if mine is not None:
            values["bits_differ_ours"] = differing(output, mine)
        found[executor.name] = values
    if mine is not None and device.type == "cuda":
        forward = loaded.forwards[OURS][0]
        replayed = capture([lambda: forward(*inputs)])
        replayed.first_output.fill_(float("nan"))
        replayed.graph.replay()
        found[OURS]["bits_differ"] = differing(replayed.first_output, mine)
    return found
