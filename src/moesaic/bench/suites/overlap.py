"""Suite `overlap`: the exchange of one batch beside the experts of another, over GPUs of one host.

Two batches go through three layers of experts spread over the ranks. `in-turn` does one after the
other on the whole GPU. `streams` runs the exchange of one beside the experts of the other on two
streams, `split@n` the same on two green contexts: n SMs for the exchange, the others for the
experts, and both held to budgets of as many programs. `policy:...` is what a policy chooses from
the curves of the same run: a split, or one batch after the other.

Clock `curve`: an exchange there and back, and the experts of one batch, alone on ever more SMs.
Clock `overlap`: milliseconds of one layer of both batches, of the slowest rank, in a CUDA graph.
Keys besides the usual: `over_in_turn` (how many times as fast as in turn), `sms` of the exchange,
`other_sms`, `predicted_ms`, `policy`, `reason`. Bits are compared with the batches in turn. Curves
are measured alone; what they cannot know (the two slow each other down, rows must be back before
they can leave again) `adaptive` learns where times are handed back to it, which the targets replay
over the measured times.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..overlaps import IN_TURN, SPLIT, STREAMS, measure_all, settled
from ..report import Sheet, markdown, provenance, short, targets_sheet
from ..results import Line, Target, at_least, at_most
from ..suite import Cell, Context, Suite
from ..workloads import MODELS, Model
from .colocation import curves_from

NAME, CHOSEN = "overlap", "policy:adaptive"
MODELS_HERE = {
    "OLMoE": MODELS["OLMoE"],
    "deepseek-v3-16": Model("deepseek-v3-16", 16, 8, 7168, 2048, family="deepseek_v3"),
    "tiny": Model("tiny", 4, 2, 32, 16),
}


def cells() -> list[Cell]:
    """Tokens are those of a batch and rank."""
    sizes = (("OLMoE", 4096), ("deepseek-v3-16", 2048), ("OLMoE", 512))
    return [Cell(model, tokens, clock="overlap") for model, tokens in sizes]


def run(wanted: Sequence[Cell], context: Context) -> None:
    """Measure the cells over the ranks there are."""
    measure_all(wanted, context, suite=NAME, models=MODELS_HERE)


def measured(line: Line) -> Cell | None:
    """The cell of a right line of the chosen policy."""
    if line["impl"] != CHOSEN or not line["ms"] or line.get("wrong"):
        return None
    return Cell(line["model"], line["tokens"], line["routing"], line["dtype"], line["clock"])


def ways(lines: Sequence[Line], cell: Cell) -> dict[str, Line]:
    """The measured ways of a cell by name."""
    return {
        x["impl"]: x
        for x in lines
        if x["clock"] == "overlap" and x["ms"]
        and (x["model"], x["tokens"]) == (cell.model, cell.tokens)
    }  # fmt: skip


def best_ms(found: dict[str, Line]) -> float | None:
    """The time of the fastest way of all, one batch after the other among them."""
    tried = [x["ms"] for name, x in found.items() if name.startswith((SPLIT, STREAMS, IN_TURN))]
    return min(tried, default=None)


def fed_back(lines: Sequence[Line], cell: Cell) -> list[str]:
    """The ways of `adaptive` when each step's measured time is handed back to it; replayed over the
    measured times, [] where something is not measured."""
    found, mine = ways(lines, cell), (cell.model, cell.tokens)
    curves = curves_from([x for x in lines if (x["model"], x["tokens"]) == mine])
    if IN_TURN not in found or not {"exchange", "experts"} <= set(curves):
        return []
    return settled(curves, {name: x["ms"] for name, x in found.items()})


def summarize(lines: Sequence[Line]) -> list[Target]:
    """The chosen plan, at first and with times fed back, beside the fastest way and no slices."""
    targets = []
    for cell in cells():
        found, what = ways(lines, cell), f"{cell.model}, {cell.tokens} tokens"
        chosen, steps = found.get(CHOSEN), fed_back(lines, cell)
        took = [found[way]["ms"] for way in steps]
        best, whole = best_ms(found), found[IN_TURN]["ms"] if took else None
        targets += [
            at_least(
                f"{what}: {CHOSEN} over the fastest way",
                best / chosen["ms"] if best and chosen else None, 0.9,
            ),
            at_least(
                f"{what}: {CHOSEN}, times fed back, where it settles, over the fastest way",
                best / took[-1] if best and took else None, 0.9,
            ),
            at_least(
                f"{what}: {CHOSEN}, times fed back, all steps, times as fast as in turn",
                whole * len(took) / sum(took) if whole else None, 0.98,
            ),
        ]  # fmt: skip
    bad = [x for x in lines if x.get("wrong") or x.get("error")]
    return [*targets, at_most("lines wrong or failed", float(len(bad)), 0.0)]


def section(
    lines: Sequence[Line], targets: Sequence[Target], root: Path, device: str, folder: str
) -> tuple[str, dict[str, str]]:
    """Every way of every cell, the policies' reasons, and the curves."""
    parts = [provenance(lines), markdown(targets_sheet(targets))]
    for cell in cells():
        found = ways(lines, cell)
        if not found:
            continue
        rows = [
            [
                name, str(x.get("sms") or "-"), str(x.get("other_sms") or "-"), short(x["ms"]),
                short(x["over_in_turn"]), short(x.get("predicted_ms")), x.get("reason") or "",
            ]
            for name, x in found.items()
        ]  # fmt: skip
        heads = ["way", "SMs of the exchange", "of the experts", "ms", "× in turn", "foreseen ms"]
        for way in fed_back(lines, cell)[-1:]:
            x, why = found[way], "where `adaptive` settles when it is told the measured times"
            rows.append(
                [f"{CHOSEN}, told", "", way, short(x["ms"]), short(x["over_in_turn"]), "", why]
            )
        title = f"#### {cell.model}, {cell.tokens} tokens a batch and rank"
        parts += [title, markdown(Sheet([*heads, "why"], rows)), markdown(curves(lines, cell))]
    return "\n\n".join(parts) + "\n", {}


def curves(lines: Sequence[Line], cell: Cell) -> Sheet:
    """Milliseconds alone by SMs."""
    mine = [
        x for x in lines
        if x["clock"] == "curve" and (x["model"], x["tokens"]) == (cell.model, cell.tokens)
    ]  # fmt: skip
    rows = [[x["work"], str(x["sms"]), short(x["ms"]), short(x["slowdown"])] for x in mine]
    return Sheet(["alone", "SMs", "ms", "slowdown"], rows)


SUITE = Suite(
    name=NAME,
    about="the exchange of one batch beside the experts of another, on slices (--gpus N)",
    cells=cells,
    run=run,
    summarize=summarize,
    budget_s=60.0,
    measured=measured,
    section=section,
)
