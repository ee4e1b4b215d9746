"""What the experts of one rank make of received rows, and the weighted sum at the end.

    T tokens · K top-k · R received rows · J slots a row may have · X expert rows · H hidden width
    L experts of this rank

A slot's row is the same, bit for bit, wherever it is computed: it depends on the token's row and
the expert's weights alone. The sum runs over k in order in fp32, as in one process.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dispatch import Impl, choose_impl
from ..ops import ungated
from ..reference import moe_reference
from ..types import ExpertSpec, ExpertWeights
from .exchange.base import ExpertRows, Returned


class Share(NamedTuple):
    """What an evenly loaded rank computes: as much as a layer of so many tokens and choices."""

    tokens: int
    top_k: int

    @staticmethod
    def of(bound: int, top_k: int, ranks: int) -> Share:
        """The share of one of `ranks` that bring `bound` tokens of `top_k` choices each.

        >>> Share.of(bound=512, top_k=8, ranks=2), Share.of(bound=512, top_k=2, ranks=8)
        (Share(tokens=1024, top_k=4), Share(tokens=1024, top_k=1))
        """
        own = max(1, round(top_k / ranks))
        return Share(-(-bound * top_k // own), own)


def _epilogue(spec: ExpertSpec) -> dict[str, Any]:
    names = ("activation", "gated", "limit", "alpha", "up_offset")
    return {name: getattr(spec, name) for name in names}


def expert_rows(
    rows_RH: Tensor,
    ids_RJ: Tensor,
    weights: ExpertWeights,
    spec: ExpertSpec,
    *,
    share: Share,
    impl: Impl = "auto",
    num_sms: int | None = None,
) -> ExpertRows:
    """Every live slot through its expert: rows (X, H), unweighted.

    Args:
        rows_RH: fp32, fp16 or bf16; a row without a live slot may hold anything.
        ids_RJ: int32, index of an expert of `weights` or -1.
        weights: of this rank's experts; `spec.num_experts` is their number.
        share: how many live slots to expect, for the choice of tiles.
        num_sms: SM budget of the products on a GPU; None: all.

    Raises:
        RuntimeError: `impl` cannot run here, or obeys no `num_sms`.
    """
    chosen = choose_impl(impl, rows_RH.device, rows_RH.dtype, spec)
    if ids_RJ.numel() == 0:
        dtype = row_dtype(rows_RH.dtype, rows_RH.device)
        return ExpertRows(rows_RH.new_empty((0, spec.hidden_size), dtype=dtype), ids_RJ)
    if chosen == "reference" and rows_RH.device.type != "cpu":
        raise RuntimeError("impl='reference' has no expert parallelism on a GPU; use impl='triton'")
    if rows_RH.device.type == "cpu":
        if num_sms is not None:
            raise RuntimeError(f"impl={chosen!r} obeys no SM budget; pass num_sms=None")
        return _rows_cpu(rows_RH, ids_RJ, weights, spec, chosen)
    with torch.cuda.device(rows_RH.device):
        if chosen == "hopper":
            return _rows_hopper(rows_RH, ids_RJ, weights, spec, share, num_sms)
        return _rows_triton(rows_RH, ids_RJ, weights, spec, num_sms)


def _rows_cpu(
    rows_RH: Tensor, ids_RJ: Tensor, weights: ExpertWeights, spec: ExpertSpec, impl: str
) -> ExpertRows:
    """Each live slot as a token of its own with one expert of weight 1, which leaves its bits."""
    row_X, j_X = (ids_RJ >= 0).nonzero(as_tuple=True)
    ids_X1 = ids_RJ[row_X, j_X][:, None].contiguous()
    ones_X1 = torch.ones(ids_X1.shape, dtype=torch.float32, device=ids_RJ.device)
    if impl == "reference":
        out_XH = moe_reference(rows_RH[row_X], ids_X1, ones_X1, weights, spec).float()
    else:
        from ..kernels.cpu import experts_cpu

        named: dict[str, Any] = dict(weights.named())
        out_XH = experts_cpu(
            rows_RH[row_X],
            ids_X1,
            ones_X1,
            **named,
            **_epilogue(spec),
            interleaved=spec.interleaved,
            transposed=spec.transposed,
            out_dtype=torch.float32,
        )
    position_RJ = torch.full_like(ids_RJ, -1)
    position_RJ[row_X, j_X] = torch.arange(len(row_X), dtype=torch.int32, device=ids_RJ.device)
    return ExpertRows(out_XH.float(), position_RJ)


def _rows_triton(
    rows_RH: Tensor,
    ids_RJ: Tensor,
    weights: ExpertWeights,
    spec: ExpertSpec,
    num_sms: int | None,
) -> ExpertRows:
    from ..kernels.experts import rows_triton

    out_SH = rows_RH.new_empty((ids_RJ.numel(), spec.hidden_size))
    named: dict[str, Any] = dict(weights.named())
    position_S = rows_triton(
        rows_RH,
        ids_RJ,
        **named,
        **_epilogue(spec),
        interleaved=spec.interleaved,
        transposed=spec.transposed,
        num_sms=num_sms,
        out=out_SH,
    )
    return ExpertRows(out_SH, position_S.view(ids_RJ.shape))


def _rows_hopper(
    rows_RH: Tensor,
    ids_RJ: Tensor,
    weights: ExpertWeights,
    spec: ExpertSpec,
    share: Share,
    num_sms: int | None,
) -> ExpertRows:
    if spec.layers == 3 or spec.bias:
        from ..kernels.hopper.mlp import rows_mlp

        named: dict[str, Any] = dict(weights.named())
        expected = max(1, share.tokens * share.top_k)
        rows_XH, position_S = rows_mlp(
            rows_RH, ids_RJ, **named, **ungated(spec), num_sms=num_sms, expected=expected
        )
        return ExpertRows(rows_XH, position_S.view(ids_RJ.shape))
    from ..kernels.batching import batch_rows
    from ..kernels.device import sm_count
    from ..kernels.hopper.experts import choose_measured

    sms = num_sms or sm_count(rows_RH.device)
    config = choose_measured(
        max(2, share.tokens), share.top_k, weights.up.shape, spec.gated, rows_RH.dtype,
        rows_RH.device, sms,
    )  # fmt: skip
    sort, tasks = batch_rows(
        ids_RJ,
        spec.num_experts,
        heights=(config.up.bm,),
        order=config.order,  # type: ignore[arg-type]
    )
    rows_XH = _products(rows_RH, ids_RJ, sort.order_S, tasks, weights, spec, config, sms)
    return ExpertRows(rows_XH, sort.position_S.view(ids_RJ.shape))


def _products(
    rows_RH: Tensor,
    ids_RJ: Tensor,
    order_S: Tensor,
    tasks: Any,
    weights: ExpertWeights,
    spec: ExpertSpec,
    config: Any,
    sms: int,
) -> Tensor:
    """Both products of the sorted slots, in one launch or two as the tiles want: (S, H)."""
    from ..kernels.hopper.experts import products
    from ..kernels.hopper.flex import flex_mm_hopper
    from ..kernels.hopper.pair import pair_mm_hopper

    how: dict[str, Any] = {"top_k": ids_RJ.shape[1], "num_sms": sms, **_epilogue(spec)}
    up, down = weights.up, weights.down
    if config.up.kernel not in ("pair", "flex"):
        return products(rows_RH, order_S, tasks, up=up, down=down, config=config, **how)
    act_SI = rows_RH.new_empty((order_S.numel(), down.shape[2]))
    out_SH = rows_RH.new_empty((order_S.numel(), rows_RH.shape[1]))
    both = pair_mm_hopper if config.up.kernel == "pair" else flex_mm_hopper
    return both(
        rows_RH, up, down, tasks, act_SI, out_SH, config=config.up, order_S=order_S, pdl=True, **how
    )


def row_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of an expert's row: the model's on a GPU, fp32 on the CPU, which sums in it."""
    return torch.float32 if device.type == "cpu" else dtype


def weigh(returned: Returned, topk_weights_TK: Tensor, dtype: torch.dtype) -> Tensor:
    """The weighted sum over k, in slot order, in fp32, rounded once to `dtype`: (T, H)."""
    rows_XH, position_TK = returned
    topk_weights_TK = topk_weights_TK.contiguous()
    if rows_XH.device.type == "cpu":
        from ..kernels.cpu import combine_cpu

        if topk_weights_TK.numel() == 0:
            return rows_XH.new_zeros((position_TK.shape[0], rows_XH.shape[1]), dtype=dtype)
        nobody = rows_XH.shape[0]
        slots_S = torch.where(position_TK < 0, nobody, position_TK).flatten().long()
        padded_XH = torch.cat((rows_XH, rows_XH.new_zeros((1, rows_XH.shape[1]))))
        return combine_cpu(padded_XH, slots_S, topk_weights_TK).to(dtype)
    from ..kernels.combine import combine

    with torch.cuda.device(rows_XH.device):
        return combine(rows_XH, position_TK.contiguous(), topk_weights_TK)
