"""Windows of energy over a GPU: from zeus where it is installed, else from the NVML counter itself.

The counter is the whole board's and steps about every 100 ms, so a window under `MIN_WINDOW_S` is
refused; `EnergyMeter.sustain` begins and ends on a step. Windows are zeus's where it is installed
(extra `energy`), else differences of the same counter, and `Energy.meter` says which. Nothing here
raises because of the driver: the work that is measured runs on whatever becomes of it, and the
reading says why it is not available, never zero.

>>> meter = open_meter(torch.device("cpu"))
>>> print(meter.measure(lambda: None))
not available: NVML: cpu is not an NVIDIA GPU
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import torch

from .energy import STEP_S, Energy, Reading, Unavailable
from .nvml import Clock, Gpu, NotAvailable, open_gpu

MIN_WINDOW_S = 1.0
LONGEST_STEP_S = 1.0
T = TypeVar("T")
log = logging.getLogger("moesaic")


@dataclass(frozen=True)
class Sustained:
    """A reading over `calls` calls that followed each other without a gap."""

    reading: Reading
    calls: int


class Source(Protocol):
    """Where joules come from; every method raises `NotAvailable` when they do not."""

    @property
    def name(self) -> str:
        """What readings are labelled with."""

    def counter(self) -> float:
        """The counter in joules."""

    def begin(self) -> None:
        """Begin a window."""

    def end(self) -> float:
        """End it: joules since the beginning."""


class NvmlSource:
    """Differences of NVML's counter."""

    name = "nvml"

    def __init__(self, gpu: Gpu) -> None:
        self._gpu, self._began = gpu, 0.0
        gpu.joules()

    def counter(self) -> float:
        """The counter in joules."""
        return self._gpu.joules()

    def begin(self) -> None:
        """Begin a window."""
        self._began = self.counter()

    def end(self) -> float:
        """Joules since the beginning."""
        return self.counter() - self._began


class ZeusSource:
    """Windows of zeus's `ZeusMonitor` over one GPU, the CPU's counters left alone.

    zeus without NVML measures no GPU and its windows are empty, which would sum to zero: refused.
    zeus numbers the GPUs by CUDA_VISIBLE_DEVICES, in NVML's order where torch has CUDA's, so the
    GPU is looked up among zeus's by its UUID.
    """

    KEY = "moesaic"

    def __init__(self, gpu: Gpu) -> None:
        try:
            import zeus
            from zeus.device import get_gpus
            from zeus.monitor import ZeusMonitor
        except ImportError as error:
            raise NotAvailable(f"zeus: cannot be imported: {error}") from error
        self.name = f"zeus {getattr(zeus, '__version__', '')}".strip()
        handles = self._ask(lambda: [known.handle for known in get_gpus().gpus])
        index = self._index = gpu.place_among(handles)
        self._monitor = self._ask(lambda: ZeusMonitor(gpu_indices=[index], cpu_indices=[]))
        self.counter()

    @staticmethod
    def _ask(question: Callable[[], Any]) -> Any:
        try:
            return question()
        except Exception as error:  # zeus has several families of errors, and passes NVML's on
            raise NotAvailable(f"zeus: {type(error).__name__}: {error}") from error

    def counter(self) -> float:
        """The counter in joules."""
        gpus = self._monitor.gpus
        return float(self._ask(lambda: gpus.get_total_energy_consumption(self._index))) / 1e3

    def begin(self) -> None:
        """Begin a window; the meter has already waited for the device where it wants to."""
        self._ask(lambda: self._monitor.begin_window(self.KEY, sync_execution=False, restart=True))

    def end(self) -> float:
        """Joules since the beginning."""
        window = self._ask(lambda: self._monitor.end_window(self.KEY, sync_execution=False))
        if self._index not in window.gpu_energy:
            raise NotAvailable("zeus: the window is empty, zeus has found no NVML")
        return float(window.gpu_energy[self._index])


