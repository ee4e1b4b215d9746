"""The summary of compute-sanitizer's findings: clean grids, planted faults that must be found."""

from __future__ import annotations

import pytest

from moesaic.bench.results import Line, make_line
from moesaic.bench.suites import sanitizer


def lines_of(reported: dict[tuple[str, str], int]) -> list[Line]:
    return [
        make_line(
            {"suite": "sanitizer"},
            **sanitizer.line_of(tool, job, "\nran a\nran b\n= SUMMARY", [count], 0, "2026.4"),
        )
        for (tool, job), count in reported.items()
    ]


GOOD = {
    ("memcheck", "grid_triton"): 0,
    ("memcheck", "grid_hopper"): 0,
    ("racecheck", "grid_triton"): 0,
    ("racecheck", "grid_hopper"): 0,
    ("memcheck", "plant_memcheck"): 4,
    ("racecheck", "plant_racecheck"): 1,
    ("racecheck", "plant_hopper"): 7,
}


def test_clean_grids_and_found_faults_meet_every_target() -> None:
    lines = lines_of(GOOD)
    assert all(target.met for target in sanitizer.summarize(lines))
    assert lines[0]["calls"] == 2 and lines[0]["tail"] == ""
    assert lines[4]["tail"].endswith("SUMMARY")


@pytest.mark.parametrize(
    "change",
    [
        {("racecheck", "grid_hopper"): 19},
        {("memcheck", "plant_memcheck"): 0},
        {("memcheck", "grid_triton"): None},
        {("racecheck", "plant_hopper"): 0},
    ],
)
def test_a_finding_a_missed_fault_or_a_missing_job_fails(change: dict) -> None:
    reported = {k: v for k, v in (GOOD | change).items() if v is not None}
    assert [target.met for target in sanitizer.summarize(lines_of(reported))].count(False) == 1


def test_it_names_the_program_to_start() -> None:
    with pytest.raises(RuntimeError, match=r"benchmarks/sanitize\.py"):
        sanitizer.run([], None)  # type: ignore[arg-type]
