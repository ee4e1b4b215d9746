"""The expert layer on a GPU: sort, first product, (middle product,) last product, combine.

    T tokens · H hidden width · I intermediate width · E experts · K top-k · S = T*K routed rows

Four or five launches whatever the routing, no host sync, every buffer sized by S alone:

    ids_TK ─ batch_rows ─► order_S, TaskMap
    hidden_TH ─ up, activation ─► act_SI ─ (mid ─►) down ─► rows_SH ─ combine ─► out_TH

Activations and rows are rounded once each to the dtype of the model. The weights of the router are
applied in the combine, in top-k slot order in fp32 with one rounding, and nowhere else: an epilogue
that multiplied by them would round every row once more.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from .batching import RowSort, batch_rows
from .combine import combine
from .expert_mlp import expert_mlp
from .grouped_mm import Epilogue, grouped_mm
from .tune import FUSED_ROWS, Config, Problem, choose, device_family


@lru_cache(maxsize=64)
def _device(device: torch.device) -> tuple[int, str]:
    """Compute capability (80, 90, ...) and table of a device; (90, "") for the interpreter."""
    if device.type != "cuda":
        return 90, ""
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor, device_family(torch.cuda.get_device_name(device))


class Products(NamedTuple):
    """The weight tensors of one call, as `experts_triton` describes them."""

    up: Tensor
    down: Tensor
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    mid: Tensor | None = None
    mid_bias: Tensor | None = None
    transposed: bool = False


def problem_of(
    hidden: Tensor,
    topk_ids: Tensor,
    up: Tensor,
    down: Tensor,
    *,
    gated: bool,
    layers: int,
    transposed: bool,
) -> Problem:
    """The shape of a call, which decides its configuration."""
    arch, family = _device(hidden.device)
    return Problem(
        tokens=hidden.shape[0],
        top_k=topk_ids.shape[1],
        num_experts=up.shape[0],
        hidden=hidden.shape[1],
        intermediate=down.shape[1 if transposed else 2],
        gated=gated,
        layers=layers,
        dtype=str(hidden.dtype).removeprefix("torch."),
        arch=arch,
        family=family,
        transposed=transposed,
    )


def experts_triton(
    hidden: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    *,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    mid: Tensor | None = None,
    mid_bias: Tensor | None = None,
    activation: str = "silu",
    gated: bool = True,
    interleaved: bool = False,
    transposed: bool = False,
    limit: float | None = None,
    alpha: float = 1.0,
    up_offset: float = 0.0,
    num_sms: int | None = None,
    config: Config | None = None,
    fused: bool | None = None,
    counters: Tensor | None = None,
) -> Tensor:
    """Each token through its K experts, weighted and summed in slot order: the output (T, H).

    Args:
        hidden: (T, H) fp32, fp16 or bf16.
        topk_ids: (T, K) int32 or int64; a slot whose id is not in [0, E) adds nothing.
        topk_weights: (T, K), fp32 or the dtype of `hidden`.
        up: (E, U, H), down: (E, H, I), or (E, H, U) and (E, I, H) when `transposed`; U = 2I when
            gated. mid: (E, I, I) makes the three-layer expert. Biases: (E, width).
        num_sms: a budget: as many programs of a product as fit on so many SMs; None: all.
        config: instead of `tune.choose`'s; moves time, never bits.
        fused: whether a three-layer expert runs as one launch; None: as the configuration says.
        counters: (3, E) int32 to which each expert's rows and tiles are added; see `batch_rows`.

    Raises:
        ValueError: a width is not a multiple of 8, an expert has 2**31 weights, or `fused` is asked
            for where it does not fit (`tune.fused_stages`) or there are two layers.
    """
    hidden, topk_weights = hidden.contiguous(), topk_weights.contiguous()
    products = Products(up, down, up_bias, down_bias, mid, mid_bias, transposed)
    config = config or _config_of(hidden, topk_ids, products, gated)
    if topk_ids.numel() == 0:
        return torch.zeros_like(hidden)
    clamp = limit if mid is None else None
    epilogue = Epilogue(activation, gated, interleaved, clamp, alpha, up_offset)
    run = _fused_rows if (config.fused if fused is None else fused) else _tiled_rows
    # Triton launches on the current device, which need not be that of the tensors.
    device = hidden.device
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        rows_SH, sort = run(hidden, topk_ids, products, epilogue, config, num_sms, counters)
        return combine(rows_SH, sort.position_S.view(topk_ids.shape), topk_weights)


def _config_of(hidden: Tensor, topk_ids: Tensor, products: Products, gated: bool) -> Config:
    """What `tune.choose` says of a call."""
    layers, p = 2 if products.mid is None else 3, products
    return choose(
        problem_of(
            hidden, topk_ids, p.up, p.down, gated=gated, layers=layers, transposed=p.transposed
        )
    )


def rows_triton(
    hidden: Tensor,
    topk_ids: Tensor,
    *,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    mid: Tensor | None = None,
    mid_bias: Tensor | None = None,
    activation: str = "silu",
    gated: bool = True,
    interleaved: bool = False,
    transposed: bool = False,
    limit: float | None = None,
    alpha: float = 1.0,
    up_offset: float = 0.0,
    num_sms: int | None = None,
    out: Tensor,
) -> Tensor:
    """`experts_triton` without the combine: rows into `out` (S, H), and where each slot's row is.

    Returns:
        int32 (S,): the row of each slot; -1 for a slot whose id is not in [0, E), which has none.
    """
    products = Products(up, down, up_bias, down_bias, mid, mid_bias, transposed)
    config = _config_of(hidden, topk_ids, products, gated)
    epilogue = Epilogue(
        activation, gated, interleaved, limit if mid is None else None, alpha, up_offset
    )
    run = _fused_rows if config.fused else _tiled_rows
    return run(hidden, topk_ids, products, epilogue, config, num_sms, out=out)[1].position_S


def _tiled_rows(
    hidden: Tensor,
    topk_ids: Tensor,
    products: Products,
    epilogue: Epilogue,
    config: Config,
    num_sms: int | None,
    counters: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, RowSort]:
    """Expert rows (S, H) by one launch a layer, and the sort that orders them."""
    p = products
    sort, tasks = batch_rows(
        topk_ids, p.up.shape[0], heights=config.heights, order=config.order, counters=counters
    )
    multiply = partial(
        grouped_mm,
        sort=sort,
        tasks=tasks,
        heights=config.heights,
        transposed=p.transposed,
        num_sms=num_sms,
    )
    rows = multiply(
        hidden, p.up, top_k=topk_ids.shape[1], bias=p.up_bias, epilogue=epilogue, config=config.up
    )
    if p.mid is not None:
        rows = multiply(rows, p.mid, top_k=0, bias=p.mid_bias, epilogue=epilogue, config=config.mid)
    return multiply(rows, p.down, top_k=0, bias=p.down_bias, config=config.down, out=out), sort


def _fused_rows(
    hidden: Tensor,
    topk_ids: Tensor,
    products: Products,
    epilogue: Epilogue,
    config: Config,
    num_sms: int | None,
    counters: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, RowSort]:
    """The same rows by the one launch of `expert_mlp`."""
    p = products
    if p.mid is None:
        raise ValueError("fused=True needs a three-layer expert (mid), got two layers")
    biases = (p.up_bias, p.mid_bias, p.down_bias)
    sort, tasks = batch_rows(
        topk_ids, p.up.shape[0], heights=(FUSED_ROWS,), order=config.order, counters=counters
    )
    rows = expert_mlp(
        hidden,
        p.up,
        p.mid,
        p.down,
        sort,
        tasks,
        top_k=topk_ids.shape[1],
        arch=_device(hidden.device)[0],
        biases=None if None in biases else biases,  # type: ignore[arg-type]
        activation=epilogue.activation,
        alpha=epilogue.alpha,
        num_sms=num_sms,
        out=out,
    )
    return rows, sort
