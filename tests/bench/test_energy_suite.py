"""Suite `energy`: joules per token, spreads and the model, from a driver in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nvml_double import Driver

from moesaic.bench.results import Recorder
from moesaic.bench.suite import Cell, Context
from moesaic.bench.suites import energy
from moesaic.bench.suites.energy import MODEL, Meters, Window, Work, values_of
from moesaic.bench.workloads import Model
from moesaic.hardware.energy import Energy, Unavailable
from moesaic.hardware.meter import Device, EnergyMeter, NvmlSource, Sustained, open_meter

CPU = torch.device("cpu")
MODELS = {MODEL: Model(MODEL, 4, 2, 64, 32)}


def metered(driver: Driver) -> EnergyMeter:
    """A meter whose clock goes on by 30 ms whenever it is read, at the driver's power."""

    def clock() -> float:
        driver.pass_time(0.03)
        return driver.now

    source = NvmlSource(driver.gpu())
    device = Device(lambda: None, lambda: lambda: None)
    return EnergyMeter(source, tdp_w=700.0, device=device, clock=clock, sleep=driver.pass_time)


def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, meters: Meters, cells: list[Cell]
) -> Recorder:
    monkeypatch.setattr(energy, "open_meters", lambda _: meters)
    recorder = Recorder(tmp_path, "cpu", "energy", energy.summarize)
    energy.run(cells, Context(CPU, recorder, budget_s=60.0), models=MODELS)
    return recorder


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[Cell]]:
    monkeypatch.setattr(energy, "TOKENS", (1, 16))
    monkeypatch.setattr(energy, "REPEATS", 3)
    monkeypatch.setattr(energy, "cells", lambda: cells())

    def cells() -> list[Cell]:
        own = [Cell(MODEL, tokens, dtype="float32", clock="energy") for tokens in (1, 16)]
        ceilings = [Cell(name, 0, "-", clock="ceiling") for name in ("copy", "gemm")]
        return [Cell("-", 0, "-", clock="idle"), *ceilings, *own]

    return cells


def test_a_run_gives_joules_per_token_and_their_spread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: Callable[[], list[Cell]]
) -> None:
    meters = Meters(metered(Driver(watts=300.0)), None, "GPM: not here")
    recorder = run(tmp_path, monkeypatch, meters, small())
    lines = {(x["clock"], x["model"], x["tokens"]): x for x in recorder.lines}
    idle, one = lines["idle", "-", 0], lines["energy", MODEL, 1]
    assert idle["watts"] == pytest.approx(300, rel=0.02) and idle["samples"] == 3
    assert one["gpm"] == "not available: GPM: not here" and one["meter"] == "nvml"
    assert one["joules_per_token"] * one["tokens_per_joule"] == pytest.approx(1)
    assert one["joules_per_call"] == pytest.approx(one["joules_per_token"] * 8)
    assert one["ms"] > 0 and len(one["repeats"]) == 3 and one["share_of_tdp"] < 0.44
    assert lines["meters", "gemm", 0]["zeus_watts"].startswith("not available: ")
    targets = {t.name: t for t in recorder.targets()}
    assert targets["spread of joules per token, worst size"].value is not None
    assert targets["repeats of each cell"].value == 3.0
    assert targets["cells measured"].value == 5.0
    assert targets["zeus against NVML's counter, one window"].value is None


def test_a_machine_without_a_counter_says_why_and_gives_no_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: Callable[[], list[Cell]]
) -> None:
    meters = Meters(open_meter(CPU), None, "NVML: cpu is not an NVIDIA GPU")
    recorder = run(tmp_path, monkeypatch, meters, small())
    assert {x["error"] for x in recorder.lines} == {"not available: NVML: cpu is not an NVIDIA GPU"}
    assert not any(x.get("watts") or x.get("joules_per_token") for x in recorder.lines)
    assert all(not t.met for t in recorder.targets() if t.name == "cells measured")


def test_a_driver_that_goes_away_spoils_its_cells_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: Callable[[], list[Cell]]
) -> None:
    driver = Driver(watts=300.0)
    meters, taken = Meters(metered(driver), None, "-"), []
    window = Meters.window

    def counted(self: Meters, work: Work) -> Window:
        taken.append(work)
        driver.gone = len(taken) == 15
        return window(self, work)

    monkeypatch.setattr(Meters, "window", counted)
    recorder = run(tmp_path, monkeypatch, meters, small())
    errors = [x["error"] for x in recorder.lines if x.get("error")]
    assert len(errors) == 1 and "GPU is lost" in errors[0]


def windows_of(joules: list[float], calls: int = 10) -> list[Window]:
    return [
        Window(Sustained(Energy(joules=j, seconds=2.0, tdp_w=700.0, meter="nvml"), calls))
        for j in joules
    ]


def test_net_joules_and_spread_are_those_of_the_windows() -> None:
    work = Work(lambda: None, tokens=80, layers=8)
    values = values_of(work, windows_of([1000.0, 1040.0, 980.0]), idle_w=100.0)
    assert values["joules_per_call"] == 100.0 and values["spread"] == pytest.approx(0.06)
    assert values["ms"] == pytest.approx(25.0)  # 2 s over ten calls of eight layers
    assert values["net_joules_per_call"] == pytest.approx(80.0)
    assert values["net_tokens_per_joule"] == pytest.approx(1.0)
    lost: list[Any] = [*windows_of([1.0]), Window(Sustained(Unavailable("gone"), 0))]
    assert values_of(work, lost, None) == {"error": "not available: gone"}


def test_a_model_that_is_far_off_misses_its_target() -> None:
    fixed = {"clock": "model", "model": MODEL, "samples": None}
    lines = [{**fixed, "modelled_over_measured": ratio} for ratio in (0.9, 0.4)]
    target = next(t for t in energy.summarize(lines) if "model of attribution" in t.name)
    assert target.value == 2.5 and not target.met
