"""`moesaic bench`: list the suites, run one, check what is committed.

Tables go to stdout, progress to stderr; the last line of stdout is one compact JSON document.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .ranks import Silent, launched, own_rank, relaunch, world_size
from .report import Sheet, by_clock, overview, sheet, targets_sheet
from .results import Line, Recorder, check_results, device_slug, line_key
from .suite import Cell, Context, Suite, registry
from .timing import DeviceLost


def show(table: Sheet, title: str) -> None:
    """Print a sheet as a rich table."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    width = None if console.is_terminal else 200
    rich = Table(title=title, box=None, header_style="bold")
    for column, head in enumerate(table.heads):
        text = all(not row[column][:1].isdigit() for row in table.rows)
        rich.add_column(head, justify="left" if text else "right", overflow="fold")
    for row in table.rows:
        rich.add_row(*(Text(cell) for cell in row))
    Console(width=width).print(rich)


def last_line(document: Any) -> None:
    """Print one compact JSON document."""
    print(json.dumps(document, separators=(",", ":"), allow_nan=False), flush=True)


def check(root: Path) -> int:
    """Recompute every committed summary; 1 and a sentence each when one is not what lines give."""
    problems = check_results(root, {name: s.summarize for name, s in registry().items()})
    for problem in problems:
        print(problem)
    last_line({"checked": len(list(root.glob("*/*.jsonl"))), "problems": problems})
    return 1 if problems else 0


def list_suites() -> int:
    """Print the suites."""
    suites = registry().values()
    rows = [[s.name, ", ".join(s.devices), str(len(s.cells())), s.about] for s in suites]
    show(Sheet(["suite", "device", "cells", "about"], rows), "Suites")
    last_line([s.name for s in suites])
    return 0


def selected(
    suite: Suite,
    *,
    only: Sequence[str] = (),
    tokens: Sequence[int] = (),
    routing: Sequence[str] = (),
    clock: Sequence[str] = (),
    measured: Sequence[Line] | None = None,
) -> list[Cell]:
    """The suite's cells of the given models, tokens, routings and clocks, without those `measured`.

    Raises:
        ValueError: a value that no cell has, or no cell is left.
    """
    cells = list(suite.cells())
    limits: tuple[tuple[str, Sequence[Any], Callable[[Cell], Any]], ...] = (
        ("--only", only, lambda cell: cell.model),
        ("--tokens", tokens, lambda cell: cell.tokens),
        ("--routing", routing, lambda cell: cell.routing),
        ("--clock", clock, lambda cell: cell.clock),
    )
    for option, values, of in limits:
        known = list(dict.fromkeys(of(cell) for cell in suite.cells()))
        for value in values:
            if value not in known:
                raise ValueError(f"{option} must be one of {known}, got {value!r}")
        if values:
            cells = [cell for cell in cells if of(cell) in values]
    if not cells:
        raise ValueError("no cell of the suite has all of --only, --tokens, --routing, --clock")
    done = {suite.measured(line) for line in measured or ()}
    return [cell for cell in cells if cell not in done]


def find(name: str) -> Suite:
    """The suite of a name.

    Raises:
        ValueError: there is none.
    """
    suites = registry()
    if name not in suites:
        raise ValueError(f"--suite must be one of {sorted(suites)}, got {name!r}")
    return suites[name]


def find_device(suite: Suite, name: str | None) -> torch.device:
    """The device asked for, or the first of the suite's kinds that is here.

    Raises:
        RuntimeError: the suite cannot run on this machine.
    """
    here = {"cpu": True, "cuda": torch.cuda.is_available()}
    kinds = (name.split(":")[0],) if name else suite.devices
    for kind in kinds:
        if kind in suite.devices and here.get(kind, False):
            return torch.device(name or kind)
    raise RuntimeError(
        f"suite {suite.name} runs on {' or '.join(suite.devices)}, "
        f"which {name or 'this machine'} is not or has not"
    )


def run(suite: Suite, cells: Sequence[Cell], context: Context) -> int:
    """Run a suite over cells; show its table and targets. 130 interrupted, 1 device lost."""
    before = {line_key(x): x for x in context.recorder.lines}
    code, ended = 0, "done"
    try:
        suite.run(cells, context)
    except KeyboardInterrupt:
        code, ended = 130, "interrupted"
    except DeviceLost as error:
        code, ended = 1, f"{error}; run again with --missing for the cells not measured"
    if code:
        context.say(ended)
    new = [x for x in context.recorder.lines if before.get(line_key(x)) != x]
    if new:
        for clock, some in by_clock(new).items():
            show(sheet(some), f"{suite.name} on {new[0]['device']}, clock {clock}")
            show(overview(some), "Speed-up of moesaic, geometric mean")
    targets = context.recorder.targets()
    show(targets_sheet(targets), "Targets")
    last_line(
        {
            "suite": suite.name,
            "ended": ended,
            "seconds": round(context.elapsed_s(), 1),
            "new_lines": len(new),
            "lines": len(context.recorder.lines),
            "targets": [asdict(t) for t in targets],
            "path": str(context.recorder.path),
        }
    )
    return code


def main(
    *,
    suite: str | None = None,
    check_only: bool = False,
    list_only: bool = False,
    only: Sequence[str] = (),
    tokens: Sequence[int] = (),
    routing: Sequence[str] = (),
    clock: Sequence[str] = (),
    out: Path = Path("benchmarks/results"),
    budget_s: float | None = None,
    missing: bool = False,
    device: str | None = None,
    seed: int = 0,
    gpus: int | None = None,
) -> int:
    """The command; gives the exit code.

    Under torchrun every rank runs it and rank 0 alone writes; `gpus` starts torchrun.

    Raises:
        ValueError, RuntimeError: an option does not fit, or the machine; results cannot be written.
    """
    if check_only:
        return check(out)
    if list_only or suite is None:
        return list_suites()
    chosen = find(suite)
    if gpus is not None and not launched():
        relaunch(gpus, sys.argv[1:])
    place = find_device(chosen, device)
    slug = device_slug(place) + (f"-x{world_size()}" if world_size() > 1 else "")
    recorder = Recorder(out, slug, chosen.name, chosen.summarize)
    cells = selected(
        chosen, only=only, tokens=tokens, routing=routing, clock=clock,
        measured=recorder.lines if missing else None,
    )  # fmt: skip
    budget = chosen.budget_s if budget_s is None else budget_s
    if own_rank():
        chosen.run(cells, Context(place, Silent(recorder), budget, seed))
        return 0
    return run(chosen, cells, Context(place, recorder, budget, seed))
