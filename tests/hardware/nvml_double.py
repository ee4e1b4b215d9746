"""A driver in memory: the functions of `pynvml` that moesaic asks, a clock of its own.

Its GPUs are `GPU-0`, `GPU-1`, ... in NVML's order. The `watched` one draws the driver's power, the
others draw `OTHER_WATTS`, so a counter of the wrong GPU shows.
"""

from __future__ import annotations

import types
from dataclasses import dataclass, field
from typing import Any

import pynvml

from moesaic.hardware.nvml import Gpu

OTHER_WATTS = 77.0


@dataclass
class Driver:
    """The double's state: change it to make time pass, power change, the driver go away."""

    now: float = 0.0
    watts: float = 500.0
    step_s: float = 0.1
    gone: bool = False
    gpm: bool = True
    mig: int = 0
    shares: dict[int, float] = field(default_factory=lambda: {2: 96.0, 3: 50.0, 5: 93.0, 10: 17.0})
    codes: dict[int, int] = field(default_factory=dict)
    joules: float = 1000.0
    freed: int = 0
    gpus: int = 1
    watched: int = 0

    def pass_time(self, seconds: float) -> None:
        """Let time pass at the power of now."""
        self.joules += seconds * self.watts
        self.now += seconds

    def clock(self) -> float:
        """Seconds."""
        return self.now

    def counter_mj(self) -> int:
        """The counter, which shows the joules of the last full step."""
        since = (self.now + 1e-9) % self.step_s
        return round((self.joules - since * self.watts) * 1e3)

    def counter_of(self, handle: str) -> int:
        """The counter of one GPU."""
        if handle == f"handle GPU-{self.watched}":
            return self.counter_mj()
        return round(OTHER_WATTS * self.now * 1e3)

    def handle_of(self, uuid: str) -> str:
        """The handle of a GPU that there is."""
        if uuid not in {f"GPU-{i}" for i in range(self.gpus)}:
            raise pynvml.NVMLError_NotFound()
        return f"handle {uuid}"

    def gpu(self) -> Gpu:
        """The watched GPU, opened."""
        return Gpu(make_lib(self), self.handle_of(f"GPU-{self.watched}"))


def make_lib(driver: Driver) -> Any:
    """The module: constants, structures and errors of nvidia-ml-py, functions of the double."""
    lib = types.SimpleNamespace(**{k: getattr(pynvml, k) for k in dir(pynvml)})

    def answer(value: Any) -> Any:
        def function(*args: Any) -> Any:
            if driver.gone:
                raise pynvml.NVMLError_GpuIsLost()
            return value(*args) if callable(value) else value

        return function

    def metrics(query: Any) -> Any:
        for i in range(query.numMetrics):
            metric = query.metrics[i]
            metric.value = driver.shares[metric.metricId]
            metric.nvmlReturn = driver.codes.get(metric.metricId, 0)
        return query

    def free(_: Any) -> None:
        driver.freed += 1

    functions = {
        "nvmlInit": None,
        "nvmlDeviceGetHandleByUUID": driver.handle_of,
        "nvmlDeviceGetMigMode": lambda _: [driver.mig, driver.mig],
        "nvmlDeviceGetName": "NVIDIA Double",
        "nvmlDeviceGetUUID": lambda handle: handle.removeprefix("handle "),
        "nvmlSystemGetDriverVersion": "580.1",
        "nvmlDeviceGetMemoryInfo": types.SimpleNamespace(total=2**37),
        "nvmlDeviceGetPowerManagementDefaultLimit": 700_000,
        "nvmlDeviceGetEnforcedPowerLimit": 650_000,
        "nvmlDeviceGetPowerUsage": lambda _: round(driver.watts * 1e3),
        "nvmlDeviceGetTemperature": 40,
        "nvmlDeviceGetTotalEnergyConsumption": driver.counter_of,
        "nvmlGpmQueryDeviceSupport": lambda _: types.SimpleNamespace(isSupportedDevice=driver.gpm),
        "nvmlGpmSampleAlloc": lambda: pynvml.c_nvmlGpmSample_t(),
        "nvmlGpmSampleGet": lambda _, sample: sample,
        "nvmlGpmSampleFree": free,
        "nvmlGpmMetricsGet": metrics,
    }
    for name, value in functions.items():
        setattr(lib, name, answer(value))
    return lib
