"""Ungated experts of two or three layers on Hopper, with biases: a launch a layer, or one for all.

    T tokens · H hidden width · I intermediate width · E experts · K top-k · S = T*K routed rows

    ids_TK ─ sort and map ─► order_S, TaskMap
    hidden_TH ─ up, activation ─► (S, I) ─ (mid, activation ─► (S, I) ─) down ─► (S, H) ─ combine

The first product reads the tokens through the order of the sort, or a sorted copy of them where its
tiles are tall; the others read sorted rows. All share one task map, so one tile height. Launches
overlap as in `experts`: each product begins to load weights while the one before still runs. Three
layers with biases and ReLU may also be one launch, see `chained`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..batching import batch_rows
from ..combine import combine
from ..device import sm_count
from ..gather import gather_rows
from ..sorting import ONE_LAUNCH_SLOTS
from ..taskmap import TaskMap
from ..tune import Problem, device_family, hopper_row
from .chain import ChainTiles, Experts, chain_mm_hopper
from .launch import HopperConfig, grouped_mm_hopper
from .plans import planned
from .single import constants, one_token


class MlpConfig(NamedTuple):
    """The tiles of each product, which share one task map, and its order.

    `chain`: tiles of one launch for three layers with biases and ReLU, where it is faster; then
    `tiles` are of other layers of the shape.
    """

    tiles: tuple[HopperConfig, ...]
    order: str = "index"
    chain: ChainTiles | None = None

    @property
    def height(self) -> int:
        """The tile height of the map."""
        return self.tiles[0].bm


class Layer(NamedTuple):
    """One product of the chain: weight (E, C, K), bias (E, C) or None, what follows it."""

    weight: Tensor
    bias: Tensor | None
    activation: str


TILES = (
    HopperConfig("decode", 16, 64, 12),
    HopperConfig("decode", 16, 128, 10),
    HopperConfig("decode", 32, 64, 12),
    HopperConfig("decode", 32, 128, 9),
    HopperConfig("decode", 64, 64, 10),
    HopperConfig("decode", 64, 128, 8),
    HopperConfig("decode", 128, 64, 8),
    HopperConfig("decode", 128, 128, 6),
    HopperConfig("prefill", 128, 256, 4),
    HopperConfig("tall", 64, 128, 8),
    HopperConfig("tall", 128, 128, 6),
    HopperConfig("tall", 192, 128, 4),
    HopperConfig("tall", 256, 128, 4),
    HopperConfig("tall", 320, 128, 3),
    HopperConfig("tall", 384, 128, 3),
)
BIASED = frozenset(tile.kernel for tile in TILES)
NARROW = {16: TILES[0], 32: TILES[2], 64: TILES[4]}
WIDE = {16: TILES[1], 32: TILES[3], 64: TILES[5]}
GATHERS, TALL_192, TALL_256 = TILES[8], TILES[11], TILES[12]


@lru_cache(maxsize=4096)
def choose_mlp(slots: int, experts: int, inter: int, layers: int, num_sms: int) -> MlpConfig:
    """Tiles for an expected number of routed rows, the measured best of each range on an H200.

    Few rows want tiles of about twice as many, so that an uneven expert stays one tile, and narrow
    ones where wide ones would leave SMs idle. More rows want tall tiles, whose rows are copied
    together first; where there are many rows for the width that copy does not pay. One launch for
    three layers pays where an expert has about a tile of rows, or all have few tiles.

    >>> [(t.kernel, t.bm, t.bn) for t in choose_mlp(128, 32, 4096, 3, 132).tiles[:1]]
    [('decode', 16, 128)]
    """
    live = min(slots, experts)
    rows = slots / live
    few = live * inter // 128 < num_sms
    if rows <= 48 or (few and rows <= 160):
        height = 16 if rows <= 8 else 32 if rows <= 24 else 64
        tile = (NARROW if few and rows <= 48 else WIDE)[height]
    elif inter <= 2 * rows and rows > 340:
        tile = GATHERS
    else:
        tile = TALL_192 if few or rows <= 100 else TALL_256
    chain = _choose_chain(slots, rows, inter, few) if layers == 3 else None
    return MlpConfig((tile,) * layers, chain=chain)


def _choose_chain(slots: int, rows: float, inter: int, few: bool) -> ChainTiles | None:
    """Tiles of one launch for all three products, where they were measured faster than three."""
    if 48 < rows <= 160 and not few:
        return ChainTiles(96, 128, 16, 6) if rows <= 80 else ChainTiles(144, 128, 16, 6)
    if few and 160 < rows <= 340:
        return ChainTiles(128, 128, 16, 6)
    if rows > 340 and slots <= 8192:
        return ChainTiles(128, 256, 32, 4) if inter >= 2048 else ChainTiles(128, 128, 16, 6)
    return None


@lru_cache(maxsize=4096)
def choose_measured(
    slots: int,
    top_k: int,
    shape: tuple[int, int, int],
    layers: int,
    dtype: torch.dtype,
    device: torch.device,
    num_sms: int,
) -> MlpConfig:
    """The tiles measured for this shape on this kind of device, whatever the budget; else
    `choose_mlp`'s.

    Args:
        shape: (E, H, I).
    """
    experts, hidden, inter = shape
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    problem = Problem(
        slots // top_k, top_k, experts, hidden, inter, False, layers,
        str(dtype).removeprefix("torch."), 90, device_family(name),
    )  # fmt: skip
    row = hopper_row(problem)
    measured = None if row is None else config_of(row)
    # A row may be of layers without biases, whose shapes have the same name and more tiles.
    if measured is None or any(tile.kernel not in BIASED for tile in measured.tiles):
        return choose_mlp(slots, experts, inter, layers, num_sms)
    return measured


def config_of(row: dict[str, Any]) -> MlpConfig:
    """A table's row as a configuration."""
    names = [name for name in ("up", "mid", "down") if name in row]
    chain = ChainTiles(**row["chain"]) if "chain" in row else None
    tiles = tuple(HopperConfig(**row[name]) for name in names)
    return MlpConfig(tiles, row.get("order", "index"), chain)


