"""The experts of one layer on the CPU: rows grouped by expert, stable products, fixed-order sum.

    T tokens · K top-k · S = T*K slots · E experts · H hidden · U width of the first product
    I intermediate · P padded rows · B experts of one batch · M rows of each

1. Sort the slots by expert (stably) and lay every expert's rows out padded to a fixed height, so
   that consecutive experts with the same height form one batch: rows (P, H), one gather.
2. Per batch: up product, activation, (mid product, activation,) down product into rows (P, H).
3. Sum each token's K rows in slot order, in fp32, and round once.

The bits of a token's output depend on its own row, ids and weights alone. Products hold that by
`cpu_products`, activations by `cpu_activation`. The sum has one order per token.

Padding rows repeat some token's row; their results are dropped.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from . import cpu_products as products
from .cpu_activation import Act, activate

CALL_COST = 4.5e6
PHASED_HEIGHT = 32
PHASED_ELEMENTS = 1 << 22
FEW_SLOTS = 256
GATHERED_ELEMENTS = 6 << 20


class Run(NamedTuple):
    """`batch` consecutive experts from `first`, `height` rows each, from padded row `row`."""

    first: int
    batch: int
    height: int
    row: int


class Shapes:
    """The products of one layer, and which of their shapes may be used here; answers are kept."""

    def __init__(self, keys: tuple[products.Key, ...], packs: bool = False) -> None:
        self.keys, self.packs = keys, packs
        self.row_cost = sum(2 * n * k for n, k, *_ in keys)
        self.small = max(n * k for n, k, *_ in keys) <= products.SMALL_MATRIX
        self._usable: dict[tuple[int, int], bool] = {}
        self._tiles: dict[int, tuple[int, ...]] = {}
        self._columns: dict[tuple[int, int, int], bool] = {}
        self._packed: dict[tuple[int, int], bool] = {}
        self._gathers: dict[tuple[int, int], bool] = {}
        self.trusted = all(products.anchor_height(key) > 1 for key in keys)

    def packed(self, which: int, height: int) -> bool:
        """Whether product `which` takes its packed weights at this height."""
        if not self.packs:
            return False
        known = self._packed.get((which, height))
        if known is None:
            key = self.keys[which]
            known = products.prefers_packed(height, *key[:3])
            known = known and products.packed_stable(key, height)
            self._packed[which, height] = known
        return known

    def columns(self, which: int, batch: int, height: int) -> bool:
        """Whether product `which` keeps its weights on the left at this batch and height."""
        known = self._columns.get((which, batch, height))
        if known is None:
            n, k, dtype, transposed, _ = self.keys[which]
            known = (
                self.trusted
                and not transposed
                and not (batch == 1 and self.packed(which, height))
                and products.prefers_columns(height, n, k, dtype)
                and products.stable(self.keys[which], batch, height, True)
            )
            self._columns[which, batch, height] = known
        return known

    def usable(self, batch: int, height: int) -> bool:
        """Whether every product of the layer is stable for `batch` experts of `height` rows."""
        known = self._usable.get((batch, height))
        if known is None:
            known = height == 1 or self.trusted
            if batch > 1:
                known = known and not self.packs and height in products.BATCHED_HEIGHTS
                largest = batch * max(n * k for n, k, *_ in self.keys)
                known = known and largest <= products.BATCHED_ELEMENTS
            known = known and all(
                self.packed(which, height) or products.stable(key, batch, height, False)
                for which, key in enumerate(self.keys)
            )
            self._usable[batch, height] = known
        return known

    def gathers(self, batch: int, height: int) -> bool:
        """Whether a copy of these `batch` experts' weights and one product of them is faster.

        It is for a few small experts: a call of its own for each costs more than the copy.
        """
        known = self._gathers.get((batch, height))
        if known is None:
            elements = batch * sum(n * k for n, k, *_ in self.keys)
            known = (
                self.trusted
                and batch > 1
                and self.small
                and elements <= GATHERED_ELEMENTS
                and not self.keys[0][3]
                and all(products.stable(key, batch, height, False) for key in self.keys)
            )
            self._gathers[batch, height] = known
        return known

    def tiles(self, rows: int) -> tuple[int, ...]:
        """The heights of the tiles that hold `rows` rows of one expert, the padded one last."""
        known = self._tiles.get(rows)
        if known is None:
            heights = products.PACKED_HEIGHTS if self.packs else products.HEIGHTS
            tried = heights if self.trusted else (1,)
            tallest = next(h for h in reversed(tried) if h == 1 or self.usable(1, h))
            rest = rows % tallest
            known = (tallest,) * (rows // tallest)
            if rest:
                batched = [h for h in products.BATCHED_HEIGHTS if h >= rest and self.usable(2, h)]
                single = (h for h in tried if h >= rest and self.usable(1, h))
                known += (batched[0] if batched else next(single),)
            self._tiles[rows] = known
        return known


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


Counts = list[tuple[int, int]]


def plan_runs(counts: Counts, shapes: Shapes) -> tuple[list[Run], dict[int, int], int]:
    """Runs for (expert, rows) pairs in order, each expert's first padded row, the padded total.

    Experts with neighbouring ids join a batch as long as padding them to a common height costs
    less time than the calls it saves.
    """
    runs: list[Run] = []
    starts: dict[int, int] = {}
    waste_allowed = CALL_COST / shapes.row_cost
    row = i = 0
    while i < len(counts):
        first, count = counts[i]
        tiles = shapes.tiles(count)
        starts[first] = row
        batch, height = 1, tiles[0]
        i += 1
        if len(tiles) > 1 or not shapes.usable(2, height):
            for height in tiles:
                runs.append(Run(first, 1, height, row))
                row += height
            continue
        held = height
        while i < len(counts) and counts[i][0] == first + batch:
            tiles = shapes.tiles(counts[i][1])
            taller = max(height, tiles[0])
            waste = taller * (batch + 1) - held - tiles[0]
            if len(tiles) > 1 or waste > batch * waste_allowed or not shapes.usable(2, taller):
                break
            batch, height, held, i = batch + 1, taller, held + tiles[0], i + 1
        for b in range(batch):
            starts[first + b] = row + b * height
        runs += _split(first, batch, height, row, shapes)
        row += batch * height
    return runs, starts, row


Packed = tuple[tuple[Tensor, ...], ...]


@dataclass(frozen=True)
class Layer:
    """The weights of one call, seen as (E, N, K), with their biases, in order of use.

    `packed`: for every product, the packed weights of each expert; or nothing.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    act: Act
    compute: torch.dtype
    packed: Packed = ()

    def gather(self, experts_B: Tensor) -> Layer:
        """A layer of copies of these experts alone."""
        return replace(
            self,
            weights=tuple(w.index_select(0, experts_B) for w in self.weights),
            biases=tuple(b if b is None else b.index_select(0, experts_B) for b in self.biases),
            packed=(),
        )


