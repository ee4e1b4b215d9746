"""The experts of one layer on the CPU: rows grouped by expert, stable products, fixed-order sum.

    T tokens · K top-k · S = T*K slots · E experts · H hidden · U width of the first product
    I intermediate · P padded rows · B experts of one batch · M rows of each

1. Sort the slots by expert (stably) and lay every expert's rows out padded to a fixed height, so
   that consecutive experts with the same height form one batch: rows (P, H), one gather.
2. Per batch: up product, activation, (mid product, activation,) down product into rows (P, H).
3. Sum each token's K rows in slot order, in fp32, and round once.

The bits of a token's output depend on its own row, ids and weights alone. Products hold that by
`cpu_products`. Elementwise functions need care too: torch computes the last few elements of each
thread's share by scalar code, whose exponential rounds differently from the vector code, so
`flat_blocks` cuts every call such that no such rest exists. The sum has one order per token.

Padding rows repeat some token's row; their results are dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from . import cpu_products as products
from .activation import pointwise_ref

VECTOR = 64
GRAIN = 32768
CALL_ROW_COST = 4.5e6


class Run(NamedTuple):
    """`batch` consecutive experts from `first`, `height` rows each, from padded row `row`."""

    first: int
    batch: int
    height: int
    row: int


@dataclass(frozen=True)
class Shapes:
    """The products of one layer, and which of their shapes may be used here."""

    keys: tuple[products.Key, ...]
    row_cost: int

    def columns(self, which: int, height: int, batch: int = 1) -> bool:
        """Whether product `which` keeps its weights on the left at this height."""
        n, k, dtype, transposed, _ = self.keys[which]
        return (
            batch == 1
            and not transposed
            and products.prefers_columns(height, n, k)
            and products.stable(self.keys[which], 1, height, True)
        )

    def usable(self, batch: int, height: int) -> bool:
        """Whether every product of the layer is stable for `batch` experts of `height` rows."""
        return _usable(self, batch, height)

    def heights(self) -> tuple[int, ...]:
        """The heights tried, smallest first; one row at a time if there is no stable anchor."""
        if all(products.anchor_height(key) > 1 for key in self.keys):
            return products.HEIGHTS
        return (1,)


@lru_cache(maxsize=65536)
def _usable(shapes: Shapes, batch: int, height: int) -> bool:
    if batch > 1 and (
        height > products.BATCHED_HEIGHT
        or batch * max(n * k for n, k, *_ in shapes.keys) > products.BATCHED_ELEMENTS
    ):
        return False
    return all(
        shapes.columns(i, height, batch) or products.stable(key, batch, height, False)
        for i, key in enumerate(shapes.keys)
    )


@lru_cache(maxsize=4096)
def tile_heights(rows: int, shapes: Shapes) -> tuple[int, ...]:
    """The heights of the tiles that hold `rows` rows of one expert, the padded one last."""
    heights = [h for h in shapes.heights() if h == 1 or shapes.usable(1, h)]
    tiles = [heights[-1]] * (rows // heights[-1])
    rest = rows % heights[-1]
    if rest:
        tiles.append(next(h for h in heights if h >= rest))
    return tuple(tiles)


def _split(first: int, batch: int, height: int, row: int, shapes: Shapes) -> list[Run]:
    """`batch` experts as runs whose batch is a power of two, so that few shapes occur."""
    runs = []
    while batch:
        part = 1 << (batch.bit_length() - 1)
        while part > 1 and not shapes.usable(part, height):
            part //= 2
        runs.append(Run(first, part, height, row))
        first, batch, row = first + part, batch - part, row + part * height
    return runs


def plan_runs(counts: list[int], shapes: Shapes) -> tuple[list[Run], list[int], int]:
    """Runs for `counts` rows per expert, each expert's first padded row, and the padded total.

    Consecutive experts join a batch as long as padding them to a common height costs less time
    than the calls it saves.
    """
    runs: list[Run] = []
    starts: list[int] = []
    row = 0
    group: list[int] = []
    waste_allowed = CALL_ROW_COST / shapes.row_cost
    first = 0

    def close() -> None:
        nonlocal row
        if group:
            height = max(group)
            starts.extend(row + i * height for i in range(len(group)))
            runs.extend(_split(first, len(group), height, row, shapes))
            row += len(group) * height
            group.clear()

    for e, count in enumerate(counts):
        tiles = tile_heights(count, shapes)
        joins = len(tiles) == 1 and shapes.usable(2, tiles[0])
        if group and joins:
            height = max(*group, tiles[0])
            waste = height * (len(group) + 1) - sum(group) - tiles[0]
            joins = waste <= len(group) * waste_allowed
            if not joins:
                close()
                joins = True
        else:
            close()
        if joins:
            first = first if group else e
            group.append(tiles[0])
            continue
        starts.append(row)
        for height in tiles:
            runs.append(Run(e, 1, height, row))
            row += height
    close()
    return runs, starts, row


def flat_blocks(flat: Tensor, threads: int) -> list[Tensor]:
    """`flat` (a multiple of 64 elements) in parts of which each thread gets a multiple of 64.

    torch gives each of ``min(threads, ceil(n / 32768))`` threads one contiguous share of n
    elements; in every part returned here that share is 32768 elements a thread, a multiple of
    that, or the whole part.
    """
    n = flat.numel()
    even = n // (GRAIN * threads) * (GRAIN * threads)
    full = n // GRAIN * GRAIN
    cuts = sorted({0, even, full, n})
    return [flat[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]


def _pointwise_(x: Tensor, activation: str, alpha: float) -> Tensor:
    """The activation of `x`, with the same bits wherever an element stands; may overwrite `x`."""
    if activation == "relu":
        return x.relu_()
    if activation == "relu2":
        return x.relu_().square_()
    n = x.numel()
    if x.is_contiguous() and n % VECTOR == 0:
        flat = x.view(-1)
    else:
        flat = x.new_zeros(-(-n // VECTOR) * VECTOR)
        flat[:n].view(x.shape).copy_(x)
    for block in flat_blocks(flat, torch.get_num_threads()):
        if activation == "silu" and alpha == 1.0:
            torch.nn.functional.silu(block, inplace=True)
        else:
            block.copy_(pointwise_ref(block, activation, alpha))
    return flat[:n].view(x.shape)


class Act(NamedTuple):
    """The activation's options, as in `activation.activate_ref`."""

    activation: str
    gated: bool
    interleaved: bool
    limit: float | None
    alpha: float
    up_offset: float


