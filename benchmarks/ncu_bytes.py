"""DRAM bytes of fused kernels against the unfused PyTorch sequence, counted by Nsight Compute.

    python benchmarks/ncu_bytes.py [--out benchmarks/results] [--only MODEL]

Starts itself once more under `ncu` (which must be on the PATH and allowed to read counters), turns
its CSV into lines of suite `bytes` and prints the targets. Clocks and caches are left as they are.
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

from moesaic.bench import command, counters, report
from moesaic.bench.results import Recorder, device_slug, stamp
from moesaic.bench.suites.bytes import SUITE


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--only", action="append", default=[], help="a model of the suite")
    parser.add_argument("--keep", type=Path, help="also keep ncu's CSV here")
    parser.add_argument("--child", type=Path, help="run the cases, write their labels here")
    return parser.parse_args()


def count(only: list[str], folder: Path) -> tuple[str, list[dict[str, object]]]:
    """ncu's log and the labels of one profiled run; whatever ncu left, also after a failure."""
    labels, log = folder / "labels.json", folder / "ncu.csv"
    chosen = [part for name in only for part in ("--only", name)]
    ran = subprocess.run(
        [*counters.ncu_command(sys.executable, __file__, labels, log), *chosen], check=False
    )
    if not log.exists() or not labels.exists():
        raise RuntimeError(f"ncu ended with {ran.returncode} and left no counters; see above")
    return log.read_text(encoding="utf-8"), json.loads(labels.read_text(encoding="utf-8"))


def main() -> int:
    chosen = options()
    if chosen.child is not None:
        counters.profile(command.selected(SUITE, only=chosen.only), chosen.child)
        return 0
    if not torch.cuda.is_available() or shutil.which("ncu") is None:
        print("ncu_bytes: needs a CUDA device and ncu on the PATH", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    recorder = Recorder(chosen.out, device_slug(device), SUITE.name, SUITE.summarize)
    with tempfile.TemporaryDirectory() as folder:
        text, labels = count(chosen.only, Path(folder))
    if chosen.keep:
        chosen.keep.write_text(text, encoding="utf-8")
    lines = counters.lines_from(text, labels, stamp(device))
    recorder.record(lines)
    command.show(report.sheet(lines), "DRAM bytes")
    command.show(report.targets_sheet(recorder.targets()), "Targets")
    command.last_line({"suite": SUITE.name, "lines": len(lines), "path": str(recorder.path)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
