"""Counters on the device, a ring of their values in host memory, and reading it without waiting.

    L layers · E experts · R slots of the ring

Every layer's counters are a (3, E) int32 tensor that the data path adds to: line `ROUTED` the
router's choices, `ROWS` the rows computed, `TILES` the tiles of the task map. `Ring.publish` ends a
step: one launch copies them all into the next slot (on the CPU, a plain copy), or one after every
so many steps. `Ring.read` gives the complete slots that were not read yet; it never waits, and
where the device was a whole ring ahead the next sample spans more steps, so that no count is lost.

>>> counters = new_counters(2, torch.device("cpu"))
>>> ring = Ring([counters], slots=4)
>>> counters[ROWS] += torch.tensor([3, 1], dtype=torch.int32)
>>> ring.publish(); [sample.counts[0][ROWS].tolist() for sample in ring.read()]
[[3, 1]]
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..kernels.publish_ref import HEAD, new_ring, new_state, publish_ref

captured: list[Ring] = []
"""Rings that CUDA graphs write to: a replay may come at any time, so they are never freed."""

ROUTED, ROWS, TILES = 0, 1, 2
Counts = NDArray[np.int64]


def new_counters(num_experts: int, device: torch.device) -> Tensor:
    """Zeros, (3, E) int32."""
    return torch.zeros((3, num_experts), dtype=torch.int32, device=device)


@dataclass(frozen=True)
class Sample:
    """What happened in the `steps` steps up to number `step` (from 0), (3, E) of each layer.

    `time_ns`: when the step ended, in Unix time by the clock of the device.
    """

    step: int
    steps: int
    time_ns: int
    counts: tuple[Counts, ...]


def loads_of(counts: Counts) -> Counts:
    """(E,) rows where the experts counted, else what the router chose."""
    rows_E: Counts = counts[ROWS]
    return rows_E if rows_E.any() else counts[ROUTED]


class Ring:
    """Slots of host memory that the device fills step by step.

    Args:
        counters: of `new_counters`, one a layer, all on one device.
        slots: how many publications the host may be late before samples are merged.
        every: publish every so many steps; the steps between are counted on the host and cost it
            nothing, but for those captured in a CUDA graph, which a launch each counts.

    Raises:
        ValueError: no counters, several devices, or a number out of range.
        RuntimeError: the host memory cannot be pinned.
    """

    def __init__(self, counters: Sequence[Tensor], *, slots: int = 64, every: int = 1) -> None:
        devices = {tensor.device for tensor in counters}
        if len(devices) != 1:
            raise ValueError(
                f"a ring takes counters of one device, got {sorted(map(str, devices))}; "
                "make a profiler for each device"
            )
        if slots < 4 or every < 1:
            raise ValueError(f"slots must be at least 4 and every at least 1, got {slots}, {every}")
        self.counters, self.every, self.slots = tuple(counters), every, slots
        (self.device,) = devices
        width = sum(tensor.numel() for tensor in counters)
        self.merged = 0
        """Publications that were overwritten before they were read."""
        self._next = 0
        self._pending = 0
        self._read_step = 0
        self._offset_ns = 0
        self._before = [tensor.cpu().numpy().astype(np.uint32) for tensor in counters]
        if self.device.type == "cuda":
            self._start_on_gpu(width)
        else:
            self._ring = new_ring(slots, width)
            self._state = new_state(len(counters), self.device)
        self._words: NDArray[np.uint64] = self._ring.numpy().view(np.uint64)

    def _start_on_gpu(self, width: int) -> None:
        from ..kernels import publish as room

        with torch.cuda.device(self.device):
            self._again: Callable[[int], None] | None = None
            self._pdl = torch.cuda.get_device_capability(self.device) >= (9, 0)
            self._ring = new_ring(self.slots, width, pinned=True)
            self._state = new_state(len(self.counters), self.device)
            self._table = room.new_table(self.counters)
            torch.cuda.synchronize()
            room.device_clock_ns(self.device)
            before = time.time_ns()
            shown = room.device_clock_ns(self.device)
            self._offset_ns = (before + time.time_ns()) // 2 - shown

    def publish(self) -> None:
        """End a step, in the order of the current stream; may be captured in a CUDA graph."""
        gpu = self.device.type == "cuda"
        if gpu and torch.cuda.is_current_stream_capturing():
            if self not in captured:
                captured.append(self)
            self._launch(steps=1, every=self.every)
            return
        self._pending += 1
        if self._pending < self.every:
            return
        self._pending = 0
        if gpu:
            self._repeat()
        else:
            self._publish_on_host(steps=self.every, every=self.every)

    def flush(self) -> None:
        """Publish the steps that wait for others to complete `every` of them."""
        steps, self._pending = self._pending, 0
        if steps:
            publish = self._launch if self.device.type == "cuda" else self._publish_on_host
            publish(steps=steps, every=1)

    def _repeat(self) -> None:
        """A publication of `every` steps by the launch that is kept for it."""
        if self.device.index != torch.cuda.current_device():
            self._launch(steps=self.every, every=self.every)
        elif self._again is None:
            from ..kernels.publish import again

            tensors = (self._table, self._ring, self._state)
            self._again = again(*tensors, every=self.every, pdl=self._pdl)
        else:
            self._again(torch._C._cuda_getCurrentRawStream(self.device.index))

    def _launch(self, *, steps: int, every: int) -> None:
        from ..kernels.publish import publish

        with torch.cuda.device(self.device):
            publish(
                self._table,
                self._ring,
                self._state,
                every=every,
                steps=steps,
                pdl=self._pdl,
            )

    def _publish_on_host(self, *, steps: int, every: int) -> None:
        publish_ref(
            self.counters,
            self._ring,
            self._state,
            every=every,
            steps=steps,
            time_ns=time.time_ns(),
        )

    def read(self) -> list[Sample]:
        """The samples that were completed since the last call, oldest first, without waiting."""
        samples: list[Sample] = []
        while True:
            words = self._words[self._next % self.slots].copy()
            ahead = self._ahead(words)
            if ahead.max() > 0:
                # Written again, or about to be: go on half a ring behind the newest.
                newest = self._next + 1 + int(self._ahead(self._words).max())
                kept = newest - 1 - self.slots // 2
                self.merged += kept - self._next
                self._next = kept
            elif ahead.min() < 0:
                return samples
            else:
                samples.append(self._sample(words.astype(np.uint32)))
                self._next += 1

    def _ahead(self, words: NDArray[np.uint64]) -> NDArray[np.int32]:
        """By how many publications each word is newer than the next to be read, modulo 2**32."""
        due = np.uint32((self._next + 1) % 2**32)
        return ((words >> np.uint64(32)).astype(np.uint32) - due).view(np.int32)

    def _sample(self, values: NDArray[np.uint32]) -> Sample:
        low_ns, high_ns, low, high = map(int, values[:HEAD])
        time_ns, until = high_ns << 32 | low_ns, high << 32 | low
        counts, first = [], HEAD
        for layer, before in enumerate(self._before):
            now = values[first : first + before.size].reshape(before.shape)
            first += before.size
            # Counters grow modulo 2**32, and so does their difference.
            counts.append((now - before).astype(np.int64))
            self._before[layer] = now
        steps, self._read_step = until - self._read_step, until
        return Sample(until - 1, steps, time_ns + self._offset_ns, tuple(counts))
