"""What bounds two tenants on one GPU: the bytes each must move, and counters while they do.

The least bytes of a stack are the weights of the experts that its tokens chose, of whole layers
also dense weights and the cache that attention reads, and every layer's intermediate rows as often
as they are written and read (rows copied together, activated rows, rows of the second product, the
sum). Over its time alone they are a demand on memory; at a promise of decode its demand falls to
that fraction, and what the memory gives beyond it bounds prefill.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..cost import H200_READ_BYTES_PER_S, expert_weight_elements
from ..hardware.nvml import NotAvailable, open_gpu
from .colocate import Pair
from .colocation_targets import LOOPS
from .results import Line, make_line
from .stacks import Stack

SM_CLOCK = 1
"""NVML_CLOCK_SM."""
MANY_ROWS = 48
"""Rows per expert from which rows are copied together before the products."""


def stack_bytes(stack: Stack) -> float:
    """Bytes that one pass of a stack must move, the mean of its turns."""
    spec, itemsize, total = stack.spec, stack.weights[0].up.element_size(), 0
    for inputs in (layer for turn in stack.inputs for layer in turn):
        tokens, top_k = inputs.topk_ids_TK.shape
        rows = tokens * top_k
        active = int(inputs.topk_ids_TK.flatten().long().bincount().count_nonzero())
        copies = 2 if rows / spec.num_experts > MANY_ROWS else 0
        moved = rows * spec.hidden_size * (copies + 2) + 2 * rows * spec.intermediate_size
        total += active * expert_weight_elements(spec) + moved + 2 * tokens * spec.hidden_size
    dense = sum(layer.read_elements for layer in stack.whole)
    return itemsize * (total / len(stack.inputs) + dense)


def left_for_prefill(
    decode_per_s: float, prefill_per_s: float, slower: float, duty: float
) -> float:
    """The share of its throughput alone that bandwidth leaves prefill, at most 1.

    Args:
        decode_per_s, prefill_per_s: bytes a second of each alone.
        slower: decode's promise. duty: the part of the time in which it has work, alone.

    >>> left_for_prefill(3.6e12, 1.8e12, 1.5, 1.0), left_for_prefill(3.6e12, 1.8e12, 1.2, 0.5)
    (1.0, 1.0)
    """
    busy = min(1.0, duty * slower)
    beside = (H200_READ_BYTES_PER_S - decode_per_s / slower) / prefill_per_s
    return busy * min(1.0, max(0.0, beside)) + 1.0 - busy


def demand_lines(fixed: Line, pair: Pair, step_ms: float, prefill_per_s: float) -> list[Line]:
    """What each tenant moves a second alone, and what decode's promises leave to prefill."""
    decode = stack_bytes(pair.step) / step_ms * 1e3
    prefill = stack_bytes(pair.other) * prefill_per_s
    bound = {
        f"bound_{loop}": left_for_prefill(decode, prefill, slo, 1.0 if loop == "closed" else 0.5)
        for loop, (slo, _) in LOOPS.items()
    }
    return [
        make_line(fixed, clock="demand", impl="decode", bytes_per_s=decode, ms=step_ms),
        make_line(
            fixed, clock="demand", impl="prefill", bytes_per_s=prefill, ms=1e3 / prefill_per_s,
            **bound,
        ),
    ]  # fmt: skip


def counters_during(device: torch.device, work: Callable[[], Any]) -> dict[str, Any]:
    """SM clock, power and the share of DRAM bandwidth while `work` runs; why where there is none.

    Clock and power are read once `work` has queued its last step: power is a mean of the last
    second, the clock of that moment.
    """
    try:
        gpu = open_gpu(device)
        with gpu.gpm() as window:
            work()
            used = window.read()
            clock = float(gpu.ask("nvmlDeviceGetClockInfo", SM_CLOCK))
            watts = gpu.watts()
    except (NotAvailable, ValueError) as error:
        return {"counters_missing": str(error)}
    return {
        "dram_share": used.dram, "tensor_share": used.tensor, "sm_share": used.sm,
        "sm_mhz": clock, "watts": watts,
    }  # fmt: skip