def row_of(config: MlpConfig) -> dict[str, Any]:
    """The table's row of a configuration."""
    names = ("up", "mid", "down") if len(config.tiles) == 3 else ("up", "down")
    tiles = {name: tile._asdict() for name, tile in zip(names, config.tiles, strict=True)}
    chain = {} if config.chain is None else {"chain": config.chain._asdict()}
    return tiles | {"order": config.order} | chain


def layers_of(
    up: Tensor,
    down: Tensor,
    mid: Tensor | None,
    biases: tuple[Tensor | None, Tensor | None, Tensor | None],
    activation: str,
) -> list[Layer]:
    """The chain of products; `biases` of up, mid and down."""
    middle = [] if mid is None else [Layer(mid, biases[1], activation)]
    return [Layer(up, biases[0], activation), *middle, Layer(down, biases[2], "none")]


def together_of(config: MlpConfig, layers: Sequence[Layer]) -> ChainTiles | None:
    """The tiles of one launch for all layers, where these have one: three, with biases, ReLU."""
    relu = [layer.activation for layer in layers] == ["relu", "relu", "none"]
    return config.chain if relu and all(layer.bias is not None for layer in layers) else None


def chain(
    hidden: Tensor,
    order_S: Tensor,
    tasks: TaskMap,
    layers: Sequence[Layer],
    *,
    top_k: int,
    config: MlpConfig,
    num_sms: int,
    limit: float | None = None,
    alpha: float = 1.0,
    draw: bool = True,
    out: Tensor | None = None,
) -> Tensor:
    """All products of the rows that `tasks` covers: rows (S, H) in sorted order.

    Args:
        draw: programs draw their tiles. A launch puts its counter back to zero and the next but one
            starts when it is over, so two counters serve any number of launches.
        out: where they are written, (S, H) contiguous; rows of no task are left as they are.
    """
    rows: Tensor = hidden
    gathered: Tensor | None = order_S
    if config.tiles[0].kernel == "tall":
        rows, gathered = gather_rows(hidden, order_S, top_k, pdl=True), None
    for number, (layer, tile) in enumerate(zip(layers, config.tiles, strict=True)):
        last = number == len(layers) - 1
        shape = (order_S.numel(), layer.weight.shape[1])
        into = out if last and out is not None else hidden.new_empty(shape)
        rows = grouped_mm_hopper(
            rows,
            layer.weight,
            tasks,
            into,
            config=tile,
            num_sms=num_sms,
            order_S=gathered,
            top_k=top_k,
            bias=layer.bias,
            activation=layer.activation,
            limit=None if last else limit,
            alpha=alpha,
            ticket=number % 2 if draw else None,
            pdl="prefetch" if number else "wait",
        )
        gathered = None
    return rows


