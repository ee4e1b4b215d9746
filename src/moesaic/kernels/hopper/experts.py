"""The MoE layer on Hopper: sort and map, up-projection, down-projection, combine; four launches.

T tokens · H hidden width · I intermediate width · E experts · K top-k · S = T*K routed rows
"""

from __future__ import annotations

from collections.abc import Hashable
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
from .flex import layer_flex
from .launch import GLUON_DTYPES, HopperConfig, grouped_mm_hopper
from .pair import is_few, layer_pair
from .plans import planned
from .single import constants, one_token
from .tiles import triton_problem
from .zeros import prepare


class LayerConfig(NamedTuple):
    """The tiles of both products, which share one task map, and its order."""

    up: HopperConfig
    down: HopperConfig
    order: str = "index"


@lru_cache(maxsize=4096)
def choose(tokens: int, top_k: int, experts: int, up_rows: int, num_sms: int) -> LayerConfig:
    """Tiles for an expected number of rows per expert, the measured best of each range.

    With few rows the work is reading weights, and a narrow token side wastes no shared memory;
    from about fifty rows on, the tensor cores want many, and no more than there are: tiles trimmed
    to their rows, which they gather themselves.
    """
    rows_per_expert = tokens * top_k / experts
    for most, rows, stages in ((2, 16, 10), (12, 32, 9), (48, 64, 8)):
        if rows_per_expert <= most:
            tile = HopperConfig("decode", rows, 128, stages)
            return LayerConfig(tile, tile)
    if up_rows < 2048 and rows_per_expert <= 100:
        tile = HopperConfig("prefill", 128, 256, 4)
    else:
        tile = HopperConfig("trim", 160, 256, 4)
    return LayerConfig(tile, tile)


@lru_cache(maxsize=4096)
def choose_layer(tokens: int, top_k: int, experts: int, up_rows: int, num_sms: int) -> LayerConfig:
    """`choose`, but tiles for any routing where they were measured best over even, Zipf and worst.

    Few tokens, see `pair.is_few`, are one launch, sort and sum included. Where a token's up tiles
    of 128 weight rows are fewer than SMs, tiles of 64 are more: then not all of them end, and not
    all programs wait for the others' rows, at once. Experts as wide as Mixtral's keep two launches
    up to 96 tokens: a column of their down-projection is too long for one program, and narrow tiles
    spread it. A few experts with many rows run their largest first: no tall task then begins when
    the others end.
    """
    rows = tokens * top_k / experts
    spread = top_k * up_rows // 128 >= num_sms
    few = HopperConfig("pair", 16, 128 if spread else 64, 6 if spread else 10, bk=128)
    if up_rows >= 8192 and tokens <= 16:
        tile = HopperConfig("decode", 16, 64, 12)
    elif tokens == 1:
        tile = HopperConfig("pair", 16, 64, 10, bk=128)
    elif is_few(tokens, top_k, few):
        tile = few
    elif experts <= 16 and 100 < rows <= 340:
        tile = HopperConfig("tall", 256, 128, 4)
        return LayerConfig(tile, tile, "large_first")
    else:
        any_routing = _choose_any_routing(tokens, rows, top_k, up_rows, num_sms)
        if any_routing is None:
            return choose(tokens, top_k, experts, up_rows, num_sms)
        tile = any_routing
    return LayerConfig(tile, tile)


