"""The generated table of suite `placement`: what each placement puts on the busiest link."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .report import Sheet, markdown, provenance, short, targets_sheet
from .results import Line, Target

RIVALS = ("contiguous", "eplb", "milp")


def link_sheet(lines: Sequence[Line]) -> Sheet:
    """Microseconds of the busiest link by planner, HiGHS' bound, and how long ours planned."""
    found: dict[tuple[Any, ...], dict[str, Line]] = {}
    for x in lines:
        key = (x["model"], x["clock"], x["routing"])
        found.setdefault(key, {})[x["impl"]] = x
    heads = ["experts and GPUs", "exchange", "routing", "moesaic µs"]
    heads += ["contiguous µs", "eplb µs", "HiGHS µs", "HiGHS' bound µs", "CPU ms of moesaic"]
    rows = []
    for (model, clock, routing), of in found.items():
        links = [of.get(name, {}).get("link_us") for name in ("moesaic", *RIVALS)]
        numbers = [*links, of.get("milp", {}).get("bound_us"), of.get("moesaic", {}).get("cpu_ms")]
        told = ["-" if number is None else short(number) for number in numbers]
        rows.append([model, clock, routing, *told])
    return Sheet(heads, rows)


def placement_section(
    lines: Sequence[Line], targets: Sequence[Target], root: Path, device: str, folder: str
) -> tuple[str, dict[str, str]]:
    """The table of suite `placement`."""
    parts = [provenance(lines), markdown(targets_sheet(targets)), markdown(link_sheet(lines))]
    return "\n\n".join(parts) + "\n", {}
