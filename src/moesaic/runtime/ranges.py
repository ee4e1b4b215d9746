"""Named ranges around layers: NVTX for Nsight, and the same names in `torch.profiler`.

They are hooks of eager calls. A compiled model is traced without them, and a replayed CUDA graph
shows its kernels alone: to see layers by name, run eagerly while looking.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .profiler import watched


class _Range:
    """The hooks of one module; calls of a module may nest."""

    def __init__(self, name: str, nvtx: bool) -> None:
        self.name, self.nvtx = name, nvtx
        self._open: list[Any] = []

    def enter(self, module: nn.Module, inputs: Any) -> None:
        if torch.compiler.is_compiling():
            return
        record = torch.autograd.profiler.record_function(self.name)
        record.__enter__()  # type: ignore[no-untyped-call]
        self._open.append(record)
        if self.nvtx:
            torch.cuda.nvtx.range_push(self.name)  # type: ignore[no-untyped-call]

    def leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or not self._open:
            return
        if self.nvtx:
            torch.cuda.nvtx.range_pop()  # type: ignore[no-untyped-call]
        self._open.pop().__exit__(None, None, None)


@contextmanager
def ranges(model: nn.Module, *, top_k: int | None = 1) -> Iterator[None]:
    """Name every MoE layer of a model, its router and its experts: "moesaic.<layer>.<part>".

    Raises:
        ValueError: see `profiler.watched`.
    """
    parts: dict[str, nn.Module] = {}
    modules = dict(model.named_modules())
    for name, (experts, _) in watched(model, top_k).items():
        parts[f"moesaic.{name or 'experts'}"] = experts
        layer = name.rpartition(".")[0]
        parent = modules[layer]
        if parent is not experts:
            parts[f"moesaic.{layer or 'layer'}"] = parent
            if isinstance(gate := getattr(parent, "gate", None), nn.Module):
                parts[f"moesaic.{layer + '.' if layer else ''}gate"] = gate
    nvtx = torch.cuda.is_available()
    hooks = []
    for name, module in parts.items():
        held = _Range(name, nvtx)
        hooks.append(module.register_forward_pre_hook(held.enter))
        hooks.append(module.register_forward_hook(held.leave, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
