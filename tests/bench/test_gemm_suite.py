"""Suite `gemm` on the CPU with small shapes: right answers, splits, bits, what targets refuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from moesaic.bench.results import Line, Recorder, make_line
from moesaic.bench.suite import Cell, Context, registry
from moesaic.bench.suites import gemm
from moesaic.bench.suites.gemm import Call, Shape, Work, split, summarize
from moesaic.kernels.batching import build_task_map_ref
from moesaic.kernels.hopper.launch import grouped_mm_hopper_ref

TINY = {"tiny": Shape(4, 32, 48, 64)}
BITS = {"bits 48x64": Shape(4, 0, 48, 64)}
STAMP: Line = dict.fromkeys(("device", "torch", "triton", "commit", "date"), "x")


def twin(work: Work) -> Call:
    tasks = build_task_map_ref(work.offsets_E1, heights=(16,))
    return lambda: grouped_mm_hopper_ref(work.x_SK, work.weight_ENK, tasks)


def off_by_one(work: Work) -> Call:
    return lambda: twin(work)().roll(1, 0)


def silent(work: Work) -> Call:
    return lambda: work.out_SN


def per_expert(work: Work) -> Call:
    """torch.matmul itself, expert by expert."""
    starts = work.offsets_E1.tolist()

    def call() -> Tensor:
        parts = zip(starts[:-1], starts[1:], work.weight_ENK, strict=True)
        return torch.cat([work.x_SK[a:b] @ weight.T for a, b, weight in parts])

    return call


def run(tmp_path: Path, builders: dict[str, Any], bits: Any = per_expert) -> list[Line]:
    recorder = Recorder(tmp_path, "cpu", "gemm", lambda lines: summarize(lines, ("tiny",)))
    context = Context(torch.device("cpu"), recorder, budget_s=30.0)
    wanted = [c for c in gemm.cells(TINY, BITS) if c.clock != "bits" or c.tokens < 64]
    gemm.run(wanted, context, shapes=TINY | BITS, builders=builders, bits=bits, tile_rows=16)
    done = {gemm.measured(x) for x in recorder.lines}
    if bits is per_expert and builders["moesaic"] is twin:
        assert done >= set(wanted)
    return recorder.lines


def test_every_split_has_as_many_full_tiles() -> None:
    for shape in gemm.SHAPES.values():
        for routing in gemm.ROUTINGS:
            rows = split(routing, shape.experts, shape.slots)
            assert sum(rows) == shape.slots and len(rows) == shape.experts
            assert all(count % gemm.TILE_ROWS == 0 for count in rows)
            assert sum(count // gemm.TILE_ROWS for count in rows) == shape.slots // gemm.TILE_ROWS
    for routing, slots in (("skewed", 3 * 256), ("odd", 4096)):
        with pytest.raises(ValueError, match=routing):
            split(routing, 4, slots)


def test_a_whole_run_times_in_turn_and_compares_bits(tmp_path: Path) -> None:
    builders = {"moesaic": twin, "cublas": gemm.cublas, "torch-grouped-mm": gemm.torch_grouped}
    lines = run(tmp_path, builders)
    timed = [x for x in lines if x["clock"] != "bits"]
    assert len(timed) == len(builders) * 4 + 3
    for x in timed:
        assert x.get("error") is None and x["wrong"] is False and x["of_datasheet"] > 0
        assert x["floor_ms"] > 0 and (x["clock"] != "zero") == (x["err"] > 0)
    assert [x["routing"] for x in timed if x["clock"] == "imbalance"] == list(gemm.ROUTINGS)
    bits = [x for x in lines if x["clock"] == "bits"]
    assert {(x["tokens"], x["equal_experts"]) for x in bits} == {(1, 4), (16, 4)}
    text, _ = gemm.SUITE.section(lines, summarize(lines, ("tiny",)), tmp_path, "cpu", "")
    assert "91 % of an H800" in text and "| 48x64 | 16 | 4 of 4 |" in text


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs the interpreter")
@pytest.mark.parametrize("routing", gemm.ROUTINGS)
def test_the_triton_candidate_is_right_in_every_split(routing: str) -> None:
    """In fp16, for Triton's interpreter multiplies bf16 wrongly."""
    device = torch.device("cpu")
    work = gemm.make_work(TINY["tiny"], routing, zero=False, device=device, seed=0, tile_rows=16)
    x, weight, offsets, out = (getattr(work, name) for name in vars(work))
    half = Work(x.half(), weight.half(), offsets, out.half())
    assert 0 < gemm.error_of(half, gemm.triton(half)(), False) < 3e-3


