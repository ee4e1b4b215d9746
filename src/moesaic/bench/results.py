"""Benchmark results as files: one JSON line per measured cell and candidate, summaries from them.

A *line* is a flat JSON object with at least the keys of `REQUIRED`; `null` where a key has no
meaning or where there is no number because of an `error`. `<root>/<device>/<suite>.jsonl` holds the
lines of one suite on one device, `<suite>.summary.json` what code computed from them. Files are
replaced whole (temporary file, then rename), so that an interrupted run or a full disk never leaves
half of one.

>>> at_least("speed-up", 1.625, 1.5)
Target(name='speed-up', value=1.625, goal='>= 1.5', met=True)
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

Line = dict[str, Any]
Summarize = Callable[[Sequence[Line]], "list[Target]"]

KEY = ("suite", "clock", "model", "tokens", "routing", "impl", "mode", "dtype")
NUMBERS = ("ms", "ms_p20", "ms_p80", "samples", "floor_ms", "of_floor", "tflops", "gbps")
STAMP = ("device", "torch", "triton", "commit", "date")
REQUIRED = (*KEY, *NUMBERS, *STAMP)


class ResultsError(RuntimeError):
    """A results file could not be read, written or understood; the message says the remedy."""


@dataclass(frozen=True)
class Target:
    """One promise of a suite: what was reached, what was asked (``">= 1.5"``), if it is met."""

    name: str
    value: float | None
    goal: str
    met: bool


def _rounded(value: float | None) -> float | None:
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.6g}")


def at_least(name: str, value: float | None, goal: float) -> Target:
    """A target met when `value` is a number not under `goal`."""
    return Target(name, _rounded(value), f">= {goal:g}", value is not None and value >= goal)


def at_most(name: str, value: float | None, goal: float) -> Target:
    """A target met when `value` is a number not over `goal`."""
    return Target(name, _rounded(value), f"<= {goal:g}", value is not None and value <= goal)


def geomean(values: Iterable[float]) -> float | None:
    """The geometric mean, or None of nothing."""
    logs = [math.log(v) for v in values]
    return math.exp(math.fsum(logs) / len(logs)) if logs else None


def write_atomic(path: Path, text: str) -> None:
    """Replace the file at `path` by `text`, or leave it as it was.

    Raises:
        ResultsError: the disk is full or the folder cannot be written.
    """
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        raise ResultsError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another --out"
        ) from error


def device_name(device: torch.device) -> str:
    """What the device calls itself: "NVIDIA H200", or the CPU's model name and core count."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        if match := re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE):
            model = match.group(1)
    return f"{model}, {os.cpu_count()} cores"


def device_slug(device: torch.device) -> str:
    """The folder of a device's results: `cpu`, or `h200` from "NVIDIA H200"."""
    if device.type != "cuda":
        return device.type
    words = re.findall(r"[a-z0-9]+", device_name(device).lower())
    return "-".join(w for w in words if w not in ("nvidia", "geforce", "tesla")) or "cuda"


def _commit() -> str:
    if given := os.environ.get("MOESAIC_COMMIT"):
        return given
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()
    return "unknown"


def stamp(device: torch.device) -> Line:
    """Where and when lines are made: device, versions, commit (or $MOESAIC_COMMIT), UTC date."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        triton: str | None = version("triton")
    except PackageNotFoundError:
        triton = None
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": triton,
        "commit": _commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def make_line(stamped: Mapping[str, Any], **values: Any) -> Line:
    """A whole line: every required key, `null` where `values` has none, in the documented order."""
    merged = {**stamped, **values}
    extra = {k: v for k, v in merged.items() if k not in REQUIRED}
    line = {key: merged.get(key) for key in REQUIRED} | extra
    for key, value in line.items():
        if isinstance(value, float):
            line[key] = _rounded(value)
    return line


def line_key(line: Line) -> tuple[Any, ...]:
    """What makes two lines measurements of the same thing."""
    return tuple(line[k] for k in KEY)


def read_lines(path: Path) -> list[Line]:
    """The lines of a file, checked to have every required key.

    Raises:
        ResultsError: the file is missing or a line is not such an object; says which.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ResultsError(f"cannot read {path}: {error.strerror}") from error
    lines: list[Line] = []
    for number, row in enumerate(text.splitlines(), 1):
        try:
            line = json.loads(row)
        except json.JSONDecodeError as error:
            raise ResultsError(f"{path}:{number} is not JSON: {error.msg}") from error
        if not isinstance(line, dict) or any(k not in line for k in REQUIRED):
            missing = [k for k in REQUIRED if not isinstance(line, dict) or k not in line]
            raise ResultsError(f"{path}:{number} lacks {', '.join(missing)}")
        lines.append(line)
    return lines


