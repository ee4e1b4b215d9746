"""Counters: ncu's CSV to kernels, kernels to cases, cases to lines and targets; cases are right."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.bench import counters, ncu
from moesaic.bench.report import sheet
from moesaic.bench.results import Line
from moesaic.bench.suite import Cell
from moesaic.bench.suites import bytes as suite
from moesaic.bench.workloads import Model

STAMP: Line = dict.fromkeys(("device", "torch", "triton", "commit", "date"), "x")
HEAD = (
    '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size",'
    '"Grid Size","Device","CC","Section Name","Metric Name","Metric Unit","Metric Value"'
)


def row(number: int, kernel: str, metric: str, unit: str, value: str) -> str:
    fixed = '"4242","python3.12","127.0.0.1"'
    place = '"1","7","(128, 1, 1)","(1024, 1, 1)","0","9.0","Command line profiler metrics"'
    return f'"{number}",{fixed},"{kernel}",{place},"{metric}","{unit}","{value}"'


def launch(number: int, kernel: str, read: str, written: str, unit: str = "byte") -> list[str]:
    pairs = zip(suite.METRICS, (read, written), strict=True)
    return [row(number, kernel, metric, unit, value) for metric, value in pairs]


SAMPLE = "\n".join(
    [
        "==PROF== Connected to process 4242 (/usr/bin/python3.12)",
        '==PROF== Profiling "spin_kernel": 0%....50%....100% - 1 pass',
        HEAD,
        *launch(0, "spin_kernel(long)", "512", "0"),
        *launch(1, "_route_kernel", "1,000,000", "24,576"),
        *launch(2, "at::native::spin_kernel(long)", "0", "0"),
        *launch(3, "void cunn_SoftMaxForward<float, 4>(T1 *, T2 *)", "1.5", "2", "Mbyte"),
        *launch(4, "void gatherTopK<float, 2>(T1, T2)", "2,000,000", "0"),
        "==PROF== Disconnected from process 4242",
    ]
)


def labels() -> list[dict[str, Any]]:
    fixed = {"model": "routing-8-top2", "tokens": 262144, "routing": "uniform"}
    fixed |= {"dtype": "bfloat16", "err": 1e-8, "wrong": False}
    return [fixed | {"impl": suite.FUSED}, fixed | {"impl": suite.UNFUSED}]


def test_the_table_is_read_in_bytes_whatever_the_unit() -> None:
    kernels = ncu.parse_csv(SAMPLE, suite.METRICS)
    assert [k.name.split("(")[0] for k in kernels][:2] == ["spin_kernel", "_route_kernel"]
    assert kernels[1].name == "_route_kernel" and [*kernels[1].values.values()] == [1e6, 24576.0]
    assert [*kernels[3].values.values()] == [1.5e6, 2e6]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("==ERROR== ERR_NVGPUCTRPERM: no permission", "ERR_NVGPUCTRPERM"),
        ("\n".join([HEAD, launch(0, "k", "1", "1")[0]]), "lacks dram__bytes_write.sum"),
        ("\n".join([HEAD, *launch(0, "k", "1", "1", "second")]), "got 'second'"),
        ("\n".join([HEAD, *launch(0, "k", "n/a", "1")]), "n/a"),
    ],
)
def test_a_table_that_is_not_whole_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ncu.parse_csv(text, suite.METRICS)


def test_markers_cut_the_launches_into_cases_and_lines_sum_them() -> None:
    fused, unfused = counters.lines_from(SAMPLE, labels(), STAMP)
    assert (fused["bytes_read"], fused["bytes_written"], fused["launches"]) == (1e6, 24576, 1)
    assert (unfused["bytes_read"], unfused["bytes_written"], unfused["launches"]) == (3.5e6, 2e6, 2)
    assert suite.ratios([fused, unfused], "routing") == [5.5e6 / (1e6 + 24576)]
    assert suite.ratios([fused | {"wrong": True}, unfused], "routing") == []
    table = sheet([fused, unfused])
    assert table.rows[1][4:7] == ["3.5", "2", "2"]
    with pytest.raises(ValueError, match="saw 2 marked cases, the program ran 1"):
        counters.lines_from(SAMPLE, labels()[:1], STAMP)


def test_a_case_that_failed_has_a_line_and_spoils_the_summary() -> None:
    failed = {"model": "expert-mlp-small", "tokens": 64, "routing": "uniform", "dtype": "bfloat16"}
    failed |= {"impl": suite.FUSED, "error": "RuntimeError: x", "marked": False}
    lines = counters.lines_from(SAMPLE, [failed, *labels()], STAMP)
    assert lines[0]["error"] == "RuntimeError: x" and len(lines) == 3
    by_name = {t.name: t for t in suite.summarize(lines)}
    assert not by_name["lines wrong or failed"].met and not by_name["cells compared"].met
    routing = next(t for t in by_name.values() if "routing" in t.name)
    assert routing.met and routing.goal == ">= 3"


def test_routing_cases_agree_and_an_error_in_them_shows() -> None:
    cell = Cell("routing-64-top8", 100)
    cases = list(counters.routing_cases(cell, torch.device("cpu"), 0))
    assert [c.impl for c in cases] == [suite.FUSED, suite.UNFUSED]
    assert all(c.err < 1e-6 and not counters.label(c)["wrong"] for c in cases)
    logits = torch.randn(50, 64)
    ids, weights, counts = counters.unfused_route(logits, 8)
    assert counters.route_error(logits, 8, (ids, weights * 1.1, counts)) > 0.05
    assert counters.route_error(logits, 8, (ids, weights, counts + 1)) == float("inf")
    assert counters.label(counters.Case(cell, "x", lambda: None, float("nan")))["wrong"]


def test_expert_cases_agree() -> None:
    tiny = {"paper-small": Model("paper-small", 4, 2, 32, 64, kind="relu3", family="paper")}
    cell = Cell("expert-mlp-small", 20, dtype="float32")
    cases = list(counters.expert_cases(cell, torch.device("cpu"), 0, impl="reference", models=tiny))
    assert [c.impl for c in cases] == [suite.FUSED, suite.UNFUSED, "torch-grouped-mm"]
    assert all(c.err < 1e-5 for c in cases)


def test_the_script_starts_itself_under_ncu_and_says_what_it_needs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Path(__file__).parents[2] / "benchmarks/ncu_counters.py"
    command = ncu.command("python", str(script), suite.METRICS, Path("labels"), Path("log"))
    assert command[0] == "ncu" and command[-2:] == ["--child", "labels"]
    assert ",".join(suite.METRICS) in command and "none" in command
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["ncu_counters.py", "--suite", "bytes"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 2 and "needs a CUDA device" in capsys.readouterr().err
