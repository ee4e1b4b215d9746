"""A few streams beside the current one, forked from it and joined to it again.

Work on a lane begins after everything queued on the current stream at the fork, and the current
stream goes on after everything on the lanes at the join. Only events order them, so a fork and its
join may lie within a graph capture. Memory: what a lane reads was made before the fork or on that
lane, and what it makes is read elsewhere after the join only; then the allocator, which knows a
block by the stream it was made on, can never hand it out too early.

Streams are made once for a device and a purpose: a stream for each layer would cost a wait each.
On a device without streams the work runs in order.

>>> lanes = open_lanes(torch.device("cpu"), 2, "aside")
>>> with lanes.fork([0, 1]):
...     with lanes.on(1):
...         print(len(lanes))
2
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Protocol

import torch


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
