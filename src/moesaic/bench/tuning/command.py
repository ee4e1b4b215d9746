"""`moesaic tune`: the fastest tiles of a layer on this GPU, kept in the user's table.

A table goes to stdout, progress to stderr; the last line of stdout is one compact JSON document.
Token counts are compiled in their order and each is timed as soon as it is compiled, while the next
ones compile. Every cell is written as soon as it is measured, so an interrupted run keeps what it
has; where the time ends inside a cell, its row is chosen from what was timed by then.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ...kernels.tune import device_family, shape_key
from ..command import last_line, show
from ..report import Sheet, short
from ..results import ResultsError, stamp
from ..timing import DeviceLost
from . import store
from .cell import Lab, OutOfTime, Result, steps_of, tune_cell
from .compiling import Ahead, Request, compile_all, plan_of, space_of
from .grid import problem_for
from .shapes import DTYPES, find_model, token_counts

IMPLS = ("triton", "hopper")
ROUTINGS = ("uniform", "zipf1", "worst")
"""What candidates are judged over: whoever chooses tiles does not know the routing."""
MakeLab = Callable[[Request, str, int], Lab[Any]]


def routings_of(tokens: int) -> tuple[str, ...]:
    """The routings to time; those of a single token are all alike."""
    return ROUTINGS if tokens > 1 else ROUTINGS[:1]


@dataclass(frozen=True)
class Tools:
    """What a run does to the machine; a test brings its own."""

    make_lab: MakeLab
    compile_all: Callable[..., None]
    clock: Callable[[], float] = time.perf_counter
    tidy: Callable[[], None] = field(default=lambda: None)


@dataclass
class Outcome:
    """The cells measured, those not reached, and how the run ended."""

    results: list[Result] = field(default_factory=list)
    left: list[tuple[str, int]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    ended: str = "done"
    code: int = 0


class Bar:
    """Progress with the time that is left, on stderr."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
            console=Console(stderr=True), transient=True,
        )  # fmt: skip

    @contextmanager
    def task(self, name: str, total: int) -> Iterator[Callable[[], None]]:
        """One part of the work; gives what to call at each step."""
        task = self.bar.add_task(name, total=total)
        yield lambda: self.bar.advance(task)

    def say(self, text: str) -> None:
        """A line above the bar."""
        self.bar.console.print(text, markup=False, highlight=False)


def refusals(request: Request, impls: Sequence[str]) -> dict[str, str]:
    """Why a path cannot run the layer on this device, by path."""
    from ...kernels.hopper.experts import refusal

    model, spec, found = request.model, request.model.spec(), {}
    if "hopper" in impls:
        why = refusal(
            divmod(request.arch, 10),
            getattr(torch, request.dtype),
            hidden_size=model.hidden_size,
            intermediate_size=model.intermediate_size,
            plain=not (spec.transposed or spec.interleaved or (spec.gated and spec.bias)),
        )
        if spec.layers == 3 or spec.bias:
            why = why or "tiles of three-layer and of ungated biased experts come from fixed rules"
        if why:
            found["hopper"] = why
    return found


def chosen_impls(request: Request, impl: str, say: Callable[[str], None]) -> tuple[str, ...]:
    """The paths to tune.

    Raises:
        ValueError: the one asked for cannot run the layer.
    """
    if impl not in (*IMPLS, "all"):
        raise ValueError(f"--impl must be one of {', '.join(IMPLS)} or all, got {impl!r}")
    wanted = IMPLS if impl == "all" else (impl,)
    why = refusals(request, wanted)
    if impl in why:
        raise ValueError(f"--impl {impl} cannot run this layer: {why[impl]}")
    for name, text in why.items():
        say(f"{name} left out: {text}")
    return tuple(name for name in wanted if name not in why)


