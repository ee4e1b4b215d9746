"""Suite `sanitizer`: what compute-sanitizer's memcheck and racecheck say of a reduced grid.

A line is one tool on one job: the grid on the Triton path, on the Hopper path, or a planted fault,
which the tool must find. `benchmarks/sanitize.py` runs them and records.

The Hopper kernels hand data from one warp group to another through mbarriers, which versions of the
tool before 2026.1 take for races now and then: a line says which version spoke. Whatever is
reported is counted, not explained away.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..results import Line, Target, at_least, at_most
from ..suite import Cell, Context, Suite

TOOLS = ("memcheck", "racecheck")
GRIDS = ("grid_triton", "grid_hopper")
FAULTS = (("memcheck", "plant_memcheck"), ("racecheck", "plant_racecheck"),
          ("racecheck", "plant_hopper"))  # fmt: skip


def cells() -> list[Cell]:
    """One per tool."""
    return [Cell(tool, 0) for tool in TOOLS]


def run(wanted: Sequence[Cell], context: Context) -> None:
    """The tools surround a process, so this only says what to start.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError("suite sanitizer runs under a tool; start: python benchmarks/sanitize.py")


def line_of(
    tool: str, job: str, text: str, counts: Sequence[int], status: int, version: str
) -> dict[str, object]:
    """What goes into a line: findings, calls made, exit status and, where something was found, the
    end of what the tool printed."""
    clean = bool(counts) and not sum(counts)
    return {
        "clock": "counters",
        "mode": "eager",
        "model": tool,
        "impl": job,
        "tokens": 0,
        "reported": sum(counts) if counts else None,
        "calls": text.count("\nran ") + text.startswith("ran "),
        "status": status,
        "version": version,
        "tail": "" if clean else text[-3000:],
    }


def summarize(lines: Sequence[Line]) -> list[Target]:
    """Nothing found on either path by either tool, and every planted fault found."""
    found = {(x["model"], x["impl"]): x["reported"] for x in lines}
    grid = [
        at_most(f"{tool} findings, {job}", None if count is None else float(count), 0.0)
        for tool in TOOLS
        for job in GRIDS
        for count in [found.get((tool, job))]
    ]
    planted = sum(bool(found.get(fault)) for fault in FAULTS)
    return [*grid, at_least("planted faults found", float(planted), float(len(FAULTS)))]


SUITE = Suite(
    name="sanitizer",
    about="compute-sanitizer on a reduced grid of every kernel, with planted faults",
    cells=cells,
    run=run,
    summarize=summarize,
)
