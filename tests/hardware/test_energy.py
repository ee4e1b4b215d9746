from __future__ import annotations

import math
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nvml_double import OTHER_WATTS, Driver, make_lib

from moesaic.cost import expert_bytes, expert_flops, expert_weight_elements
from moesaic.hardware.energy import Energy, EnergyModel, Repeats, Unavailable, attribute
from moesaic.hardware.meter import EnergyMeter, NvmlSource, ZeusSource, open_meter
from moesaic.hardware.nvml import NotAvailable, open_gpu
from moesaic.types import ExpertSpec

SPEC = ExpertSpec(num_experts=4, hidden_size=64, intermediate_size=128)


def meter_of(driver: Driver) -> EnergyMeter:
    return EnergyMeter(
        NvmlSource(driver.gpu()), tdp_w=700.0, clock=driver.clock, sleep=driver.pass_time
    )


def test_a_window_gives_joules_watts_share_and_tokens_gross_and_above_idle() -> None:
    driver = Driver(watts=120.0)
    meter = meter_of(driver)
    assert isinstance(meter.idle(2.0), Energy) and meter.idle_w == pytest.approx(120.0)
    driver.watts = 520.0
    reading = meter.measure(lambda: driver.pass_time(2.0))
    assert isinstance(reading, Energy) and reading.meter == "nvml"
    assert reading.joules == pytest.approx(1040.0) and reading.watts == pytest.approx(520.0)
    assert reading.share_of_tdp == pytest.approx(520 / 700)
    assert reading.net_joules == pytest.approx(800.0)
    assert reading.tokens_per_joule(2080) == pytest.approx(2.0)
    assert reading.tokens_per_joule(1600, net=True) == pytest.approx(2.0)
    assert reading.step_share == pytest.approx(0.05)


def test_without_an_idle_reading_there_is_nothing_above_idle() -> None:
    energy = Energy(joules=10.0, seconds=2.0, tdp_w=700.0, meter="nvml")
    assert energy.net_joules is None and energy.tokens_per_joule(5, net=True) is None
    assert energy.tokens_per_joule(5) == 0.5
    under = Energy(joules=10.0, seconds=2.0, tdp_w=700.0, meter="nvml", idle_w=9.0)
    assert under.tokens_per_joule(5, net=True) is None  # -8 J above idle are no efficiency


def test_a_short_window_and_a_still_counter_are_refused() -> None:
    driver = Driver()
    short = meter_of(driver).measure(lambda: driver.pass_time(0.3))
    assert str(short).startswith("not available: the window lasted 0.300 s")
    frozen = Driver(watts=0.0)
    reading = meter_of(frozen).measure(lambda: frozen.pass_time(2.0))
    assert str(reading) == "not available: the energy counter moved by 0 J in 2.0 s"


@pytest.mark.parametrize("when", ["before", "during"])
def test_nvml_going_away_leaves_the_work_alone(when: str, caplog: pytest.LogCaptureFixture) -> None:
    driver, done = Driver(), []
    meter = meter_of(driver)
    driver.gone = when == "before"

    def work() -> None:
        driver.pass_time(2.0)
        driver.gone = True
        done.append(True)

    for _ in range(3):
        reading = meter.measure(work)
        assert isinstance(reading, Unavailable) and "GPU is lost" in str(reading)
    assert done == [True] * 3 and meter.lost == 3
    assert len(caplog.records) == 1 and "told once" in caplog.records[0].message


def test_sustained_calls_are_counted_between_steps_of_the_counter() -> None:
    driver = Driver(watts=400.0)
    meter = meter_of(driver)
    sustained = meter.sustain(lambda: driver.pass_time(0.003), seconds=2.0)
    reading = sustained.reading
    assert isinstance(reading, Energy)
    assert 2.0 <= reading.seconds < 2.2
    assert reading.watts == pytest.approx(400.0, rel=0.01)
    # Batches of four calls, one always in flight: off by one batch at each end at most.
    assert sustained.calls == pytest.approx(reading.seconds / 0.003, abs=8)
    with pytest.raises(ValueError, match=r"at least 1.0, got 0.5"):
        meter.sustain(lambda: None, seconds=0.5)


def test_sustaining_ends_when_the_counter_stands_still_or_goes() -> None:
    frozen = Driver(watts=0.0)
    still = meter_of(frozen).sustain(lambda: frozen.pass_time(0.01), seconds=2.0)
    assert "stood still" in str(still.reading) and still.calls == 0
    driver = Driver()

    def call() -> None:
        driver.pass_time(0.01)
        driver.gone = driver.now > 1.0

    assert "GPU is lost" in str(meter_of(driver).sustain(call, seconds=2.0).reading)


