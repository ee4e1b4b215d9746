"""Suite `tune`: every tile worth timing on the Hopper path, and how near the untuned choice comes.

A cell is a layer at a number of tokens: the tiles of both products are timed one by one, the best
combinations as whole layers under a graph, all of it under three routings (one for a single token),
with a line for each. Candidates are judged by the geometric mean over these, for whoever chooses
does not know the routing. `moesaic` is the best layer, `heuristic` what runs where no table speaks
for the shape; `ms` is the least of the rounds. The heuristic was made from measurements of the
first six models; it never saw the held-out ones. Lines without `judged_by` were tuned on uniform
routing alone, and their cells stay missing.

Every candidate is compared bit for bit with the first that ran. The shipped table is made from
these lines (`table_of`). A line with `by` was not made by this suite: it says what timed the few
tiles of that cell, and the cell stays missing.

    E experts · K top-k · H hidden width · I intermediate width
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ...kernels.tune import device_family, shape_key
from ..report import Sheet, markdown, provenance, short, targets_sheet
from ..results import Line, Target, at_least, at_most, make_line, stamp
from ..suite import Cell, Context, Suite
from ..timing import DeviceLost
from ..tuning.cell import NOISE, WITHIN, Result, score, tune_cell
from ..tuning.command import Tools, device_facts, one_line, real_tools
from ..tuning.compiling import Ahead, Request, space_of
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


def request_of(cell: Cell, facts: tuple[str, int, int]) -> Request:
    """What is tuned of one cell on a device."""
    device, arch, num_sms = facts
    family = device_family(device)
    return Request(MODELS[cell.model], "bfloat16", (cell.tokens,), (IMPL,), arch, family, num_sms)


def ranks_of(result: Result) -> dict[str, Any]:
    """Where the paper's block sizes stand, flat: rank, of how many, time over the best's."""
    found: dict[str, Any] = {}
    for rank in result.ranks:
        name = rank.name.split()[0] if rank.name.startswith("routing") else "expert_gemm"
        found |= {f"{name}_rank": rank.rank, f"{name}_of": rank.of, f"{name}_over": rank.over_best}
    return found


def lines_of(cell: Cell, result: Result, candidates: int, stamped: Line) -> list[Line]:
    """Lines of the fastest layer and of the heuristic's, with their rows of the table, a routing
    each."""
    other = sum(OTHER_BITS in text for text in result.refused)
    more: Line = {"candidates": candidates, "refused": len(result.refused), "other_bits": other}
    more |= ranks_of(result)
    both: tuple[tuple[str, Line, dict[str, float], Line], ...] = (
        ("moesaic", result.row, result.best, more),
        ("heuristic", result.heuristic_row, result.heuristic, {}),
    )
    return [
        make_line(
            stamped, suite=NAME, clock=cell.clock, model=cell.model, tokens=cell.tokens,
            routing=routing, dtype=cell.dtype, mode="graph", impl=impl, ms=seconds * 1e3,
            row=json.dumps(row), judged_by=" ".join(result.best),
            **(extra if routing == cell.routing else {}),
        )
        for impl, row, times, extra in both
        for routing, seconds in times.items()
    ]  # fmt: skip


def run(
    wanted: Sequence[Cell],
    context: Context,
    *,
    tools: Tools | None = None,
    facts: tuple[str, int, int] | None = None,
) -> None:
    """Tune cell after cell within the budget; those not begun by then are named and left out.

    Raises:
        DeviceLost: the GPU answers no more.
    """
    known = facts or device_facts()
    stamped = stamp(context.device) | {"device": known[0]}
    requests = [request_of(cell, known) for cell in wanted]
    own: dict[str, Tools] = {}

    def through(number: int) -> None:
        if number + 1 == len(wanted) or wanted[number + 1].model != wanted[number].model:
            context.say(f"compiled: {wanted[number].model}")

    def left_s() -> float:
        return context.budget_s - context.elapsed_s()

    compile_all = (tools or real_tools()).compile_all
    ahead = Ahead(requests, compile_all, lambda: None, context.say, through)
    try:
        for number, (cell, request) in enumerate(zip(wanted, requests, strict=True)):
            if not ahead.wait_for(number, left_s()) or left_s() <= 0:
                context.say(f"out of time, not tuned: {len(wanted) - number} cells from {cell}")
                break
            if cell.model not in own:
                own = {cell.model: tools or real_tools()}  # weights of one model at a time
            with torch.no_grad():
                one_cell(cell, request, context, own[cell.model], stamped)
    finally:
        ahead.stop()


def one_cell(cell: Cell, request: Request, context: Context, tools: Tools, stamped: Line) -> None:
    """A cell tuned and recorded."""
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
    """The cell of a layer tuned over its routings; other lines leave it missing."""
    if line["impl"] != "moesaic" or line["ms"] is None or not line.get("judged_by"):
        return None
    if line["routing"] != "uniform":
        return None
    return Cell(line["model"], line["tokens"], line["routing"], line["dtype"], line["clock"])


def times_of(lines: Sequence[Line], impl: str) -> dict[tuple[str, int], dict[str, float]]:
    """Milliseconds of an implementation by model and tokens, then by routing."""
    found: dict[tuple[str, int], dict[str, float]] = {}
    for x in lines:
        if x["impl"] == impl and x["ms"]:
            found.setdefault((x["model"], x["tokens"]), {})[x["routing"]] = x["ms"]
    return found


def ratios(lines: Sequence[Line], models: Mapping[str, Model]) -> dict[tuple[str, int], float]:
    """The heuristic's time over the best's by model and tokens, geometric mean over routings."""
    best, own = times_of(lines, "moesaic"), times_of(lines, "heuristic")
    return {
        cell: score({r: own[cell][r] / ms for r, ms in times.items()})
        for cell, times in best.items()
        if cell[0] in models and own.get(cell, {}).keys() >= times.keys()
    }


def summarize(lines: Sequence[Line]) -> list[Target]:
    """The untuned choice within a tenth of the best, of models it was made on and of others.

    Lines of a probe count for neither, as the heuristic was set by their times, nor do those tuned
    on uniform routing alone, whose heuristic was another.
    """
    targets, own = [], [x for x in lines if x.get("judged_by") and not x.get("by")]
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
    """The Hopper rows of a shipped table, by shape and token count, from the lines.

    Where the heuristic's tiles take as long as the best but for noise, they are the row. Rows come
    from cells that were tuned whole by today's rule: chosen for an even routing alone, tiles took
    up to three times as long under another, and the heuristic was another then.
    """
    rows: dict[str, dict[str, Any]] = {}
    gains = ratios(lines, MODELS)
    own = {(x["model"], x["tokens"]): x["row"] for x in lines
           if x["impl"] == "heuristic" and x.get("row")}  # fmt: skip
    for x in lines:
        if measured(x) is None or x.get("by"):
            continue
        cell = (x["model"], x["tokens"])
        same = cell in own and gains.get(cell, math.inf) <= NOISE and x["tokens"] > 1
        problem = problem_for(MODELS[x["model"]], x["tokens"], x["dtype"], 90, family)
        row = own[cell] if same else x["row"]
        rows.setdefault(shape_key(problem), {})[str(x["tokens"])] = json.loads(row)
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
    heads = ["model", "tokens", "tuned µs", "untuned µs", "untuned ÷ tuned", "by routing",
             "candidates", "fastest tiles", "rank of 128/128/64",
             "rank of next_pow2(E)"]  # fmt: skip
    best, own = times_of(lines, "moesaic"), times_of(lines, "heuristic")
    found, rows = ratios(lines, MODELS), []
    for x in lines:
        cell = (x["model"], x["tokens"])
        if x["impl"] != "moesaic" or not x["ms"] or x["routing"] != "uniform":
            continue
        ranks = [
            "-" if x.get(f"{n}_rank") is None
            else f"{x[f'{n}_rank']} of {x[f'{n}_of']} (× {short(x[f'{n}_over'])})"
            for n in ("expert_gemm", "routing")
        ]  # fmt: skip
        untuned = own.get(cell, {})
        each = ", ".join(f"{r} {untuned[r] / ms:.2f}" for r, ms in best[cell].items()
                         if r in untuned)  # fmt: skip
        rows.append([cell[0], str(cell[1]), short(score(best[cell]) * 1e3),
                     short(score(untuned) * 1e3) if untuned else "-", short(found.get(cell)), each,
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
