"""Hardware counters by Nsight Compute: suites `bytes`, `launches`, the steps of `transformers`.

    python benchmarks/ncu_counters.py --suite launches [--out benchmarks/results] [--only MODEL]
        [--misses benchmarks/results/h200/layer.jsonl]

Starts itself once more under `ncu` (which must be on the PATH and allowed to read counters), turns
its CSV into lines of the suite and prints the targets. Clocks and caches are left as they are.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from moesaic.bench import command, counters, launches, ncu, report, step_counters
from moesaic.bench.layer_misses import over_limit
from moesaic.bench.results import Recorder, device_slug, read_lines, stamp
from moesaic.bench.suite import Cell
from moesaic.bench.suites import bytes as bytes_suite
from moesaic.bench.suites import launches as launches_suite

SUITES = {
    "bytes": (bytes_suite, counters.cases, counters.lines_from),
    "launches": (launches_suite, launches.layer_cases, launches.lines_from),
    "transformers": (step_counters, step_counters.step_cases, step_counters.lines_from),
}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", choices=SUITES, required=True)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--only", action="append", default=[], help="a model of the suite")
    parser.add_argument(
        "--misses", type=Path, help="first the cells over their limit in these lines"
    )
    parser.add_argument("--budget-s", type=float, default=1e9, help="start no cell after this")
    parser.add_argument("--keep", type=Path, help="also keep ncu's CSV here")
    parser.add_argument("--child", type=Path, help="run the cases, write their labels here")
    return parser.parse_args()


def wanted(chosen: argparse.Namespace) -> list[Cell]:
    """The suite's cells of the models asked for, after those over their limit, if asked for."""
    cells = command.selected(SUITES[chosen.suite][0].SUITE, only=chosen.only)
    if chosen.misses is None:
        return cells
    missed = (
        Cell(x["model"], x["tokens"], x["routing"])
        for x in reversed(over_limit(read_lines(chosen.misses)))
        if not chosen.only or x["model"] in chosen.only
    )
    return list(dict.fromkeys([*missed, *cells]))


def count(chosen: argparse.Namespace, folder: Path) -> tuple[str, list[dict[str, object]]]:
    """ncu's log and the labels of one profiled run; whatever ncu left, also after a failure."""
    labels, log = folder / "labels.json", folder / "ncu.csv"
    definition = SUITES[chosen.suite][0]
    caches = getattr(definition, "CACHES", "none")
    around = ncu.command(sys.executable, __file__, definition.METRICS, labels, log, caches)
    passed = ["--suite", chosen.suite, "--budget-s", str(chosen.budget_s)]
    passed += [part for name in chosen.only for part in ("--only", name)]
    passed += [] if chosen.misses is None else ["--misses", str(chosen.misses)]
    ran = subprocess.run([*around, *passed], check=False)
    if not log.exists() or not labels.exists():
        raise RuntimeError(f"ncu ended with {ran.returncode} and left no counters; see above")
    return log.read_text(encoding="utf-8"), json.loads(labels.read_text(encoding="utf-8"))


def main() -> int:
    chosen = options()
    definition, cases, lines_from = SUITES[chosen.suite]
    suite = definition.SUITE
    if chosen.child is not None:
        counters.profile(wanted(chosen), chosen.child, cases, budget_s=chosen.budget_s)
        return 0
    if not torch.cuda.is_available() or shutil.which("ncu") is None:
        print("ncu_counters: needs a CUDA device and ncu on the PATH", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    recorder = Recorder(chosen.out, device_slug(device), suite.name, suite.summarize)
    with tempfile.TemporaryDirectory() as folder:
        text, labels = count(chosen, Path(folder))
    if chosen.keep:
        chosen.keep.write_text(text, encoding="utf-8")
    lines = lines_from(text, labels, stamp(device))
    recorder.record(lines)
    sheet = report.sheet if suite.section is None else launches_suite.counters_sheet
    command.show(sheet(lines), suite.about)
    command.show(report.targets_sheet(recorder.targets()), "Targets")
    command.last_line({"suite": suite.name, "lines": len(lines), "path": str(recorder.path)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