def _linear(x: Tensor, which: int, run: Run, layer: Layer, shapes: Shapes, columns: bool) -> Tensor:
    """Product and bias of one run, from (M, K) or (B, M, K): (.., M, N), or (.., N, M)."""
    weights, bias_EN = layer.weights[which], layer.biases[which]
    first, batch, height, _ = run
    if batch == 1 and shapes.packed(which, height):
        y = products.packed_product(x, layer.packed[which][first])
    elif batch == 1:
        w_NK = weights[first]
        if w_NK.dtype is not layer.compute:
            w_NK = w_NK.to(layer.compute)
        y = products.one_product(x, w_NK, columns=columns)
    else:
        w_BNK = weights[first : first + batch].to(layer.compute)
        y = products.product(x, w_BNK, columns=columns)
    if bias_EN is not None:
        bias_BN = bias_EN[first : first + batch].to(layer.compute)
        bias = bias_BN[:, :, None] if columns else bias_BN[:, None]
        y.add_(bias[0] if batch == 1 else bias)
    return y


def _of_run(rows: Tensor, run: Run) -> Tensor:
    """Rows (B*M, N) of a run as (B, M, N), or (M, N) when B is 1."""
    return rows if run.batch == 1 else rows.view(run.batch, run.height, -1)


def _one_by_one(x_PH: Tensor, y_PH: Tensor, runs: list[Run], layer: Layer, shapes: Shapes) -> None:
    """All products of one run, then the next: what was just written is still in the cache."""
    last = len(layer.weights) - 1
    sizes = [run.batch * run.height for run in runs]
    for run, x_RH, y_RH in zip(runs, x_PH.split(sizes), y_PH.split(sizes), strict=True):
        x = _of_run(x_RH, run)
        for which in range(last + 1):
            columns = shapes.columns(which, run.batch, run.height)
            h = _linear(x, which, run, layer, shapes, columns)
            if which < last:
                h = activate(h, columns, layer.act)
            x = h.mT if columns else h
        _of_run(y_RH, run).copy_(x)


