"""A capturer without a GPU: recordings run their call again, memory is a number that runs out.

As a CUDA graph does, a recording reads the weights where they lay when it was made: `module` is put
back as it was for each replay, so that a stale graph gives a stale answer.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from moesaic.runtime.capture import Call, CaptureFailed, OutOfMemory, Outputs


@dataclass
class FakeCapturer:
    """Counts what is asked of it. `fail`: asked at each capture, gives what it raises, if anything.

    `size`: bytes that the driver takes for a recording, beside nothing else.
    """

    module: nn.Module | None = None
    total_bytes: int = 10**9
    size: Callable[[int | None], int] = lambda sms: 1000
    fail: Callable[[], Exception | None] = lambda: None
    fail_warm: Callable[[], Exception | None] = lambda: None
    occupied: str | None = None
    used_bytes: int = 0
    live: int = 0
    warmed: int = 0
    recorded: int = 0
    replayed: int = 0
    trims: int = 0
    log: list[str] = field(default_factory=list)

    def busy(self) -> str | None:
        return self.occupied

    def warm(self, call: Call, sms: int | None) -> Outputs:
        if error := self.fail_warm():
            raise error
        self.warmed += 1
        return call()

    def record(self, call: Call, sms: int | None) -> FakeRecording:
        if error := self.fail():
            raise error
        if self.used_bytes + self.size(sms) > self.total_bytes:
            raise OutOfMemory("CUDA out of memory")
        recording = FakeRecording(self, call, self.size(sms), sms)
        self.recorded += 1
        return recording

    def before_replay(self) -> None:
        self.log.append("ordered")

    def free_bytes(self) -> int:
        return self.total_bytes - self.used_bytes

    def trim(self) -> None:
        self.trims += 1


Places = list[tuple[nn.Module, dict[str, nn.Module | None], list[tuple[str, Tensor, Tensor]]]]


def places_of(module: nn.Module | None) -> Places:
    """Which modules, parameters and memory a module consists of."""
    found: Places = []
    for one in module.modules() if module is not None else ():
        tensors = [(n, p, p.data) for n, p in one._parameters.items() if p is not None]
        found.append((one, dict(one._modules), tensors))
    return found


def put(places: Places) -> None:
    """Make modules consist of these parts again."""
    for module, children, tensors in places:
        module._modules.update(children)
        for name, parameter, memory in tensors:
            parameter.data = memory
            module._parameters[name] = parameter


@contextmanager
def as_it_was(module: nn.Module | None, then: Places) -> Iterator[None]:
    """Inside, the module is what it was then."""
    now = places_of(module)
    put(then)
    try:
        yield
    finally:
        put(now)


class FakeRecording:
    """A call that can be run again into the tensors that its first run gave."""

    def __init__(self, owner: FakeCapturer, call: Call, size: int, sms: int | None) -> None:
        self._owner, self._call, self._size = owner, call, size
        with torch.no_grad():
            outputs = call()  # a real capture runs nothing; its outputs hold rubbish until replayed
        single = isinstance(outputs, Tensor)
        made = tuple(torch.full_like(o, 99) for o in ((outputs,) if single else outputs))
        self.outputs: Outputs = made[0] if single else made
        self._places = places_of(owner.module)
        owner.used_bytes += size
        owner.live += 1

    def replay(self) -> None:
        assert self._size >= 0, "replayed after its release"
        with as_it_was(self._owner.module, self._places):
            fresh = self._call()
        fresh_all = (fresh,) if isinstance(fresh, Tensor) else fresh
        held = (self.outputs,) if isinstance(self.outputs, Tensor) else self.outputs
        for old, new in zip(held, fresh_all, strict=True):
            old.copy_(new)
        self._owner.replayed += 1

    def release(self) -> None:
        assert self._size >= 0, "released twice"
        self._owner.used_bytes -= self._size
        self._owner.live -= 1
        self._size = -1
        self.outputs, self._places = (), []


def refused() -> CaptureFailed:
    """What a call that waits for the device gives."""
    return CaptureFailed("waits for the device")


def live_tensors() -> int:
    """Tensors that the garbage collector knows."""
    gc.collect()
    return sum(issubclass(type(o), Tensor) for o in gc.get_objects())
