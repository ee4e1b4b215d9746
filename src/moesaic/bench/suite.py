"""What a benchmark suite is, and the registry of them: every module of `suites/` with a `SUITE`.

A suite lists its cells, measures those it is given, and turns lines into targets. `summarize` is a
pure function of the lines, so that `moesaic bench --check` can repeat it anywhere.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Protocol

import torch

from .results import Line, Recorder, Summarize, Target


@dataclass(frozen=True)
class Cell:
    """One thing to measure: a model at a number of tokens under a routing, in a dtype.

    `clock`: what is timed, for suites that time the same layer in several ways.
    """

    model: str
    tokens: int
    routing: str = "uniform"
    dtype: str = "bfloat16"
    clock: str = "experts"


def measured_cell(line: Line) -> Cell | None:
    """The cell that a line shows to be measured, or None: a right time of moesaic, any clock."""
    if line["impl"] != "moesaic" or line["ms"] is None or line.get("wrong"):
        return None
    return Cell(line["model"], line["tokens"], line["routing"], line["dtype"])


@dataclass
class Context:
    """What a run may use: where to put lines, on which device, for how long.

    `budget_s` is the wall time that the whole run should take; a suite spreads it over its cells.
    """

    device: torch.device
    recorder: Recorder
    budget_s: float
    seed: int = 0
    clock: Callable[[], float] = time.perf_counter
    started: float = field(init=False)

    def __post_init__(self) -> None:
        self.started = self.clock()

    def elapsed_s(self) -> float:
        """Seconds since the run began."""
        return self.clock() - self.started

    def share_s(self, cells_left: int) -> float:
        """The part of the remaining budget that one of `cells_left` cells may use."""
        return max(0.0, self.budget_s - self.elapsed_s()) / max(1, cells_left)

    def record(self, lines: Sequence[Line]) -> None:
        """Keep lines at once, so that an interrupted run loses only the cell it was in."""
        self.recorder.record(lines)

    def say(self, text: str) -> None:
        """Progress for the person who waits, on stderr."""
        print(f"[{self.elapsed_s():6.1f} s] {text}", file=sys.stderr, flush=True)


class Section(Protocol):
    """Makes the generated part of a page: Markdown, and figures as SVG text by file name."""

    def __call__(
        self,
        lines: Sequence[Line],
        targets: Sequence[Target],
        root: Path,
        device: str,
        folder: str,
    ) -> tuple[str, dict[str, str]]:
        """The part for `device`, other devices' lines being under `root`; figures shown from
        `folder`."""


@dataclass(frozen=True)
class Suite:
    """A named benchmark: its cells, how they are measured, what the lines must show.

    `measured` gives the cell that needs no further measuring once a line is there; `section` makes
    the suite's part of a page, where the usual tables (`report.section`) are not what it needs.
    """

    name: str
    about: str
    cells: Callable[[], Sequence[Cell]]
    run: Callable[[Sequence[Cell], Context], None]
    summarize: Summarize
    devices: tuple[str, ...] = ("cuda",)
    budget_s: float = 480.0
    measured: Callable[[Line], Cell | None] = measured_cell
    section: Section | None = None


@cache
def registry() -> dict[str, Suite]:
    """Every suite by name."""
    from . import suites

    found: dict[str, Suite] = {}
    for info in pkgutil.iter_modules(suites.__path__):
        module = importlib.import_module(f"{suites.__name__}.{info.name}")
        suite = getattr(module, "SUITE", None)
        if isinstance(suite, Suite):
            found[suite.name] = suite
    return found
