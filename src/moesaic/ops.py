"""One registered torch op per contract: `moesaic::route`, `::experts`, `::experts_backward`.

`choose` is `route` without counts; `route_hidden` is the router from hidden states, product
included. `route_counted` and `experts_counted` do the same as `route` and `experts` and add what
happened to counters (3, E) int32: line 0 the router's choices, line 1 the rows computed, line 2 the
tiles of the task map (on a GPU). They are ops of their own, so that the others stay free of side
effects.

Importing this module needs torch alone; the kernels (and Triton) are imported when an op first
runs on a device. Specs cross the boundary as strings (`ExpertSpec.key()`), because op schemas know
no dataclasses. Autograd lives outside, in `functional.py`.

    T tokens · H hidden width · E experts · K top-k
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .dispatch import choose_impl
from .packing import PackedWeights
from .reference import moe_reference
from .types import ExpertSpec, ExpertWeights, RouterSpec
from .validate import check_contiguous, refuse_nan

WEIGHT_NAMES = ("up", "down", "up_bias", "down_bias", "mid", "mid_bias")

torch.library.define(
    "moesaic::route", "(Tensor logits, Tensor? bias, str spec) -> (Tensor, Tensor, Tensor)"
)
torch.library.define(
    "moesaic::route_counted",
    "(Tensor logits, Tensor? bias, str spec, Tensor(a!) counters) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "moesaic::route_hidden",
    "(Tensor hidden, Tensor weight, Tensor? linear_bias, Tensor? bias, str spec, bool fp32, "
    "bool as_logits) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "moesaic::choose", "(Tensor logits, Tensor? bias, str spec, bool as_logits) -> (Tensor, Tensor)"
)
_EXPERTS = (
    "(Tensor hidden, Tensor topk_ids, Tensor topk_weights, Tensor up, Tensor down, "
    "Tensor? up_bias, Tensor? down_bias, Tensor? mid, Tensor? mid_bias, str spec, str impl"
)
_BUDGET = "*, int? num_sms=None"
torch.library.define("moesaic::experts", f"{_EXPERTS}, {_BUDGET}) -> Tensor")
torch.library.define(
    "moesaic::experts_counted", f"{_EXPERTS}, Tensor(a!) counters, {_BUDGET}) -> Tensor"
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


def count_rows(counters: Tensor, topk_ids: Tensor) -> None:
    """Add the rows of each expert to line 1 of counters (3, E); ids outside [0, E) count not."""
    experts = counters.shape[1]
    if counters.device.type == "cpu":
        rows_E = torch.bincount(topk_ids.reshape(-1), minlength=experts)
        counters[1].add_(rows_E[:experts])
        return
    # Elsewhere `bincount` would wait for the device.
    ids_S = topk_ids.reshape(-1).long()
    ids_S = torch.where((ids_S >= 0) & (ids_S < experts), ids_S, experts)
    rows_E = counters.new_zeros(experts + 1)
    rows_E.scatter_add_(0, ids_S, torch.ones_like(ids_S, dtype=torch.int32))
    counters[1].add_(rows_E[:experts])


@lru_cache(maxsize=64)
def _rule(spec: str) -> dict[str, Any]:
    """A router's rule as kernels take it."""
    r = RouterSpec.from_key(spec)
    names = ("top_k", "scoring", "renormalize", "n_group", "topk_group", "scale")
    return {name: getattr(r, name) for name in names}


