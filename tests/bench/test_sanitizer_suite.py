"""What the sanitizers told: clean grids, found faults, excuses that need controls."""

from __future__ import annotations

import pytest

from moesaic.bench.results import Line, make_line
from moesaic.bench.suites import sanitizer

NOTES = {"decode_kernel": {"pipeline.py": range(10, 15)}}
NOTE = """========= Error: Race reported between Write access at decode_kernel+0x9 in pipeline.py:12
=========     and Read access at decode_kernel+0x2270 in pipeline.py:30 [8 hazards]
=========     and Read access at decode_kernel+0x2a20 in decode.py:86 [8 hazards]
=========
"""
MIXED = (
    NOTE
    + """========= Error: Race reported between Read access at decode_kernel+0x10 in decode.py:7
=========     and Write access at decode_kernel+0x9c0 in pipeline.py:12 [8 hazards]
=========     and Write access at decode_kernel+0xa00 in decode.py:9 [8 hazards]
"""
)
ELSEWHERE = NOTE.replace("decode_kernel", "prefill_kernel")
WRITES = NOTE.replace("Read", "Write")
CONTROLS = "".join(
    f"""========= Error: Race reported between Read access at {name}+0x390
=========     and Write access at {name}+0x240 [4 hazards]
"""
    for name in sanitizer.REPORTED
)
RAN = "".join(f"\nran {name}" for name in (*sanitizer.REPORTED, *sanitizer.SILENT))


def lines_of(change: dict[tuple[str, str], tuple[int, str]] | None = None) -> list[Line]:
    """A line of each check, all as it should be but for what `change` says: count and text."""
    told = dict.fromkeys(sanitizer.CHECKS, (0, "\nran a\nran b\n= SUMMARY"))
    told |= dict.fromkeys(sanitizer.FAULTS, (3, "\n= SUMMARY"))
    told["racecheck", "grid_hopper"] = (1, NOTE)
    told["racecheck", "controls"] = (9, CONTROLS + RAN)
    told["consan", "copies_arriving"] = (1, "Assertion `Deadlock` failed")
    return [
        make_line(
            {"suite": "sanitizer"},
            **sanitizer.line_of(tool, job, text, [count], 0, "2026.4", NOTES),
        )
        for (tool, job), (count, text) in (told | (change or {})).items()
    ]


def missed(lines: list[Line]) -> list[str]:
    return [target.name for target in sanitizer.summarize(lines) if not target.met]


def test_clean_grids_found_faults_and_answered_controls_meet_every_target() -> None:
    lines = lines_of()
    assert missed(lines) == []
    assert lines[0]["calls"] == 2 and lines[0]["tail"] == "" and lines[-1]["tail"]


@pytest.mark.parametrize(("text", "known"), [(NOTE, 1), (MIXED, 1), (ELSEWHERE, 0), (WRITES, 0)])
def test_only_reads_beside_the_writes_of_notes_are_known(text: str, known: int) -> None:
    assert sanitizer.known_races(text, NOTES) == known
    assert len(sanitizer.races(text)) == 1 + (text is MIXED)
    assert sanitizer.known_races(text, {}) == 0


@pytest.mark.parametrize(
    ("check", "told"),
    [
        (("racecheck", "grid_hopper"), (2, MIXED)),
        (("racecheck", "grid_hopper"), (1, ELSEWHERE)),
        (("memcheck", "grid_triton"), (16, "")),
        (("memcheck", "plant_memcheck"), (0, "")),
        (("racecheck", "plant_note"), (0, "")),
        (("consan", "ring_tall"), (1, "Assertion `outstanding reads` failed")),
        (("consan", "plant_ring"), (0, "")),
        (("consan", "copies_waited"), (1, "Assertion `Deadlock` failed")),
    ],
)
def test_a_finding_or_a_missed_fault_fails(check: tuple[str, str], told: tuple[int, str]) -> None:
    assert len(missed(lines_of({check: told}))) == 1


@pytest.mark.parametrize(
    "change",
    [
        {("racecheck", "grid_arriving"): (1, NOTE)},
        {("racecheck", "controls"): (0, RAN)},
        {("racecheck", "controls"): (9, CONTROLS.replace("warp", "each") + RAN)},
    ],
)
def test_notes_are_excused_only_while_the_controls_show_why(
    change: dict[tuple[str, str], tuple[int, str]],
) -> None:
    assert "racecheck findings, grid_hopper" in missed(lines_of(change))


def test_a_missing_check_or_another_version_fails() -> None:
    lines = lines_of()
    assert len(missed([x for x in lines if x["impl"] != "ring_decode"])) == 1
    assert "racecheck findings, grid_hopper" in missed(
        [x | {"version": "2027.1"} if x["impl"] == "controls" else x for x in lines]
    )


def test_it_names_the_program_to_start() -> None:
    with pytest.raises(RuntimeError, match=r"benchmarks/sanitize\.py"):
        sanitizer.run([], None)  # type: ignore[arg-type]


def test_what_consan_told_counts_once() -> None:
    text = "a.py:1: block Assertion `two reads` failed.\nb Assertion `two reads` failed\nx"
    assert sanitizer.asserted(text) == ["two reads"]
