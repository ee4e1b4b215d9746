"""How the real capturer treats torch: pools that are used up, captures that break, in which order.

A torch in memory stands for the GPU's: it keeps the rules that torch 2.11 was seen to have there. A
pool whose last graph has gone is refused, and a capture that could not be ended leaves the pool
recording and the random generator in a capture.
"""

from __future__ import annotations

import types
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from moesaic.runtime import capture
from moesaic.runtime.capture import CaptureFailed, CudaCapturer, OutOfMemory


class FakeTorch:
    """What `capture.py` uses of torch, with an allocator and a generator that can go wrong."""

    def __init__(self) -> None:
        self.users: dict[int, int] = {}
        self.recording: list[int] = []
        self.broken = False
        self.generator_captures = False
        self.handles = 0
        self.log: list[str] = []
        owner = self

        class Stream:
            device_index = 0

            def __init__(self, device: Any = None) -> None:
                pass

            def wait_stream(self, other: Any) -> None:
                owner.log.append("wait")

        class Graph:
            def __init__(self) -> None:
                self.handle, self.ended = 0, False

            def capture_begin(self, pool: int = 0, capture_error_mode: str = "global") -> None:
                self.handle = pool or owner.new_handle()
                if owner.users.get(self.handle) == 0:
                    raise RuntimeError("use_count > 0 INTERNAL ASSERT FAILED")
                if self.handle in owner.recording:
                    raise RuntimeError("already recording to mempool_id")
                owner.users[self.handle] = owner.users.get(self.handle, 0) + 1
                owner.recording.append(self.handle)
                owner.generator_captures = True

            def capture_end(self) -> None:
                if owner.broken:
                    owner.broken = False
                    raise RuntimeError("operation failed due to a previous error during capture")
                owner.recording.remove(self.handle)
                owner.generator_captures = False
                self.ended = True

            def pool(self) -> int:
                if not self.ended:
                    raise RuntimeError("without a preceding successful capture")
                return self.handle

            def replay(self) -> None:
                owner.log.append("replay")

            def reset(self) -> None:
                if self.ended:
                    owner.users[self.handle] -= 1
                    self.ended = False

        def end(device: int, handle: int) -> None:
            if handle not in owner.recording:
                raise RuntimeError("not currently recording")
            owner.recording.remove(handle)

        def release(device: int, handle: int) -> None:
            owner.users[handle] -= 1

        @contextmanager
        def on(stream: Any) -> Any:
            yield

        stream = Stream()
        self.cuda = types.SimpleNamespace(
            Stream=Stream, CUDAGraph=Graph, stream=on, current_stream=lambda _: stream,
            graph_pool_handle=self.new_handle, empty_cache=lambda: None,
        )  # fmt: skip
        self._C = types.SimpleNamespace(_cuda_endAllocateToPool=end, _cuda_releasePool=release)
        self.OutOfMemoryError = torch.OutOfMemoryError

    def new_handle(self) -> int:
        self.handles += 1
        return self.handles

    def device(self, name: Any) -> Any:
        return name

    def zeros(self, size: int, device: Any) -> Any:
        return torch.zeros(size)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeTorch:
    made = FakeTorch()
    monkeypatch.setattr(capture, "torch", made)
    return made


def works() -> torch.Tensor:
    return torch.ones(1)


def test_graphs_share_a_pool_until_none_is_left(fake: FakeTorch) -> None:
    capturer = CudaCapturer("cuda")
    first, second = capturer.record(works, None), capturer.record(works, 64)
    assert first.pool is second.pool and fake.users == {1: 2}
    first.release()
    third = capturer.record(works, None)
    assert third.pool is second.pool
    second.release()
    third.release()
    assert fake.users == {1: 0}
    fourth = capturer.record(works, None)  # the old pool would be refused
    assert fourth.pool.handle == 2 and fake.users[2] == 1


def breaks(fake: FakeTorch) -> Any:
    def call() -> torch.Tensor:
        fake.broken = True
        raise RuntimeError("operation not permitted when stream is capturing")

    return call


def test_a_capture_that_cannot_be_ended_leaves_nothing_behind(fake: FakeTorch) -> None:
    capturer = CudaCapturer("cuda")
    good = capturer.record(works, None)
    with pytest.raises(CaptureFailed, match="not permitted"):
        capturer.record(breaks(fake), None)
    assert fake.recording == [] and not fake.generator_captures
    assert fake.users[1] == 1  # the graph that lives, and nobody for the one that failed
    again = capturer.record(works, None)
    assert again.pool is not good.pool
    good.release()
    assert fake.users[1] == 0


def test_short_memory_in_a_capture_is_told_apart_and_the_pool_goes_on(fake: FakeTorch) -> None:
    def greedy() -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    capturer = CudaCapturer("cuda")
    good = capturer.record(works, None)
    with pytest.raises(OutOfMemory):
        capturer.record(greedy, None)
    assert fake.users == {1: 1} and fake.recording == []
    assert capturer.record(works, None).pool is good.pool


def test_other_errors_pass_and_leave_nothing_behind(fake: FakeTorch) -> None:
    def wrong() -> torch.Tensor:
        raise TypeError("no such argument")

    capturer = CudaCapturer("cuda")
    with pytest.raises(TypeError, match="no such argument"):
        capturer.record(wrong, None)
    assert fake.recording == [] and not fake.generator_captures
    capturer.record(works, None).replay()


def test_without_the_undoing_the_next_capture_would_fail(
    fake: FakeTorch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CudaCapturer, "_abandon", lambda *_: None)
    capturer = CudaCapturer("cuda")
    capturer.record(works, None)
    with pytest.raises(CaptureFailed):
        capturer.record(breaks(fake), None)
    with pytest.raises(CaptureFailed, match="already recording"):
        capturer.record(works, None)
    assert fake.generator_captures
