"""Sinks that write a running job into files: profiles as JSON lines, steps as a routing trace.

E experts · K top-k

profiler.sinks["jsonl"] = JsonLines(Path("profile.jsonl"))
with TraceWriter(path, info) as trace:
    profiler.sinks["trace"] = RoutingTrace(trace)
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

from ..runtime.counters import loads_of
from ..runtime.profile import Profile
from ..runtime.profiler import Update
from ..trace import TraceWriter

log = logging.getLogger("moesaic")


class JsonLines:
    """Appends every profile to a file, one line each, readable while the job runs.

    A line that could not be written whole is taken back.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.path.touch()

    def __call__(self, update: Update) -> None:
        line = (update.profile.to_json() + "\n").encode()
        with self.path.open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                if file.write(line) != len(line):
                    raise OSError(f"{self.path}: the disk is full")
            except OSError:
                file.truncate(end)
                raise


def read_profiles(path: str | os.PathLike[str]) -> Iterator[Profile]:
    """The profiles of a file of JSON lines; a last line that is not whole yet is left out.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is no profile; says which.
    """
    with Path(path).open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                return
            try:
                yield Profile.from_json(line)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from error


def last_profile(path: str | os.PathLike[str]) -> Profile | None:
    """The last whole profile of a file of JSON lines, reading no more of it than needed; or None.

    Raises:
        OSError: the file cannot be read.
        ValueError: its last whole line is no profile.
    """
    with Path(path).open("rb") as file:
        left = file.seek(0, os.SEEK_END)
        tail = b""
        while left and tail.count(b"\n") < 2:
            size = min(left, 1 << 20)
            left = file.seek(left - size)
            tail = file.read(size) + tail
    lines = tail[: tail.rfind(b"\n") + 1].splitlines()
    return Profile.from_json(lines[-1].decode()) if lines else None


class RoutingTrace:
    """Writes every step into a routing trace, layer by layer: see `trace.TraceWriter`.

    A trace has one row for each layer and step. A sample of several steps (the ring was lapped, or
    publishes only every so many steps) is no such row: it is left out and counted in `skipped`.
    """

    def __init__(self, writer: TraceWriter) -> None:
        self.writer, self.skipped = writer, 0

    def __call__(self, update: Update) -> None:
        for sample in update.samples:
            if sample.steps != 1:
                if not self.skipped:
                    log.warning("routing trace: steps that were merged are left out")
                self.skipped += sample.steps
                continue
            for layer, counts in enumerate(sample.counts):
                self.writer.add(sample.step, layer, loads_of(counts).tolist())
