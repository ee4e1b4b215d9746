"""Seconds of the single kernels a step is made of, but for the experts and their exchange.

    m rows · n columns · k inner width · T tokens · G GPUs

Products and attention's cores are rooflines with what keeps kernels from them: a constant, too few
tiles to occupy the memory (eight-bit kernels do not cut k), and the fill and drain of a core's
pipeline, which counts as so many more tokens of context. Shares of the peak and these figures were
read off SGLang's kernels on H200 in NVIDIA aiconfigurator-core 0.12.0, whose rows the validation
page therefore marks as fitted.
"""

from __future__ import annotations

import numpy as np

from .cluster import Cluster, Gpu
from .exchange import ExchangeTable
from .model import Attention

SMS = 132
# Slowdown of a copy on few SMs of an H200 (benchmarks/curves/h200.json).
FEW_SMS = ((8, 6.6), (16, 3.5), (32, 1.9), (48, 1.37), (64, 1.16), (96, 1.08), (128, 1.0))
TILE_ROWS, TILE_COLUMNS = 128, 64
# Of a product in eight bits, beside its kernel: its input's scales.
SCALES_S = 1e-6
FILL_DECODE, FILL_PREFILL = 256, 640
# Of a step of a ring over NVLink, as NCCL's own tuning table has it.
RING_STEP_S = 0.6e-6
_MIB = 2**20
# NCCL 2.29.2 on H200, bytes and seconds by GPUs (NVIDIA aiconfigurator-core 0.12.0, Apache-2.0).
ALL_REDUCE = ExchangeTable(
    {
        2: ((_MIB / 4, 8.69e-6), (_MIB, 14.26e-6), (4 * _MIB, 32.39e-6), (16 * _MIB, 76.2e-6),
            (64 * _MIB, 248.32e-6), (256 * _MIB, 885.82e-6)),
        4: ((_MIB / 4, 11.74e-6), (_MIB, 18.06e-6), (4 * _MIB, 39.79e-6), (16 * _MIB, 98.77e-6),
            (64 * _MIB, 323.27e-6), (256 * _MIB, 1180.42e-6)),
        8: ((_MIB / 4, 20.8e-6), (_MIB, 26.14e-6), (4 * _MIB, 51.37e-6), (16 * _MIB, 121.74e-6),
            (64 * _MIB, 319.63e-6), (256 * _MIB, 1052.63e-6)),
    },
    "NCCL 2.29.2",
)  # fmt: skip


def few_tiles(tiles: int) -> float:
    """How much slower bytes come when only so many tiles read them.

    >>> few_tiles(16), few_tiles(4), few_tiles(500)
    (3.5, 13.2, 1.0)
    """
    sms, slower = zip(*FEW_SMS, strict=True)
    if tiles < sms[0]:
        return float(slower[0] * sms[0] / tiles)
    return float(np.interp(tiles, sms, slower))


def product_s(
    gpu: Gpu, m: float, n: float, k: float, itemsize: float, *, kernels: int = 1
) -> float:
    """An m x k by k x n product, weights and input of `itemsize` bytes, output of two."""
    moved = itemsize * (n * k + m * k) + 2.0 * m * n
    seconds = kernels * gpu.kernel_s
    if itemsize == 1:
        tiles = max(1, -int(-m // TILE_ROWS)) * max(1, -int(-n // TILE_COLUMNS))
        moved *= few_tiles(tiles)
        seconds += SCALES_S
    flops = 2.0 * m * n * k
    return seconds + float(np.hypot(flops / gpu.rate(itemsize), moved / gpu.read_bytes_per_s))


def core_s(gpu: Gpu, flops: float, moved: float, *, kernels: int = 1) -> float:
    """Attention's core: loads lie under scores and values better than in a product."""
    busy, bytes_s = flops / gpu.attention_flops_per_s, moved / gpu.read_bytes_per_s
    return kernels * gpu.kernel_s + float((busy**3 + bytes_s**3) ** (1 / 3))


def decode_core_s(
    gpu: Gpu, a: Attention, sequences: float, context: float, cache_bytes: float, tp: int = 1
) -> float:
    """One token of every sequence, heads cut over `tp` GPUs; a second kernel merges the parts.

    Args:
        cache_bytes: of a token on this GPU.
    """
    pairs = sequences * (context + FILL_DECODE)
    flops = a.core_flops(pairs, absorbed=True) / tp
    width = 2 * a.kv_rank + a.rope_dim if a.kv_rank else a.head_dim + a.value_dim
    moved = sequences * (context * cache_bytes + 2.0 * a.heads / tp * width)
    return core_s(gpu, flops, moved, kernels=2)


def prefill_core_s(
    gpu: Gpu, a: Attention, tokens: float, context: float, tp: int = 1, *, absorbed: bool = False
) -> float:
    """Tokens of prompts that attend to `context` others on average, half of their prompt."""
    pairs = tokens * (context + FILL_PREFILL / 2)
    flops = a.core_flops(pairs, absorbed=absorbed) / tp
    width = 2 * a.kv_rank + a.rope_dim if absorbed else a.head_dim + a.value_dim
    kept = 0 if a.kv_rank else a.kv_heads * (a.head_dim + a.value_dim)
    return core_s(gpu, flops, 2.0 * tokens * (a.heads * width + kept) / tp)


def reduce_s(cluster: Cluster, num_bytes: float, ranks: int) -> float:
    """An all-reduce inside a node.

    Up to 8 GPUs as NCCL on NVLink of 450 GB/s, bytes at the cluster's rate; a ring beyond.
    """
    if ranks == 1:
        return 0.0
    if ranks <= max(ALL_REDUCE.points):
        least = ALL_REDUCE.seconds(ranks, 1.0)
        beyond = ALL_REDUCE.seconds(ranks, num_bytes) - least
        return least + beyond * 450e9 * 0.79 / cluster.nvlink_bytes_per_s
    moved = 2 * (ranks - 1) / ranks * num_bytes
    latency = cluster.nvlink_latency_s + RING_STEP_S * (2 * (ranks - 1) - 2)
    return moved / cluster.nvlink_bytes_per_s + latency + cluster.gpu.kernel_s
