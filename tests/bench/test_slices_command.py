"""`moesaic slices`: facts, curves from a file or none, plans with their reasons, last line JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moesaic.bench import slices_command
from moesaic.bench.results import make_line
from moesaic.bench.slices_command import Found, facts_sheet, main
from moesaic.bench.suites.colocation import curve_lines
from moesaic.hardware.green import Cut
from moesaic.hardware.mig import MigInventory, MigProfile
from moesaic.runtime.plan import Curve

STAMPED = dict.fromkeys(("device", "torch", "triton", "commit", "date"), "x")
CURVES = {
    "decode": Curve(work="decode", sms=(8, 32, 64, 132), ms=(1.6, 0.45, 0.28, 0.25), load=0.25),
    "prefill": Curve(work="prefill", sms=(8, 64, 132), ms=(60, 7.6, 3.9), load=3.9),
    "copy": Curve(work="copy", sms=(8, 64, 132), ms=(6, 1.2, 1.0)),
}
NO_GPU = torch.device("cpu")


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    fixed = STAMPED | {"suite": "colocation", "model": "a beside b", "tokens": 1}
    path = tmp_path / "lines.jsonl"
    made = [json.dumps(make_line(line)) for line in curve_lines(fixed, CURVES)]
    path.write_text("\n".join(made) + "\n", encoding="utf-8")
    return path


def document(capsys: pytest.CaptureFixture[str]) -> tuple[str, dict]:
    out = capsys.readouterr().out
    return out, json.loads(out.splitlines()[-1])


def test_curves_and_plans_are_shown_with_their_reasons(
    lines: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(explain_plans=True, given=lines, device="cpu") == 0
    out, found = document(capsys)
    assert "promise 1.25 x alone" in out and "a beside b" in out
    assert found["curves"]["copy"]["ms"] == [6.0, 1.2, 1.0]
    plans = {plan["policy"]: plan for plan in found["plans"]["closed"]}
    assert plans["none"]["sms"] == {} and "asked not to slice" in plans["none"]["why"]
    assert "<= 1.35 x alone" in plans["moesaic"]["why"]
    assert found["green"].startswith("green contexts need an NVIDIA GPU")


def test_without_curves_the_remedy_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(explain_plans=True, device="cpu") == 0
    out, found = document(capsys)
    assert "moesaic slices --measure" in out and found["plans"] == {}
    with pytest.raises(RuntimeError, match="needs an NVIDIA GPU"):
        main(measure_now=True, device="cpu")


def test_a_gpu_is_described_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    profiles = (MigProfile("1g.18gb", 16, 16 * 2**30, 7),)
    mig = MigInventory(mode="off", pending="off", profiles=profiles, instances=())
    cuts = {
        "for any kernel": Cut(132, 8, 15, 12, 8, 8),
        "without clusters": Cut(132, 2, 66, 0, 2, 2),
    }
    found = Found("GPU", 132, 141 * 2**30, cuts, "", mig, mig.missing)
    text = str(facts_sheet(found).rows)
    for word in ("15 parts of 8 SMs, 12 SMs remain", "66 parts of 2", "1g.18gb", "MIG is off"):
        assert word in text
    machine = slices_command.seen_by_planners(found, {})
    assert machine.sizes[-1] == machine.total_sms == 132 and machine.granularity == 4
