"""Suite `launches`: ncu's metrics to a line per launch, cases that agree, a table of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.bench import launches
from moesaic.bench.results import Line
from moesaic.bench.suite import Cell
from moesaic.bench.suites import launches as suite
from moesaic.bench.workloads import Model

STAMP: Line = dict.fromkeys(("device", "torch", "triton", "commit", "date"), "x")
HEAD = '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"'
VALUES = ("ns", "2,000"), ("hz", "1,500,000,000"), ("cycle", "3,000"), ("cycle", "2,700")
SHARES = ("%", "75.5"), ("%", "50"), ("byte", "8,000,000"), ("byte", "5,000,000"), ("byte", "0")


def table(*kernels: str) -> str:
    rows = [HEAD]
    for number, kernel in enumerate(kernels):
        for metric, (unit, value) in zip(suite.METRICS, VALUES + SHARES, strict=True):
            rows.append(f'"{number}","{kernel}","{metric}","{unit}","{value}"')
    return "\n".join(rows)


def labels(*who: str) -> list[dict[str, Any]]:
    known = {"model": "OLMoE", "tokens": 1, "routing": "uniform", "dtype": "bfloat16"}
    return [known | {"impl": name, "err": 0.0, "wrong": False} for name in who]


def test_a_line_per_launch_says_what_was_busy() -> None:
    text = table("spin_kernel(long)", "tall_kernel", "void a::b<c>(d)", "x::spin_kernel", "nvjet")
    lines = launches.lines_from(text, labels(suite.OURS, suite.TWIN), STAMP)
    names = ["moesaic 1: tall_kernel", "moesaic 2: b", "dense-twin 1: nvjet"]
    assert [x["impl"] for x in lines] == names
    first = lines[0]
    assert (first["ms"], first["gbps"], first["clock_ghz"]) == (0.002, 2500.0, 1.5)
    assert (first["tensor"], first["sms_active"], first["l2"]) == (0.755, 0.9, 0.5)
    assert first["l2_to_sm_tbps"] == 4.0
    row = suite.counters_sheet(lines).rows[0]
    assert row[4:] == ["2.0", "1.50", "76", "90", "50", "4.0", "2.50"]
    long = lines[1] | {"ms": 0.006}
    text, _ = suite.section([first, long], [], Path(), "h200", "figures")
    assert "1 of them, are left out" in text and "tall" not in text and "| 6.0 |" in text
    counted = {t.name: t for t in suite.summarize(lines)}["cells counted"]
    assert counted.value == 1.0 and not counted.met


def test_the_combine_is_held_against_a_copy_of_as_many_bytes() -> None:
    text = table("spin_kernel", "up", "combine_kernel", "spin_kernel", "copy_")
    lines = launches.lines_from(text, labels(suite.OURS, suite.COPY), STAMP)
    (rate,) = (t for t in suite.summarize(lines) if "combine" in t.name)
    assert rate.value == 1.0 and rate.met
    slower = [x | {"ms": 0.0025} if x["impl"].endswith("combine_kernel") else x for x in lines]
    (rate,) = (t for t in suite.summarize(slower) if "combine" in t.name)
    assert rate.value == pytest.approx(0.8) and not rate.met


def test_a_cell_that_failed_has_a_line_and_spoils_the_summary() -> None:
    failed = labels(suite.OURS)[0] | {"error": "OutOfMemoryError: x", "marked": False}
    lines = launches.lines_from(table("spin_kernel", "k"), [failed, *labels(suite.TWIN)], STAMP)
    assert lines[0]["error"].startswith("OutOfMemory") and lines[0]["ms"] is None
    by_name = {t.name: t for t in suite.summarize(lines)}
    assert by_name["cells counted"].value == 0 and not by_name["lines wrong or failed"].met
    assert "OutOfMemoryError: x" in suite.counters_sheet(lines).rows[0]
    with pytest.raises(ValueError, match="saw 1 marked cases, the program ran 2"):
        launches.lines_from(table("spin_kernel", "k"), labels(suite.OURS, suite.TWIN), STAMP)


def test_the_cases_are_the_layer_and_its_twin_and_every_cell_has_a_model() -> None:
    tiny = {"tiny": Model("tiny", 4, 2, 32, 64)}
    cell = Cell("tiny", 8, dtype="float32")
    cases = list(launches.layer_cases(cell, torch.device("cpu"), 0, impl="reference", models=tiny))
    assert [c.impl for c in cases] == [suite.OURS, suite.TWIN]
    assert cases[0].err < 1e-5 and cases[0].call().shape == (8, 32)
    assert cases[1].call().shape == (16, 32)
    many = launches.layer_cases(replace(cell, tokens=4096), torch.device("cpu"), 0,
                                impl="reference", models=tiny)  # fmt: skip
    assert [c.call().numel() for c in many] == [4096 * 32, 8192 * 32, 4096 * 3 * 32 / 2]
    assert {cell.model for cell in suite.cells()} <= set(launches.SHAPES)
    with pytest.raises(RuntimeError, match="ncu_counters"):
        suite.run([], None)  # type: ignore[arg-type]