def measure(
    request: Request, tools: Tools, path: Path, stamped: dict[str, Any], budget_s: float, bar: Bar
) -> Outcome:
    """Every cell in turn within the budget, compiling included; each is written at once."""
    started, outcome = tools.clock(), Outcome()
    table = store.open_table(path, str(stamped["device"]))
    left = outcome.left = [(impl, tokens) for tokens in request.tokens for impl in request.impls]
    spaces = {cell: space_of(request, *cell) for cell in left}
    stages = [replace(request, tokens=(t,), impls=(i,)) for i, t in left]

    def left_s() -> float:
        return started + budget_s - tools.clock()

    def keep(result: Result) -> None:
        nonlocal table
        sizes = (request.model, result.tokens, request.dtype, request.arch, request.family)
        table = store.add(table, stamped, shape_key(problem_for(*sizes)), result)
        store.write(path, table)
        outcome.results.append(result)

    with (
        bar.task("compiling", sum(map(len, plan_of(stages)))) as compiled,
        bar.task("timing", sum(map(steps_of, spaces.values()))) as timed,
    ):
        ahead = Ahead(stages, tools.compile_all, compiled, bar.say)
        try:
            for number in range(len(stages)):
                if not ahead.wait_for(number, left_s()) or left_s() <= 0:
                    raise OutOfTime
                one_cell(request, tools, spaces[left[0]], outcome, timed, keep, left_s)
                tools.tidy()
        except OutOfTime:
            outcome.ended = "out of time"
        except KeyboardInterrupt:
            outcome.ended, outcome.code = "interrupted", 130
        except DeviceLost as error:
            outcome.ended, outcome.code = str(error), 1
        finally:
            ahead.stop()
    return outcome


def one_cell(
    request: Request, tools: Tools, space: Any, outcome: Outcome, advance: Callable[[], None],
    keep: Callable[[Result], None], left_s: Callable[[], float],
) -> None:  # fmt: skip
    """The next cell, tuned and kept; why not, among the failures, where nothing could be timed.

    Raises:
        DeviceLost: the GPU answers no more.
        OutOfTime: the time ended before anything could be chosen.
    """
    impl, tokens = outcome.left[0]
    try:
        lab = tools.make_lab(request, impl, tokens)
        keep(tune_cell(space, lab, tokens, advance, lambda: left_s() <= 0))
    except (DeviceLost, ResultsError):
        raise
    except RuntimeError as error:
        outcome.failed.append(f"{impl} at {tokens} tokens: {one_line(error)}")
    del outcome.left[0]


def one_line(error: BaseException) -> str:
    """The message without line breaks, at most 300 characters."""
    return " ".join(str(error).split())[:300]


def sheet(results: Sequence[Result]) -> Sheet:
    """A row per cell: the best tiles, their time, the heuristic's, the paper's ranks."""
    names = list(dict.fromkeys(rank.name for r in results for rank in r.ranks))
    heads = ["impl", "tokens", "best", "µs", "heuristic µs", "ratio", "within 10 %",
             "ratio by routing", *names]  # fmt: skip
    rows = []
    for r in results:
        ranks = {rank.name: rank for rank in r.ranks}
        told = [rank_text(ranks.get(name)) for name in names]
        kept = "-" if r.kept is None else "yes" if r.kept else "no"
        times = [short(r.best_us), short(r.heuristic_us), short(r.ratio)]
        each = " ".join(f"{name} {r.heuristic[name] / s:.2f}" for name, s in r.best.items()
                        if name in r.heuristic)  # fmt: skip
        rows.append([r.impl, str(r.tokens), best_text(r), *times, kept, each or "-", *told])
    return Sheet(heads, rows)


def rank_text(rank: Any) -> str:
    """A rank in words."""
    if rank is None:
        return "-"
    if rank.rank is None:
        return "refused"
    return f"{rank.rank} of {rank.of} (× {rank.over_best:.2f})"


def best_text(result: Result) -> str:
    """The best row in a few words."""
    row = result.row
    if result.impl == "hopper":
        parts = [f"{p} {row[p]['kernel']} {row[p]['bm']}x{row[p]['bn']}x{row[p]['stages']}"
                 for p in ("up", "down")]  # fmt: skip
    elif row["fused"]:
        parts = ["fused launch"]
    else:
        heights = "/".join(map(str, row["heights"]))
        parts = [f"rows {heights}"]
        parts += [f"{p} {row[p]['block_n']}x{row[p]['block_k']}" for p in ("up", "down")]
    return ", ".join([*parts, *([] if row["order"] == "index" else [row["order"]])])