def _dump(target: Target) -> str:
    return json.dumps(asdict(target), allow_nan=False)


def summary_text(targets: Sequence[Target]) -> str:
    """The text of a summary file: a JSON list, one target a row."""
    return "[\n" + ",\n".join(f"  {_dump(t)}" for t in targets) + "\n]\n"


class Recorder:
    """The lines of one suite on one device, kept on disk after every `record`.

    A new line replaces an old one of the same key, so that a run over some of the cells leaves the
    others as they were.
    """

    def __init__(self, root: Path, device: str, suite: str, summarize: Summarize) -> None:
        self.path = root / device / f"{suite}.jsonl"
        self.summary_path = root / device / f"{suite}.summary.json"
        self._summarize = summarize
        old = read_lines(self.path) if self.path.exists() else []
        self._lines = {line_key(line): line for line in old}

    @property
    def lines(self) -> list[Line]:
        """All lines, old and new, in the order of their first appearance."""
        return list(self._lines.values())

    def record(self, lines: Iterable[Line]) -> None:
        """Add or replace lines and rewrite both files; raises ResultsError as `write_atomic`."""
        for line in lines:
            self._lines[line_key(line)] = line
        rows = [json.dumps(line, allow_nan=False) for line in self.lines]
        write_atomic(self.path, "\n".join(rows) + "\n")
        write_atomic(self.summary_path, summary_text(self.targets()))

    def targets(self) -> list[Target]:
        """The summary of the lines held now."""
        return self._summarize(self.lines)


def _same(committed: object, target: Target) -> bool:
    if not isinstance(committed, dict):
        return False
    fresh = asdict(target)
    value, wanted = committed.get("value"), fresh["value"]
    close = value == wanted or (
        isinstance(value, int | float)
        and wanted is not None
        and math.isclose(value, wanted, rel_tol=2e-6)
    )
    others = {k: v for k, v in fresh.items() if k != "value"}
    return close and {k: v for k, v in committed.items() if k != "value"} == others


def _check_file(path: Path, summarize: Summarize | None) -> str | None:
    """What is wrong with one suite's lines and summary, or None."""
    summary_path = path.with_suffix(".summary.json")
    if summarize is None:
        return f"{path}: there is no suite named {path.stem!r}"
    if not summary_path.exists():
        return f"{path}: has lines but no {summary_path.name}"
    targets = summarize(read_lines(path))
    try:
        committed = json.loads(summary_path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"{summary_path}: cannot be read as JSON: {error}"
    if not isinstance(committed, list) or len(committed) != len(targets):
        return f"{summary_path}: does not hold the {len(targets)} targets its lines give"
    for old, target in zip(committed, targets, strict=True):
        if not _same(old, target):
            return f"{summary_path}: {target.name!r} is {_dump(target)} from the lines, not {old}"
    return None


def check_results(root: Path, summarizers: Mapping[str, Summarize]) -> list[str]:
    """Recompute every committed summary under `root`; one sentence per file that is wrong."""
    problems: list[str] = []
    for path in sorted(root.glob("*/*.jsonl")):
        try:
            problem = _check_file(path, summarizers.get(path.stem))
        except ResultsError as error:
            problem = str(error)
        if problem:
            problems.append(problem)
    for summary in sorted(root.glob("*/*.summary.json")):
        name = summary.name.removesuffix(".summary.json")
        if not (summary.parent / f"{name}.jsonl").exists():
            problems.append(f"{summary}: has no lines, {name}.jsonl is missing")
    return problems
