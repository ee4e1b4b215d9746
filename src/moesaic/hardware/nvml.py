"""One GPU as NVML knows it: facts, its energy counter, and utilisation from GPM windows.

GPM gives what the hardware really did between two samples: the share of cycles with SMs, tensor
cores and DRAM busy. (`utilization.gpu` of nvidia-smi says only that some kernel was resident.) The
counters are the whole device's, whoever used it, and mean nothing over windows under 100 ms, which
are refused.

Whatever NVML cannot give raises `NotAvailable` with the reason; a missing number is never a zero.

>>> open_gpu(torch.device("cuda", 0))  # doctest: +SKIP
Gpu(NVIDIA H200, 700 W)
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

MIN_GPM_WINDOW_S = 0.1
# Metric numbers of nvml.h; the values come as percentages.
GPM_METRICS = {"sm": 2, "occupancy": 3, "tensor": 5, "dram": 10}
Clock = Callable[[], float]


class NotAvailable(RuntimeError):
    """The machine cannot say this; the message is the reason."""


@dataclass(frozen=True, kw_only=True)
class DeviceFacts:
    """What NVML says of a GPU: powers in watts, memory in bytes; `mig`: it is partitioned."""

    name: str
    uuid: str
    driver: str
    memory_bytes: int
    tdp_w: float
    power_limit_w: float
    mig: bool


@dataclass(frozen=True, kw_only=True)
class Utilisation:
    """Shares in [0, 1] over a window of `seconds`: SMs busy, warps resident of the most possible,
    tensor cores busy, DRAM bandwidth used. `ended` is the clock at the end of the window."""

    seconds: float
    ended: float
    sm: float
    occupancy: float
    tensor: float
    dram: float


def load_nvml() -> Any:
    """The `pynvml` module of nvidia-ml-py, initialised.

    Raises:
        NotAvailable: it is not installed, or finds no driver.
    """
    try:
        import pynvml
    except ImportError as error:
        raise NotAvailable("NVML: nvidia-ml-py is not installed") from error
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise NotAvailable(f"NVML: {error}") from error
    return pynvml


class Gpu:
    """An open GPU; every method raises `NotAvailable`, with the reason, when NVML refuses."""

    def __init__(self, lib: Any, handle: Any) -> None:
        self._lib, self._handle = lib, handle

    def _ask(self, name: str, *args: Any) -> Any:
        try:
            return getattr(self._lib, name)(*args)
        except self._lib.NVMLError as error:
            raise NotAvailable(f"{name}: {error}") from error
        except AttributeError as error:
            raise NotAvailable(f"{name}: not in this nvidia-ml-py, update it") from error

    def ask(self, name: str, *args: Any) -> Any:
        """The answer of the NVML function `name` for this GPU."""
        return self._ask(name, self._handle, *args)

    def place_among(self, handles: Sequence[Any]) -> int:
        """Which of other NVML handles is this GPU, by UUID.

        Raises:
            NotAvailable: none of them is.
        """
        own = self.ask("nvmlDeviceGetUUID")
        others = [self._ask("nvmlDeviceGetUUID", handle) for handle in handles]
        if own not in others:
            raise NotAvailable(f"NVML: {own} is not among {others}")
        return others.index(own)

    def facts(self) -> DeviceFacts:
        """Name, driver, memory, design power (the default limit), limit now, MIG mode."""
        try:
            mig = bool(self.ask("nvmlDeviceGetMigMode")[0])
        except NotAvailable:  # GPUs that cannot be partitioned refuse the question
            mig = False
        return DeviceFacts(
            name=self.ask("nvmlDeviceGetName"),
            uuid=self.ask("nvmlDeviceGetUUID"),
            driver=self._ask("nvmlSystemGetDriverVersion"),
            memory_bytes=self.ask("nvmlDeviceGetMemoryInfo").total,
            tdp_w=self.ask("nvmlDeviceGetPowerManagementDefaultLimit") / 1e3,
            power_limit_w=self.ask("nvmlDeviceGetEnforcedPowerLimit") / 1e3,
            mig=mig,
        )

    def joules(self) -> float:
        """The counter of energy used since the driver was loaded; it steps every 100 ms or so."""
        return float(self.ask("nvmlDeviceGetTotalEnergyConsumption")) / 1e3

    def watts(self) -> float:
        """Power now, an average over the last second on Ampere and newer."""
        return float(self.ask("nvmlDeviceGetPowerUsage")) / 1e3

    def celsius(self) -> float:
        """Temperature of the GPU."""
        return float(self.ask("nvmlDeviceGetTemperature", self._lib.NVML_TEMPERATURE_GPU))

    def gpm(self, *, clock: Clock = time.perf_counter) -> GpmWindow:
        """A utilisation window that begins now."""
        return GpmWindow(self, self._lib, clock)

    def check_gpm(self) -> None:
        """Raise `NotAvailable` unless this GPU gives utilisation of the whole device."""
        if not self.ask("nvmlGpmQueryDeviceSupport").isSupportedDevice:
            raise NotAvailable("GPM: this GPU has none, Hopper and newer have")
        if self.facts().mig:
            raise NotAvailable("GPM: the GPU is partitioned (MIG), its shares would be misread")

    def __repr__(self) -> str:
        facts = self.facts()
        return f"Gpu({facts.name}, {facts.tdp_w:.0f} W)"


class GpmWindow:
    """Utilisation between two moments: the window begins when it is made or `restart`ed.

    Raises:
        NotAvailable: the GPU has no GPM, is partitioned, or NVML has gone.
    """

    def __init__(self, gpu: Gpu, lib: Any, clock: Clock = time.perf_counter) -> None:
        self._gpu, self._lib, self._clock = gpu, lib, clock
        gpu.check_gpm()
        self._first, self._second = (gpu._ask("nvmlGpmSampleAlloc") for _ in range(2))
        self._began = 0.0
        self.restart()

    def restart(self) -> None:
        """Begin anew, now."""
        self._gpu.ask("nvmlGpmSampleGet", self._first)
        self._began = self._clock()

    def read(self) -> Utilisation:
        """The utilisation since the beginning; the next window begins here.

        Raises:
            ValueError: the window is shorter than 100 ms, and goes on.
            NotAvailable: NVML gives no number for one of the metrics.
        """
        ended = self._clock()
        seconds = ended - self._began
        if seconds < MIN_GPM_WINDOW_S:
            raise ValueError(
                f"a utilisation window must be at least {MIN_GPM_WINDOW_S * 1e3:.0f} ms, got "
                f"{seconds * 1e3:.1f} ms; repeat the work until it lasts that long"
            )
        self._gpu.ask("nvmlGpmSampleGet", self._second)
        shares = self._shares()
        self._first, self._second = self._second, self._first
        self._began = ended
        return Utilisation(seconds=seconds, ended=ended, **shares)

    def _shares(self) -> dict[str, float]:
        query = self._lib.c_nvmlGpmMetricsGet_t()
        query.version = self._lib.NVML_GPM_METRICS_GET_VERSION
        query.numMetrics = len(GPM_METRICS)
        query.sample1, query.sample2 = self._first, self._second
        for place, number in enumerate(GPM_METRICS.values()):
            query.metrics[place].metricId = number
        self._gpu._ask("nvmlGpmMetricsGet", query)
        shares = {}
        for place, name in enumerate(GPM_METRICS):
            metric = query.metrics[place]
            if metric.nvmlReturn or metric.value != metric.value:
                raise NotAvailable(f"GPM: no value of {name} (code {metric.nvmlReturn})")
            shares[name] = metric.value / 100
        return shares

    def close(self) -> None:
        """Free the two samples."""
        for sample in (self._first, self._second):
            self._gpu._ask("nvmlGpmSampleFree", sample)

    def __enter__(self) -> GpmWindow:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.close()


class UtilisationTrace:
    """Utilisation over time: a thread that reads a window every `period_s`.

    `points` are what it read; `why` is the reason when NVML refused or went away, and then the
    points end there. The work that is watched is never disturbed.

    Raises:
        ValueError: `period_s` is under 100 ms.
    """

    def __init__(self, gpu: Gpu, *, period_s: float = MIN_GPM_WINDOW_S) -> None:
        if period_s < MIN_GPM_WINDOW_S:
            raise ValueError(f"period_s must be at least {MIN_GPM_WINDOW_S}, got {period_s}")
        self.points: list[Utilisation] = []
        self.why: str | None = None
        self._gpu, self._period_s = gpu, period_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="moesaic-gpm", daemon=True)

    def _watch(self) -> None:
        try:
            with self._gpu.gpm() as window:
                # A timer may fire early by its granularity, and a short window is refused.
                while not self._stop.wait(self._period_s + 2e-3):
                    self.points.append(window.read())
        except (NotAvailable, ValueError) as error:
            self.why = str(error)

    def __enter__(self) -> UtilisationTrace:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()


def open_gpu(device: torch.device, *, lib: Any = None) -> Gpu:
    """The GPU of a torch device, found by its UUID.

    NVML counts every GPU of the machine, torch those in CUDA_VISIBLE_DEVICES in CUDA's order, so
    an index of the one means nothing to the other.

    Args:
        lib: instead of the `pynvml` module, for tests.

    Raises:
        NotAvailable: the device is no GPU, or NVML cannot be used, and why.
    """
    if device.type != "cuda":
        raise NotAvailable(f"NVML: {device} is not an NVIDIA GPU")
    lib = load_nvml() if lib is None else lib
    uuid = torch.cuda.get_device_properties(device).uuid
    try:
        return Gpu(lib, lib.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"))
    except lib.NVMLError as error:
        raise NotAvailable(f"NVML: {error}") from error