def _choose_any_routing(
    tokens: int, rows: float, top_k: int, up_rows: int, num_sms: int
) -> HopperConfig | None:
    """One launch for both products, by tiles that also hold the rows of an uneven routing.

    All tokens may go to the same experts: tiles as tall as `tokens` then read each weight once, and
    cost an even routing up to 2 % where its experts get few rows. Tiles of 256 weight rows are left
    where the worst case would leave a last wave of them half empty. None: `choose`.

    Args:
        rows: of an expert, if all got as many.
    """
    if tokens <= 96 or (up_rows < 3072 and tokens <= 192):
        if up_rows >= 8192 or rows > 20:
            return None
        if rows <= 2 and tokens <= 16:
            spread = top_k * up_rows // 128 >= num_sms
            return HopperConfig("pair", 16, 128, 6 if spread else 10, bk=128 if spread else 64)
        if tokens <= 48 or rows > 16:
            return HopperConfig("pair", 32, 128, 8)
        return HopperConfig("pair", 64, 128, 8)
    if tokens > 1536 or rows > (48 if up_rows < 2048 or up_rows >= 8192 else 128):
        return None
    waves = top_k * -(-up_rows // 256) * -(-tokens // 128) / num_sms
    if rows <= 20 or -(-waves // 1) > 1.1 * waves:
        return HopperConfig("flex", 128, 128, 6)
    return HopperConfig("flex", 128, 256, 4)


@lru_cache(maxsize=4096)
def choose_measured(
    tokens: int,
    top_k: int,
    up_shape: tuple[int, ...],
    gated: bool,
    dtype: torch.dtype,
    device: torch.device,
    num_sms: int,
) -> LayerConfig:
    """The tiles measured for this shape on this kind of device, whatever the budget; else
    `choose_layer`'s.

    Args:
        up_shape: (E, U, H), U = 2I when `gated`.
    """
    experts, up_rows, hidden = up_shape
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    problem = Problem(
        tokens, top_k, experts, hidden, up_rows // (2 if gated else 1), gated, 2,
        str(dtype).removeprefix("torch."), 90, device_family(name),
    )  # fmt: skip
    row = hopper_row(problem)
    if row is None:
        return choose_layer(tokens, top_k, experts, up_rows, num_sms)
    return layer_config(row)


def layer_config(row: dict[str, Any]) -> LayerConfig:
    """A table's row as a configuration."""
    up, down = HopperConfig(**row["up"]), HopperConfig(**row["down"])
    return LayerConfig(up, down, row.get("order", "index"))


def refusal(
    capability: tuple[int, int],
    dtype: torch.dtype,
    *,
    hidden_size: int,
    intermediate_size: int,
    plain: bool,
) -> str | None:
    """Why these kernels cannot run a layer, or None; `plain`: rows, and no bias where gated."""
    if capability != (9, 0):
        return f"compute capability 9.0 is needed, this device has {capability[0]}.{capability[1]}"
    if dtype not in GLUON_DTYPES:
        return f"bfloat16 or float16 is needed, the layer has {dtype}"
    if not plain:
        return "transposed, interleaved and gated biased experts have no Hopper kernel"
    if hidden_size % 64 or intermediate_size % 64:
        return f"H and I must be multiples of 64, got {hidden_size} and {intermediate_size}"
    return triton_problem()


def experts_hopper(
    hidden: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    *,
    up: Tensor,
    down: Tensor,
    activation: str = "silu",
    gated: bool = True,
    limit: float | None = None,
    alpha: float = 1.0,
    up_offset: float = 0.0,
    num_sms: int | None = None,
    config: LayerConfig | None = None,
    counters: Tensor | None = None,
    key: Hashable = None,
) -> Tensor:
    """Each token through its K experts, weighted and summed in slot order: the output (T, H).

    Args:
        hidden: (T, H) bf16 or fp16; H and I multiples of 64.
        topk_ids: (T, K) int32 or int64. topk_weights: (T, K), fp32 or the dtype of `hidden`.
        up: (E, U, H), U = 2I when `gated`. down: (E, H, I). Both contiguous.
        num_sms: SM budget of the products; None: all.
        config: instead of `choose_measured`'s; moves time, never bits.
        counters: (3, E) int32 to which each expert's rows and tiles are added: by the sort, and of
            a single token, which is not sorted, by the combine.
        key: stands for everything that a call depends on but for the addresses of its tensors,
            which are contiguous and on the current device; None: found out here.
    """
    tokens, top_k = topk_ids.shape
    if tokens == 0:
        return torch.empty_like(hidden)
    if key is None:
        # The kernels and `empty_like` take the rows of all three to lie one after the other.
        hidden, topk_ids = hidden.contiguous(), topk_ids.contiguous()
        topk_weights = topk_weights.contiguous()
    inputs: tuple[Tensor, ...] = (hidden, topk_ids, topk_weights, up, down)
    if counters is not None:
        inputs = (*inputs, counters)

    def call() -> Tensor:
        return _launches(
            hidden, topk_ids, topk_weights, up, down, activation, gated, limit, alpha, up_offset,
            num_sms, config, counters,
        )  # fmt: skip

    if key is None and all([t.is_contiguous() for t in inputs]):
        key = (
            hidden.shape, top_k, up.shape, down.shape, hidden.dtype, topk_ids.dtype,
            topk_weights.dtype, hidden.device, activation, gated, limit, alpha, up_offset, num_sms,
            config, counters is None,
        )  # fmt: skip
    if key is None or tokens * top_k > ONE_LAUNCH_SLOTS:
        return call()
    return planned(key, inputs, partial(_constants, tokens, top_k, hidden.device), call)


def _constants(tokens: int, top_k: int, device: torch.device) -> tuple[Tensor, ...]:
    """What a call uses besides its tensors, made before it is recorded."""
    if tokens > 1:
        return ()
    prepare(device)
    return constants(top_k, device)


def _launches(
    hidden: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    up: Tensor,
    down: Tensor,
    activation: str,
    gated: bool,
    limit: float | None,
    alpha: float,
    up_offset: float,
    num_sms: int | None,
    config: LayerConfig | None,
    counters: Tensor | None,
) -> Tensor:
    """`experts_hopper` through Triton's launcher."""
    tokens, top_k = topk_ids.shape
    num_sms = num_sms or sm_count(hidden.device)
    config = config or choose_measured(
        tokens, top_k, up.shape, gated, hidden.dtype, hidden.device, num_sms
    )
    epilogue = {
        "gated": gated, "activation": activation, "limit": limit, "alpha": alpha,
        "up_offset": up_offset,
    }  # fmt: skip
    if config.up.kernel == "pair":
        out = layer_pair(
            hidden, topk_ids, topk_weights, up, down, config=config.up,
            order=config.order,  # type: ignore[arg-type]
            num_sms=num_sms, epilogue=epilogue, counters=counters,
        )  # fmt: skip
        if out is not None:
            return out
        # Two launches have no deep stages: they would read past the end of a row.
        apart = config.up._replace(kernel="decode", bk=64)
        config = LayerConfig(apart, apart, config.order)
    if config.up.kernel == "flex":
        return layer_flex(
            hidden, topk_ids, topk_weights, up, down, config=config.up,
            order=config.order,  # type: ignore[arg-type]
            num_sms=num_sms, epilogue=epilogue, counters=counters,
        )  # fmt: skip
    if tokens == 1:
        order_S, tasks = one_token(topk_ids)
        position = order_S
        counted = None if counters is None else (tasks.task_N, counters)
    else:
        sort, tasks = batch_rows(
            topk_ids,
            up.shape[0],
            heights=(config.up.bm,),
            order=config.order,  # type: ignore[arg-type]
            counters=counters,
            pdl=True,
        )
        counted = None
        order_S, position = sort.order_S, sort.position_S
    rows_SH = products(
        hidden,
        order_S,
        tasks,
        top_k=top_k,
        up=up,
        down=down,
        activation=activation,
        gated=gated,
        limit=limit,
        alpha=alpha,
        up_offset=up_offset,
        num_sms=num_sms,
        config=config,
        tickets=(None, None) if tokens == 1 else (0, 1),
    )
    return combine(rows_SH, position.view(tokens, top_k), topk_weights, pdl=True, counted=counted)


def products(
    hidden: Tensor,
    order_S: Tensor,
    tasks: TaskMap,
    *,
    top_k: int,
    up: Tensor,
    down: Tensor,
    activation: str,
    gated: bool,
    limit: float | None,
    alpha: float,
    up_offset: float,
    num_sms: int,
    config: LayerConfig,
    tickets: tuple[int | None, int | None] = (0, 1),
    out: Tensor | None = None,
) -> Tensor:
    """Both products of the rows that `tasks` covers, two launches: rows (S, H) in sorted order.

    `out`: where they are written, (S, H) contiguous; rows of no task are left as they are.
    `tickets`: of the two launches, see `grouped_mm_hopper`.
    """
    act_SI = hidden.new_empty((order_S.numel(), down.shape[2]))
    sorts = config.up.kernel == "tall"
    grouped_mm_hopper(
        gather_rows(hidden, order_S, top_k, pdl=True) if sorts else hidden,
        up,
        tasks,
        act_SI,
        config=config.up,
        num_sms=num_sms,
        order_S=None if sorts else order_S,
        top_k=top_k,
        gated=gated,
        activation=activation,
        limit=limit,
        alpha=alpha,
        up_offset=up_offset,
        ticket=tickets[0],
        pdl="wait",
    )
    rows_SH = hidden.new_empty((order_S.numel(), hidden.shape[1])) if out is None else out
    return grouped_mm_hopper(
        act_SI,
        down,
        tasks,
        rows_SH,
        config=config.down,
        num_sms=num_sms,
        ticket=tickets[1],
        pdl="prefetch",
    )
