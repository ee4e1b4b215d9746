"""The command line's edge: one line and the right exit code, never a traceback."""

from __future__ import annotations

import json

import pytest
import typer
from typer.testing import CliRunner

import moesaic
from moesaic.cli import app, edge, one_line

RUNNER = CliRunner()


def test_version() -> None:
    result = RUNNER.invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"moesaic {moesaic.__version__}\n")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("K must be\nin [1, 8]"), 2, "moesaic: K must be in [1, 8]"),
        (FileNotFoundError(2, "No such file", "a.txt"), 2, "moesaic: [Errno 2] No such file: 'a"),
        (RuntimeError("impl='triton' needs a CUDA device"), 2, "moesaic: impl='triton' needs"),
        (ModuleNotFoundError("No module named 'x'"), 2, "moesaic: No module named 'x'"),
        (KeyboardInterrupt(), 130, "moesaic: interrupted"),
        (KeyError("gone"), 1, "moesaic: a defect, KeyError: 'gone'; please report"),
    ],
)
def test_an_error_becomes_one_line(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as stop, edge():
        raise error
    captured = capsys.readouterr()
    assert stop.value.exit_code == code
    assert captured.err.startswith(line) and captured.err.count("\n") == 1
    assert captured.out == ""


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESAIC_DEBUG", "1")
    with pytest.raises(ValueError, match="bad"), edge():
        raise ValueError("bad")


def test_an_exit_passes_the_edge() -> None:
    with pytest.raises(typer.Exit) as stop, edge():
        raise typer.Exit(7)
    assert stop.value.exit_code == 7
    assert one_line(ValueError()) == "ValueError"


@pytest.mark.parametrize("arguments", [["nonsense"], ["doctor", "--nonsense"]])
def test_wrong_usage_exits_2_with_a_hint(arguments: list[str]) -> None:
    result = RUNNER.invoke(app, arguments)
    assert result.exit_code == 2
    assert "--help" in result.output and "Traceback" not in result.output


def test_doctor_speaks_to_people_and_to_programs() -> None:
    table, document = (RUNNER.invoke(app, ["doctor", *more]) for more in ([], ["--json"]))
    assert (table.exit_code, document.exit_code) == (0, 0)
    findings = json.loads(document.output)
    assert {"Python", "torch", "GPU", "NVML", "Triton", "transformers"} <= {
        finding["name"] for finding in findings
    }
    assert all(finding["remedy"] for finding in findings if finding["status"] != "ok")
    assert all(finding["name"] in table.output for finding in findings)
