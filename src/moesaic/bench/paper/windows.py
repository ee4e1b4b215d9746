"""Energy and activity over windows: one executor, one cell, about a second without a gap.

    T tokens

The window runs from one step of the energy counter to another (`hardware.energy`), while a thread
reads GPM every 100 ms (`hardware.nvml`), so joules, watts and the activity of SMs, tensor cores and
DRAM over time are of the same work. A host that cannot measure says why, and gives no number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch

from ...hardware.energy import Unavailable
from ...hardware.meter import EnergyMeter, open_meter
from ...hardware.nvml import Gpu, NotAvailable, Utilisation, UtilisationTrace, open_gpu
from ..timing import Call, capture

SHARES = ("sm", "occupancy", "tensor", "dram")


@dataclass(frozen=True)
class Work:
    """What a window repeats: a call of the host, and the tokens that it takes through the layer."""

    call: Callable[[], Any]
    tokens: int


def work_of(calls: Sequence[Call], tokens: int, mode: str) -> Work:
    """A graph of all `calls`, or the calls one after the other.

    Raises:
        GraphError: mode is "graph" and they cannot be captured.
    """
    if mode == "graph":
        captured = capture(calls)
        return Work(captured.graph.replay, captured.calls * tokens)
    turn = cycle(calls)
    return Work(lambda: next(turn)(), tokens)


@dataclass(frozen=True)
class Watch:
    """What the machine lets us measure: a meter, the GPU for GPM, and why there is none."""

    meter: EnergyMeter
    gpu: Gpu | None
    why: str | None = None

    @staticmethod
    def open(device: torch.device) -> Watch:
        """The meters of a device; it never raises."""
        try:
            gpu = open_gpu(device)
            gpu.check_gpm()
        except NotAvailable as error:
            return Watch(open_meter(device), None, str(error))
        return Watch(open_meter(device), gpu)

    def measure(self, work: Work, seconds: float) -> dict[str, Any]:
        """Values of a line: time per call of the layer, energy, activity; or the `error`."""
        trace: UtilisationTrace | None = None
        with ExitStack() as stack:
            if self.gpu is not None:
                trace = stack.enter_context(UtilisationTrace(self.gpu))
            sustained = self.meter.sustain(work.call, seconds=seconds)
        reading = sustained.reading
        if isinstance(reading, Unavailable):
            return {"error": str(reading)}
        tokens = sustained.calls * work.tokens
        values: dict[str, Any] = {
            "samples": sustained.calls,
            "tokens_per_s": tokens / reading.seconds,
            "window_s": reading.seconds,
            "joules": reading.joules,
            "j_per_1000_tokens": 1000 * reading.joules / tokens,
            "watts": reading.watts,
            "idle_watts": reading.idle_w,
            "share_of_tdp": reading.share_of_tdp,
            "meter": reading.meter,
        }
        net = reading.joules_per_token(tokens, net=True)
        values["net_j_per_1000_tokens"] = None if net is None else 1000 * net
        return values | self._activity(trace)

    def _activity(self, trace: UtilisationTrace | None) -> dict[str, Any]:
        """Means and series of the GPM points; without any, why."""
        points = trace.points if trace else []
        if not points:
            return {"gpm": f"not available: {(trace and trace.why) or self.why or 'no point read'}"}
        return activity(points)


def activity(points: Sequence[Utilisation]) -> dict[str, Any]:
    """Means over the windows, the first and the last left out where there are more than four (they
    hold the edges of the work), and the series from the first: seconds, SM, tensor, DRAM."""
    inner = points[1:-1] if len(points) > 4 else points
    length = sum(p.seconds for p in inner)
    means = {name: sum(getattr(p, name) * p.seconds for p in inner) / length for name in SHARES}
    start = points[0].ended - points[0].seconds
    series = [
        [round(p.ended - start, 3), *(round(getattr(p, n), 4) for n in ("sm", "tensor", "dram"))]
        for p in points
    ]
    return {f"{name}_activity": value for name, value in means.items()} | {"series": series}
