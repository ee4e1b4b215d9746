"""The router's launch made again: right addresses, fresh outputs, and the ways around it.

The driver is made of Python and the kernel adds up addresses, as in `test_plans`.
"""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from moesaic.kernels import launching
from moesaic.kernels.hopper import plans, raw, routes

SIGNATURE = {
    "logits_ptr": "*fp32", "bias_ptr": "constexpr", "ids_ptr": "*i32", "weights_ptr": "*fp32",
    "counts_ptr": "*i32", "tokens": "i32", "counters_ptr": "*i32",
}  # fmt: skip
SIZES = [8, 8, 8, 8, 4, 8, 8, 8]


def work(logits: int, ids: int, weights: int, counts: int, counters: int) -> None:
    """Weights are the logits, ids 5, counts 1, counters one more."""
    (ctypes.c_float * 8).from_address(weights)[:] = (ctypes.c_float * 8).from_address(logits)[:]
    (ctypes.c_int32 * 8).from_address(ids)[:] = [5] * 8
    (ctypes.c_int32 * 8).from_address(counts)[:] = [1] * 8
    ctypes.c_int32.from_address(counters).value += 1


class Kernel:
    arg_names = tuple(SIGNATURE)
    params = tuple(SimpleNamespace(name=n, has_default=False, default=None) for n in SIGNATURE)
    metadata = SimpleNamespace(
        num_warps=1, num_ctas=1, shared=0, launch_pdl=False, launch_cooperative_grid=False,
        global_scratch_size=0, profile_scratch_size=0,
    )  # fmt: skip

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(x: Tensor, _: None, *more: Any, counters_ptr: Tensor) -> Any:
            ids, weights, counts, _ = more
            work(*(t.data_ptr() for t in (x, ids, weights, counts, counters_ptr)))
            ptx = f".entry route({'.param ' * len(SIZES)})"
            src = SimpleNamespace(signature=SIGNATURE)
            return SimpleNamespace(src=src, metadata=self.metadata, asm={"ptx": ptx}, function=1)

        return run


def slow(logits: Tensor, bias: None, *, counters: Tensor, extra: bool) -> routes.Routed:
    shape = logits.shape
    ids, counts = (logits.new_empty(shape, dtype=torch.int32) for _ in range(2))
    weights = logits.new_zeros(shape) if extra else logits.new_empty(shape)
    launching.launch(
        Kernel(), 1, logits, bias, ids, weights, counts, shape[0], counters_ptr=counters
    )
    return ids, weights, counts


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    streams: list[int] = []

    def launch(config: int, function: int, parameters: int, extra: None) -> int:
        places = (ctypes.c_void_p * 8).from_address(parameters)
        cells = [ctypes.c_uint64.from_address(places[i] or 0).value for i in (0, 1, 2, 3, 5)]
        work(*cells)
        streams.append(raw._Config.from_address(config).stream or 0)
        return 0

    def parameter(function: int, index: int, offset: int, size: int) -> int:
        ctypes.c_size_t.from_address(size).value = SIZES[index]
        return 0

    driver = raw.Driver(launch, None, None, parameter)  # type: ignore[arg-type]
    monkeypatch.setattr(raw, "driver", lambda: driver)
    monkeypatch.setattr(routes, "route", slow)
    for name, value in (("_cuda_getCurrentRawStream", 77), ("_cuda_isCurrentStreamCapturing", 0)):
        monkeypatch.setattr(torch._C, name, lambda *_, value=value: value, raising=False)
    return streams


def again(known: routes.RepeatedRoute, logits: Tensor, counters: Tensor) -> Tensor:
    ids, weights, counts = known(logits, None, counters)
    assert ids.tolist() == [5] * 8 and counts.tolist() == [1] * 8
    assert torch.equal(weights, logits)
    return weights


def test_later_calls_are_the_recorded_launch_for_other_tensors(launched: list[int]) -> None:
    counters = torch.zeros(4, dtype=torch.int32)
    known = routes.RepeatedRoute({"extra": False})
    kept = [again(known, torch.randn(8), counters) for _ in range(4)]
    assert launched == [77] * 3 and int(counters[0]) == 4
    assert len({weights.data_ptr() for weights in kept}) == 4


def test_what_cannot_be_made_again_goes_through_the_launcher(
    launched: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "moesaic")
    counters = torch.zeros(4, dtype=torch.int32)
    more, known = (routes.RepeatedRoute({"extra": extra}) for extra in (True, False))
    for _ in range(3):
        again(more, torch.randn(8), counters)
    assert len(caplog.messages) == 1 and "new_zeros" in caplog.text
    again(known, torch.randn(8), counters)
    again(known, torch.randn(9)[1:], counters)
    monkeypatch.setattr(plans.knobs.runtime.launch_enter_hook, "calls", [print], raising=False)
    again(known, torch.randn(8), counters)
    assert launched == [] and int(counters[0]) == 6
