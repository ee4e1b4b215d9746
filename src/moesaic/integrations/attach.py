"""`moesaic.attach(model)`: a loaded transformers model through moesaic, and back.

What is attached are plain Python attributes: nothing is added to the state_dict, no parameter or
buffer is touched, copied or cast. `detach` puts everything back.

    attachment = moesaic.attach(model)
    [(layer.index, layer.name, layer.router) for layer in attachment.layers]
    moesaic.detach(model)
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from ..dispatch import Impl
from ..parallel.expert_parallel import Options
from ..parallel.placement import Placement
from ..types import ExpertSpec
from .blocks import BLOCK, fused_block
from .known_blocks import plan_block, recognise_block
from .layouts import UnsupportedExperts, family_of, is_experts, spec_of, weights_of
from .routers import PLAN, fused_forward, recognise
from .spread import SpreadLayer, Tokens, spread_layers
from .transformers import NAME, STATE, fallback_function

Fuse = Literal["auto", "always", "never"]
ATTACHMENT = "_moesaic_attachment"
# What `moesaic.profile` leaves on a module that it has watched.
PROFILERS = ("counters", "kept_counters")
# Families of transformers that are Mixtures of Experts with code of their own.
WITHOUT_INTERFACE = (
    "aria", "dbrx", "doge", "jetmoe", "llama4", "longcat_flash", "nllb_moe", "step3p7",
    "switch_transformers",
)  # fmt: skip


@dataclass
class LayerState:
    """One MoE layer of an attached model, and what the runtime says of it.

    `spec` is None for a layer that runs `fallback`. `router`, `block`: "fused", or why it was left
    as it is.
    `spread`: what runs the experts over several ranks, if a mesh was given.
    `observe(state, topk_ids_TK)`, while it is not None, is called before the experts of every
    forward that is not compiled. `profiler`: the `Profiler` that counts the layer now.
    `num_sms`: SMs that its experts may use, for a scheduler to set; see `moesaic.moe`. Compiled
    and captured steps keep the number of when they were made.
    """

    index: int
    name: str
    spec: ExpertSpec | None
    top_k: int | None
    router: str
    block: str = "its router is not fused"
    impl: Impl = "auto"
    fallback: str | None = None
    observe: Callable[[LayerState, Tensor], None] | None = None
    profiler: Any = None
    num_sms: int | None = None
    spread: SpreadLayer | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy is not watched."""
        return vars(self) | {"profiler": None}


@dataclass(frozen=True)
class Attachment:
    """What `attach` did: the layers in order, and the implementations selected before."""

    layers: tuple[LayerState, ...]
    before: tuple[tuple[Any, str | None], ...] = field(repr=False)


def experts_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every experts module with transformers' interface, by name, in order."""
    return ((name, module) for name, module in model.named_modules() if is_experts(module))


def _router_of(model: nn.Module, name: str) -> nn.Module | None:
    """The router beside an experts module: the sibling that has a `top_k` and a `weight`."""
    block = model.get_submodule(name.rpartition(".")[0])
    for child in block.children():
        if hasattr(child, "top_k") and "weight" in dict(child.named_parameters(recurse=False)):
            return child
    return None


def _nothing_here(model: nn.Module) -> UnsupportedExperts:
    """Why a model without experts of the interface cannot be attached."""
    families = {family_of(module) for module in model.modules()}
    own = sorted(families & set(WITHOUT_INTERFACE))
    name = type(model).__name__
    if own:
        return UnsupportedExperts(
            f"{name}: {own[0]} has experts of its own in transformers, without the interface that "
            "experts_implementation selects from; run it as it is"
        )
    if any("Mxfp4" in type(module).__name__ for module in model.modules()):
        return UnsupportedExperts(
            f"{name}: its experts are MXFP4 blocks; load it with "
            "quantization_config=Mxfp4Config(dequantize=True)"
        )
    return UnsupportedExperts(
        f"{name}: no module has transformers' experts interface; is it a dense model?"
    )