def _phased(x_PH: Tensor, y_PH: Tensor, runs: list[Run], layer: Layer, shapes: Shapes) -> None:
    """The up products of all runs, one activation, then the next products: few calls."""
    sizes = [run.batch * run.height for run in runs]
    x, last = x_PH, len(layer.weights) - 1
    for which in range(last + 1):
        parts = []
        for rows, run in zip(x.split(sizes), runs, strict=True):
            y = _linear(_of_run(rows, run), which, run, layer, shapes, False)
            parts.append(y if run.batch == 1 else y.flatten(0, 1))
        h = torch.cat(parts)
        if which == last:
            y_PH.copy_(h)
        else:
            x = activate(h, False, layer.act)


class Layout(NamedTuple):
    """Where every row goes: runs, the token of each padded row, the padded row of each slot.

    Slots of nobody (id E) point to row P, one past the rows. With `gathered` the runs number the
    experts in that list, whose weights are copied together first.
    """

    runs: list[Run]
    token_P: Tensor
    slot_rows_S: Tensor
    gathered: Tensor | None = None


def lay_out(topk_ids_TK: Tensor, experts: int, shapes: Shapes) -> Layout:
    """The layout of many slots, by a stable sort."""
    tokens, k = topk_ids_TK.shape
    ids_S = topk_ids_TK.reshape(-1)
    sorted_S, order_S = torch.sort(ids_S, stable=True)
    counts_E = torch.bincount(ids_S, minlength=experts + 1)
    *counts, nobody = counts_E.tolist()
    active = [(e, count) for e, count in enumerate(counts) if count]
    runs, starts, padded = plan_runs(active, shapes)
    begins_E = torch.cumsum(counts_E, 0) - counts_E
    starts_E = torch.tensor([*(starts.get(e, 0) for e in range(experts)), padded])
    rows_S = (starts_E - begins_E)[sorted_S] + torch.arange(tokens * k)
    rows_S[tokens * k - nobody :] = padded
    slot_rows_S = torch.empty_like(rows_S)
    slot_rows_S[order_S] = rows_S
    token_P = torch.zeros(padded + 1, dtype=torch.long)
    token_P[rows_S] = order_S // k
    return Layout(runs, token_P[:padded], slot_rows_S)


def lay_out_few(topk_ids_TK: Tensor, experts: int, shapes: Shapes) -> Layout:
    """The same layout of few slots, for which one loop is faster than a dozen torch calls."""
    tokens, k = topk_ids_TK.shape
    slots: dict[int, list[int]] = {}
    for slot, e in enumerate(topk_ids_TK.reshape(-1).tolist()):
        if e in slots:
            slots[e].append(slot)
        else:
            slots[e] = [slot]
    slots.pop(experts, None)
    active = sorted(slots)
    most = max(map(len, slots.values()), default=0)
    height = next((h for h in products.BATCHED_HEIGHTS if h >= most), 0)
    gathers = height > 0 and shapes.gathers(len(active), height)
    if gathers:
        runs, padded = [Run(0, len(active), height, 0)], len(active) * height
        starts = {e: row for e, row in zip(active, range(0, padded, height), strict=True)}
    else:
        runs, starts, padded = plan_runs([(e, len(slots[e])) for e in active], shapes)
    tokens_of = [0] * padded
    rows_of = [padded] * (tokens * k)
    for e, start in starts.items():
        for row, slot in enumerate(slots[e], start):
            tokens_of[row] = slot // k
            rows_of[slot] = row
    return Layout(
        runs,
        torch.tensor(tokens_of, dtype=torch.long),
        torch.tensor(rows_of),
        torch.tensor(active) if gathers else None,
    )


