"""Recording calls into CUDA graphs: the only part of the graph cache that touches the device.

A `Capturer` runs warm-up calls where it will capture, records a call without running it, and says
how much memory the device has left, the driver's own part included. `CudaCapturer` is the real one;
the cache's logic is tested on a CPU with another.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

Outputs = Tensor | tuple[Tensor, ...]
Call = Callable[[], Outputs]


class CaptureFailed(RuntimeError):
    """The call cannot be recorded; the message is the reason."""


class OutOfMemory(CaptureFailed):
    """There is not enough memory to record the call."""


class Recording(Protocol):
    """A recorded call; `outputs` are rewritten by every replay."""

    @property
    def outputs(self) -> Outputs:
        """What the call returned."""

    def replay(self) -> None:
        """Run the call again on whatever its inputs hold now, on the current stream."""

    def release(self) -> None:
        """Give everything back; the recording and its outputs are dead then."""


class Capturer(Protocol):
    """How calls are recorded; `sms` is the SM budget for which they are."""

    def busy(self) -> str | None:
        """Why nothing can be recorded or replayed just now, or None."""

    def warm(self, call: Call, sms: int | None) -> Outputs:
        """Run a call where `record` would record it, refusing one that waits for the device.

        Raises:
            CaptureFailed: it waits for the device, which a graph cannot.
        """

    def record(self, call: Call, sms: int | None) -> Recording:
        """Record a call without running it.

        Raises:
            OutOfMemory, CaptureFailed: it was not recorded, and everything is as before.
        """

    def before_replay(self) -> None:
        """Order the replay that follows behind the last one, whose memory it may share."""

    def free_bytes(self) -> int:
        """Free memory of the device as the driver sees it, once all work is done."""

    def trim(self) -> None:
        """Give unused memory back; called when no recording is left, and after a failure."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch or the driver says that memory is short."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()


def one_line(error: BaseException) -> str:
    """An exception as one line of at most 300 characters."""
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text}"[:300]


@contextlib.contextmanager
def _no_sync() -> Any:
    """Any wait for the device raises inside."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@dataclass
class Pool:
    """A memory pool of graphs and how many of them live; one that had none left is not used again,
    for the allocator refuses that."""

    handle: Any
    live: int = 0


@dataclass
class CudaRecording:
    """A CUDA graph and what its call returned."""

    graph: torch.cuda.CUDAGraph
    outputs: Outputs
    pool: Pool

    def replay(self) -> None:
        """Launch the graph on the current stream."""
        self.graph.replay()

    def release(self) -> None:
        """Destroy the graph; its memory goes back to the pool."""
        self.outputs = ()
        self.graph.reset()
        self.pool.live -= 1


class CudaCapturer:
    """Records on a CUDA device, every graph into one memory pool.

    Graphs that share a pool must not run at the same time: `before_replay` makes a stream wait for
    the one that replayed last.

    Args:
        device: where the calls run.
        streams: the stream of each SM budget, for graphs that must keep a slice of the GPU (a graph
            keeps that of the stream that captured it); other budgets use one stream of our own.
    """

    def __init__(
        self,
        device: torch.device | str = "cuda",
        *,
        streams: Mapping[int, torch.cuda.Stream] | None = None,
    ) -> None:
        self.device = torch.device(device)
        self._streams = dict(streams or {})
        self._own: torch.cuda.Stream | None = None
        self._pool: Pool | None = None
        self._broken: list[torch.cuda.CUDAGraph] = []
        self._last: torch.cuda.Stream | None = None

    def _stream(self, sms: int | None) -> torch.cuda.Stream:
        if sms is not None and sms in self._streams:
            return self._streams[sms]
        if self._own is None:
            self._own = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        return self._own

    def busy(self) -> str | None:
        """Within another capture and under torch.compile calls must stay plain calls."""
        if torch.compiler.is_compiling():
            return "compiling"
        return "inside a capture" if torch.cuda.is_current_stream_capturing() else None

    def warm(self, call: Call, sms: int | None) -> Outputs:
        """Run a call on the stream that captures, waits for the device forbidden."""
        outer = torch.cuda.current_stream(self.device)
        side = self._stream(sms)
        side.wait_stream(outer)
        try:
            with torch.cuda.stream(side), _no_sync():
                outputs = call()
        except RuntimeError as error:
            if "synchronizing CUDA operation" in str(error):
                raise CaptureFailed(f"waits for the device: {one_line(error)}") from error
            raise
        finally:
            outer.wait_stream(side)
        for output in (outputs,) if isinstance(outputs, Tensor) else outputs:
            output.record_stream(outer)
        return outputs

    def record(self, call: Call, sms: int | None) -> CudaRecording:
        """Capture a call into the shared pool.

        `torch.cuda.graph` would empty the allocator's cache at each capture, which the calls
        between two captures would pay for.
        """
        side, outer = self._stream(sms), torch.cuda.current_stream(self.device)
        if self._pool is None or not self._pool.live:
            self._pool = Pool(torch.cuda.graph_pool_handle())
        graph, pool = torch.cuda.CUDAGraph(), self._pool
        side.wait_stream(outer)
        try:
            with torch.cuda.stream(side):
                # Only this thread is kept from what a capture forbids.
                graph.capture_begin(pool=pool.handle, capture_error_mode="thread_local")
                try:
                    outputs = call()
                except BaseException:
                    with warnings.catch_warnings(), contextlib.suppress(RuntimeError):
                        warnings.simplefilter("ignore")  # it says that the graph is empty
                        graph.capture_end()
                    raise
                graph.capture_end()
        except BaseException as error:
            self._abandon(graph, pool, side)
            if not isinstance(error, RuntimeError):
                raise
            kind = OutOfMemory if is_out_of_memory(error) else CaptureFailed
            raise kind(one_line(error)) from error
        pool.live += 1
        return CudaRecording(graph, outputs, pool)

    def _abandon(self, graph: torch.cuda.CUDAGraph, pool: Pool, side: torch.cuda.Stream) -> None:
        """Undo a capture that failed.

        One that could not even be ended leaves torch's allocator (before 2.12) recording to the
        pool, the pool with a user too many, and the random generator in a capture. So the pool is
        let go by hand, a new one is used, and a capture that succeeds sets the generator right.
        """
        try:
            graph.pool()
            ended = True
        except RuntimeError:
            ended = False
            self._broken.append(graph)  # the allocator may still ask it whose memory is whose
        with contextlib.suppress(RuntimeError):
            graph.reset()
        if ended:
            return
        self._pool = None
        for undo in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            with contextlib.suppress(RuntimeError):
                getattr(torch._C, undo)(side.device_index, pool.handle)
        healing = torch.cuda.CUDAGraph()
        with contextlib.suppress(RuntimeError):
            cell = torch.zeros(1, device=self.device)
            side.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(side):
                healing.capture_begin(capture_error_mode="thread_local")
                cell.add_(1)
                healing.capture_end()
        healing.reset()

    def before_replay(self) -> None:
        """Wait for the stream of the last replay when this is another."""
        now = torch.cuda.current_stream(self.device)
        if self._last is not None and self._last != now:
            now.wait_stream(self._last)
        self._last = now

    def free_bytes(self) -> int:
        """Free bytes by the driver, after all work on the device."""
        torch.cuda.synchronize(self.device)
        return int(torch.cuda.mem_get_info(self.device)[0])

    def trim(self) -> None:
        """Return unused blocks, those of a pool without graphs included."""
        torch.cuda.empty_cache()