def _plan_layers(
    model: nn.Module, impl: Impl, fallback: str | None
) -> list[tuple[nn.Module, LayerState]]:
    """Experts modules with their states; nothing is changed yet."""
    found = []
    for index, (name, module) in enumerate(experts_modules(model)):
        router = _router_of(model, name)
        top_k = getattr(router, "top_k", None)
        try:
            spec, instead = spec_of(module, weights_of(module)), None
        except UnsupportedExperts:
            if fallback is None:
                raise
            fallback_function(module, fallback)
            spec, instead = None, fallback
        found.append(
            (
                module,
                LayerState(index, name, spec, top_k, "not looked at", impl=impl, fallback=instead),
            )
        )
    return found


def _facts(router: nn.Module) -> tuple[Any, ...]:
    """What decides how a router computes, as a key."""
    plain = (bool, int, float, str, type(None))
    values = {k: v for k, v in vars(router).items() if isinstance(v, plain)}
    shapes = [(name, tuple(p.shape)) for name, p in router.named_parameters()]
    return (
        type(router),
        tuple(sorted(values.items(), key=repr)),
        tuple(shapes),
        "forward" in vars(router),
    )


def _fuse_routers(model: nn.Module, layers: list[LayerState], fuse: Fuse) -> None:
    """Replace the forward of every router that a rule fits, and note what was done."""
    seen: dict[Any, Any] = {}
    for layer in layers:
        router = _router_of(model, layer.name)
        if router is None:
            layer.router = "no router beside the experts"
        elif layer.fallback is not None:
            layer.router = f"left to its layer's fallback, {layer.fallback}"
        elif fuse == "never":
            layer.router = "left as it is, as asked"
        elif fuse == "auto" and router.get_parameter("weight").device.type != "cuda":
            layer.router = "left as it is: on a CPU torch's own top-k is faster"
        else:
            facts = _facts(router)
            if facts not in seen:
                seen[facts] = recognise(router)
            plan = seen[facts]
            layer.router = plan if isinstance(plan, str) else "fused"
            if not isinstance(plan, str):
                setattr(router, PLAN, plan)
                router.forward = types.MethodType(fused_forward, router)


def _fuse_blocks(model: nn.Module, layers: list[LayerState]) -> None:
    """Replace the forward of every block around a fused router that is known whole."""
    seen: dict[Any, Any] = {}
    for layer in layers:
        router = _router_of(model, layer.name)
        if layer.router != "fused" or layer.spec is None or router is None:
            continue
        if layer.spread is not None:
            layer.block = "its experts are spread over ranks"
            continue
        block = model.get_submodule(layer.name.rpartition(".")[0])
        facts = (type(block), *((n, type(c)) for n, c in block.named_children()))
        if facts not in seen:
            seen[facts] = recognise_block(block, router, model.get_submodule(layer.name))
        parts = seen[facts]
        layer.block = parts if isinstance(parts, str) else "fused"
        if not isinstance(parts, str):
            setattr(block, BLOCK, plan_block(parts, layer.spec))
            block.forward = types.MethodType(fused_block, block)


