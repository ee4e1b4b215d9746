from __future__ import annotations

import sys
import time

import pytest
import torch
from nvml_double import Driver

from moesaic.hardware.nvml import NotAvailable, UtilisationTrace, load_nvml, open_gpu


def test_facts_and_counters_have_their_units() -> None:
    gpu = Driver().gpu()
    facts = gpu.facts()
    assert (facts.name, facts.tdp_w, facts.power_limit_w, facts.mig) == (
        "NVIDIA Double", 700.0, 650.0, False,
    )  # fmt: skip
    assert (gpu.joules(), gpu.watts(), gpu.celsius()) == (1000.0, 500.0, 40.0)


def test_a_window_gives_shares_and_the_next_begins_where_it_ended() -> None:
    driver = Driver()
    with driver.gpu().gpm(clock=driver.clock) as window:
        driver.pass_time(0.25)
        first = window.read()
        assert (first.seconds, first.sm, first.tensor) == (0.25, 0.96, 0.93)
        assert (first.occupancy, first.dram) == (0.5, 0.17)
        driver.shares[10] = 89.0
        driver.pass_time(0.5)
        assert (window.read().seconds, window._shares()["dram"]) == (0.5, 0.89)
    assert driver.freed == 2


def test_short_windows_are_refused_and_go_on() -> None:
    driver = Driver()
    window = driver.gpu().gpm(clock=driver.clock)
    driver.pass_time(0.06)
    with pytest.raises(ValueError, match=r"at least 100 ms, got 60\.0 ms"):
        window.read()
    driver.pass_time(0.06)
    assert window.read().seconds == pytest.approx(0.12)


def test_what_nvml_cannot_give_is_said_and_never_zero() -> None:
    with pytest.raises(NotAvailable, match="Hopper"):
        Driver(gpm=False).gpu().gpm()
    with pytest.raises(NotAvailable, match="MIG"):
        Driver(mig=1).gpu().gpm()
    for driver in (Driver(codes={5: 3}), Driver(shares={2: 1.0, 3: 1.0, 5: float("nan"), 10: 1.0})):
        window = driver.gpu().gpm(clock=driver.clock)
        driver.pass_time(1)
        with pytest.raises(NotAvailable, match="no value of tensor"):
            window.read()
    lost = Driver()
    gpu = lost.gpu()
    lost.gone = True
    with pytest.raises(NotAvailable, match=r"TotalEnergyConsumption: .*GPU is lost"):
        gpu.joules()
    with pytest.raises(NotAvailable, match="not in this nvidia-ml-py"):
        Driver().gpu().ask("nvmlDeviceGetTheFuture")
    with pytest.raises(NotAvailable, match="cpu is not an NVIDIA GPU"):
        open_gpu(torch.device("cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver here")
def test_without_a_driver_or_nvidia_ml_py_the_reason_is_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(NotAvailable, match="NVML: "):
        load_nvml()
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(NotAvailable, match="nvidia-ml-py is not installed"):
        load_nvml()


def test_a_trace_ends_with_the_reason_and_leaves_the_work_alone() -> None:
    driver = Driver()
    gpu = driver.gpu()
    with UtilisationTrace(gpu) as trace:
        deadline = time.monotonic() + 10
        while not trace.points and time.monotonic() < deadline:
            time.sleep(0.01)
        driver.gone = True
        while trace.why is None and time.monotonic() < deadline:
            time.sleep(0.01)
    assert trace.points and trace.points[0].sm == 0.96
    assert "GPU is lost" in (trace.why or "")
    with pytest.raises(ValueError, match=r"at least 0\.1"):
        UtilisationTrace(gpu, period_s=0.05)
