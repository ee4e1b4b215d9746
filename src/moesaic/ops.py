"""One registered torch op per contract: `moesaic::route`, `::experts`, `::experts_backward`.

Importing this module needs torch alone; the kernels (and Triton) are imported when an op first
runs on a device. Specs cross the boundary as strings (`ExpertSpec.key()`), because op schemas know
no dataclasses. Autograd lives outside, in `functional.py`.

    T tokens · H hidden width · E experts · K top-k
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .dispatch import choose_impl
from .packing import PackedWeights
from .reference import moe_reference
from .types import ExpertSpec, ExpertWeights, RouterSpec

WEIGHT_NAMES = ("up", "down", "up_bias", "down_bias", "mid", "mid_bias")

torch.library.define(
    "moesaic::route", "(Tensor logits, Tensor? bias, str spec) -> (Tensor, Tensor, Tensor)"
)
torch.library.define(
    "moesaic::experts",
    "(Tensor hidden, Tensor topk_ids, Tensor topk_weights, Tensor up, Tensor down, "
    "Tensor? up_bias, Tensor? down_bias, Tensor? mid, Tensor? mid_bias, str spec, str impl) "
    "-> Tensor",
)
torch.library.define(
    "moesaic::experts_backward",
    "(Tensor grad, Tensor hidden, Tensor topk_ids, Tensor topk_weights, Tensor[] params, str spec)"
    " -> Tensor[]",
)


def pack_weights(params: list[Tensor], spec: ExpertSpec) -> ExpertWeights:
    """The weights of `spec` from its tensors in `WEIGHT_NAMES` order, absent ones left out."""
    wanted = spec.weight_shapes()
    names = [name for name in WEIGHT_NAMES if name in wanted]
    return ExpertWeights(**dict(zip(names, params, strict=True)))


def _route_cpu(logits: Tensor, bias: Tensor | None, spec: str) -> tuple[Tensor, Tensor, Tensor]:
    from .kernels.routing_ref import route_ref

    r = RouterSpec.from_key(spec)
    return route_ref(
        logits,
        bias,
        top_k=r.top_k,
        scoring=r.scoring,
        renormalize=r.renormalize,
        n_group=r.n_group,
        topk_group=r.topk_group,
        scale=r.scale,
    )


def _route_cuda(logits: Tensor, bias: Tensor | None, spec: str) -> tuple[Tensor, Tensor, Tensor]:
    from .kernels.routing import route

    r = RouterSpec.from_key(spec)
    return route(
        logits,
        bias,
        top_k=r.top_k,
        scoring=r.scoring,
        renormalize=r.renormalize,
        n_group=r.n_group,
        topk_group=r.topk_group,
        scale=r.scale,
    )


def _route_fake(logits: Tensor, bias: Tensor | None, spec: str) -> tuple[Tensor, Tensor, Tensor]:
    r = RouterSpec.from_key(spec)
    shape = (logits.shape[0], r.top_k)
    return (
        logits.new_empty(shape, dtype=torch.int32),
        logits.new_empty(shape, dtype=torch.float32),
        logits.new_empty((r.num_experts,), dtype=torch.int32),
    )


def _epilogue(s: ExpertSpec) -> dict[str, Any]:
    """What happens between the products, as kernels take it."""
    names = ("activation", "gated", "limit", "alpha", "up_offset")
    return {name: getattr(s, name) for name in names}


def _arithmetic(s: ExpertSpec) -> dict[str, Any]:
    """The arithmetic and the layout of the experts, as kernels take them."""
    return _epilogue(s) | {"interleaved": s.interleaved, "transposed": s.transposed}


def _experts_cpu(
    hidden: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    mid: Tensor | None,
    mid_bias: Tensor | None,
    spec: str,
    impl: str,
) -> Tensor:
    s = ExpertSpec.from_key(spec)
    weights = ExpertWeights(up, down, up_bias, down_bias, mid, mid_bias)
    if impl == "reference":
        return moe_reference(hidden, topk_ids, topk_weights, weights, s)
    from .kernels.cpu import experts_cpu

    named: dict[str, Any] = {**weights.named()}
    return experts_cpu(hidden, topk_ids, topk_weights, **named, **_arithmetic(s))


def experts_packed(
    hidden: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    weights: PackedWeights,
    spec: ExpertSpec,
) -> Tensor:
    """`moesaic::experts` on the CPU with packed weights; no op, for these tensors are opaque."""
    from .kernels.cpu import experts_cpu

    named: dict[str, Any] = {**weights.plain.named()}
    return experts_cpu(
        hidden, topk_ids, topk_weights, **named, **_arithmetic(spec), packed=weights.products
    )


def _experts_cuda(
    hidden: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    mid: Tensor | None,
    mid_bias: Tensor | None,
    spec: str,
    impl: str,
) -> Tensor:
    s = ExpertSpec.from_key(spec)
    weights = ExpertWeights(up, down, up_bias, down_bias, mid, mid_bias)
    impl = choose_impl(impl, hidden.device, hidden.dtype, s)
    if impl == "reference":
        return moe_reference(hidden, topk_ids, topk_weights, weights, s)
    if impl == "hopper":
        from .kernels.hopper.experts import experts_hopper

        return experts_hopper(
            hidden,
            topk_ids,
            topk_weights,
            up=up,
            down=down,
            **_epilogue(s),
        )
    from .kernels.experts import experts_triton

    named: dict[str, Any] = {**weights.named()}
    return experts_triton(hidden, topk_ids, topk_weights, **named, **_arithmetic(s))


def _experts_fake(hidden: Tensor, *_: object) -> Tensor:
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


def _experts_backward(
    grad: Tensor,
    hidden: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    params: list[Tensor],
    spec: str,
) -> list[Tensor]:
    """Gradients of hidden, topk_weights and every parameter, by re-running the reference."""
    s = ExpertSpec.from_key(spec)
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_(True) for t in (hidden, topk_weights, *params)]
        out_TH = moe_reference(leaves[0], topk_ids, leaves[1], pack_weights(leaves[2:], s), s)
        grads = torch.autograd.grad(out_TH, leaves, grad, allow_unused=True)
    return [
        torch.zeros_like(leaf) if g is None else g.contiguous()
        for leaf, g in zip(leaves, grads, strict=True)
    ]


def _experts_backward_fake(
    grad: Tensor,
    hidden: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    params: list[Tensor],
    spec: str,
) -> list[Tensor]:
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in (hidden, topk_weights, *params)
    ]


torch.library.impl("moesaic::route", "CPU", _route_cpu)
torch.library.impl("moesaic::route", "CUDA", _route_cuda)
torch.library.register_fake("moesaic::route", _route_fake)
torch.library.impl("moesaic::experts", "CPU", _experts_cpu)
torch.library.impl("moesaic::experts", "CUDA", _experts_cuda)
torch.library.register_fake("moesaic::experts", _experts_fake)
torch.library.impl("moesaic::experts_backward", "CPU", _experts_backward)
torch.library.impl("moesaic::experts_backward", "CUDA", _experts_backward)
torch.library.register_fake("moesaic::experts_backward", _experts_backward_fake)

route_op: Callable[..., tuple[Tensor, Tensor, Tensor]] = torch.ops.moesaic.route.default
experts_op: Callable[..., Tensor] = torch.ops.moesaic.experts.default
experts_backward_op: Callable[..., list[Tensor]] = torch.ops.moesaic.experts_backward.default
