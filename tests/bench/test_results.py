"""Results files: whole lines, checked summaries, and writes that leave no half file."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from moesaic.bench import results
from moesaic.bench.results import Line, Recorder, Target, at_least, at_most, check_results

STAMP = {"device": "d", "torch": "t", "triton": None, "commit": "c", "date": "now"}


def line(model: str, ms: float | None, impl: str = "moesaic") -> Line:
    return results.make_line(
        STAMP, suite="s", clock="experts", model=model, tokens=1, routing="uniform",
        impl=impl, mode="eager", dtype="float32", ms=ms,
    )  # fmt: skip


def summarize(lines: Sequence[Line]) -> list[Target]:
    return [at_most("worst ms", max(x["ms"] for x in lines), 3.0)]


def recorded(root: Path) -> Recorder:
    recorder = Recorder(root, "cpu", "s", summarize)
    recorder.record([line("a", 1.0), line("b", 2.0)])
    return recorder


def test_a_new_line_replaces_the_old_one_of_its_key_and_keeps_the_others(tmp_path: Path) -> None:
    recorded(tmp_path).record([line("a", 2.5)])
    again = Recorder(tmp_path, "cpu", "s", summarize)
    assert [(x["model"], x["ms"]) for x in again.lines] == [("a", 2.5), ("b", 2.0)]
    assert set(results.REQUIRED) <= again.lines[0].keys()
    summary = json.loads((tmp_path / "cpu/s.summary.json").read_text())
    assert summary == [{"name": "worst ms", "value": 2.5, "goal": "<= 3", "met": True}]


def test_check_passes_and_finds_each_way_to_be_wrong(tmp_path: Path) -> None:
    recorded(tmp_path)
    lines, summary = tmp_path / "cpu/s.jsonl", tmp_path / "cpu/s.summary.json"
    known = {"s": summarize}
    assert check_results(tmp_path, known) == []

    good = summary.read_text()
    for bad, word in (
        (good.replace("2.0", "1.0"), "worst ms"),
        (good.replace("true", "false"), "worst ms"),
        (good.replace("<= 3", "<= 4"), "worst ms"),
        ("[]", "does not hold"),
        ("[{", "JSON"),
    ):
        assert bad != good
        summary.write_text(bad)
        (problem,) = check_results(tmp_path, known)
        assert word in problem and "s.summary.json" in problem
    summary.write_text(good)
    lines.write_text(lines.read_text().replace('"ms": 2.0', '"ms": 9.0'))
    assert "worst ms" in check_results(tmp_path, known)[0]
    assert "no suite named 's'" in check_results(tmp_path, {})[0]
    summary.unlink()
    assert "has lines but no" in check_results(tmp_path, known)[0]
    lines.rename(tmp_path / "cpu/other.txt")
    summary.write_text(good)
    assert "has no lines" in check_results(tmp_path, known)[0]


@pytest.mark.parametrize("row", ["{", "[]", '{"suite": "s"}'])
def test_a_line_that_is_not_one_is_named(tmp_path: Path, row: str) -> None:
    recorded(tmp_path)
    path = tmp_path / "cpu/s.jsonl"
    path.write_text(path.read_text() + row + "\n")
    assert f"{path}:3" in check_results(tmp_path, {"s": summarize})[0]


def test_a_full_disk_is_one_line_and_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = recorded(tmp_path)
    before = {p.name: p.read_bytes() for p in (tmp_path / "cpu").iterdir()}

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(results.ResultsError, match=r"No space left on device; .*--out") as error:
        recorder.record([line("a", 2.9)])
    assert "\n" not in str(error.value)
    assert {p.name: p.read_bytes() for p in (tmp_path / "cpu").iterdir()} == before


def test_targets_are_unmet_without_a_number() -> None:
    assert at_least("x", None, 1.0) == Target("x", None, ">= 1", False)
    assert not at_least("x", 1.4999999999, 1.5).met
    assert not at_most("x", float("nan"), 1.5).met
    assert results.geomean([2.0, 8.0]) == pytest.approx(4.0)
    assert results.geomean([]) is None


def test_a_float_that_json_cannot_hold_becomes_null() -> None:
    assert line("a", float("inf"))["ms"] is None
