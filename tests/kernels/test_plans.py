"""Recorded launches made again: same arguments, other tensors; refused where they would be wrong.

The driver here is made of Python: its one kernel, `scale`, reads its parameters as a GPU would,
from the host memory that the launch points at, and works on CPU tensors by their addresses.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from moesaic.kernels import launching
from moesaic.kernels.hopper import plans, raw, single

SOURCE = Path(__file__).resolve().parents[2] / "src"
SIZES = {"*fp32": 8, "i32": 4, "fp32": 4}
SIGNATURE = {"x_ptr": "*fp32", "out_ptr": "*fp32", "n": "i32", "factor": "fp32", "W": "constexpr"}


def scale(x: int, out: int, n: int, factor: float) -> None:
    read, written = ((ctypes.c_float * n).from_address(address) for address in (x, out))
    written[:] = [value * factor for value in read]


class Kernel:
    """Stands for a JIT function: launched as one, it does its work at once."""

    arg_names = tuple(SIGNATURE)
    params = tuple(SimpleNamespace(name=n, has_default=n == "W", default=8) for n in SIGNATURE)
    metadata = SimpleNamespace(
        num_warps=4, num_ctas=1, shared=0, launch_pdl=True, launch_cooperative_grid=False,
        global_scratch_size=0, profile_scratch_size=0,
    )  # fmt: skip
    signature = SIGNATURE
    parameters = 6

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(x: torch.Tensor, out: torch.Tensor, n: int, factor: float, W: int = 8) -> Any:
            scale(x.data_ptr(), out.data_ptr(), n, factor)
            src = SimpleNamespace(signature=self.signature)
            ptx = f".entry scale({'.param ' * self.parameters})"
            return SimpleNamespace(src=src, metadata=self.metadata, asm={"ptx": ptx}, function=1)

        return run


class FakeDriver:
    def __init__(self) -> None:
        self.launches: list[tuple[int, int]] = []
        self.outputs: list[int] = []
        self.stream, self.capturing = 77, False
        self.sizes = [SIZES[kind] for kind in SIGNATURE.values() if kind in SIZES] + [8, 8]

    def launch(self, config: int, function: int, parameters: int, extra: None) -> int:
        places = (ctypes.c_void_p * 4).from_address(parameters)
        x, out = (ctypes.c_uint64.from_address(place).value for place in places[:2])
        n, factor = ctypes.c_int32.from_address(places[2]), ctypes.c_float.from_address(places[3])
        scale(x, out, n.value, factor.value)
        self.outputs.append(out)
        told = raw._Config.from_address(config)
        self.launches.append((told.grid[0], told.stream or 0))
        return 0

    def parameter(self, function: int, index: int, offset: int, size: int) -> int:
        assert index < len(self.sizes), "an error of the driver, which memory checkers report"
        ctypes.c_size_t.from_address(size).value = self.sizes[index]
        return 0


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    driver = FakeDriver()
    found = raw.Driver(driver.launch, None, None, driver.parameter)  # type: ignore[arg-type]
    monkeypatch.setattr(raw, "driver", lambda: found)
    monkeypatch.setattr(plans, "driver", lambda: found)
    monkeypatch.setattr(plans, "_threads", SimpleNamespace())
    monkeypatch.setattr(plans, "_told", plans.Counter())
    monkeypatch.setattr(
        torch._C, "_cuda_getCurrentRawStream", lambda _: driver.stream, raising=False
    )
    monkeypatch.setattr(
        torch._C, "_cuda_isCurrentStreamCapturing", lambda: driver.capturing, raising=False
    )
    return driver


KERNEL = Kernel()
FIXED = torch.full((8,), 3.0)


def twice(x: torch.Tensor) -> torch.Tensor:
    """2 * (5 * x) + nothing, through scratch; then the constant's own scratch is read by nobody."""
    between = torch.empty(16)
    launching.launch(KERNEL, 7, x, between[8:], 8, 5.0)
    out = torch.empty_like(x)
    launching.launch(KERNEL, 9, between[8:], out, 8, 2.0)
    return out