def combine_cpu(y_PH: Tensor, slot_rows_S: Tensor, topk_weights_TK: Tensor) -> Tensor:
    """Each token's K rows, weighted and summed in slot order in fp32: (T, H)."""
    tokens, k = topk_weights_TK.shape
    bags_T = torch.arange(0, tokens * k, k)
    weights_S = topk_weights_TK.reshape(-1).float()
    out_TH: Tensor = torch._embedding_bag_forward_only(
        y_PH, slot_rows_S, bags_T, False, 0, False, weights_S
    )[0]
    return out_TH


def _compute(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which products of `dtype` run here."""
    return dtype if products.computes(dtype) else torch.float32


def _views(weights: tuple[Tensor | None, ...], transposed: bool) -> tuple[Tensor, ...]:
    """The weights that are there, seen as (E, N, K)."""
    return tuple(w.transpose(1, 2) if transposed else w for w in weights if w is not None)


def pack_experts(up: Tensor, down: Tensor, mid: Tensor | None, *, transposed: bool) -> Packed:
    """For up, mid and down, the packed weights of every expert; memory as of `packed_bytes`.

    Raises:
        RuntimeError: this torch or this CPU has no oneDNN to pack for.
    """
    if not products.has_onednn():
        raise RuntimeError("packing needs a torch with oneDNN on this CPU; use the plain weights")
    compute = _compute(up.dtype)
    return tuple(
        tuple(products.pack(w_NK.to(compute)) for w_NK in w_ENK)
        for w_ENK in _views((up, mid, down), transposed)
    )


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
    packed: Packed = (),
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Each token through its K experts, weighted and summed in slot order: (T, H) like `hidden_TH`.

    Args:
        hidden_TH: fp32, bf16 or fp16.
        topk_ids_TK: int32 or int64 in [0, E]; E means nobody here and adds nothing.
        topk_weights_TK: fp32 or the dtype of `hidden_TH`.
        up, down, mid and biases: as in `types.ExpertSpec.weight_shapes`; three layers with `mid`.
        activation, gated, interleaved, transposed, limit, alpha, up_offset: as in
            `types.ExpertSpec`.
        packed: what `pack_experts` made of these weights. out_dtype: None: that of `hidden_TH`.
    """
    if topk_ids_TK.numel() == 0:
        return torch.zeros_like(hidden_TH, memory_format=torch.contiguous_format)
    compute = _compute(hidden_TH.dtype)
    named = [(up, up_bias), (mid, mid_bias), (down, down_bias)]
    layer = Layer(
        _views((up, mid, down), transposed),
        tuple(b for w, b in named if w is not None),
        Act(activation, gated, interleaved, limit, alpha, up_offset),
        compute,
        packed,
    )
    shapes = _shapes(
        tuple((w.shape[1], w.shape[2]) for w in layer.weights),
        compute,
        transposed,
        torch.get_num_threads(),
        bool(packed),
    )
    choose = lay_out_few if topk_ids_TK.numel() <= FEW_SLOTS else lay_out
    runs, token_P, slot_rows_S, gathered = choose(topk_ids_TK, up.shape[0], shapes)
    if gathered is not None:
        layer = layer.gather(gathered)
    padded = token_P.shape[0]
    x_PH = hidden_TH.index_select(0, token_P).to(compute)
    y_PH = torch.empty(padded + 1, hidden_TH.shape[1], dtype=torch.float32)
    y_PH[padded].zero_()
    tallest = max((run.height for run in runs), default=0)
    widest = max(w.shape[1] for w in layer.weights)
    few = tallest <= PHASED_HEIGHT and padded * widest <= PHASED_ELEMENTS
    if runs and shapes.small and few:
        _phased(x_PH, y_PH[:padded], runs, layer, shapes)
    else:
        _one_by_one(x_PH, y_PH[:padded], runs, layer, shapes)
    return combine_cpu(y_PH, slot_rows_S, topk_weights_TK).to(out_dtype or hidden_TH.dtype)


@lru_cache(maxsize=256)
def _shapes(
    widths: tuple[tuple[int, int], ...],
    compute: torch.dtype,
    transposed: bool,
    threads: int,
    packs: bool,
) -> Shapes:
    return Shapes(tuple((n, k, compute, transposed, threads) for n, k in widths), packs)
