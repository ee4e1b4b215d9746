"""Suite `sanitizer`: what memcheck, racecheck and ConSan say of a reduced grid.

A line is one tool on one job: the grid on the Triton path, on the Hopper path or on its launches of
whole layers, the ring of one kind of tile, a control, or a planted fault, which must be found.
`benchmarks/sanitize.py` runs them and records.

Two reports are a tool's own. The kernels are written so that neither arises, and controls say why:

- Racecheck orders by an mbarrier only what the arriving thread wrote itself. Of three right
  hand-overs in CUDA it reports those where a warp or four warps meet and one thread arrives, not
  the one where every thread arrives; and it reports readers who do not wait.
- ConSan of Triton 3.6 counts no arrival by cp.async, and tells of a deadlock that is none: in a
  kernel that does nothing else, and not in the one that waits for its copies.

Any report of a grid or a ring fails.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..results import Line, Target, at_least, at_most
from ..suite import Cell, Context, Suite

TOOLS = ("memcheck", "racecheck", "consan")
GRIDS = (
    *((tool, f"grid_{part}") for tool in TOOLS[:2] for part in ("triton", "hopper", "together")),
    *(("consan", f"ring_{kind}")
      for kind in ("decode", "prefill", "tall", "decode_gathered", "prefill_gathered")),
)  # fmt: skip
FAULTS = (("memcheck", "plant_memcheck"), ("racecheck", "plant_racecheck"),
          ("racecheck", "plant_note"), ("consan", "plant_ring"))  # fmt: skip
CONTROLS = (("racecheck", "controls"), ("consan", "copies_waited"), ("consan", "copies_arriving"))
CHECKS = (*GRIDS, *FAULTS, *CONTROLS)
REPORTED = ("hand_over_warp", "hand_over_block", "hand_over_unread")
SILENT = ("hand_over_each",)


def reporting(text: str, kernels: Sequence[str]) -> list[str]:
    """Those of `kernels` in which racecheck reported something, from what it printed."""
    told = {*re.findall(r"Race reported between \w+ access at (\w+)\+", text)}
    return [kernel for kernel in kernels if kernel in told]


def asserted(text: str) -> list[str]:
    """What ConSan told in what a process printed, each once."""
    return sorted({*re.findall(r"Assertion `(.*?)` failed", text)})


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
    tool: str,
    job: str,
    text: str,
    counts: Sequence[int],
    status: int,
    version: str,
) -> dict[str, object]:
    """What goes into a line: findings, controls that were reported, calls made, exit status and,
    where something was found, the end of what the tool printed."""
    # A job that broke off has shown nothing, whatever the tool sums up.
    told = bool(counts) and (status == 0 or sum(counts) > 0)
    clean = told and not sum(counts)
    return {
        "clock": "counters",
        "mode": "eager",
        "model": tool,
        "impl": job,
        "tokens": 0,
        "reported": sum(counts) if told else None,
        "controls": reporting(text, (*REPORTED, *SILENT)) if job == "controls" else None,
        "calls": text.count("\nran ") + text.startswith("ran "),
        "status": status,
        "version": version,
        "tail": "" if clean else text[-3000:],
    }


def summarize(lines: Sequence[Line]) -> list[Target]:
    """Nothing found by any tool, every planted fault found, every control answered as the head of
    this file says."""
    last = {(x["model"], x["impl"]): x for x in lines}
    found = {pair: last[pair]["reported"] for pair in GRIDS if pair in last}
    grid = [
        at_most(f"{tool} findings, {job}", None if count is None else float(count), 0.0)
        for tool, job in GRIDS
        for count in [found.get((tool, job))]
    ]
    planted = sum(bool(last[fault]["reported"]) for fault in FAULTS if fault in last)
    controls = last.get(("racecheck", "controls"))
    told = None if controls is None else controls["controls"]
    right = 0
    if told is not None:
        right = sum(name in told for name in REPORTED) + sum(name not in told for name in SILENT)
    copies = [last.get(pair) for pair in CONTROLS[1:]]
    if None not in copies:
        right += [bool(x and x["reported"]) for x in copies] == [False, True]
    return [
        *grid,
        at_least("planted faults found", float(planted), float(len(FAULTS))),
        at_least("controls answered as expected", float(right), len(REPORTED) + len(SILENT) + 1.0),
    ]


SUITE = Suite(
    name="sanitizer",
    about="memory and race checkers on a reduced grid of every kernel, with planted faults",
    cells=cells,
    run=run,
    summarize=summarize,
)