LAUNCHES = """
import collections, json, torch
from triton.runtime.jit import JITFunction
from moesaic.bench.suites import gemm

seen = []

def noted(self, *args, grid, warmup, **options):
    if self.fn.__name__ != "task_map_kernel":
        seen.append([self.fn.__name__, options["BM"], options["BN"], options["NB"], options["PDL"]])

JITFunction.run = noted
for rows in (1, 512):
    shape = gemm.Shape(4, rows, 256, 128)
    device = torch.device("cpu")
    work = gemm.make_work(shape, "balanced", zero=True, device=device, seed=0)
    if rows > 1:
        for name in ("moesaic", "moesaic-prefill"):
            assert gemm.BUILDERS[name](work)() is work.out_SN
    gemm.few_rows(work)()
print(json.dumps(seen))
"""


def test_the_hopper_candidates_are_launched_as_meant() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    run = subprocess.run([sys.executable, "-c", LAUNCHES], env=environment, capture_output=True,
                         text=True, timeout=300, check=False)  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == [
        ["decode_kernel", 16, 128, 10, "off"],
        ["tall_kernel", 256, 128, 4, "off"],
        ["prefill_kernel", 128, 256, 4, "off"],
        ["trim_kernel", 160, 256, 4, "off"],
    ]


def test_wrong_rows_rows_not_written_and_other_bits_are_told(tmp_path: Path) -> None:
    builders = {"moesaic": off_by_one, "moesaic-prefill": silent, "cublas": gemm.cublas}
    lines = run(tmp_path, builders, bits=off_by_one)
    for x in lines:
        if x["impl"] == "moesaic":
            # Zeros cannot show that rows are exchanged.
            assert x["wrong"] == (x["clock"] != "zero"), x
        elif x["impl"] == "moesaic-prefill":
            assert x["wrong"]
    assert all(x["equal_experts"] == 0 for x in lines if x["clock"] == "bits")
    targets = {t.name: t for t in summarize(lines, ("tiny",))}
    assert not targets["moesaic lines wrong or failed"].met
    assert targets["tiny: × cuBLAS on the dense product, balanced"].value is None


def line(routing: str, impl: str, ms: float, clock: str = "imbalance", **more: Any) -> Line:
    values = {"suite": "gemm", "model": "tiny", "tokens": 1, "mode": "graph"}
    return make_line(STAMP, **values, clock=clock, routing=routing, impl=impl, ms=ms, **more)


def test_targets_compare_per_tile_and_with_cublas() -> None:
    lines = [line("balanced", "moesaic", 1.0, "random"), line("balanced", "cublas", 1.0, "random"),
             line("balanced", "moesaic", 1.0), line("one_expert", "moesaic", 0.96),
             line("skewed", "moesaic", 1.04)]  # fmt: skip
    assert all(t.met for t in summarize(lines, ("tiny",)))
    for worse in (line("balanced", "cublas", 0.99, "random"), line("skewed", "moesaic", 1.06),
                  line("one_expert", "moesaic", 0.94), line("skewed", "moesaic", 1.0, error="x"),
                  line("balanced", "cublas", 9.0, "random", wrong=True)):  # fmt: skip
        key = [worse[k] for k in ("clock", "routing", "impl")]
        others = [x for x in lines if [x[k] for k in ("clock", "routing", "impl")] != key]
        assert not all(t.met for t in summarize([*others, worse], ("tiny",))), worse


def test_the_suite_is_registered_with_every_cell_once() -> None:
    cells = registry()["gemm"].cells()
    assert len(cells) == len(set(cells)) == 2 * 5 + len(gemm.BITS_SHAPES) * len(gemm.BITS_ROWS)
    assert Cell("8x4096x28672x4096", 32768, "skewed", clock="random") in cells
    assert all(shape.flops == 2 * 32768 * 28672 * 4096 for shape in gemm.SHAPES.values())