class FakeMonitor:
    """`ZeusMonitor` over the double; `empty`: as zeus is without NVML."""

    driver = Driver()
    empty = False
    visible = (0,)

    def __init__(self, *, gpu_indices: list[int], cpu_indices: list[int]) -> None:
        self.indices, self.keys = gpu_indices, {}
        assert cpu_indices == []
        self.gpus = types.SimpleNamespace(get_total_energy_consumption=self._mj)

    @classmethod
    def get_gpus(cls) -> Any:
        """As zeus counts them: those in CUDA_VISIBLE_DEVICES, by NVML's index."""
        gpus = [types.SimpleNamespace(handle=f"handle GPU-{i}") for i in cls.visible]
        return types.SimpleNamespace(gpus=gpus)

    def _mj(self, index: int) -> int:
        if self.empty:
            return 0
        if self.driver.gone:
            raise RuntimeError("NVML error: GPU is lost")
        return self.driver.counter_of(self.get_gpus().gpus[index].handle)

    def begin_window(self, key: str, *, sync_execution: bool, restart: bool) -> None:
        assert not sync_execution and restart
        self.keys[key] = self._mj(self.indices[0])

    def end_window(self, key: str, *, sync_execution: bool) -> Any:
        joules = (self._mj(self.indices[0]) - self.keys.pop(key)) / 1e3
        return types.SimpleNamespace(gpu_energy={} if self.empty else {self.indices[0]: joules})


@pytest.fixture
def zeus(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ZeusSource]:
    def install(
        driver: Driver, *, empty: bool = False, visible: tuple[int, ...] = (0,)
    ) -> ZeusSource:
        monkeypatch.setattr(FakeMonitor, "driver", driver)
        monkeypatch.setattr(FakeMonitor, "empty", empty)
        monkeypatch.setattr(FakeMonitor, "visible", visible)
        modules = {n: types.ModuleType(n) for n in ("zeus", "zeus.device", "zeus.monitor")}
        modules["zeus"].__version__ = "0.16.0"  # type: ignore[attr-defined]
        modules["zeus.device"].get_gpus = FakeMonitor.get_gpus  # type: ignore[attr-defined]
        modules["zeus.monitor"].ZeusMonitor = FakeMonitor  # type: ignore[attr-defined]
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        return ZeusSource(driver.gpu())

    return install


def test_zeus_windows_say_so_and_agree_with_the_counter(zeus: Callable[..., ZeusSource]) -> None:
    driver = Driver()
    meter = EnergyMeter(zeus(driver), tdp_w=700.0, clock=driver.clock, sleep=driver.pass_time)
    reading = meter.measure(lambda: driver.pass_time(2.0))
    assert isinstance(reading, Energy)
    assert (reading.meter, reading.joules) == ("zeus 0.16.0", pytest.approx(1000.0))
    sustained = meter.sustain(lambda: driver.pass_time(0.01), seconds=1.0).reading
    assert isinstance(sustained, Energy) and sustained.watts == pytest.approx(500, rel=0.02)


