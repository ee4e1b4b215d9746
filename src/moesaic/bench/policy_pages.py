"""The page of suite `policies`: errors, regrets, re-plans, measured plans, from its lines alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .report import Sheet, markdown, provenance, short, targets_sheet
from .results import Line, Target

LEARNED = ("learned, no context", "learned, step before", "learned, step before, earlier layers")
NAMED = ("none", "static", "dynamic", "proportional")
BOUND = ("last", "learned", "learned by counts")


def rows_of(lines: Sequence[Line], clock: str) -> dict[tuple[Any, ...], dict[str, Line]]:
    """The lines of a clock by cell, then by implementation."""
    found: dict[tuple[Any, ...], dict[str, Line]] = {}
    for x in lines:
        if x["clock"] == clock:
            found.setdefault((x["model"], x["routing"], x["tokens"]), {})[x["impl"]] = x
    return found


def percent(value: float | None) -> str:
    """A ratio in percent, two figures after the point."""
    return "-" if value is None else f"{100 * value:.2f}"


def best(row: dict[str, Line], prefix: str, key: str) -> Line | None:
    """The line with the least number among implementations of a prefix."""
    some = [x for impl, x in row.items() if impl.startswith(prefix) and x.get(key) is not None]
    return min(some, key=lambda x: float(x[key])) if some else None


def errors(lines: Sequence[Line]) -> Sheet:
    """Errors of the predictors of rows per expert, in percent of the rows."""
    heads = ["trace", "last", "best ewma in hindsight", "trend", *LEARNED]
    rows = []
    for (model, _, _), row in rows_of(lines, "error").items():
        plain = best(row, "ewma", "wape")
        told = "-" if plain is None else f"{percent(plain['wape'])} ({plain['impl'][4:]})"
        others = [percent(row[n]["wape"]) if n in row else "-" for n in ("last", "trend")]
        mine = [percent(row[n]["wape"]) if n in row else "-" for n in LEARNED]
        rows.append([model, others[0], told, others[1], *mine])
    return Sheet(heads, rows)


def work(lines: Sequence[Line]) -> Sheet:
    """Errors of the ways to foresee the groups' work, in percent of the work."""
    found = rows_of(lines, "work")
    names = list(dict.fromkeys(impl for row in found.values() for impl in row))
    rows = [
        [model, scene, str(tokens), *(percent(row[n]["wape"]) if n in row else "-" for n in names)]
        for (model, scene, tokens), row in found.items()
    ]
    return Sheet(["trace", "scene", "tokens", *names], rows)


def regrets(lines: Sequence[Line]) -> Sheet:
    """Regret of every policy, in percent of the oracle's time."""
    heads = ["trace", "scene", "tokens", *NAMED, "best ewma in hindsight"]
    heads += [f"adaptive by {name}" for name in BOUND] + ["adaptive"]
    rows = []
    for (model, scene, tokens), row in rows_of(lines, "replay").items():
        plain = best(row, "adaptive by ewma", "regret")
        names = [*NAMED, *(f"adaptive by {name}" for name in BOUND), "adaptive"]
        told = [percent(row[n]["regret"]) if n in row else "-" for n in names]
        told.insert(len(NAMED), "-" if plain is None else percent(plain["regret"]))
        rows.append([model, scene, str(tokens), *told])
    return Sheet(heads, rows)


def replans(lines: Sequence[Line]) -> Sheet:
    """How often sizes changed, and how often they went back at once."""
    names = [
        "proportional", "dynamic", "adaptive by last",
        "adaptive by learned, no hysteresis", "adaptive by learned", "adaptive", "oracle",
    ]  # fmt: skip
    rows = []
    for (model, scene, tokens), row in rows_of(lines, "replay").items():
        told = [f"{row[n]['replans']} ({row[n]['flaps']})" if n in row else "-" for n in names]
        rows.append([model, scene, str(tokens), *told])
    return Sheet(["trace", "scene", "tokens", *names], rows)


def curves(lines: Sequence[Line]) -> Sheet:
    """Slowdown over SMs of the works measured."""
    found: dict[int, dict[str, Line]] = {}
    for x in lines:
        if x["clock"] == "curve":
            found.setdefault(x["sms"], {})[x["work"]] = x
    works = list(dict.fromkeys(x["work"] for x in lines if x["clock"] == "curve"))
    rows = [
        [str(sms), *(f"{short(at[w]['ms'])} ms, {at[w]['slowdown']:.2f} x" for w in works)]
        for sms, at in sorted(found.items())
    ]
    return Sheet(["SMs", *works], rows)


def measured(lines: Sequence[Line]) -> Sheet:
    """What the plans took, beside what was predicted."""
    rows = []
    for x in lines:
        if x["clock"] == "measured":
            sizes = list(
                dict.fromkeys("+".join(map(str, s)) or "whole" for s in x.get("plans") or ())
            )
            state = "wrong" if x.get("wrong") else str(x.get("error") or "right")
            told = [short(x["ms"]), short(x.get("predicted_ms")), ", ".join(sizes) or "-", state]
            rows.append([x["model"], str(x["tokens"]), x["impl"], *told])
    heads = ["trace", "tokens", "impl", "measured ms", "predicted ms", "sizes (hot+cold+shared)"]
    return Sheet([*heads, "state"], rows)


TABLES = (
    ("Error of the rows per expert foreseen, percent", errors),
    ("Error of the groups' work foreseen, percent", work),
    ("Regret in predicted time, percent of the oracle's", regrets),
    ("Re-plans (of them, back at once to what was before)", replans),
    ("Time over SMs, alone in one green context", curves),
    ("Plans as they ran, mean of the steps", measured),
)


def section(
    lines: Sequence[Line], targets: Sequence[Target], root: Path, device: str, folder: str
) -> tuple[str, dict[str, str]]:
    """The suite's part of a page: provenance, targets, and every table that has rows."""
    parts = [provenance(lines), markdown(targets_sheet(targets))]
    sources = sorted({x["curves"] for x in lines if x.get("curves")})
    if sources:
        parts.append(f"Curves: `{', '.join(f'benchmarks/{s}' for s in sources)}`.")
    for title, table in TABLES:
        if (made := table(lines)).rows:
            parts += [f"#### {title}", markdown(made)]
    return "\n\n".join(parts) + "\n", {}
