"""`moesaic bench` and `moesaic report`: cells chosen, exit codes, last line, tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from moesaic.bench import command, report
from moesaic.bench.results import Line, ResultsError, Target, at_most, make_line
from moesaic.bench.suite import Cell, Context, Suite, registry
from moesaic.bench.timing import DeviceLost

STAMP = {"device": "d", "torch": "t", "triton": "1", "commit": "c", "date": "2026-01-01T00"}
CELLS = [Cell("a", 1), Cell("a", 16), Cell("b", 1), Cell("b", 16, "zipf1")]


def made(cell: Cell, impl: str, ms: float | None, mode: str = "eager", **more: Any) -> Line:
    spread = {"ms_p20": ms, "ms_p80": ms, "floor_ms": 0.5}
    return make_line(
        STAMP, suite="fake", clock="experts", model=cell.model, tokens=cell.tokens,
        routing=cell.routing, dtype=cell.dtype, impl=impl, mode=mode, ms=ms, **spread, **more,
    )  # fmt: skip


def measure(cells: Sequence[Cell], context: Context) -> None:
    for cell in cells:
        context.record([made(cell, "moesaic", 1.0), made(cell, "other", 3.0)])


def summarize(lines: Sequence[Line]) -> list[Target]:
    return [at_most("slowest", max((x["ms"] for x in lines if x["ms"]), default=None), 3.0)]


def fake(run: Any = measure) -> Suite:
    return Suite("fake", "a test", lambda: CELLS, run, summarize, devices=("cpu",))


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> dict[str, Suite]:
    suites = {"fake": fake()}
    monkeypatch.setattr(command, "registry", lambda: suites)
    monkeypatch.setattr(report, "registry", lambda: suites)
    return suites


def last(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_cells_are_chosen_by_option_and_what_has_lines_is_not_missing() -> None:
    suite = fake()
    assert command.selected(suite, only=["b"]) == CELLS[2:]
    assert command.selected(suite, tokens=[16], routing=["zipf1"]) == [CELLS[3]]
    assert command.selected(suite, clock=["experts"]) == CELLS
    lines = [
        made(CELLS[0], "moesaic", 1.0),
        made(CELLS[1], "other", 1.0),
        made(CELLS[2], "moesaic", None, error="x"),
        made(CELLS[3], "moesaic", 1.0, wrong=True),
    ]
    assert command.selected(suite, measured=lines) == CELLS[1:]
    with pytest.raises(ValueError, match=r"--only must be one of \['a', 'b'\], got 'c'"):
        command.selected(suite, only=["c"])
    with pytest.raises(ValueError, match=r"--clock must be one of \['experts'\], got 'host'"):
        command.selected(suite, clock=["host"])
    with pytest.raises(ValueError, match="no cell"):
        command.selected(suite, only=["a"], routing=["zipf1"])


def test_a_run_writes_lines_and_summary_and_ends_in_one_json_line(
    tmp_path: Path, registered: dict[str, Suite], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(suite="fake", out=tmp_path, only=["a"]) == 0
    document = last(capsys)
    assert document["new_lines"] == 4 and document["ended"] == "done"
    assert document["targets"] == [asdict(summarize([{"ms": 3.0}])[0])]
    assert command.main(suite="fake", out=tmp_path, missing=True) == 0
    assert last(capsys)["lines"] == 8
    assert command.main(check_only=True, out=tmp_path) == 0
    assert last(capsys) == {"checked": 1, "problems": []}

    path = tmp_path / "cpu/fake.summary.json"
    path.write_text(path.read_text().replace("true", "false"))
    assert command.main(check_only=True, out=tmp_path) == 1
    assert "fake.summary.json" in last(capsys)["problems"][0]


@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), 130), (DeviceLost("the GPU answers no more"), 1)]
)
def test_what_was_measured_before_the_end_is_kept(
    tmp_path: Path,
    registered: dict[str, Suite],
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
) -> None:
    def broken(cells: Sequence[Cell], context: Context) -> None:
        measure(cells[:1], context)
        raise error

    registered["fake"] = fake(broken)
    assert command.main(suite="fake", out=tmp_path) == code
    assert last(capsys)["lines"] == 2
    assert command.main(check_only=True, out=tmp_path) == 0


def test_a_suite_or_device_that_is_not_there_is_refused(registered: dict[str, Suite]) -> None:
    with pytest.raises(ValueError, match=r"--suite must be one of \['fake'\], got 'fast'"):
        command.main(suite="fast")
    with pytest.raises(RuntimeError, match="suite fake runs on cpu, which cuda"):
        command.main(suite="fake", device="cuda")


def test_every_registered_suite_summarises_nothing_and_lists_cells(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert {"triton", "bytes"} <= registry().keys()
    for name, suite in registry().items():
        assert suite.name == name and len(suite.cells()) > 0
        targets = suite.summarize([])
        assert targets and not all(t.met for t in targets), "nothing measured cannot meet all"
    assert command.main(list_only=True) == 0
    assert last(capsys) == list(registry())


def test_tables_show_losses_errors_and_wrong_answers() -> None:
    lines = [
        made(CELLS[0], "moesaic", 2.0, "graph"),
        made(CELLS[0], "other", 1.0, "graph"),
        made(CELLS[0], "third", None, "graph", error="no graph: waits for the device"),
        made(CELLS[1], "moesaic", 1.0, "graph", wrong=True),
        made(CELLS[1], "other", 4.0, "graph"),
        made(CELLS[1], "third", None, "graph", error="skipped: 42 GiB"),
    ]
    table = report.sheet(lines)
    first, second = (dict(zip(table.heads, row, strict=True)) for row in table.rows)
    assert first["× best other"] == "0.5" and first["third ms"] == "no graph"
    assert second["moesaic ms"] == "wrong" and second["× best other"] == "-"
    assert second["third ms"] == "skipped"
    (row,) = report.overview(lines).rows
    assert row == ["a", "graph", "0.5", "-"]


def test_report_rewrites_only_between_its_marks_and_tells_when_stale(
    tmp_path: Path, registered: dict[str, Suite], capsys: pytest.CaptureFixture[str]
) -> None:
    root, page = tmp_path / "results", tmp_path / "docs/performance.md"
    command.main(suite="fake", out=root)
    page.parent.mkdir()
    page.write_text(
        "# Before\n<!-- results: fake on cpu -->\nold\n<!-- end -->\nAfter\n"
        "<!-- results: fake on h200 -->\n<!-- end -->\n"
    )
    assert report.main(page=page, root=root, check=True) == 1
    assert report.main(page=page, root=root) == 0
    text = page.read_text()
    assert text.startswith("# Before\n<!-- results") and "\nAfter\n" in text and "old" not in text
    assert "| slowest | 3 | <= 3 | yes |" in text and "Not measured yet." in text
    assert "![fake-cpu-eager](figures/fake-cpu-eager.svg)" in text
    figure = page.parent / "figures/fake-cpu-eager.svg"
    drawn = figure.read_bytes()
    assert b"moesaic" in drawn
    assert report.main(page=page, root=root, check=True) == 0
    assert figure.read_bytes() == drawn

    page.write_text("<!-- results: none on cpu -->\n<!-- end -->\n")
    with pytest.raises(ResultsError, match="no suite named 'none'"):
        report.main(page=page, root=root)
    with pytest.raises(ResultsError, match="--page"):
        report.main(page=tmp_path / "absent.md", root=root)