def rows_mlp(
    hidden: Tensor,
    topk_ids: Tensor,
    *,
    up: Tensor,
    down: Tensor,
    mid: Tensor | None = None,
    up_bias: Tensor | None = None,
    mid_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "relu",
    limit: float | None = None,
    alpha: float = 1.0,
    num_sms: int | None = None,
    expected: int | None = None,
    config: MlpConfig | None = None,
    counters: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`experts_mlp` without the combine: rows (S, H), and where each slot's row is.

    Args:
        expected: how many live slots to expect, for the choice of tiles; None: all.
        out: where the rows are written, (S, H).

    Returns:
        The rows, and int32 (S,): the row of each slot; -1 where its id is not in [0, E).
    """
    slots, experts = topk_ids.numel(), up.shape[0]
    num_sms = num_sms or sm_count(hidden.device)
    layers = layers_of(up, down, mid, (up_bias, mid_bias, down_bias), activation)
    config = config or choose_measured(
        max(1, slots if expected is None else expected), topk_ids.shape[1],
        (experts, up.shape[2], up.shape[1]), len(layers), hidden.dtype, hidden.device, num_sms,
    )  # fmt: skip
    one = topk_ids.shape[0] == 1 and counters is None and out is None
    together = None if one else together_of(config, layers)
    # Slots of nobody are tasks there too: weights and bias of no expert are read as zeros.
    if one:
        order_S, tasks = one_token(topk_ids)
        position_S = order_S
    else:
        sort, tasks = batch_rows(
            topk_ids,
            experts,
            heights=(together.bm if together else config.height,),
            order=config.order,  # type: ignore[arg-type]
            counters=counters,
            pdl=True,
        )
        order_S, position_S = sort.order_S, sort.position_S
    if together is not None:
        rows_SH = hidden.new_empty((slots, hidden.shape[1])) if out is None else out
        chain_mm_hopper(
            hidden, Experts(*zip(*(layer[:2] for layer in layers), strict=True)), tasks, rows_SH,
            tiles=together, num_sms=num_sms, order_S=order_S, top_k=topk_ids.shape[1], pdl=True,
        )  # fmt: skip
        return rows_SH, position_S
    rows_SH = chain(
        hidden, order_S, tasks, layers, top_k=topk_ids.shape[1], config=config, num_sms=num_sms,
        limit=limit if mid is None else None, alpha=alpha, draw=not one, out=out,
    )  # fmt: skip
    return rows_SH, position_S


def experts_mlp(
    hidden: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    *,
    counters: Tensor | None = None,
    **weights: Any,
) -> Tensor:
    """Each token through its K experts, weighted and summed in slot order: the output (T, H).

    Args:
        hidden: (T, H) bf16 or fp16; H and I multiples of 64.
        topk_ids: (T, K) int32 or int64. topk_weights: (T, K), fp32 or the dtype of `hidden`.
        counters: (3, E) int32 to which each expert's rows and tiles are added: by the sort, and of
            a single token, which is not sorted, by the combine.
        weights: arguments of `rows_mlp`: `up` (E, I, H), `mid` (E, I, I), `down` (E, H, I), biases
            (E, width), activation, `num_sms` (SM budget of the products), `config` (moves time,
            never bits).
    """
    if topk_ids.numel() == 0:
        return torch.zeros_like(hidden)
    device = hidden.device
    if device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return experts_mlp(hidden, topk_ids, topk_weights, counters=counters, **weights)
    hidden, topk_ids = hidden.contiguous(), topk_ids.contiguous()
    topk_weights = topk_weights.contiguous()

    def call() -> Tensor:
        return _launches(hidden, topk_ids, topk_weights, counters, weights)

    given = {name: value for name, value in weights.items() if isinstance(value, Tensor)}
    inputs = (hidden, topk_ids, topk_weights, *given.values())
    if counters is not None:
        inputs = (*inputs, counters)
    if topk_ids.numel() > ONE_LAUNCH_SLOTS or not all([t.is_contiguous() for t in inputs]):
        return call()
    how = tuple([(name, v) for name, v in weights.items() if not isinstance(v, Tensor)])
    key = (
        "mlp", hidden.shape, topk_ids.shape, *given, weights["up"].shape, hidden.dtype,
        topk_ids.dtype, topk_weights.dtype, device, counters is None, how,
    )  # fmt: skip
    return planned(key, inputs, partial(_constants, topk_ids.shape, device), call)


def _constants(shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, ...]:
    """What a call uses besides its tensors, made before it is recorded."""
    return constants(shape[1], device) if shape[0] == 1 else ()


def _launches(
    hidden: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    counters: Tensor | None,
    weights: dict[str, Any],
) -> Tensor:
    """`experts_mlp` through Triton's launcher."""
    counted = None
    if topk_ids.shape[0] == 1 and counters is not None:
        counted, counters = (topk_ids[0], counters), None
    rows_SH, position_S = rows_mlp(hidden, topk_ids, counters=counters, **weights)
    position_TK = position_S.view(topk_ids.shape)
    return combine(rows_SH, position_TK, topk_weights, pdl=True, counted=counted)
