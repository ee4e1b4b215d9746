"""Borrowed SMs: launches that share tiles, in which order they are queued, and their bits."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moesaic import moe
from moesaic.hardware.green import GreenDevice, GreenError, GreenUnavailable
from moesaic.kernels.hopper.tiles import draw_shared_ref
from moesaic.runtime.borrowing import BorrowingLayer, BorrowingStack, Grounds, Lending
from moesaic.runtime.seats import Seat
from moesaic.types import ExpertSpec, ExpertWeights

sys.path.insert(0, str(Path(__file__).parents[1] / "hardware"))
from green_double import Code, FakeDriver

SPEC = ExpertSpec(num_experts=4, hidden_size=256, intermediate_size=128)
hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a Hopper GPU",
)


def weights_of(spec: ExpertSpec, device: str, seed: int = 0) -> ExpertWeights:
    generator = torch.Generator(device).manual_seed(seed)
    shapes = spec.weight_shapes()
    return ExpertWeights(**{
        name: 0.05 * torch.randn(shape, generator=generator, device=device).bfloat16()
        for name, shape in shapes.items()
    })  # fmt: skip


def inputs_of(tokens: int, device: str, top_k: int = 2) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator(device).manual_seed(tokens)
    scores = torch.rand(tokens, SPEC.num_experts, generator=generator, device=device)
    share = torch.rand(tokens, top_k, generator=generator, device=device)
    hidden = torch.randn(tokens, SPEC.hidden_size, generator=generator, device=device).bfloat16()
    return hidden, scores.topk(top_k).indices.int(), share


def test_the_flag_is_written_by_the_tenants_own_stream() -> None:
    driver = FakeDriver()
    with GreenDevice(0, driver=driver) as gpu:
        part = gpu.slice(range(4))
        driver_handle = SimpleNamespace(cuda_stream=part.handle)
        lending = Lending(gpu, torch.device("cpu"))
        lending.want(driver_handle)
        lending.release(driver_handle)
        address = lending.wanted_1.data_ptr()
        assert driver.written == [(part.handle, address, 1), (part.handle, address, 0)]
        driver.fail["cuStreamWriteValue32"] = Code.CUDA_ERROR_NOT_SUPPORTED
        with pytest.raises(GreenError, match="NOT_SUPPORTED"):
            lending.want(driver_handle)


def test_a_second_stream_shares_the_sms_and_goes_with_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda handle, device: handle)
    driver = FakeDriver()
    gpu = GreenDevice(0, driver=driver)
    part = gpu.slice(range(4))
    handle = gpu.second_stream(part, priority=-5)
    assert handle != part.handle and driver.sms_of(handle) == driver.sms_of(part.handle)
    gpu.close()
    assert not driver.streams and not driver.contexts


class Told:
    """Streams, events and graphs that only say what they were asked for."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def stream(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(
            name=name, wait_event=lambda event: self.log.append(f"{name} waits {event.name}")
        )

    def event(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(
            name=name, record=lambda stream: self.log.append(f"{stream.name} says {name}")
        )

    def graph(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(replay=lambda: self.log.append(name))


def test_a_product_starts_before_its_guests_and_the_next_waits_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = Told()
    own, lent = Seat(92, told.stream("own")), Seat(40, told.stream("lent"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    layer = BorrowingLayer(
        *inputs_of(8, "cpu"), weights_of(SPEC, "cpu"), SPEC,
        Grounds(own, lent, SimpleNamespace(wanted_1=torch.zeros(1)), visits=3),
    )  # fmt: skip
    assert layer._counters.tolist() == [[0, 92 + 3 * 40]] * 2
    with pytest.raises(RuntimeError, match="call capture"):
        layer.launch()
    names = ["front", "up", "up guests", "down", "down guests", "tail"]
    seats = [own, own, lent, own, lent, own]
    layer._graphs = [(told.graph(n), seat) for n, seat in zip(names, seats, strict=True)]
    layer._events = [told.event(n) for n in "abcd"]
    BorrowingStack([layer]).launch()
    assert told.log == [
        "front", "own says a", "up", "lent waits a", "up guests", "lent says b", "own waits b",
        "own says c", "down", "lent waits c", "down guests", "lent says d", "own waits d", "tail",
    ]  # fmt: skip


@given(st.integers(1, 40), st.integers(1, 6), st.lists(st.integers(0, 3), max_size=4), st.data())
def test_every_tile_is_drawn_once_whoever_leaves_when(tiles, owners, guests, data) -> None:
    """Owners and several launches of guests in any order; the flag moves between any two draws."""
    counter = [0, owners + sum(guests)]
    waiting = [False] * owners + [True] * sum(guests)
    drawn = []
    while waiting:
        place = data.draw(st.integers(0, len(waiting) - 1))
        wanted = data.draw(st.booleans())
        tile = draw_shared_ref(counter, wanted, tiles, waiting[place])
        if tile < tiles:
            drawn.append(tile)
        else:
            waiting.pop(place)
    assert sorted(drawn) == list(range(tiles)) and counter[0] == 0


def test_experts_without_tall_tiles_are_refused() -> None:
    spec = ExpertSpec(
        num_experts=4, hidden_size=256, intermediate_size=128, bias=True, layers=3, gated=False,
        activation="relu",
    )  # fmt: skip
    with pytest.raises(ValueError, match="two-layer experts without biases"):
        BorrowingLayer(
            *inputs_of(8, "cpu"), weights_of(spec, "cpu"), spec,
            Grounds(Seat(8), Seat(8), SimpleNamespace(wanted_1=torch.zeros(1))),
        )  # fmt: skip


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("lent_sms", [16, 64])
def test_borrowed_sms_given_back_at_any_time_leave_the_bits(lent_sms: int) -> None:
    try:
        gpu = GreenDevice(0)
    except GreenUnavailable as error:
        pytest.skip(str(error))
    spec = ExpertSpec(num_experts=4, hidden_size=2048, intermediate_size=2048)
    weights, device = weights_of(spec, "cuda"), torch.device("cuda", torch.cuda.current_device())
    generator = torch.Generator("cuda").manual_seed(1)
    hidden = torch.randn(5000, 2048, generator=generator, device="cuda").bfloat16()
    _, ids, share = inputs_of(5000, "cuda")
    expected = moe(hidden, ids, share, weights, spec)
    with gpu, torch.no_grad():
        mine, rest = gpu.carve([lent_sms, 120 - lent_sms], rest_to=1)
        lending = Lending(gpu, device)
        flags, lent = (gpu.second_stream(mine, priority=n) for n in (-5, 0))
        grounds = Grounds(Seat(rest.sms, rest.stream), Seat(mine.sms, lent), lending)
        layer = BorrowingLayer(hidden, ids, share, weights, spec, grounds)
        assert torch.equal(layer.warm_up(), expected)
        layer.capture()
        for flips in (0, 1, 2, 40, 200):
            layer.out_TH.fill_(float("nan"))
            torch.cuda.synchronize()
            layer.launch()
            for _ in range(flips):
                lending.want(flags)
                lending.release(flags)
            flags.synchronize()
            rest.stream.synchronize()
            assert torch.equal(layer.out_TH, expected), flips
            assert layer._counters[:, 0].tolist() == [0, 0]
        stack = BorrowingStack([layer], whole=True)
        stack.prepare()
        for flips in (0, 40):
            layer.out_TH.fill_(float("nan"))
            torch.cuda.synchronize()
            stack.launch()
            for _ in range(flips):
                lending.want(flags)
                lending.release(flags)
            flags.synchronize()
            rest.stream.synchronize()
            assert torch.equal(layer.out_TH, expected), f"one graph, {flips}"
        lending.want(flags)  # nobody helps
        layer.out_TH.fill_(float("nan"))
        torch.cuda.synchronize()
        layer.launch()
        rest.stream.synchronize()
        assert torch.equal(layer.out_TH, expected)
        assert layer._counters[:, 0].tolist() == [0, 0]