def _activate(h: Tensor, dim: int, act: Act) -> Tensor:
    """The activated product; `dim` is where the U columns are. Overwrites `h`."""
    if not act.gated:
        return _pointwise_(h if act.limit is None else h.clamp_(max=act.limit), *act[:1], act.alpha)
    width = h.shape[dim]
    if act.interleaved:
        h_pairs = h.unflatten(dim, (width // 2, 2))
        gate, up = h_pairs.select(dim + 1, 0), h_pairs.select(dim + 1, 1)
    else:
        gate, up = h.narrow(dim, 0, width // 2), h.narrow(dim, width // 2, width // 2)
    if act.limit is not None:
        gate, up = gate.clamp(max=act.limit), up.clamp(-act.limit, act.limit)
    if act.up_offset:
        up = up + act.up_offset
    return _pointwise_(gate, act.activation, act.alpha).mul_(up)


@dataclass(frozen=True)
class Layer:
    """The weights of one call, seen as (E, N, K), with their biases, in order of use."""

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    act: Act
    compute: torch.dtype

    def slice(self, which: int, run: Run) -> Tensor:
        """Weights (B, N, K) of the run's experts in the compute dtype."""
        return self.weights[which][run.first : run.first + run.batch].to(self.compute)


def _linear(x_BMK: Tensor, which: int, run: Run, layer: Layer, columns: bool) -> Tensor:
    """Product and bias: (B, M, N), or (B, N, M) when `columns`."""
    y = products.product(x_BMK, layer.slice(which, run), columns=columns)
    bias_EN = layer.biases[which]
    if bias_EN is None:
        return y
    bias_BN = bias_EN[run.first : run.first + run.batch].to(layer.compute)
    return y.add_(bias_BN.unsqueeze(2 if columns else 1))


def _run_experts(x_BMH: Tensor, y_BMH: Tensor, run: Run, layer: Layer, shapes: Shapes) -> None:
    """All products of one run; writes its rows of `y_BMH` (fp32)."""
    x = x_BMH
    last = len(layer.weights) - 1
    for which in range(last):
        columns = shapes.columns(which, run.height, run.batch)
        h = _activate(_linear(x, which, run, layer, columns), 1 if columns else 2, layer.act)
        x = h.transpose(1, 2) if columns else h
    columns = shapes.columns(last, run.height, run.batch)
    y = _linear(x, last, run, layer, columns)
    y_BMH.copy_(y.transpose(1, 2) if columns else y)


def _layout(
    topk_ids_TK: Tensor, experts: int, shapes: Shapes
) -> tuple[list[Run], Tensor, Tensor, int]:
    """Runs, the token of each padded row (P,), the padded row of each slot (S,), and P.

    Slots of nobody (id E) point to row P, one past the rows.
    """
    tokens, k = topk_ids_TK.shape
    ids_S = topk_ids_TK.reshape(-1)
    sorted_S, order_S = torch.sort(ids_S, stable=True)
    counts_E = torch.bincount(ids_S, minlength=experts + 1)
    counts = counts_E.tolist()
    runs, starts, padded = plan_runs(counts[:experts], shapes)
    begins_E = torch.cumsum(counts_E, 0) - counts_E
    shift_E = torch.tensor([*starts, padded]) - begins_E
    rows_S = shift_E[sorted_S] + torch.arange(tokens * k)
    if counts[experts]:
        rows_S[tokens * k - counts[experts] :] = padded
    slot_rows_S = torch.empty_like(rows_S)
    slot_rows_S[order_S] = rows_S
    token_P = torch.zeros(padded + 1, dtype=torch.long)
    token_P[rows_S] = order_S // k
    return runs, token_P[:padded], slot_rows_S, padded


def _combine(y_PH: Tensor, slot_rows_S: Tensor, topk_weights_TK: Tensor) -> Tensor:
    """Each token's K rows, weighted and summed in slot order in fp32: (T, H)."""
    tokens, k = topk_weights_TK.shape
    bags_T = torch.arange(0, tokens * k, k)
    weights_S = topk_weights_TK.reshape(-1).float()
    out_TH: Tensor = torch._embedding_bag_forward_only(
        y_PH, slot_rows_S, bags_T, False, 0, False, weights_S
    )[0]
    return out_TH


def experts_cpu(
    hidden_TH: Tensor,
    topk_ids_TK: Tensor,
    topk_weights_TK: Tensor,
    *,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    mid: Tensor | None = None,
    mid_bias: Tensor | None = None,
    activation: str,
    gated: bool,
    interleaved: bool = False,
    transposed: bool = False,
    limit: float | None = None,
    alpha: float = 1.0,
    up_offset: float = 0.0,
) -> Tensor:
    """Each token through its K experts, weighted and summed in slot order: (T, H) like `hidden_TH`.

    Args:
        hidden_TH: fp32, bf16 or fp16.
        topk_ids_TK: int32 or int64 in [0, E]; E means nobody here and adds nothing.
        topk_weights_TK: fp32 or the dtype of `hidden_TH`.
        up, down, up_bias, down_bias, mid, mid_bias: as in `types.ExpertSpec.weight_shapes`; a
            three-layer expert is one with `mid`.
        activation, gated, interleaved, transposed, limit, alpha, up_offset: as in
            `types.ExpertSpec`.
    """
    if topk_ids_TK.numel() == 0:
        return torch.zeros_like(hidden_TH, memory_format=torch.contiguous_format)
    compute = hidden_TH.dtype if products.computes(hidden_TH.dtype) else torch.float32
    named = [(up, up_bias), (mid, mid_bias), (down, down_bias)]
    present = [(w.transpose(1, 2) if transposed else w, b) for w, b in named if w is not None]
    layer = Layer(
        tuple(w for w, _ in present),
        tuple(b for _, b in present),
        Act(activation, gated, interleaved, limit, alpha, up_offset),
        compute,
    )
    shapes = _shapes(
        tuple((w.shape[1], w.shape[2]) for w in layer.weights),
        compute,
        transposed,
        torch.get_num_threads(),
    )
    runs, token_P, slot_rows_S, padded = _layout(topk_ids_TK, up.shape[0], shapes)
    x_PH = hidden_TH.index_select(0, token_P).to(compute)
    y_PH = torch.empty(padded + 1, hidden_TH.shape[1], dtype=torch.float32)
    y_PH[padded].zero_()
    for run in runs:
        rows = slice(run.row, run.row + run.batch * run.height)
        shape = (run.batch, run.height, -1)
        _run_experts(x_PH[rows].view(shape), y_PH[rows].view(shape), run, layer, shapes)
    return _combine(y_PH, slot_rows_S, topk_weights_TK).to(hidden_TH.dtype)


@lru_cache(maxsize=256)
def _shapes(
    widths: tuple[tuple[int, int], ...], compute: torch.dtype, transposed: bool, threads: int
) -> Shapes:
    keys = tuple((n, k, compute, transposed, threads) for n, k in widths)
    return Shapes(keys, sum(2 * n * k for n, k in widths))
