"""Nsight Compute's CSV: launches with their counters, cut at marker launches.

A profiled program starts each case with a launch of torch's spin kernel (`torch.cuda._sleep`), and
`split` cuts there. Clocks and caches are left as they are in use.

>>> BYTES["Mbyte"], TIME["ns"]
(1000000.0, 1e-09)
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

Units = Mapping[str, float]

BYTES: Units = {"byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "Tbyte": 1e12}
TIME: Units = {"ns": 1e-9, "nsecond": 1e-9, "us": 1e-6, "usecond": 1e-6, "ms": 1e-3,
               "msecond": 1e-3, "s": 1.0, "second": 1.0}  # fmt: skip
RATE: Units = {"hz": 1.0, "Khz": 1e3, "Mhz": 1e6, "Ghz": 1e9, "cycle/nsecond": 1e9,
               "cycle/second": 1.0}  # fmt: skip
SHARE: Units = {"%": 0.01}
MARKER = "spin_kernel"


@dataclass(frozen=True)
class Launch:
    """One profiled launch: its kernel's name and the value of each metric in its base unit."""

    name: str
    values: dict[str, float]


def parse_number(text: str, unit: str, units: Units) -> float:
    """A value of ncu's CSV in the base unit of `units`.

    Raises:
        ValueError: the unit is not one of `units`, or the value is none (`n/a`).
    """
    if unit not in units:
        raise ValueError(f"unit must be one of {', '.join(units)}, got {unit!r}")
    return float(text.replace(",", "")) * units[unit]


def parse_csv(text: str, metrics: Mapping[str, Units]) -> list[Launch]:
    """The launches of `ncu --csv` output in launch order; lines that are not CSV are skipped.

    Args:
        text: what ncu printed.
        metrics: every metric wanted and the units in which it may come.

    Raises:
        ValueError: no table is found, or a launch lacks one of the metrics.
    """
    rows = [row for row in text.splitlines() if row.startswith('"')]
    if not rows or '"Metric Name"' not in rows[0]:
        ends = " ".join(text.split()[-30:])
        raise ValueError(f"no ncu table with a 'Metric Name' column; it ends: {ends}")
    names: dict[int, str] = {}
    found: dict[int, dict[str, float]] = {}
    for row in csv.DictReader(io.StringIO("\n".join(rows))):
        if (metric := row["Metric Name"]) in metrics:
            launch = int(row["ID"])
            names[launch] = row["Kernel Name"]
            value = parse_number(row["Metric Value"], row["Metric Unit"], metrics[metric])
            found.setdefault(launch, {})[metric] = value
    launches = []
    for launch in sorted(found):
        if missing := [m for m in metrics if m not in found[launch]]:
            raise ValueError(f"launch {launch} ({names[launch]}) lacks {', '.join(missing)}")
        launches.append(Launch(names[launch], found[launch]))
    return launches


def split(launches: Iterable[Launch]) -> list[list[Launch]]:
    """The launches between markers: one list per marker, of those that follow it."""
    parts: list[list[Launch]] = []
    for launch in launches:
        if MARKER in launch.name:
            parts.append([])
        elif parts:
            parts[-1].append(launch)
    return parts


def command(
    python: str, script: str, metrics: Iterable[str], labels: Path, log: Path, caches: str = "none"
) -> list[str]:
    """The profiler's command line around `script --child labels`.

    `caches`: "all" empties them before every run of a launch.
    """
    return [
        "ncu", "--metrics", ",".join(metrics), "--clock-control", "none", "--cache-control", caches,
        "--profile-from-start", "off", "--print-units", "base", "--csv", "--log-file", str(log),
        python, script, "--child", str(labels),
    ]  # fmt: skip
