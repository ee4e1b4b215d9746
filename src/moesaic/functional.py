"""The public functions: `route` (logits to top-k) and `moe` (tokens through their experts).

    T tokens · H hidden width · E experts · K top-k

>>> spec = ExpertSpec(num_experts=4, hidden_size=8, intermediate_size=16)
>>> weights = ExpertWeights(up=torch.randn(4, 32, 8), down=torch.randn(4, 8, 16))
>>> routing = route(torch.randn(3, 4), RouterSpec(num_experts=4, top_k=2))
>>> moe(torch.randn(3, 8), routing.topk_ids_TK, routing.topk_weights_TK, weights, spec).shape
torch.Size([3, 8])
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .dispatch import Impl, choose_impl, listened_to
from .kernels.routing_ref import weigh_ref
from .ops import (
    WEIGHT_NAMES,
    epilogue,
    experts_backward_op,
    experts_counted_op,
    experts_op,
    experts_packed,
    route_counted_op,
    route_op,
)
from .packing import PackedWeights
from .types import ExpertSpec, ExpertWeights, RouterSpec, Routing
from .validate import (
    check_counters,
    check_inputs,
    check_moe,
    check_route,
    counters_mark,
    values_wanted,
)

PLAIN = (Tensor, torch.nn.Parameter)
MAX_KNOWN = 4096
MAX_ROUTED = 64
"""Tokens up to which a route may be one program; see `routing.plan_route`."""
_known: dict[tuple[Any, ...], tuple[Callable[..., Tensor], object]] = {}
_known_routes: dict[tuple[Any, ...], Callable[..., tuple[Tensor, Tensor, Tensor]]] = {}


def route(
    logits_TE: Tensor,
    spec: RouterSpec,
    *,
    bias_E: Tensor | None = None,
    counters: Tensor | None = None,
) -> Routing:
    """Scores, top-k and counts of router logits (T, E), fused in one launch on GPU.

    Args:
        logits_TE: fp32, fp16 or bf16.
        spec: the scoring rule.
        bias_E: fp32 correction bias, for `scoring="sigmoid"` only.
        counters: (3, E) int32; the counts are added to line 0 by the same launch.

    Returns:
        Routing: ids (T, K) int32, weights (T, K) fp32, counts (E,) int32.

    Raises:
        TypeError, ValueError: see `validate.check_route` and `check_counters`.
    """
    if not torch.compiler.is_compiling():
        key = _repeatable_route(logits_TE, spec, bias_E, counters)
        known = None if key is None else _known_routes.get(key)
        if known is not None:
            return Routing(*known(logits_TE, bias_E, counters))
        check_route(logits_TE, spec, bias_E)
        if counters is not None:
            check_counters(counters, spec.num_experts, logits_TE)
        if key is not None:
            _remember_route(key, spec)
    if logits_TE.requires_grad and torch.is_grad_enabled():
        return _route_differentiable(logits_TE, spec, bias_E, counters)
    return _route(logits_TE, spec, bias_E, counters)


def _repeatable_route(
    logits: Tensor, spec: RouterSpec, bias: Tensor | None, counters: Tensor | None
) -> tuple[Any, ...] | None:
    """All that checks and the launch for few tokens depend on, or None: as `_repeatable`."""
    if not logits.is_cuda or logits.dim() != 2 or logits.shape[0] > MAX_ROUTED:
        return None
    if listened_to() or values_wanted():
        return None
    mark = None if counters is None else counters_mark(counters)
    if counters is not None and mark is None:
        return None
    grad, device = torch.is_grad_enabled(), torch._C._cuda_getDevice()
    kind: Any = None
    for tensor in (logits,) if bias is None else (logits, bias):
        if type(tensor) not in PLAIN or not tensor.is_contiguous() or tensor.get_device() != device:
            return None
        if grad and tensor.requires_grad:
            return None
        kind = (kind, tensor.shape, tensor.dtype)
    return (device, spec.key(), mark, kind)


def _remember_route(key: tuple[Any, ...], spec: RouterSpec) -> None:
    """A call with this key passes the checks."""
    from .kernels.hopper.routes import RepeatedRoute

    rule = {
        "top_k": spec.top_k, "scoring": spec.scoring, "renormalize": spec.renormalize,
        "n_group": spec.n_group, "topk_group": spec.topk_group, "scale": spec.scale,
    }  # fmt: skip
    if len(_known_routes) >= MAX_KNOWN:
        _known_routes.clear()
    _known_routes[key] = RepeatedRoute(rule)


def _route(
    logits_TE: Tensor, spec: RouterSpec, bias_E: Tensor | None, counters: Tensor | None
) -> Routing:
    if counters is None:
        return Routing(*route_op(logits_TE, bias_E, spec.key()))
    return Routing(*route_counted_op(logits_TE, bias_E, spec.key(), counters))


def _route_differentiable(
    logits_TE: Tensor, spec: RouterSpec, bias_E: Tensor | None, counters: Tensor | None
) -> Routing:
    """The same routing, the weights recomputed in torch from the chosen ids, so that they carry
    gradients."""
    ids_TK, _, counts_E = _route(logits_TE.detach(), spec, bias_E, counters)
    weights_TK = weigh_ref(
        logits_TE,
        ids_TK.long(),
        scoring=spec.scoring,
        renormalize=spec.renormalize,
        scale=spec.scale,
    )
    return Routing(ids_TK, weights_TK, counts_E)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        topk_ids_TK: Tensor,
        topk_weights_TK: Tensor,
        spec: str,
        impl: str,
        counters: Tensor | None,
        num_sms: int | None,
        *params: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(hidden_TH, topk_ids_TK, topk_weights_TK, *params)
        ctx.spec = spec
        tensors = (hidden_TH, topk_ids_TK, topk_weights_TK, *params)
        if counters is None:
            return experts_op(*tensors, spec, impl, num_sms=num_sms)
        return experts_counted_op(*tensors, spec, impl, counters, num_sms=num_sms)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TH, topk_ids_TK, topk_weights_TK, *params = ctx.saved_tensors
        present = [p for p in params if p is not None]
        d_hidden, d_weights, *d_present = experts_backward_op(
            grad_TH.contiguous(), hidden_TH, topk_ids_TK, topk_weights_TK, present, ctx.spec
        )
        it = iter(d_present)
        d_params = [None if p is None else next(it) for p in params]
        return (d_hidden, None, d_weights, None, None, None, None, *d_params)


def moe(
    hidden_TH: Tensor,
    topk_ids_TK: Tensor,
    topk_weights_TK: Tensor,
    weights: ExpertWeights | PackedWeights,
    spec: ExpertSpec,
    *,
    impl: Impl = "auto",
    counters: Tensor | None = None,
    num_sms: int | None = None,
) -> Tensor:
    """Each token through its K experts, weighted and summed in slot order: the output (T, H).

    Args:
        hidden_TH: fp32, fp16 or bf16.
        topk_ids_TK: int32 or int64, values in [0, E).
        topk_weights_TK: fp32 or the dtype of `hidden_TH`, already normalised and scaled.
        weights: tensors of `spec.weight_shapes()`, in the dtype of `hidden_TH`; on the CPU also
            what `packing.pack` made of them, without gradients.
        spec: shape and arithmetic of the experts.
        impl: "auto", or an implementation by name; one that cannot run raises.
        counters: (3, E) int32; rows and, on a GPU, tiles are added to lines 1 and 2, by launches
            that are there anyway.
        num_sms: SMs that the products may use, for what runs beside them (an exchange, another
            tenant); moves time, never bits. None: all. Only the GPU's kernels obey one.

    Raises:
        TypeError, ValueError: see `validate.check_moe` and `check_counters`; `num_sms` under 1.
        RuntimeError: `impl` cannot run on this device, or obeys no `num_sms`; or packed weights
            were changed after they were packed, or are asked for gradients.
    """
    if num_sms is not None and (num_sms < 1 or isinstance(weights, PackedWeights)):
        _refuse_budget(num_sms)
    tracing = torch.compiler.is_compiling()
    if isinstance(weights, PackedWeights):
        if counters is not None and not tracing:
            check_counters(counters, spec.num_experts, hidden_TH)
        call = _moe_packed_outside_graphs if tracing else _moe_packed
        packed_TH: Tensor = call(
            hidden_TH, topk_ids_TK, topk_weights_TK, weights, spec, impl, counters
        )
        return packed_TH
    if not tracing:
        tensors = (hidden_TH, topk_ids_TK, topk_weights_TK, weights.up, weights.down)
        key = _repeatable(tensors, weights, spec, impl, counters, num_sms)
        known = None if key is None else _known.get(key)
        if known is not None:
            kernels, known_key = known
            repeated_TH: Tensor = kernels(
                hidden_TH, topk_ids_TK, topk_weights_TK, up=weights.up, down=weights.down,
                counters=counters, num_sms=num_sms, key=known_key,
            )  # fmt: skip
            return repeated_TH
        if counters is not None:
            check_counters(counters, spec.num_experts, hidden_TH)
        check_moe(hidden_TH, topk_ids_TK, topk_weights_TK, weights, spec)
        chosen = choose_impl(impl, hidden_TH.device, hidden_TH.dtype, spec)
        if key is not None and chosen == "hopper":
            _remember(key, spec)
    named = weights.named()
    params = [named.get(name) for name in WEIGHT_NAMES]
    leaves = (hidden_TH, topk_weights_TK, *named.values())
    if torch.is_grad_enabled() and any(t.requires_grad for t in leaves):
        out_TH: Tensor = _Experts.apply(  # type: ignore[no-untyped-call]
            hidden_TH, topk_ids_TK, topk_weights_TK, spec.key(), impl, counters, num_sms, *params
        )
        return out_TH
    args = (hidden_TH, topk_ids_TK, topk_weights_TK, *params, spec.key(), impl)
    # Without a budget nothing is said of one: keywords cost every eager call.
    budget = {} if num_sms is None else {"num_sms": num_sms}
    if counters is None:
        return experts_op(*args, **budget)
    return experts_counted_op(*args, counters, **budget)


def _repeatable(
    tensors: tuple[Tensor, ...],
    weights: ExpertWeights,
    spec: ExpertSpec,
    impl: str,
    counters: Tensor | None,
    num_sms: int | None,
) -> tuple[Any, ...] | None:
    """All that checks and the choice of an implementation depend on, or None.

    A call whose like has been checked goes straight to its kernels: checks and torch's dispatcher
    cost more than the launch. Not where values are checked, gradients wanted, somebody listens to
    operators, or a tensor is no plain one.
    """
    hidden, ids, share, up, down = tensors
    if not hidden.is_cuda or listened_to() or values_wanted():
        return None
    if weights.mid is not None or weights.up_bias is not None or weights.down_bias is not None:
        return None
    if weights.mid_bias is not None:
        return None
    mark = None if counters is None else counters_mark(counters)
    if counters is not None and mark is None:
        return None
    grad = torch.is_grad_enabled()
    for tensor in tensors:
        if type(tensor) not in PLAIN or not tensor.is_contiguous():
            return None
        if grad and tensor.requires_grad:
            return None
    devices = [tensor.get_device() for tensor in tensors]
    if devices.count(torch._C._cuda_getDevice()) != len(devices):
        return None
    return (
        hidden.shape, ids.shape, share.shape, up.shape, down.shape, hidden.dtype, ids.dtype,
        share.dtype, up.dtype, down.dtype, devices[0], mark, spec.key(), impl, num_sms,
    )  # fmt: skip


def _remember(key: tuple[Any, ...], spec: ExpertSpec) -> None:
    """A call with this key passes the checks and runs on the Hopper path."""
    from .kernels.hopper.experts import experts_hopper

    if len(_known) >= MAX_KNOWN:
        _known.clear()
    # An object of its own is a key that costs no second hash.
    _known[key] = partial(experts_hopper, **epilogue(spec)), object()


def _refuse_budget(num_sms: int) -> None:
    if num_sms < 1:
        raise ValueError(f"num_sms must be positive or None, got {num_sms}")
    raise RuntimeError("packed weights run on the CPU, which obeys no SM budget; pass num_sms=None")


def _moe_packed(
    hidden_TH: Tensor,
    topk_ids_TK: Tensor,
    topk_weights_TK: Tensor,
    packed: PackedWeights,
    spec: ExpertSpec,
    impl: Impl,
    counters: Tensor | None,
) -> Tensor:
    """`moe` with packed weights, always eager: see `_moe_packed_outside_graphs`."""
    check_inputs(hidden_TH, topk_ids_TK, topk_weights_TK, spec)
    packed.check(spec, hidden_TH)
    if choose_impl(impl, hidden_TH.device, hidden_TH.dtype, spec) != "cpu":
        raise RuntimeError(f"packed weights run with impl='cpu', got {impl!r}; pass their .plain")
    tensors = (hidden_TH, topk_weights_TK, *packed.tensors)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise RuntimeError(
            "packed weights give no gradients; call under torch.no_grad(), or pass their .plain"
        )
    return experts_packed(hidden_TH, topk_ids_TK, topk_weights_TK, packed, spec, counters)


# Only traced code goes through the wrapper: it would cost every eager call.
_moe_packed_outside_graphs = torch.compiler.disable(  # type: ignore[no-untyped-call]
    _moe_packed, reason="packed weights are opaque tensors; compile with the plain ones"
)
