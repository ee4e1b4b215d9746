"""One door for launches that may be made again: `launch` makes one, `recorded` keeps those made.

Triton's launcher binds and checks every argument of every call in Python, tens of microseconds a
kernel. A sequence of launches whose shapes repeat can be recorded once and made again by
`hopper.raw` with new addresses. Recording also watches torch: memory that was made inside
is scratch, views are free, and any other torch operation means that the launches are not the
whole story, which `Recording.problem` says.

>>> with recorded() as recording:
...     scratch = torch.empty(3)
>>> recording.problem, len(recording.scratch)
(None, 1)
>>> with recorded() as recording:
...     doubled = scratch * 2
>>> recording.problem
'aten.mul.Tensor ran between the launches'
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_state = threading.local()
_aten = torch.ops.aten
MAKERS = {
    _aten.empty.memory_format, _aten.new_empty.default, _aten.empty_like.default,
    _aten.empty_strided.default,
}  # fmt: skip
VIEWS = {
    _aten.view.default, _aten.slice.Tensor, _aten.select.int, _aten.unbind.int,
    _aten.detach.default, _aten.alias.default, _aten.as_strided.default,
}  # fmt: skip


class Launch(NamedTuple):
    """One launch: the kernel's function, what was compiled of it, its grid and its arguments."""

    fn: Any
    compiled: Any
    grid: int
    values: dict[str, Any]


class Recording:
    """The launches of a block of code, in order, and the memory that it made for itself."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self.scratch: list[Tensor] = []
        self.problem: str | None = None


class _Watch(TorchDispatchMode):
    """Tells a recording of the memory that torch makes, and of operations that it cannot repeat."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.recording = recording

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in MAKERS:
            self.recording.scratch.append(result)
        elif func not in VIEWS:
            self.recording.problem = f"{func} ran between the launches"
        return result


def launch(fn: Any, grid: int, *args: Any, **options: Any) -> None:
    """``fn[(grid,)](*args, **options)``, kept if this thread is recording."""
    compiled = fn[(grid,)](*args, **options)
    recording: Recording | None = getattr(_state, "recording", None)
    if recording is None:
        return
    names = fn.arg_names
    defaults = {p.name: p.default for p in fn.params if p.has_default}
    given = {name: value for name, value in options.items() if name in names}
    values = defaults | dict(zip(names, args, strict=False)) | given
    recording.launches.append(Launch(fn, compiled, grid, values))


@contextmanager
def recorded() -> Iterator[Recording]:
    """Record the launches that this thread makes inside the block."""
    recording = Recording()
    _state.recording = recording
    try:
        with _Watch(recording):
            yield recording
    finally:
        _state.recording = None
