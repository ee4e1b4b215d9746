"""Traces for Perfetto (ui.perfetto.dev, chrome://tracing): experts, steps, and torch's streams.

    E experts

`PerfettoTrace` writes the JSON trace-event format: a process per layer with the rows of every
expert as a counter, its balancedness, and a track per expert that shows when it was hot or cold;
one more process shows the steps. `merge` puts a trace of `torch.profiler` beside it, whose GPU
streams and kernels then lie on the same time axis; times are Unix time, by the device's clock.

    with PerfettoTrace(Path("trace.json"), profiler.layers) as trace:
        profiler.sinks["perfetto"] = trace
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ..cost import balancedness
from ..runtime.counters import Sample, loads_of
from ..runtime.profile import Profile
from ..runtime.profiler import LayerInfo, Update

STEPS_PID = 1
FIRST_LAYER_PID = 1000
Event = dict[str, Any]


class PerfettoTrace:
    """A sink that writes events as they come; `close` makes the file complete.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], layers: Sequence[LayerInfo]) -> None:
        self.path = Path(path)
        self._partial = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        self._file = self._partial.open("w", encoding="utf-8")
        self._base_ns = 0
        self._last_us = 0.0
        self._since: dict[tuple[int, int, str], float] = {}
        self._layers = tuple(layers)

    def _begin(self, base_ns: int) -> None:
        self._base_ns = base_ns
        head = {"displayTimeUnit": "ms", "baseTimeNanoseconds": base_ns}
        self._file.write(json.dumps(head)[:-1] + ', "traceEvents": [\n')
        name: Event = {"ph": "M", "name": "process_name", "pid": STEPS_PID}
        self._file.write(json.dumps(name | {"args": {"name": "moesaic steps"}}))
        for layer, info in enumerate(self._layers):
            self._write(name | {"pid": FIRST_LAYER_PID + layer, "args": {"name": info.name}})

    def _write(self, event: Event) -> None:
        self._file.write(",\n" + json.dumps(event, separators=(",", ":")))

    def _us(self, time_ns: int) -> float:
        return (time_ns - self._base_ns) / 1e3

    def __call__(self, update: Update) -> None:
        if not self._base_ns:
            self._begin(update.samples[0].time_ns)
        for sample in update.samples:
            self._step(sample)
        self._temperatures(update.profile)
        self._file.flush()

    def _step(self, sample: Sample) -> None:
        now = self._us(sample.time_ns)
        name = f"step {sample.step}" if sample.steps == 1 else f"{sample.steps} steps"
        event = {"ph": "X", "pid": STEPS_PID, "tid": 0, "name": name}
        self._write(event | {"ts": self._last_us, "dur": max(0.0, now - self._last_us)})
        for layer, counts in enumerate(sample.counts):
            loads = loads_of(counts).tolist()
            counter = {"ph": "C", "pid": FIRST_LAYER_PID + layer, "ts": now}
            rows = {f"expert {e}": n for e, n in enumerate(loads)}
            self._write(counter | {"name": "rows", "args": rows})
            mean = {"mean / max": balancedness(loads)}
            self._write(counter | {"name": "balancedness", "args": mean})
        self._last_us = now

    def _temperatures(self, profile: Profile) -> None:
        """Close the spans of experts that are hot or cold no more, begin those that are now."""
        now = {
            (layer.layer, expert, kind)
            for layer in profile.layers
            for kind, experts in (("hot", layer.hot), ("cold", layer.cold))
            for expert in experts
        }
        for key in set(self._since) - now:
            self._span(key)
        for key in now - set(self._since):
            self._since[key] = self._last_us

    def _span(self, key: tuple[int, int, str]) -> None:
        layer, expert, kind = key
        start = self._since.pop(key)
        event = {"ph": "X", "pid": FIRST_LAYER_PID + layer, "tid": expert, "name": kind}
        self._write(event | {"ts": start, "dur": self._last_us - start})

    def close(self) -> None:
        """End what is open and give the file its name."""
        if not self._base_ns:
            self._begin(1)
        for key in list(self._since):
            self._span(key)
        self._file.write("\n]}\n")
        self._file.close()
        self._partial.replace(self.path)

    def __enter__(self) -> PerfettoTrace:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def merge(
    ours: str | os.PathLike[str],
    torch_trace: str | os.PathLike[str],
    out: str | os.PathLike[str],
) -> None:
    """Write both traces into one, on the time axis of torch's (`profile.export_chrome_trace`).

    Raises:
        OSError: a file cannot be read or written.
        ValueError: one is not such a trace; says which.
    """
    traces = []
    for path in (ours, torch_trace):
        trace = json.loads(Path(path).read_text("utf-8"))
        if not isinstance(trace, dict) or "baseTimeNanoseconds" not in trace:
            raise ValueError(
                f"{path}: not a trace with baseTimeNanoseconds; torch >= 2.4 writes it"
            )
        traces.append(trace)
    mine, other = traces
    shift_us = (mine["baseTimeNanoseconds"] - other["baseTimeNanoseconds"]) / 1e3
    moved = [
        event | {"ts": event["ts"] + shift_us} if "ts" in event else event
        for event in mine["traceEvents"]
    ]
    other["traceEvents"] = [*other["traceEvents"], *moved]
    Path(out).write_text(json.dumps(other), "utf-8")