def attach(
    model: nn.Module,
    *,
    impl: Impl = "auto",
    fuse_routers: Fuse = "auto",
    fallback: str | None = None,
    mesh: DeviceMesh | ProcessGroup | None = None,
    placement: Placement | None = None,
    options: Options | None = None,
    tokens: Tokens = "agree",
) -> Attachment:
    """Run a loaded model's experts, and where possible its routers, through moesaic.

    Args:
        model: a transformers model, or a module that holds one.
        impl: see `moesaic.moe`.
        fuse_routers: replace routers by one product and one launch, and blocks of a router, experts
            and shared expert by one piece of code: "auto" on CUDA devices, "always" or "never".
            Only those that give the same answers as before are replaced, see `routers`, `blocks`.
        fallback: the experts implementation of layers that moesaic cannot run, such as
            "grouped_mm"; None: such a layer is an error.
        mesh: the ranks over which the experts are spread, each rank running its own batch; a
            collective of them. `placement`, `options`, `tokens`: see `spread.spread_layers`.

    Returns:
        Attachment: every layer with its index, name, spec and what became of router and block.

    Raises:
        UnsupportedExperts: the model has no such experts, or one of them has an activation, a
            gate, a dtype or a width without kernel; names family, attribute and remedy.
        ValueError: `fuse_routers` or `fallback` is no name of one.
        RuntimeError: the model is attached already, or its weights were rewritten for another
            implementation.
    """
    if fuse_routers not in get_args(Fuse):
        raise ValueError(f"fuse_routers must be one of {get_args(Fuse)}, got {fuse_routers!r}")
    if ATTACHMENT in vars(model):
        raise RuntimeError("the model is attached already; call moesaic.detach(model) first")
    planned = _plan_layers(model, impl, fallback)
    if not planned:
        raise _nothing_here(model)
    configs: dict[int, Any] = {id(module.config): module.config for module, _ in planned}
    before = tuple((c, c._experts_implementation) for c in configs.values())
    if any(name == "deepgemm_megamoe" for _, name in before):
        raise RuntimeError(
            "the model was loaded with experts_implementation='deepgemm_megamoe', which rewrites "
            "its weights; load it again without"
        )
    if mesh is not None:
        spread = spread_layers(
            [(module, state.spec, state.top_k) for module, state in planned],
            mesh=mesh, placement=placement, options=options, tokens=tokens, impl=impl,
        )  # fmt: skip
        for (_, state), layer in zip(planned, spread, strict=True):
            state.spread = layer
    for module, state in planned:
        setattr(module, STATE, state)
    for config, _ in before:
        config._experts_implementation_internal = NAME
    states = [state for _, state in planned]
    _fuse_routers(model, states, fuse_routers)
    _fuse_blocks(model, states)
    attachment = Attachment(tuple(states), before)
    setattr(model, ATTACHMENT, attachment)
    return attachment


def detach(model: nn.Module) -> None:
    """Put back what `attach` changed.

    Raises:
        RuntimeError: the model is not attached, or something else has replaced a router's forward
            since; nothing is changed then.
    """
    attachment: Attachment | None = vars(model).get(ATTACHMENT)
    if attachment is None:
        raise RuntimeError("the model is not attached; call moesaic.attach(model) first")
    fused = [
        (module, plan, forward)
        for module in model.modules()
        for plan, forward in ((PLAN, fused_forward), (BLOCK, fused_block))
        if plan in vars(module)
    ]
    for module, _, forward in fused:
        found = getattr(vars(module).get("forward"), "__func__", None)
        # What was unpickled holds its class's own.
        if found not in (forward, type(module).forward):
            raise RuntimeError(
                f"the forward of {type(module).__name__} was replaced after moesaic.attach; undo "
                "that first (accelerate: remove_hook_from_submodules)"
            )
    for module, plan, _ in fused:
        del module.forward
        delattr(module, plan)
    for _, module in experts_modules(model):
        for name in (STATE, *PROFILERS):
            vars(module).pop(name, None)
            module._buffers.pop(name, None)
    for config, before in attachment.before:
        config._experts_implementation_internal = before
    delattr(model, ATTACHMENT)


@contextmanager
def selected(model: nn.Module, name: str, fuse: Fuse = "auto") -> Iterator[None]:
    """The model with an implementation for a while: "moesaic" attached, or one of transformers'."""
    if name == NAME:
        attach(model, fuse_routers=fuse)
        try:
            yield
        finally:
            detach(model)
        return
    configs: dict[int, Any] = {id(m.config): m.config for _, m in experts_modules(model)}
    before = {key: config._experts_implementation for key, config in configs.items()}
    for config in configs.values():
        config._experts_implementation_internal = name
    try:
        yield
    finally:
        for key, config in configs.items():
            config._experts_implementation_internal = before[key]