def _route_cpu(
    logits: Tensor, bias: Tensor | None, spec: str, counters: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    from .kernels.routing_ref import route_ref

    ids_TK, weights_TK, counts_E = route_ref(logits, bias, **_rule(spec))
    if counters is not None:
        counters[0].add_(counts_E)
    return ids_TK, weights_TK, counts_E


def _route_checked_cpu(
    logits: Tensor, bias: Tensor | None, spec: str
) -> tuple[Tensor, Tensor, Tensor]:
    """For the ops that are called without `functional.route`, which checks first."""
    refuse_nan(logits)
    return _route_cpu(logits, bias, spec)


def _route_cuda(
    logits: Tensor, bias: Tensor | None, spec: str, counters: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    from .kernels.routing import route

    return route(logits, bias, counters=counters, **_rule(spec))


def _route_fake(
    logits: Tensor, bias: Tensor | None, spec: str, counters: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    r = RouterSpec.from_key(spec)
    shape = (logits.shape[0], r.top_k)
    return (
        logits.new_empty(shape, dtype=torch.int32),
        logits.new_empty(shape, dtype=torch.float32),
        logits.new_empty((r.num_experts,), dtype=torch.int32),
    )


def _choose_cpu(
    logits: Tensor, bias: Tensor | None, spec: str, as_logits: bool
) -> tuple[Tensor, Tensor]:
    ids, weights, _ = _route_checked_cpu(logits, bias, spec)
    return ids, weights.to(logits.dtype) if as_logits else weights


def _choose_cuda(
    logits: Tensor, bias: Tensor | None, spec: str, as_logits: bool
) -> tuple[Tensor, Tensor]:
    from .kernels.routing import choose_experts

    weights_dtype = logits.dtype if as_logits else torch.float32
    return choose_experts(logits, bias, weights_dtype=weights_dtype, **_rule(spec))


def _choose_fake(
    logits: Tensor, bias: Tensor | None, spec: str, as_logits: bool
) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], RouterSpec.from_key(spec).top_k)
    return (
        logits.new_empty(shape, dtype=torch.int32),
        logits.new_empty(shape, dtype=logits.dtype if as_logits else torch.float32),
    )


def _logits_dtype(hidden: Tensor, fp32: bool) -> torch.dtype:
    return torch.float32 if fp32 else hidden.dtype


def one_launch(tokens: int, experts: int) -> bool:
    """Whether `kernels.router` is faster than a product of cuBLAS and a choice.

    On an H200, us: 8 experts of 4096 columns 3.0 to 4.6 for 16 to 512 tokens against 8.6 to 9.2,
    and as long at 8192; 128 experts of 2048 columns 7.6, 9.1, 14.5 for 16, 128, 512 tokens against
    8.8, 9.2, 9.3.
    """
    return experts <= 16 and tokens <= 512


def router_product(
    hidden: Tensor, weight: Tensor, linear_bias: Tensor | None, fp32: bool
) -> Tensor:
    """Logits (T, E) of a router; `fp32`: in fp32, whatever the states and the weight are.

    On a GPU the tensor cores take two 16-bit numbers, whose product fp32 holds exactly, and add in
    fp32: ten times as fast as a product of fp32 numbers.
    """
    if not fp32:
        return F.linear(hidden, weight, linear_bias)
    linear_bias = None if linear_bias is None else linear_bias.float()
    half = hidden.dtype == weight.dtype and hidden.dtype in (torch.bfloat16, torch.float16)
    if not (half and hidden.is_cuda):
        return F.linear(hidden.float(), weight.float(), linear_bias)
    logits = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    return logits if linear_bias is None else logits + linear_bias


def _route_hidden_cpu(
    hidden: Tensor,
    weight: Tensor,
    linear_bias: Tensor | None,
    bias: Tensor | None,
    spec: str,
    fp32: bool,
    as_logits: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    logits = router_product(hidden, weight, linear_bias, fp32)
    return logits, *_choose_cpu(logits, bias, spec, as_logits)


def _route_hidden_cuda(
    hidden: Tensor,
    weight: Tensor,
    linear_bias: Tensor | None,
    bias: Tensor | None,
    spec: str,
    fp32: bool,
    as_logits: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if not fp32 and one_launch(hidden.shape[0], weight.shape[0]):
        from .kernels import router

        if router.refusal(hidden, weight) is None:
            dtype = hidden.dtype if as_logits else torch.float32
            return router.route_hidden(
                hidden, weight, linear_bias, bias, weights_dtype=dtype, **_rule(spec)
            )
    logits = router_product(hidden, weight, linear_bias, fp32)
    return logits, *_choose_cuda(logits, bias, spec, as_logits)


def _route_hidden_fake(
    hidden: Tensor,
    weight: Tensor,
    linear_bias: Tensor | None,
    bias: Tensor | None,
    spec: str,
    fp32: bool,
    as_logits: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, top_k = hidden.shape[0], RouterSpec.from_key(spec).top_k
    dtype = _logits_dtype(hidden, fp32)
    return (
        hidden.new_empty((tokens, weight.shape[0]), dtype=dtype),
        hidden.new_empty((tokens, top_k), dtype=torch.int32),
        hidden.new_empty((tokens, top_k), dtype=dtype if as_logits else torch.float32),
    )


def epilogue(s: ExpertSpec) -> dict[str, Any]:
    """What happens between the products, as kernels take it."""
    names = ("activation", "gated", "limit", "alpha", "up_offset")
    return {name: getattr(s, name) for name in names}


def ungated(s: ExpertSpec) -> dict[str, Any]:
    """What follows the products of ungated experts, for kernels that know no others."""
    return {"activation": s.activation, "limit": s.limit, "alpha": s.alpha}


def _arithmetic(s: ExpertSpec) -> dict[str, Any]:
    """The arithmetic and the layout of the experts, as kernels take them."""
    return epilogue(s) | {"interleaved": s.interleaved, "transposed": s.transposed}


def _refuse_budget(num_sms: int | None, impl: str) -> None:
    if num_sms is not None:
        raise RuntimeError(f"impl={impl!r} obeys no SM budget; pass num_sms=None")


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
    counters: Tensor | None = None,
    *,
    num_sms: int | None = None,
) -> Tensor:
    _refuse_budget(num_sms, "reference" if impl == "reference" else "cpu")
    s = ExpertSpec.from_key(spec)
    weights = ExpertWeights(up, down, up_bias, down_bias, mid, mid_bias)
    if counters is not None:
        count_rows(counters, topk_ids)
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
    counters: Tensor | None = None,
) -> Tensor:
    """`moesaic::experts` on the CPU with packed weights; no op, for these tensors are opaque."""
    from .kernels.cpu import experts_cpu

    if counters is not None:
        count_rows(counters, topk_ids)
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
    counters: Tensor | None = None,
    *,
    num_sms: int | None = None,
) -> Tensor:
    s = ExpertSpec.from_key(spec)
    weights = ExpertWeights(up, down, up_bias, down_bias, mid, mid_bias)
    check_contiguous(weights)  # a compiled caller has checked nothing
    impl = choose_impl(impl, hidden.device, hidden.dtype, s)
    if impl == "reference":
        _refuse_budget(num_sms, impl)
        if counters is not None:
            count_rows(counters, topk_ids)
        return moe_reference(hidden, topk_ids, topk_weights, weights, s)
    if impl == "hopper" and (s.layers == 3 or s.bias):
        from .kernels.hopper.mlp import experts_mlp

        named: dict[str, Any] = {**weights.named()}
        return experts_mlp(
            hidden,
            topk_ids,
            topk_weights,
            **named,
            **ungated(s),
            counters=counters,
            num_sms=num_sms,
        )
    if impl == "hopper":
        from .kernels.hopper.experts import experts_hopper

        return experts_hopper(
            hidden,
            topk_ids,
            topk_weights,
            up=up,
            down=down,
            **epilogue(s),
            counters=counters,
            num_sms=num_sms,
        )
    from .kernels.experts import experts_triton

    named = {**weights.named(), **_arithmetic(s)}
    return experts_triton(
        hidden, topk_ids, topk_weights, **named, counters=counters, num_sms=num_sms
    )


def _experts_fake(hidden: Tensor, *_: object, num_sms: int | None = None) -> Tensor:
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


def on_its_device(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` where the device of its first tensor is current: Triton launches on the current one."""

    def guarded(tensor: Tensor, *more: Any, **how: Any) -> Any:
        if tensor.get_device() == torch.cuda.current_device():
            return run(tensor, *more, **how)
        with torch.cuda.device(tensor.device):
            return run(tensor, *more, **how)

    return guarded


for _route_name in ("moesaic::route", "moesaic::route_counted"):
    torch.library.impl(_route_name, "CPU", _route_cpu)
    torch.library.impl(_route_name, "CUDA", on_its_device(_route_cuda))
    torch.library.register_fake(_route_name, _route_fake)
torch.library.impl("moesaic::choose", "CPU", _choose_cpu)
torch.library.impl("moesaic::choose", "CUDA", on_its_device(_choose_cuda))
torch.library.register_fake("moesaic::choose", _choose_fake)
torch.library.impl("moesaic::route_hidden", "CPU", _route_hidden_cpu)
torch.library.impl("moesaic::route_hidden", "CUDA", on_its_device(_route_hidden_cuda))
torch.library.register_fake("moesaic::route_hidden", _route_hidden_fake)
for _experts_name in ("moesaic::experts", "moesaic::experts_counted"):
    torch.library.impl(_experts_name, "CPU", _experts_cpu)
    torch.library.impl(_experts_name, "CUDA", on_its_device(_experts_cuda))
    torch.library.register_fake(_experts_name, _experts_fake)
torch.library.impl("moesaic::experts_backward", "CPU", _experts_backward)
torch.library.impl("moesaic::experts_backward", "CUDA", _experts_backward)
torch.library.register_fake("moesaic::experts_backward", _experts_backward_fake)

Routed = tuple[Tensor, Tensor, Tensor]
route_op: Callable[..., Routed] = torch.ops.moesaic.route.default
route_counted_op: Callable[..., Routed] = torch.ops.moesaic.route_counted.default
route_hidden_op: Callable[..., Routed] = torch.ops.moesaic.route_hidden.default
choose_op: Callable[..., tuple[Tensor, Tensor]] = torch.ops.moesaic.choose.default
experts_op: Callable[..., Tensor] = torch.ops.moesaic.experts.default
experts_counted_op: Callable[..., Tensor] = torch.ops.moesaic.experts_counted.default
experts_backward_op: Callable[..., list[Tensor]] = torch.ops.moesaic.experts_backward.default