def document(outcome: Outcome, request: Request, path: Path, seconds: float) -> dict[str, Any]:
    """The last line of stdout."""
    cells = [asdict(r) | {"ratio": r.ratio, "within_10_percent": r.kept} for r in outcome.results]
    return {
        "model": request.model.name,
        "ended": outcome.ended,
        "seconds": round(seconds, 1),
        "path": str(path) if outcome.results else None,
        "cells": cells,
        "left": [{"impl": impl, "tokens": tokens} for impl, tokens in outcome.left],
        "failed": outcome.failed,
    }


def real_tools() -> Tools:
    """This machine's GPU."""
    from .clock import Rotation, draw, draw_weights
    from .labs import HopperLab, TritonLab

    device, kept = torch.device("cuda"), {}

    def make_lab(request: Request, impl: str, tokens: int) -> Lab[Any]:
        if "weights" not in kept:
            dtype = getattr(torch, request.dtype)
            kept["weights"] = draw_weights(request.model, dtype, device, seed=0)
        turns: dict[str, Rotation] = {
            name: draw(request.model, tokens, kept["weights"], device, tokens, name)
            for name in routings_of(tokens)
        }
        problem = problem_for(request.model, tokens, request.dtype, request.arch, request.family)
        kind: Any = TritonLab if impl == "triton" else HopperLab
        lab: Lab[Any] = kind(request.model, problem, turns, request.num_sms)
        return lab

    def tidy() -> None:
        gc.collect()
        torch.cuda.empty_cache()

    return Tools(make_lab, compile_all, tidy=tidy)


def device_facts() -> tuple[str, int, int]:
    """Name, compute capability and SMs of the GPU.

    Raises:
        RuntimeError: there is none.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("moesaic tune needs an NVIDIA GPU that torch can use; see `doctor`")
    major, minor = torch.cuda.get_device_capability()
    properties = torch.cuda.get_device_properties(torch.device("cuda"))
    return properties.name, major * 10 + minor, properties.multi_processor_count


def main(
    name: str | None = None,
    *,
    experts: int | None = None,
    top_k: int | None = None,
    hidden: int | None = None,
    intermediate: int | None = None,
    tokens: Sequence[int] = (),
    dtype: str = "bfloat16",
    impl: str = "all",
    budget_s: float = 600.0,
    out: Path | None = None,
    tools: Tools | None = None,
    facts: tuple[str, int, int] | None = None,
) -> int:
    """The command; gives the exit code: 0, 1 the device was lost or nothing was measured, 130.

    Raises:
        ValueError, RuntimeError: an option does not fit, or the machine.
    """
    model = find_model(name, experts=experts, top_k=top_k, hidden=hidden, intermediate=intermediate)
    counts = token_counts(tokens)
    if dtype not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    device, arch, num_sms = facts or device_facts()
    family = device_family(device)
    request = Request(model, dtype, counts, (), arch, family, num_sms)
    say = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
    request = Request(model, dtype, counts, chosen_impls(request, impl, say), arch, family, num_sms)
    path = store.place(out, family)
    tools, started = tools or real_tools(), time.perf_counter()
    stamped = stamp(torch.device("cuda" if facts is None else "cpu")) | {"device": device}
    bar = Bar()
    with bar.bar, torch.no_grad():
        outcome = measure(request, tools, path, stamped, budget_s, bar)
    return told(outcome, request, path, time.perf_counter() - started)


def told(outcome: Outcome, request: Request, path: Path, seconds: float) -> int:
    """Show what was found; the exit code."""
    if outcome.results:
        show(sheet(outcome.results), f"{request.model.name}, {request.dtype}")
    refused = sum(len(r.refused) for r in outcome.results)
    print(f"{len(outcome.results)} cells in {path}; {refused} candidates refused", file=sys.stderr)
    if skipped := sum(r.skipped for r in outcome.results):
        print(f"the time ended before {skipped} candidates of a cell were timed", file=sys.stderr)
    if outcome.left and not outcome.code:
        print(f"{len(outcome.left)} cells not reached in {seconds:.0f} s; what is compiled stays "
              "compiled, so run again or raise --budget-s", file=sys.stderr)  # fmt: skip
    last_line(document(outcome, request, path, seconds))
    return outcome.code or (0 if outcome.results else 1)
