"""What the sanitizers told: clean grids and rings, found faults, answered controls."""

from __future__ import annotations

import pytest

from moesaic.bench.results import Line, make_line
from moesaic.bench.suites import sanitizer

RACE = """========= Error: Race reported between Read access at {0}+0x390 in decode.py:86
=========     and Write access at {0}+0x240 in pipeline.py:12 [4 hazards]
"""
CONTROLS = "".join(map(RACE.format, sanitizer.REPORTED))
RAN = "".join(f"\nran {name}" for name in (*sanitizer.REPORTED, *sanitizer.SILENT))


def lines_of(change: dict[tuple[str, str], tuple[int, str]] | None = None) -> list[Line]:
    """A line of each check, all as it should be but for what `change` says: count and text."""
    told = dict.fromkeys(sanitizer.CHECKS, (0, "\nran a\nran b\n= SUMMARY"))
    told |= dict.fromkeys(sanitizer.FAULTS, (3, "\n= SUMMARY"))
    told["racecheck", "controls"] = (9, CONTROLS + RAN)
    told["consan", "copies_arriving"] = (1, "Assertion `Deadlock` failed")
    return [
        make_line(
            {"suite": "sanitizer"}, **sanitizer.line_of(tool, job, text, [count], 0, "2026.4")
        )
        for (tool, job), (count, text) in (told | (change or {})).items()
    ]


def missed(lines: list[Line]) -> list[str]:
    return [target.name for target in sanitizer.summarize(lines) if not target.met]


def test_clean_grids_found_faults_and_answered_controls_meet_every_target() -> None:
    lines = lines_of()
    assert missed(lines) == []
    assert lines[0]["calls"] == 2 and lines[0]["tail"] == "" and lines[-1]["tail"]


@pytest.mark.parametrize(
    ("check", "told"),
    [
        (("racecheck", "grid_hopper"), (1, RACE.format("decode_kernel"))),
        (("memcheck", "grid_triton"), (16, "")),
        (("memcheck", "plant_memcheck"), (0, "")),
        (("racecheck", "plant_note"), (0, "")),
        (("consan", "ring_tall"), (1, "Assertion `outstanding reads` failed")),
        (("consan", "plant_ring"), (0, "")),
        (("consan", "copies_waited"), (1, "Assertion `Deadlock` failed")),
        (("consan", "copies_arriving"), (0, "")),
        (("racecheck", "controls"), (9, CONTROLS.replace("warp", "each") + RAN)),
        (("racecheck", "controls"), (0, RAN)),
    ],
)
def test_a_finding_a_missed_fault_or_another_answer_fails(
    check: tuple[str, str], told: tuple[int, str]
) -> None:
    assert len(missed(lines_of({check: told}))) == 1


@pytest.mark.parametrize("check", sanitizer.CHECKS)
def test_a_missing_check_fails(check: tuple[str, str]) -> None:
    lines = [x for x in lines_of() if (x["model"], x["impl"]) != check]
    assert len(missed(lines)) == 1


@pytest.mark.parametrize("counts", [[], [0]])
def test_a_job_that_broke_off_is_no_clean_one(counts: list[int]) -> None:
    line = sanitizer.line_of("memcheck", "grid_hopper", "\nran a\nTraceback", counts, 1, "2026.4")
    lines = [x for x in lines_of() if (x["model"], x["impl"]) != ("memcheck", "grid_hopper")]
    assert missed([*lines, make_line({"suite": "sanitizer"}, **line)]) == [
        "memcheck findings, grid_hopper"
    ]


def test_it_names_the_program_to_start() -> None:
    with pytest.raises(RuntimeError, match=r"benchmarks/sanitize\.py"):
        sanitizer.run([], None)  # type: ignore[arg-type]


def test_what_consan_told_counts_once() -> None:
    text = "a.py:1: block Assertion `two reads` failed.\nb Assertion `two reads` failed\nx"
    assert sanitizer.asserted(text) == ["two reads"]
