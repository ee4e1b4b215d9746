"""Suite `sanitizer`: what memcheck, racecheck and ConSan say of a reduced grid.

A line is one tool on one job: the grid on the Triton path or on the Hopper path, the ring of one
kind of Hopper tile, a control, or a planted fault, which the tool must find.
`benchmarks/sanitize.py` runs them and records.

Two reports are a tool's own, and excused as long as controls of the same version show it:

- Racecheck reports the notes of one-warp loaders: all lanes write, the warp meets, one lane arrives
  at an mbarrier, consumers wait for it. That orders the writes, but the tool follows only what the
  arriving thread wrote. It must report the small control that does the same, and not the one whose
  every lane arrives; and the grid whose kernels differ in that alone must be clean. A report is
  excused where every pair in it is a read and the write of a note.
- ConSan of Triton 3.6 counts no arrival by cp.async, and tells of a deadlock that is none. It must
  tell of it in a kernel that does nothing else, and not in the one that waits for its copies;
  gathering products are checked with loaders that wait.

Any other report fails.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ..results import Line, Target, at_least, at_most
from ..suite import Cell, Context, Suite

TOOLS = ("memcheck", "racecheck", "consan")
GRIDS = (
    *((tool, grid) for tool in TOOLS[:2] for grid in ("grid_triton", "grid_hopper")),
    ("racecheck", "grid_arriving"),
    *(("consan", f"ring_{kind}")
      for kind in ("decode", "prefill", "tall", "decode_waiting", "prefill_waiting")),
)  # fmt: skip
FAULTS = (("memcheck", "plant_memcheck"), ("racecheck", "plant_racecheck"),
          ("racecheck", "plant_note"), ("consan", "plant_ring"))  # fmt: skip
CONTROLS = (("racecheck", "controls"), ("consan", "copies_waited"), ("consan", "copies_arriving"))
CHECKS = (*GRIDS, *FAULTS, *CONTROLS)
REPORTED = ("hand_over_warp", "hand_over_block", "hand_over_unread")
SILENT = ("hand_over_each",)
RACE = re.compile(
    r"(Race reported between|and) (Read|Write) access at (\w+)\+\w+(?: in (\S+):(\d+))?"
)


def races(text: str) -> list[list[tuple[str, str, str, int]]]:
    """The reports of racecheck in what it printed: of each, the first access and the others.

    An access is what it does, its kernel, and file and line, "" and 0 where they were not told.
    """
    found: list[list[tuple[str, str, str, int]]] = []
    for word, access, kernel, file, line in RACE.findall(text):
        place = (access, kernel, file, int(line or 0))
        if word == "and":
            found[-1].append(place)
        else:
            found.append([place])
    return found


def known_races(text: str, notes: Mapping[str, Mapping[str, range]]) -> int:
    """Reports of which every pair is a read and the write of a note.

    Args:
        text: what racecheck printed.
        notes: of each kernel whose loader is one warp, the lines that write its notes, by file.
    """

    def excused(one: tuple[str, str, str, int], other: tuple[str, str, str, int]) -> bool:
        if {one[0], other[0]} != {"Read", "Write"}:
            return False
        _, kernel, file, line = one if one[0] == "Write" else other
        return line in notes.get(kernel, {}).get(file, range(0))

    return sum(
        len(report) > 1 and all(excused(report[0], other) for other in report[1:])
        for report in races(text)
    )


def reporting(text: str, kernels: Sequence[str]) -> list[str]:
    """Those of `kernels` in which racecheck reported something."""
    told = {place[1] for report in races(text) for place in report}
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
    notes: Mapping[str, Mapping[str, range]] | None = None,
) -> dict[str, object]:
    """What goes into a line: findings, those of them that are known, controls that were reported,
    calls made, exit status and, where something was found, the end of what the tool printed."""
    clean = bool(counts) and not sum(counts)
    return {
        "clock": "counters",
        "mode": "eager",
        "model": tool,
        "impl": job,
        "tokens": 0,
        "reported": sum(counts) if counts else None,
        "known": known_races(text, notes or {}),
        "controls": reporting(text, (*REPORTED, *SILENT)) if job == "controls" else None,
        "calls": text.count("\nran ") + text.startswith("ran "),
        "status": status,
        "version": version,
        "tail": "" if clean else text[-3000:],
    }


def _excusing(lines: Mapping[tuple[str, str], Line]) -> str | None:
    """The version of racecheck whose reports of notes are excused: see the head of this file."""
    controls, clean = (lines.get(("racecheck", job)) for job in ("controls", "grid_arriving"))
    if controls is None or clean is None or controls["version"] != clean.get("version"):
        return None
    shown = sorted(controls["controls"] or ()) == sorted(REPORTED)
    ran = controls["calls"] == len(REPORTED) + len(SILENT)
    return str(controls["version"]) if shown and ran and clean["reported"] == 0 else None


def _unexcused(line: Line | None, version: str | None) -> float | None:
    if line is None or line["reported"] is None:
        return None
    excused = line.get("known") or 0
    return float(line["reported"] - (excused if line.get("version") == version else 0))


def summarize(lines: Sequence[Line]) -> list[Target]:
    """Nothing found by any tool but what is excused, every planted fault found, every control
    answered as the head of this file says."""
    last = {(x["model"], x["impl"]): x for x in lines}
    version = _excusing(last)
    grid = [
        at_most(f"{tool} findings, {job}", _unexcused(last.get((tool, job)), version), 0.0)
        for tool, job in GRIDS
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
