"""What is made for good: on a stream of its own, complete, and nobody's until it is freed."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.kernels import device as device_file
from moesaic.kernels.device import for_good


class Stream:
    """A stream that is idle, or whose work never ends."""

    def __init__(self, idle: bool) -> None:
        self.idle = idle


class Event:
    """Complete when its stream is idle; asking in vain a hundred times is a hang."""

    asked = 0

    def record(self, stream: Stream) -> None:
        self.stream = stream

    def query(self) -> bool:
        self.asked += 1
        if self.asked > 100:
            raise TimeoutError("the caller's stream is waited for")
        return self.stream.idle


class Made(Tensor):
    """A tensor that says which streams use it."""

    used_by: list[Any]

    def record_stream(self, stream: Any) -> None:
        self.used_by.append(stream)


def made() -> Made:
    tensor = torch.zeros(3).as_subclass(Made)
    tensor.used_by = []
    return tensor


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> dict[str, Stream]:
    """The caller's stream waits for a launch that has not been made; our own is idle."""
    named = {"caller": Stream(idle=False), "own": Stream(idle=True)}
    monkeypatch.setattr(device_file, "own_stream", lambda device: named["own"])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: named["caller"])
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    return named


@pytest.mark.parametrize("several", [False, True])
def test_the_callers_stream_is_not_waited_for(streams: dict[str, Stream], several: bool) -> None:
    def make() -> Any:
        return (made(), made()) if several else made()

    got = for_good(make, torch.device("cuda:0"))
    tensors = got if several else (got,)
    assert len(tensors) == 1 + several
    assert all(t.used_by == [streams["caller"]] for t in tensors)


def test_what_fails_is_raised_here(streams: dict[str, Stream]) -> None:
    streams["own"].idle = False
    with pytest.raises(TimeoutError, match="waited for"):
        for_good(made, torch.device("cuda:0"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("legacy", [False, True])
def test_nothing_waits_for_a_kernel_that_runs(legacy: bool) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    # The first use of a kernel loads it, and loading may wait for the device.
    for_good(lambda: torch.ones(7, device=device), device)
    with torch.cuda.stream(None if legacy else torch.cuda.Stream()):
        torch.cuda._sleep(4_000_000_000)
        ended = torch.cuda.Event()
        ended.record()
        ones = for_good(lambda: torch.ones(7, device=device), device)
        assert not ended.query()
        assert ones.tolist() == [1.0] * 7
