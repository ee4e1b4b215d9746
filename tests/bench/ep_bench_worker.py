"""Suite `ep` on CPU processes, tiny: graphs become plain calls, GPUs become gloo ranks."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("TRITON_INTERPRET", "1")

import torch

from moesaic.bench import exchanges, ranks
from moesaic.bench.ranks import Silent, own_rank
from moesaic.bench.results import Recorder
from moesaic.bench.suite import Cell, Context
from moesaic.bench.suites import ep
from moesaic.bench.timing import Captured
from moesaic.types import ExpertSpec


def plain_capture(calls):
    def replay():
        for call in calls:
            call()

    return Captured(SimpleNamespace(replay=replay, reset=list), len(calls), calls[0]())


def wall_ms(work, *, head_start):
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3


def main() -> None:
    torch.set_num_threads(1)
    ranks.capture, exchanges.CHAIN, exchanges.LAYER_CHAIN = plain_capture, 1, 1
    exchanges.in_graphs = lambda team: True
    ranks._events_ms = wall_ms
    spec = ExpertSpec(num_experts=4, hidden_size=64, intermediate_size=48)
    ep.CPU_WIDTHS, ep.CPU_LAYERS = {"rows-7168": 64}, {"deepseek-v3-16": ep.Layer(spec, 2)}
    if os.environ.get("SABOTAGE"):
        whole = exchanges.combine
        exchanges.combine = lambda *a: whole(*a)._replace(rows_XH=whole(*a).rows_XH + 1)
    recorder = Recorder(Path(sys.argv[1]), "cpu-x2", "ep", ep.summarize)
    recorder = Silent(recorder) if own_rank() else recorder
    context = Context(torch.device("cpu"), recorder, budget_s=100.0)
    wanted = [Cell("rows-7168", 6, r, clock="exchange") for r in ("zipf1",)]
    wanted += [
        Cell("deepseek-v3-16", 8, "uniform", "float32", clock=f"layer-ep{g}") for g in (1, 2, 4)
    ]
    ep.run(wanted, context)
    if not own_rank():
        print(json.dumps(recorder.lines))


if __name__ == "__main__":
    main()
