"""Flops, bytes and floors of MoE layers: the one place where they are counted.

Benchmarks, the planner, the profiler and the docs call these, so that a figure means the same
everywhere. A multiply-add counts as two flops; bytes are what must cross device memory at least
once. `active` is the number of experts that got a token.

>>> spec = ExpertSpec(num_experts=8, hidden_size=4096, intermediate_size=14336)
>>> expert_flops(spec, rows=2) / 1e9
0.704643072
"""

from __future__ import annotations

from collections.abc import Sequence

from .types import ExpertSpec

H200_READ_BYTES_PER_S = 4.5e12


def expert_weight_elements(spec: ExpertSpec) -> int:
    """Parameters of one expert, biases included."""
    total = 0
    for shape in spec.weight_shapes().values():
        elements = 1
        for size in shape[1:]:
            elements *= size
        total += elements
    return total


def expert_flops(spec: ExpertSpec, rows: int) -> int:
    """Flops of the matrix products for `rows` routed rows (activations and biases left out)."""
    h, i = spec.hidden_size, spec.intermediate_size
    middle = i * i if spec.layers == 3 else 0
    return 2 * rows * (h * spec.up_rows + middle + i * h)


def layer_bytes(spec: ExpertSpec, tokens: int, active: int, itemsize: int) -> int:
    """Bytes a layer must move: weights of the `active` experts, the input and the output once."""
    weights = active * expert_weight_elements(spec)
    return itemsize * (weights + 2 * tokens * spec.hidden_size)


def floor_ms(num_bytes: int, dense_ms: float, read_bytes_per_s: float) -> float:
    """The larger of bytes over read bandwidth and the dense twin's measured time, in ms."""
    return max(num_bytes / read_bytes_per_s * 1e3, dense_ms)


def balancedness(counts: list[int]) -> float:
    """Mean over maximum of the experts' loads, 1.0 when nothing was routed (DESIGN, words)."""
    peak = max(counts, default=0)
    return sum(counts) / (len(counts) * peak) if peak else 1.0


def expert_bytes(spec: ExpertSpec, rows: int, itemsize: int) -> int:
    """Bytes that one expert must move for `rows` routed rows: none without rows, else its weights
    and the rows in and out once."""
    if not rows:
        return 0
    return itemsize * (expert_weight_elements(spec) + 2 * rows * spec.hidden_size)


def net_joules(joules: float, idle_watts: float, seconds: float) -> float:
    """Joules above those of an idle device over the same time."""
    return joules - idle_watts * seconds


def modelled_joules(
    spec: ExpertSpec,
    rows_E: Sequence[int],
    itemsize: int,
    *,
    joules_per_flop: float,
    joules_per_byte: float,
) -> list[float]:
    """Joules of each expert by the model flops x joules_per_flop + bytes x joules_per_byte."""
    return [
        expert_flops(spec, rows) * joules_per_flop
        + expert_bytes(spec, rows, itemsize) * joules_per_byte
        for rows in rows_E
    ]
