"""Suite `tune`: every tile worth timing on the Hopper path, and how near the untuned choice comes.

A cell is a layer at a number of tokens, uniform routing: the tiles of both products are timed one
by one, the best combinations as whole layers under a graph. `moesaic` is the fastest layer,
`heuristic` what runs where no table speaks for the shape; `ms` is the least of the rounds. The
heuristic was made from measurements of the first six models; it never saw the held-out ones.

Every candidate is compared bit for bit with the first that ran. The shipped table is made from
these lines (`table_of`). A line with `by` was not made by this suite: it says what timed the few
tiles of that cell, and the cell stays missing.

    E experts · K top-k · H hidden width · I intermediate width
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch

from ...kernels.tune import device_family, shape_key
from ..report import Sheet, markdown, provenance, short, targets_sheet
from ..results import Line, Target, at_least, at_most, make_line, stamp
from ..suite import Cell, Context, Suite
from ..timing import DeviceLost
from ..tuning.cell import WITHIN, Result, tune_cell
from ..tuning.command import Tools, device_facts, one_line, real_tools
from ..tuning.compiling import Request, space_of
from ..tuning.grid import problem_for
from ..workloads import Model
from .layer import SHAPES

NAME = "tune"
TOKENS = (1, 4, 16, 64, 128, 512, 1024, 4096, 8192)
HELD_OUT = {
    m.name: m
    for m in (
        Model("GLM-4.5-Air", 128, 8, 4096, 1408),
        Model("MiniMax-M2", 256, 8, 3072, 1536),
        Model("DeepSeek-V2-Lite", 64, 6, 2048, 1408),
        Model("Mixtral-8x22B", 8, 2, 6144, 16384),
    )
}
HELD_OUT_TOKENS = (1, 16, 128, 1024, 8192)
MODELS = SHAPES | HELD_OUT
IMPL = "hopper"
OTHER_BITS = "its bits are not those"


def cells() -> list[Cell]:
    """Every model at every token count, models of as many experts together: kernels are shared."""
    grid = [Cell(name, tokens, clock=IMPL) for name in SHAPES for tokens in TOKENS]
    grid += [Cell(name, tokens, clock=IMPL) for name in HELD_OUT for tokens in HELD_OUT_TOKENS]
    order = [128, 8, 256, 64]
    return sorted(grid, key=lambda cell: order.index(MODELS[cell.model].num_experts))


def request_of(model: Model, wanted: Sequence[Cell], facts: tuple[str, int, int]) -> Request:
    """What is tuned of one model on a device."""
    device, arch, num_sms = facts
    tokens = tuple(sorted({cell.tokens for cell in wanted}))
    return Request(model, "bfloat16", tokens, (IMPL,), arch, device_family(device), num_sms)


class Ahead:
    """Compiles the candidates of every model, in order, while those before are timed."""

    def __init__(self, requests: Sequence[Request], tools: Tools, context: Context) -> None:
        self.requests, self.tools, self.context = requests, tools, context
        self.ready = [Event() for _ in requests]
        self.thread = Thread(target=self._compile, daemon=True)
        self.thread.start()

    def _compile(self) -> None:
        try:
            self.tools.compile_all(self.requests, lambda: None, self.context.say, self._done)
        except RuntimeError as error:
            self.context.say(f"compiling: {one_line(error)}")
        finally:
            for one in self.ready:
                one.set()

    def _done(self, number: int) -> None:
        self.context.say(f"compiled: {self.requests[number].model.name}")
        self.ready[number].set()

    def wait_for(self, number: int) -> None:
        """Until the candidates of a model are compiled, or will not be."""
        self.ready[number].wait()


def ranks_of(result: Result) -> dict[str, Any]:
    """Where the paper's block sizes stand, flat: rank, of how many, time over the best's."""
    found: dict[str, Any] = {}
    for rank in result.ranks:
        name = rank.name.split()[0] if rank.name.startswith("routing") else "expert_gemm"
        found |= {f"{name}_rank": rank.rank, f"{name}_of": rank.of, f"{name}_over": rank.over_best}
    return found


def lines_of(cell: Cell, result: Result, candidates: int, stamped: Line) -> list[Line]:
    """The fastest layer's line, with its row of the table, and the heuristic's."""
    fixed = stamped | {
        "suite": NAME, "clock": cell.clock, "model": cell.model, "tokens": cell.tokens,
        "routing": cell.routing, "dtype": cell.dtype, "mode": "graph",
    }  # fmt: skip
    other = sum(OTHER_BITS in text for text in result.refused)
    mine = make_line(
        fixed, impl="moesaic", ms=result.best_us / 1e3, row=json.dumps(result.row),
        candidates=candidates, refused=len(result.refused), other_bits=other, **ranks_of(result),
    )  # fmt: skip
    own = None if result.heuristic_us is None else result.heuristic_us / 1e3
    return [mine, make_line(fixed, impl="heuristic", ms=own)]


def run(
    wanted: Sequence[Cell],
    context: Context,
    *,
    tools: Tools | None = None,
    facts: tuple[str, int, int] | None = None,
) -> None:
    """Tune model after model within the budget; cells not begun by then are named and left out.

    Raises:
        DeviceLost: the GPU answers no more.
    """
    known = facts or device_facts()
    stamped = stamp(context.device) | {"device": known[0]}
    groups = [list(some) for _, some in groupby(wanted, key=lambda cell: cell.model)]
    requests = [request_of(MODELS[some[0].model], some, known) for some in groups]
    ahead = Ahead(requests, tools or real_tools(), context)
    for number, (request, some) in enumerate(zip(requests, groups, strict=True)):
        if context.elapsed_s() > context.budget_s:
            context.say(f"out of time, not tuned: {request.model.name}")
            continue
        ahead.wait_for(number)
        with torch.no_grad():
            tune_model(request, some, context, tools or real_tools(), stamped)


def tune_model(
    request: Request, some: Sequence[Cell], context: Context, tools: Tools, stamped: Line
) -> None:
    """The cells of one model, each recorded at once."""
    for cell in some:
        if context.elapsed_s() > context.budget_s:
            context.say(f"out of time, not tuned: {cell}")
            continue
        started = context.elapsed_s()
        space = space_of(request, IMPL, cell.tokens)
        try:
            lab = tools.make_lab(request, IMPL, cell.tokens)
            result = tune_cell(space, lab, cell.tokens, lambda: None)
            lines = lines_of(cell, result, len(space) + len(space.both), stamped)
            ratio = "-" if result.ratio is None else f"{result.ratio:.3f}"
            told = f"{result.best_us:.1f} us, heuristic x {ratio}, {len(result.refused)} refused"
        except DeviceLost:
            raise
        except RuntimeError as error:
            told = one_line(error)
            lines = [make_line(stamped, suite=NAME, clock=cell.clock, model=cell.model,
                               tokens=cell.tokens, routing=cell.routing, dtype=cell.dtype,
                               impl="moesaic", mode="graph", error=told)]  # fmt: skip
        context.record(lines)
        spent = context.elapsed_s() - started
        context.say(f"{cell.model} T={cell.tokens}: {told}; {len(space)} candidates, {spent:.1f} s")
        tools.tidy()


def measured(line: Line) -> Cell | None:
    """The cell of a tuned layer; a probe of a few tiles leaves it missing."""
    if line["impl"] != "moesaic" or line["ms"] is None or line.get("by"):
        return None
    return Cell(line["model"], line["tokens"], line["routing"], line["dtype"], line["clock"])


def ratios(lines: Sequence[Line], models: Mapping[str, Model]) -> dict[tuple[str, int], float]:
    """The heuristic's time over the best's by model and tokens."""
    ms = {(x["model"], x["tokens"], x["impl"]): x["ms"] for x in lines if x["ms"]}
    return {
        (model, tokens): ms[model, tokens, "heuristic"] / best
        for (model, tokens, impl), best in ms.items()
        if impl == "moesaic" and model in models and (model, tokens, "heuristic") in ms
    }


def summarize(lines: Sequence[Line]) -> list[Target]:
    """The untuned choice within a tenth of the best, of models it was made on and of others.

    Lines of a probe count for neither: the heuristic was set by their times.
    """
    targets, own = [], [x for x in lines if not x.get("by")]
    for name, models in (("the six models", SHAPES), ("held-out models", HELD_OUT)):
        found = ratios(own, models)
        wanted = sum(cell.model in models for cell in cells())
        targets.append(at_most(f"highest untuned ÷ tuned, {name}",
                               max(found.values(), default=None), WITHIN))  # fmt: skip
        within = float(sum(value <= WITHIN for value in found.values()))
        targets.append(at_least(f"cells within 10 %, {name}", within, float(wanted)))
    other = [x["other_bits"] for x in lines if x.get("other_bits") is not None]
    targets.append(at_most("candidates with other bits", float(sum(other)) if other else None, 0.0))
    failed = sum(x["impl"] == "moesaic" and x["ms"] is None for x in lines)
    return [*targets, at_most("cells failed", float(failed), 0.0)]


def table_of(lines: Sequence[Line], family: str) -> dict[str, dict[str, Any]]:
    """The Hopper rows of a shipped table, by shape and token count, from the lines."""
    rows: dict[str, dict[str, Any]] = {}
    for x in lines:
        if x["impl"] == "moesaic" and x["ms"]:
            problem = problem_for(MODELS[x["model"]], x["tokens"], x["dtype"], 90, family)
            rows.setdefault(shape_key(problem), {})[str(x["tokens"])] = json.loads(x["row"])
    return rows


def tiles_text(row: Mapping[str, Any]) -> str:
    """A row of the table in a few words."""
    tiles = []
    for part in ("up", "down"):
        t = row[part]
        more = f", {t['ctas_per_sm']} an SM" if t["ctas_per_sm"] > 1 else ""
        tiles.append(f"{t['kernel']} {t['bm']}x{t['bn']}, {t['stages']} stages{more}")
    same = tiles[0] if tiles[0] == tiles[1] else " / ".join(tiles)
    return same + ("" if row.get("order", "index") == "index" else f"; {row['order']}")


def section(
    lines: Sequence[Line], targets: Sequence[Target], root: Path, device: str, folder: str
) -> tuple[str, dict[str, str]]:
    """The page's part: targets and a row for each cell."""
    heads = ["model", "tokens", "tuned µs", "untuned µs", "untuned ÷ tuned", "candidates",
             "fastest tiles", "rank of 128/128/64", "rank of next_pow2(E)"]  # fmt: skip
    untuned = {(x["model"], x["tokens"]): x["ms"] for x in lines if x["impl"] == "heuristic"}
    found, rows = ratios(lines, MODELS), []
    for x in lines:
        if x["impl"] != "moesaic" or not x["ms"]:
            continue
        cell = (x["model"], x["tokens"])
        own = untuned.get(cell)
        ranks = [
            "-" if x.get(f"{n}_rank") is None
            else f"{x[f'{n}_rank']} of {x[f'{n}_of']} (× {short(x[f'{n}_over'])})"
            for n in ("expert_gemm", "routing")
        ]  # fmt: skip
        rows.append([cell[0], str(cell[1]), short(x["ms"] * 1e3),
                     short(own and own * 1e3), short(found.get(cell)),
                     f"{x['candidates']}" + (f" ({x['by']})" if x.get("by") else ""),
                     tiles_text(json.loads(x["row"])), *ranks])  # fmt: skip
    parts = [provenance(lines), markdown(targets_sheet(targets)), markdown(Sheet(heads, rows))]
    return "\n\n".join(parts) + "\n", {}


SUITE = Suite(
    name=NAME,
    about="tiles of the Hopper path timed one by one; how near the untuned choice comes",
    cells=cells,
    run=run,
    summarize=summarize,
    budget_s=400.0,
    measured=measured,
    section=section,
)