def call(x: torch.Tensor, function: Any = twice, key: str = "a") -> torch.Tensor:
    return plans.planned((key, x.shape), (x,), lambda: (FIXED,), lambda: function(x))


def test_the_second_call_makes_the_same_launches_for_other_tensors(fake: FakeDriver) -> None:
    first = torch.randn(8)
    assert torch.equal(call(first), first * 5 * 2) and not fake.launches
    for _ in range(3):
        other = torch.randn(8)
        assert torch.equal(call(other), other * 5 * 2)
    assert fake.launches == [(7, 77), (9, 77)] * 3
    assert plans.told() == {"the first of its shapes": 1, "raw": 3}


def test_scratch_belongs_to_a_stream_or_to_a_graph(
    fake: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scratch(stream: int, capturing: bool = False) -> int:
        fake.stream, fake.capturing = stream, capturing
        x = torch.randn(8)
        assert torch.equal(call(x), x * 10)
        assert fake.launches[-1][1] == stream
        return fake.outputs[-2]

    call(torch.randn(8))
    own = scratch(77)
    assert scratch(77) == own != scratch(78) == scratch(78)
    held = [torch.empty(64, dtype=torch.uint8) for _ in range(4)]
    assert scratch(77, capturing=True) != own and scratch(77) == own
    plan = plans._threads.plans["a", torch.Size([8])]
    assert set(plan._kept) == {77, 78}
    monkeypatch.setattr(plans, "KEPT_BYTES", 0)
    plan._kept.clear()
    scratch(77)
    assert not plan._kept and len(held) == 4


def test_what_a_capture_makes_first_is_kept_by_nobody(
    fake: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cpu")
    monkeypatch.setattr(single, "_capturing", lambda _: fake.capturing)
    monkeypatch.setattr(single, "_made", {})
    fake.capturing = True
    x = torch.randn(8)
    assert torch.equal(call(x), x * 10) and not plans._threads.plans
    captured = single.constants(3, device)
    fake.capturing = False
    kept = single.constants(3, device)
    assert not {id(tensor) for tensor in captured} & {id(tensor) for tensor in kept}
    fake.capturing = True
    assert all(a is b for a, b in zip(kept, single.constants(3, device), strict=True))
    fake.capturing = False
    assert [tensor.tolist() for tensor in captured] == [[0, 1, 2], [1, 2, 3], [3, 3], [1, 1, 1]]
    for _ in range(2):
        assert torch.equal(call(x), x * 10)
    assert plans.told()["raw"] == 1


def test_constants_stay_and_unknown_memory_is_refused(fake: FakeDriver) -> None:
    def fixed(x: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        launching.launch(KERNEL, 1, given, out, 8, 2.0)
        return out

    for given, told in ((FIXED, "raw"), (torch.ones(8), "x_ptr is memory of unknown origin")):
        for _ in range(2):
            x = torch.randn(8)
            assert torch.equal(call(x, lambda x, g=given: fixed(x, g), told), given * 2)
        assert plans.told()[told] == 1


def test_what_a_plan_cannot_do_goes_the_ordinary_way(
    fake: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = torch.randn(64)
    call(memory[:8])
    assert torch.equal(call(memory[1:9]), memory[1:9] * 10)
    assert plans.told()["an unaligned tensor"] == 1

    def more(x: torch.Tensor) -> torch.Tensor:
        return twice(x * 2)

    for _ in range(2):
        assert torch.equal(call(memory[:8], more, "b"), memory[:8] * 20)
    assert plans.told()["aten.mul.Tensor ran between the launches"] == 1

    fake.sizes[2] = 8
    for _ in range(2):
        assert torch.equal(call(memory[:8], key="c"), memory[:8] * 10)
    assert sum("the kernel has" in reason for reason in plans.told()) == 1
    fake.sizes[2:] = [4, 4, 8, 8, 8]
    monkeypatch.setattr(Kernel, "parameters", 7)
    for _ in range(2):
        assert torch.equal(call(memory[:8], key="d"), memory[:8] * 10)
    assert sum("the kernel has" in reason for reason in plans.told()) == 2
    assert not fake.launches


def test_overlapping_tensors_make_no_plan_and_do_not_forbid_one(fake: FakeDriver) -> None:
    def two(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return plans.planned(("two",), (x, y), lambda: (), lambda: twice(y))

    x, y = torch.randn(8), torch.randn(8)
    assert torch.equal(two(x, x), x * 10)
    assert torch.equal(two(x, y), y * 10) and not fake.launches
    assert torch.equal(two(y, x), x * 10) and len(fake.launches) == 2


def test_a_launch_hook_hears_every_launch(
    fake: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(8)
    call(x)
    with monkeypatch.context() as patch:
        patch.setattr(plans.knobs.runtime.launch_enter_hook, "calls", [print])
        assert torch.equal(call(x), x * 10) and not fake.launches
    runtime = SimpleNamespace(launch_enter_hook=None, launch_exit_hook=print)
    monkeypatch.setattr(plans, "knobs", SimpleNamespace(runtime=runtime))
    assert torch.equal(call(x), x * 10) and not fake.launches
    runtime.launch_exit_hook = None
    assert torch.equal(call(x), x * 10) and len(fake.launches) == 2


def test_the_driver_reports_a_failed_launch(fake: FakeDriver) -> None:
    x = torch.randn(8)
    call(x)
    failing = raw.RawLaunch.__new__(raw.RawLaunch)
    failing.go = lambda: 719  # type: ignore[assignment]
    plan = plans._threads.plans["a", x.shape]
    plan._goes[1] = failing.go
    with pytest.raises(RuntimeError, match="719"):
        call(x)


def test_parameters_are_laid_out_as_triton_compiles_them() -> None:
    told = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("raw_layout.py"))],
        env=os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(SOURCE)},
        capture_output=True,
        text=True,
    )
    assert told.returncode == 0, told.stdout + told.stderr
    if "skipped" not in told.stdout:
        boxes, refusal = told.stdout.splitlines()
        assert boxes == "[(9, 2, 64, 16), (9, 3, 64, 64, 1), (9, 4, 64, 16, 1, 1)]"
        assert "the kernel has" in refusal


def test_counters_left_at_an_address_by_another_shape_are_nobodys(
    fake: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = [torch.empty(256, dtype=torch.int32) for _ in range(2)]
    found = iter(held)
    monkeypatch.setattr(plans, "given", lambda device, address: next(found, None))

    def through_two(x: torch.Tensor) -> torch.Tensor:
        spare, out = torch.empty(16), twice(x)
        return out if spare.numel() else spare

    x = torch.randn(8)
    for _ in range(2):
        assert torch.equal(call(x, through_two), x * 10)
    assert plans.told() == {"the first of its shapes": 1, "raw": 1}
    assert plans._threads.plans["a", x.shape]._zeros_at is None


def test_counters_that_a_launch_uses_follow_its_scratch(
    fake: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets: dict[int, torch.Tensor] = {}
    free = list(torch.zeros(4, 8).unbind(0))

    def zeroed(_: object, address: int) -> torch.Tensor:
        return sets[address] if address in sets else sets.setdefault(address, free.pop())

    monkeypatch.setattr(plans, "given", lambda _, address: sets.get(address))
    monkeypatch.setattr(plans, "zeroed", zeroed)

    def counted(x: torch.Tensor) -> torch.Tensor:
        between, out = torch.empty(16), torch.empty_like(x)
        launching.launch(KERNEL, 1, x, zeroed(None, between.data_ptr()), 8, 1.0)
        launching.launch(KERNEL, 1, x, between, 8, 1.0)
        launching.launch(KERNEL, 1, x, out, 8, 10.0)
        return out

    for stream in (1, 2):
        fake.stream = stream
        for _ in range(2):
            x = torch.randn(8)
            assert torch.equal(call(x, counted), x * 10)
    outputs = [tuple(fake.outputs[i : i + 2]) for i in range(0, len(fake.outputs), 3)]
    assert all(sets[arena].data_ptr() == counters for counters, arena in outputs)
    assert len(set(outputs)) == 2
