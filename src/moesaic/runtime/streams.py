"""A few streams beside the current one: for size classes, the shared expert, copies.

Work on a lane begins after everything queued on the current stream at the fork, and the current
stream goes on after everything on the lanes at the join. Only events order them, so a fork and its
join may lie within a graph capture. Memory: what a lane reads was made before the fork or on that
lane, and what it makes is read elsewhere after the join only; then the allocator, which knows a
block by the stream it was made on, can never hand it out too early.

Streams are made once for a device and a purpose: a stream for each layer would cost a wait each.
On a device without streams the work runs in order. Bits never depend on lanes: they move when work
runs, and what is summed is summed after the join.

>>> lanes = open_lanes(torch.device("cpu"), 2, "aside")
>>> with lanes.fork([0, 1]):
...     with lanes.on(1):
...         print(len(lanes))
2
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

SHARED_TOKENS = 256


class Lanes(Protocol):
    """Numbered streams beside the current one."""

    def __len__(self) -> int:
        """How many there are."""

    def fork(self, lanes: Iterable[int]) -> contextlib.AbstractContextManager[None]:
        """Inside, `lanes` may be used; the join follows at the end, also after an error."""

    def on(self, lane: int) -> contextlib.AbstractContextManager[None]:
        """Inside, work goes to that lane."""


class NoLanes:
    """Lanes of a device without streams: everything in order."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    @contextlib.contextmanager
    def fork(self, lanes: Iterable[int]) -> Iterator[None]:
        """Nothing to fork."""
        yield

    @contextlib.contextmanager
    def on(self, lane: int) -> Iterator[None]:
        """Nothing to switch."""
        yield


class CudaLanes:
    """CUDA streams of one device."""

    def __init__(self, device: torch.device, count: int) -> None:
        self._device = device
        make = torch.cuda.Stream
        self.streams = [make(device) for _ in range(count)]  # type: ignore[no-untyped-call]

    @staticmethod
    def of(device: torch.device, streams: Iterable[Any]) -> CudaLanes:
        """Lanes that are these streams, of parts of the GPU perhaps."""
        lanes = CudaLanes(device, 0)
        lanes.streams = list(streams)
        return lanes

    def __len__(self) -> int:
        return len(self.streams)

    @contextlib.contextmanager
    def fork(self, lanes: Iterable[int]) -> Iterator[None]:
        """Let the lanes wait for the current stream, and at the end the current one for them."""
        outer = torch.cuda.current_stream(self._device)
        used = [self.streams[lane] for lane in lanes]
        for stream in used:
            stream.wait_stream(outer)
        try:
            yield
        finally:
            for stream in used:
                outer.wait_stream(stream)

    @contextlib.contextmanager
    def on(self, lane: int) -> Iterator[None]:
        """Make a lane the current stream."""
        with torch.cuda.stream(self.streams[lane]):
            yield


@lru_cache(maxsize=64)
def _cuda_lanes(device: torch.device, count: int, purpose: str) -> CudaLanes:
    return CudaLanes(device, count)


def open_lanes(device: torch.device, count: int, purpose: str) -> Lanes:
    """The lanes of a device for a purpose, always the same ones."""
    if device.type != "cuda":
        return NoLanes(count)
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return _cuda_lanes(device, count, purpose)


class WithShared:
    """Routed experts on the current stream, the shared expert on a lane: the sum of both outputs.

    Args:
        routed: the layer of routed experts; the first input is the hidden states (T, H).
        shared: the expert that every token goes through, from (T, H) to (T, H).
        max_tokens: above it both run in turn, for then each fills the GPU by itself.
        lanes: one stream; the device's own when None.
    """

    def __init__(
        self,
        routed: Callable[..., Tensor],
        shared: Callable[[Tensor], Tensor],
        *,
        max_tokens: int = SHARED_TOKENS,
        lanes: Lanes | None = None,
    ) -> None:
        self.routed, self.shared, self.max_tokens = routed, shared, max_tokens
        self._lanes = lanes

    def __call__(self, hidden_TH: Tensor, *routing: Tensor) -> Tensor:
        """``routed(hidden, *routing) + shared(hidden)``."""
        if hidden_TH.shape[0] > self.max_tokens:
            return self.routed(hidden_TH, *routing) + self.shared(hidden_TH)
        if self._lanes is None:
            self._lanes = open_lanes(hidden_TH.device, 1, "shared expert")
        with self._lanes.fork([0]):
            with self._lanes.on(0):
                aside_TH = self.shared(hidden_TH)
            out_TH = self.routed(hidden_TH, *routing)
        return out_TH + aside_TH


class Ticket:
    """A copy that was queued: `target` holds it once `wait` was called."""

    def __init__(self, target: Tensor, event: Any) -> None:
        self.target, self._event = target, event

    def done(self) -> bool:
        """Whether the copy has ended; asks, never waits."""
        return self._event is None or bool(self._event.query())

    def wait(self) -> Tensor:
        """Let the current stream wait for the copy; the host goes on. Returns the target."""
        if self._event is not None:
            torch.cuda.current_stream(self._event.device).wait_event(self._event)
        return self.target

    def block(self) -> Tensor:
        """Let the host wait for the copy. Returns the target."""
        if self._event is not None:
            self._event.synchronize()
        return self.target


class CopyLane:
    """Copies between host and device beside the computation; host memory should be pinned.

    A copy begins after what the current stream holds when it is queued, so that it reads finished
    values and overwrites nothing that is still to be read.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            lanes = open_lanes(device, 1, "copies")
            assert isinstance(lanes, CudaLanes)
            self._stream = lanes.streams[0]

    def copy(self, source: Tensor, target: Tensor) -> Ticket:
        """Queue a copy of `source` into `target`; both may be let go at once."""
        if self._stream is None:
            target.copy_(source)
            return Ticket(target, None)
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)
        for tensor in (source, target):
            if tensor.device.type == "cuda":
                tensor.record_stream(self._stream)
        return Ticket(target, event)