@dataclass(frozen=True)
class Device:
    """What a meter needs of the device: to wait for all work, and to mark a point of the queue.

    `mark` gives a function that waits until the work queued before it is done.
    """

    wait: Callable[[], None]
    mark: Callable[[], Callable[[], None]]


def cuda_device(device: torch.device) -> Device:
    """Waiting and marking on a CUDA device's current stream."""

    def mark() -> Callable[[], None]:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
        wait: Callable[[], None] = event.synchronize
        return wait

    return Device(lambda: torch.cuda.synchronize(device), mark)


EAGER_DEVICE = Device(lambda: None, lambda: lambda: None)


def _check_length(seconds: float) -> None:
    if seconds < MIN_WINDOW_S:
        raise ValueError(f"seconds must be at least {MIN_WINDOW_S}, got {seconds}")


class EnergyMeter:
    """Windows of energy over one device; without a source it runs the work and says why not.

    `lost` counts windows that an open source failed to give, as when the driver goes away; the
    first is logged.

    Args:
        source: where joules come from, or why there are none.
        tdp_w: the design power in watts.
        passed_over: sources that were tried before `source`, and why they were not taken.
    """

    def __init__(
        self,
        source: Source | Unavailable,
        *,
        tdp_w: float = math.nan,
        device: Device = EAGER_DEVICE,
        passed_over: Sequence[str] = (),
        clock: Clock = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.source, self.tdp_w, self.passed_over = source, tdp_w, tuple(passed_over)
        self.idle_w: float | None = None
        self.lost = 0
        self._device, self._clock, self._sleep = device, clock, sleep

    @property
    def why(self) -> str | None:
        """Why there are no readings, or None."""
        return self.source.why if isinstance(self.source, Unavailable) else None

    def measure(self, work: Callable[[], object]) -> Reading:
        """The reading of one run of `work`, which runs whether or not it can be measured.

        The device is waited for before and after, so that the window holds this work alone.
        """
        begun = self._attempt(self._begin)
        work()
        self._device.wait()
        if isinstance(begun, Unavailable):
            return begun
        return self._attempt(lambda: self._end(begun, self._clock()))

    def sustain(
        self,
        call: Callable[[], object],
        *,
        seconds: float = 2.0,
        settle_s: float = 0.2,
        batch_s: float = 0.01,
    ) -> Sustained:
        """The reading of calls made without a gap for `seconds`, from one step of the counter to
        another, so that neither edges nor steps blur it.

        The calls have then run for `settle_s`, so that clocks and power are those of the work;
        batches of calls last `batch_s`.

        Raises:
            ValueError: `seconds` is under `MIN_WINDOW_S`.
        """
        _check_length(seconds)
        source = self.source
        if isinstance(source, Unavailable):
            return Sustained(source, 0)
        batch = self._batch(call, batch_s)
        try:
            return self._between_steps(source, call, batch, (settle_s, seconds), self._device.mark)
        except NotAvailable as error:
            return Sustained(self._lose(error), 0)
        finally:
            self._device.wait()

    def _batch(self, call: Callable[[], object], batch_s: float) -> int:
        """How many calls last `batch_s`, by a first guess and one trial."""
        count = 1
        for _ in range(2):
            self._device.wait()
            start = self._clock()
            for _ in range(count):
                call()
            self._device.wait()
            one_s = (self._clock() - start) / count
            count = max(1, min(100_000, math.ceil(batch_s / max(one_s, 1e-7))))
        return count

    def _between_steps(
        self,
        source: Source,
        call: Callable[[], object],
        batch: int,
        lengths: tuple[float, float],
        mark: Callable[[], Callable[[], None]],
    ) -> Sustained:
        """Calls in batches, two of them in flight, until a step of the counter ends the window."""
        flying: deque[Callable[[], None]] = deque()
        done, began, done_then = 0, math.nan, 0
        reading, stepped = source.counter(), self._clock()
        started, (settle_s, seconds) = stepped, lengths
        while True:
            for _ in range(batch):
                call()
            flying.append(mark())
            if len(flying) > 1:
                flying.popleft()()
                done += batch
            now, latest = self._clock(), source.counter()
            if latest == reading:
                if now - stepped > LONGEST_STEP_S:
                    raise NotAvailable(f"the energy counter stood still for {LONGEST_STEP_S} s")
                continue
            reading, stepped = latest, now
            if now - started < settle_s:
                continue
            if math.isnan(began):
                source.begin()
                began, done_then = now, done
            elif now - began >= seconds:
                return Sustained(self._energy(source.end(), now - began), done - done_then)

    def idle(self, seconds: float = 2.0, *, settle_s: float = 0.5) -> Reading:
        """The reading of doing nothing, once nothing was done for `settle_s`; its power is
        subtracted in later readings' `net_joules`.

        Raises:
            ValueError: `seconds` is under `MIN_WINDOW_S`.
        """
        _check_length(seconds)

        def rest() -> Reading:
            self._device.wait()
            source: Source = self.source  # type: ignore[assignment]
            nap = partial(self._sleep, 0.005)
            # No marks: an event would wake the device.
            lengths = (settle_s, seconds)
            return self._between_steps(source, nap, 1, lengths, EAGER_DEVICE.mark).reading

        reading = self._attempt(rest)
        if isinstance(reading, Energy):
            self.idle_w = reading.watts
        return reading

    def _attempt(self, step: Callable[[], T]) -> T | Unavailable:
        """What `step` gives, or the reason why it does not."""
        if isinstance(self.source, Unavailable):
            return self.source
        try:
            return step()
        except NotAvailable as error:
            return self._lose(error)

    def _lose(self, error: NotAvailable) -> Unavailable:
        """Count a window that was lost, and log the first."""
        self.lost += 1
        if self.lost == 1:
            log.warning("energy is not measured: %s (told once)", error)
        return Unavailable(str(error))

    def _begin(self) -> float:
        self._device.wait()
        began = self._clock()
        self.source.begin()  # type: ignore[union-attr]
        return began

    def _end(self, began: float, ended: float) -> Reading:
        seconds = ended - began
        joules = self.source.end()  # type: ignore[union-attr]
        if seconds < MIN_WINDOW_S:
            return Unavailable(
                f"the window lasted {seconds:.3f} s; the counter steps every {STEP_S} s, "
                f"at least {MIN_WINDOW_S:g} s are needed"
            )
        return self._energy(joules, seconds)

    def _energy(self, joules: float, seconds: float) -> Reading:
        if not joules > 0:
            return Unavailable(f"the energy counter moved by {joules:g} J in {seconds:.1f} s")
        name = self.source.name  # type: ignore[union-attr]
        return Energy(
            joules=joules, seconds=seconds, tdp_w=self.tdp_w, meter=name, idle_w=self.idle_w
        )


def open_meter(
    device: torch.device, *, sources: Sequence[str] = ("zeus", "nvml"), gpu: Gpu | None = None
) -> EnergyMeter:
    """The meter of a device, from the first of `sources` that works; it never raises.

    Raises:
        ValueError: a source has no such name.
    """
    unknown = set(sources) - {"zeus", "nvml"}
    if unknown:
        raise ValueError(f"sources must be of zeus and nvml, got {sorted(unknown)}")
    try:
        gpu = gpu or open_gpu(device)
        tdp_w = gpu.facts().tdp_w
    except NotAvailable as error:
        return EnergyMeter(Unavailable(str(error)))
    reasons: list[str] = []
    for name in sources:
        try:
            source: Source = ZeusSource(gpu) if name == "zeus" else NvmlSource(gpu)
            return EnergyMeter(source, tdp_w=tdp_w, device=cuda_device(device), passed_over=reasons)
        except NotAvailable as error:
            reasons.append(str(error))
    return EnergyMeter(Unavailable("; ".join(reasons)), passed_over=reasons)