def test_meters_read_the_gpu_of_the_torch_device_whatever_is_visible(
    zeus: Callable[..., ZeusSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA_VISIBLE_DEVICES=3,2: torch's 0 is NVML's 3, which torch itself tells by its UUID."""
    driver = Driver(gpus=4, watched=3)
    uuids = {0: 3, 1: 2}
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda d: types.SimpleNamespace(uuid=uuids[d.index])
    )
    lib = make_lib(driver)
    gpu, other = (open_gpu(torch.device("cuda", i), lib=lib) for i in (0, 1))
    for visible in ((), (3, 2), (2, 3)):
        source = zeus(driver, visible=visible) if visible else NvmlSource(gpu)
        meter = EnergyMeter(source, tdp_w=700.0, clock=driver.clock, sleep=driver.pass_time)
        reading = meter.measure(lambda: driver.pass_time(2.0))
        assert isinstance(reading, Energy) and reading.watts == pytest.approx(driver.watts)
    before = other.joules()
    driver.pass_time(1.0)
    assert other.joules() - before == pytest.approx(OTHER_WATTS)
    assert gpu.facts().uuid == "GPU-3" and other.facts().uuid == "GPU-2"
    with pytest.raises(NotAvailable, match=r"GPU-3 is not among \['GPU-0', 'GPU-1'\]"):
        zeus(driver, visible=(0, 1))
    uuids[1] = 9
    with pytest.raises(NotAvailable, match="NVML: Not Found"):
        open_gpu(torch.device("cuda", 1), lib=lib)


def test_empty_zeus_windows_are_no_zero(zeus: Callable[..., ZeusSource]) -> None:
    driver = Driver()
    meter = EnergyMeter(
        zeus(driver, empty=True), tdp_w=700.0, clock=driver.clock, sleep=driver.pass_time
    )
    reading = meter.measure(lambda: driver.pass_time(2.0))
    assert str(reading) == "not available: zeus: the window is empty, zeus has found no NVML"


def test_zeus_losing_the_gpu_is_a_reason(zeus: Callable[..., ZeusSource]) -> None:
    driver = Driver()
    meter = EnergyMeter(zeus(driver), tdp_w=700.0, clock=driver.clock, sleep=driver.pass_time)

    def work() -> None:
        driver.pass_time(2.0)
        driver.gone = True

    assert "zeus: RuntimeError: NVML error" in str(meter.measure(work))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver here")
def test_zeus_itself_without_nvml_is_a_reason() -> None:
    pytest.importorskip("zeus.monitor", reason="zeus is not installed", exc_type=ImportError)
    with pytest.raises(NotAvailable, match=r"zeus: |is not among"):
        ZeusSource(Driver().gpu())


def test_without_zeus_the_counter_is_taken_and_the_reading_tells(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "zeus", None)
    with pytest.raises(NotAvailable, match="cannot be imported"):
        ZeusSource(Driver().gpu())
    device = torch.device("cuda", 0)
    meter = open_meter(device, gpu=Driver().gpu())
    assert meter.why is None and meter.source.name == "nvml"
    assert len(meter.passed_over) == 1 and "zeus" in meter.passed_over[0]
    nothing = open_meter(device, gpu=Driver().gpu(), sources=("zeus",))
    assert "zeus: cannot be imported" in (nothing.why or "")
    with pytest.raises(ValueError, match="sources must be of"):
        open_meter(device, sources=("codecarbon",))


def test_a_cpu_has_no_meter_but_the_work_runs() -> None:
    meter, done = open_meter(torch.device("cpu")), []
    assert str(meter.measure(lambda: done.append(1))) == (
        "not available: NVML: cpu is not an NVIDIA GPU"
    )
    assert done == [1] and meter.sustain(lambda: None).calls == 0
    assert isinstance(meter.idle(1.0), Unavailable) and meter.idle_w is None


def test_repeats_tell_their_spread() -> None:
    repeats = Repeats((10.0, 10.4, 9.8, 10.1, 10.0))
    assert repeats.median == 10.0 and repeats.spread == pytest.approx(0.06)


MODEL = EnergyModel(joules_per_flop=8e-13, joules_per_byte=7e-11)
rows_of_experts = st.lists(st.integers(0, 5000), min_size=1, max_size=64).filter(any)


@given(rows_of_experts, st.floats(1.0, 1e4))
def test_attributed_joules_sum_to_the_measured_and_only_workers_get_any(
    rows_E: list[int], joules: float
) -> None:
    energy = Energy(joules=joules, seconds=2.0, tdp_w=700.0, meter="nvml")
    given_out = attribute(energy, MODEL, SPEC, rows_E, 2)
    assert given_out.label == "attributed" and not given_out.net
    assert math.fsum(given_out.joules_E) == pytest.approx(joules)
    assert all((j > 0) == (rows > 0) for j, rows in zip(given_out.joules_E, rows_E, strict=True))
    busier = sorted(zip(rows_E, given_out.joules_E, strict=True))
    assert [j for _, j in busier] == sorted(j for _, j in busier)


def test_the_model_weighs_rows_and_bytes() -> None:
    weights = expert_weight_elements(SPEC)
    assert (expert_bytes(SPEC, 0, 2), expert_bytes(SPEC, 3, 2)) == (0, 2 * (weights + 6 * 64))
    joules = MODEL.joules(SPEC, [0, 1, 1000], 2)
    assert joules[0] == 0.0
    one = expert_flops(SPEC, 1) * 8e-13 + 2 * (weights + 2 * 64) * 7e-11
    assert joules[1] == pytest.approx(one)
    # One row costs nearly the weights' bytes, a thousand mostly flops and rows.
    assert 2 < joules[2] / joules[1] < 1000
    energy = Energy(joules=9.0, seconds=2.0, tdp_w=700.0, meter="nvml", idle_w=2.0)
    net = attribute(energy, MODEL, SPEC, [1, 1], 2)
    assert net.net and net.joules_E == (2.5, 2.5)
    with pytest.raises(ValueError, match="no expert had a row"):
        attribute(energy, MODEL, SPEC, [0, 0], 2)
