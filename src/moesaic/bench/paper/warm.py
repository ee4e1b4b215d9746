"""Compile kernels before they are measured: several processes, each calls every executor once.

Triton compiles a kernel when a shape first needs it, a second or so each, in one process after the
other; its cache on disk is shared. So what a run will need is made beside it on all cores first.
A process that fails is told and forgotten: the measuring process compiles what is missing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby

import torch

from ..layers import Machine, load
from ..suite import Cell
from ..timing import reason
from ..workloads import make_inputs
from .configuration import model_of
from .executor import registry

MOST_PROCESSES = 12
TIMEOUT_S = 120.0


def call_once(cells: Sequence[Cell], device: torch.device, seed: int = 0) -> list[str]:
    """Run every executor once on every cell, eagerly; what went wrong, in words."""
    problems: list[str] = []
    executors = list(registry().values())
    machine = Machine(device, 1.0, 1)
    ordered = sorted(cells, key=lambda cell: (cell.model, cell.dtype))
    with torch.no_grad():
        for (name, dtype_name), group in groupby(ordered, key=lambda c: (c.model, c.dtype)):
            model, dtype = model_of(name), getattr(torch, dtype_name)
            loaded = load(model, dtype, [x.candidate() for x in executors], machine, seed)
            generator = torch.Generator(device).manual_seed(seed)
            for cell in group:
                inputs = make_inputs(
                    model, cell.tokens, cell.routing, dtype=dtype, generator=generator
                )
                for executor in executors:
                    try:
                        for forward in loaded.forwards.get(executor.name, []):
                            forward(*executor.inputs(inputs))
                    except Exception as error:
                        problems.append(f"{executor.name} on {cell}: {reason(error)}")
    return problems


def compile_beside(cells: Sequence[Cell], processes: int | None = None) -> list[str]:
    """`call_once` spread over processes; their problems.

    Args:
        processes: one a core but two, at most `MOST_PROCESSES`, when None.
    """
    count = processes or max(1, min(MOST_PROCESSES, (os.cpu_count() or 1) - 2, len(cells)))
    command = [sys.executable, "-m", __name__]
    running = []
    for part in range(count):
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        text = json.dumps([asdict(cell) for cell in cells[part::count]])
        running.append((process, text))
    problems: list[str] = []
    for process, text in running:
        assert process.stdin is not None
        process.stdin.write(text.encode())
        process.stdin.close()
        process.stdin = None
    for process, _ in running:
        try:
            out, err = process.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            problems.append(f"a process took over {TIMEOUT_S:.0f} s")
            continue
        if process.returncode:
            problems.append(" ".join(err.decode(errors="replace").split())[-300:])
        else:
            problems += json.loads(out)
    return problems


if __name__ == "__main__":
    wanted = [Cell(**values) for values in json.load(sys.stdin)]
    here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(json.dumps(call_once(wanted, here)))
