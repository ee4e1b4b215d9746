"""Beside a layer's time: what a window of it draws, and what an eager call costs the host.

    T tokens

Clock `energy`: a graph of the rotation replayed without a gap for at least `WINDOW_S`, between two
steps of the board's energy counter.

Clock `host`: what an eager call costs the host, twice over `HOST_CALLS` calls. `ms` is of bursts of
`BURST_CALLS`, between which the device may catch up, unmeasured: the work of the host. `row_ms` is
of all calls in a row: a driver holds some 1024 launches that have not begun, then the host waits
for the device, however little it has to do itself. A layer whose device time is the shorter one
(`HOST_MODEL`) has both alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..hardware.energy import Energy
from ..hardware.meter import EnergyMeter
from .layers import ERROR_BOUNDS, Candidate, Loaded, Machine, calls_of, make_work
from .results import Line, make_line
from .suite import Cell
from .timing import Call, capture, check_device, reason, summary
from .workloads import Model

WINDOW_S = 2.0
HOST_CALLS = 1000
BURST_CALLS = 50
HOST_REPEATS = 3
HOST_MODEL = Model("launch-bound", 8, 2, 512, 256)
OTHER = "transformers-grouped_mm"
OTHER_TOKENS = {"host": (1,), "energy": (8192,)}
"""Where the other is measured too."""


def has_other(cell: Cell, name: str) -> bool:
    """Whether a cell of clock `energy` or `host` also measures the candidate of that name."""
    return name == OTHER and cell.tokens in OTHER_TOKENS[cell.clock]


def in_turn(calls: Sequence[Call]) -> Callable[[], Any]:
    """Every call once."""

    def run() -> Any:
        outs = [call() for call in calls]
        return outs[0]

    return run


def energy_values(
    calls: Sequence[Call], tokens: int, device: torch.device, meter: EnergyMeter, seconds: float
) -> tuple[Line, Any]:
    """Joules per token of the calls over and over, and the first call's output afterwards."""
    if device.type == "cuda":
        captured = capture(calls)
        replay, first = captured.graph.replay, captured.first_output
    else:
        replay = in_turn(calls)
        first = replay()
    sustained = meter.sustain(replay, seconds=seconds)
    reading, made = sustained.reading, sustained.calls * len(calls)
    if not isinstance(reading, Energy):
        return {"error": f"no energy: {reading}"}, first
    values: Line = {"ms": reading.seconds * 1e3 / made, "window_s": reading.seconds}
    values |= {"joules_per_token": reading.joules_per_token(made * tokens)}
    values |= {"watts": reading.watts, "meter": reading.meter, "samples": sustained.calls}
    if device.type == "cuda":
        first.fill_(float("nan"))
        replay()
    return values, first


def host_values(calls: Sequence[Call], device: torch.device, count: int = HOST_CALLS) -> Line:
    """Host milliseconds of a call, in bursts and in a row, over `HOST_REPEATS` runs of `count`."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    turn = [calls[i % len(calls)] for i in range(count)]

    def taken_ms(burst: int) -> float:
        """A call of `count` in bursts; the device catches up between them, unmeasured."""
        seconds = 0.0
        for begin in range(0, count, burst):
            wait()
            start = time.perf_counter()
            for call in turn[begin : begin + burst]:
                call()
            seconds += time.perf_counter() - start
        wait()
        return seconds * 1e3 / count

    for call in turn[:64]:
        call()
    found = summary([taken_ms(BURST_CALLS) for _ in range(HOST_REPEATS)])
    row = summary([taken_ms(count) for _ in range(HOST_REPEATS)])
    values: Line = {"ms": found.median, "ms_p20": found.p20, "ms_p80": found.p80}
    return values | {"row_ms": row.median, "burst": BURST_CALLS, "samples": count}


def measure_windows(
    loaded: Loaded, cell: Cell, candidates: Sequence[Candidate], machine: Machine, *,
    meter: EnergyMeter, seed: int, stamped: Line, suite: str, seconds: float = WINDOW_S,
) -> list[Line]:  # fmt: skip
    """The lines of a cell of clock `energy` or `host`: moesaic and transformers' grouped_mm.

    Raises:
        DeviceLost: the GPU answers no more.
    """
    fixed = stamped | {
        "suite": suite, "clock": cell.clock, "model": cell.model, "tokens": cell.tokens,
        "routing": cell.routing, "dtype": cell.dtype,
    }  # fmt: skip
    lines: list[Line] = []
    with torch.no_grad():
        work = make_work(loaded, cell, machine, seed)
        for candidate in candidates:
            if candidate.name != "moesaic" and not has_other(cell, candidate.name):
                continue
            mode = "graph" if cell.clock == "energy" else "eager"
            values: Line = {"impl": candidate.name, "mode": mode}
            try:
                if candidate.name in loaded.errors:
                    raise RuntimeError(loaded.errors[candidate.name])
                calls = calls_of(loaded, candidate, work.inputs)
                if cell.clock == "host":
                    values |= host_values(calls, machine.device)
                    out = calls[0]()
                else:
                    more, out = energy_values(calls, cell.tokens, machine.device, meter, seconds)
                    values |= more
                error = work.relative_error(out)
                values |= {"err": error, "wrong": not error <= ERROR_BOUNDS[cell.dtype]}
            except Exception as error_:
                values["error"] = reason(error_)
                check_device(values["error"])
            lines.append(make_line(fixed, **values))
    return lines
