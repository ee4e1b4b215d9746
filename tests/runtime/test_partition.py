"""Books, green contexts and graphs together, on a driver made of sets: they always agree."""

from __future__ import annotations

import logging
import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "hardware"))
sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
from green_double import FakeDriver
from layer_cases import draw_layer

from moesaic.hardware import green
from moesaic.runtime import partition
from moesaic.runtime.control import Control
from moesaic.runtime.partition import machine_of, open_partition, prepare
from moesaic.runtime.plan import Curve, GroupProfile, MachineSlices, Plan, Share, SliceGroup
from moesaic.runtime.seats import Seat, SeatedWork
from moesaic.runtime.sliced import run_budgeted

CURVES = {"any": Curve(work="any", sms=(8, 132), ms=(16.5, 1.0))}
GROUPS = tuple(SliceGroup(name=n, kind="hot", curve="any") for n in ("hot", "cold"))
CPU = torch.device("cpu")


@pytest.fixture
def streams_are_handles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(green.GreenSlice, "stream", property(lambda part: part.handle))


def works(capture=lambda seat: seat) -> dict[str, SeatedWork[Seat]]:
    return {name: SeatedWork(name, capture) for name in ("hot", "cold")}


def splits(machine: MachineSlices) -> list[dict[str, int]]:
    most = machine.sizes[-1]
    return [{"hot": n, "cold": most - n} for n in machine.sizes[:-1]]


@pytest.mark.usefixtures("streams_are_handles")
def test_ten_thousand_plans_on_green_contexts_leak_nothing_and_stay_disjoint() -> None:
    driver = FakeDriver(124)
    gpu = open_partition(driver=driver)
    assert gpu is not None
    machine = machine_of(gpu, CPU)
    assert (machine.total_sms, machine.atoms, machine.sizes[-1]) == (124, 15, 120)
    made = works()
    assert prepare(made, gpu, machine, splits(machine)) == 2 * 15
    assert prepare(made, gpu, machine, splits(machine)) == 0
    contexts, rng = len(driver.contexts), random.Random(0)

    def policy(p, c, m, s) -> Plan:
        draw = rng.random()
        if draw < 0.1:
            raise ValueError("drawn")
        if draw < 0.2:
            return Plan(policy="t", reason="whole")
        size = 8 * rng.randrange(1, 15)
        return Plan(policy="t", reason="", shares=(Share("hot", size), Share("cold", 120 - size)))

    control = Control(policy, CURVES, machine, made)
    for step in range(10_000):
        with control.step() as plan:
            if plan.sliced:
                hot, cold = (driver.sms_of(made[n].current_seat.stream) for n in ("hot", "cold"))
                assert not hot & cold
                # The last four SMs fill no slice and went to the larger part.
                assert 0 <= len(hot) - plan.sizes["hot"] <= 4
        control.replan(GroupProfile(step=step, groups=GROUPS))
    control.manager.check()
    assert len(driver.contexts) == contexts and driver.splits == 1
    assert sum(work.captures for work in made.values()) == 2 * 15
    assert control.faults.keys() == {"ValueError"}
    gpu.close()
    assert not driver.contexts and not driver.streams


def test_a_driver_without_green_contexts_is_told_once_and_the_gpu_stays_whole(
    caplog: pytest.LogCaptureFixture,
) -> None:
    partition._say_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="moesaic"):
        for _ in range(3):
            assert open_partition(driver=object()) is None
    assert len(caplog.records) == 1 and "cuda-bindings" in caplog.text
    machine, made = MachineSlices(total_sms=132), works()
    assert prepare(made, None, machine, splits(machine)) == 2
    cut = Plan(policy="t", reason="", shares=(Share("hot", 64), Share("cold", 64)))
    control = Control(lambda p, c, m, s: cut, CURVES, machine, made)
    for step in range(5):
        assert not control.replan(GroupProfile(step=step, groups=GROUPS)).sliced
    assert made["hot"].current == Seat(132) and control.faults == {"no graph": 5}


@pytest.mark.usefixtures("streams_are_handles")
@pytest.mark.parametrize("problem", ["cannot launch", "too many"])
def test_slices_on_which_triton_does_not_run_are_not_used(
    problem: str, caplog: pytest.LogCaptureFixture
) -> None:
    def sms_used(stream: int) -> set[int]:
        if problem == "cannot launch":
            raise RuntimeError("invalid resource handle")
        return set(range(40))

    partition._say_once.cache_clear()
    driver = FakeDriver()
    with caplog.at_level(logging.WARNING, logger="moesaic"):
        assert open_partition(driver=driver, sms_used=sms_used) is None
    word = "invalid resource" if problem == "cannot launch" else "40 SMs of a part that has 8"
    assert word in caplog.text and not driver.contexts and not driver.streams
    good = open_partition(driver=driver, sms_used=lambda stream: {0})
    assert good is not None and good.parts == 1


@pytest.mark.usefixtures("streams_are_handles")
def test_splits_that_do_not_fit_are_refused() -> None:
    gpu = open_partition(driver=FakeDriver())
    assert gpu is not None
    machine = machine_of(gpu, CPU)
    for split, complaint in (
        ({"hot": 8, "warm": 8}, "splits must name"),
        ({"hot": 12, "cold": 8}, "multiples of 8"),
        ({"hot": 128, "cold": 8}, "add up to"),
    ):
        with pytest.raises(ValueError, match=complaint):
            prepare(works(), gpu, machine, [split])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_plans_on_a_gpu_switch_graphs_and_keep_every_bit() -> None:
    """Two layers, 10,000 plans with faults between: same bits, no capture, no part, no memory."""
    cuda = torch.device("cuda", 0)
    gpu = open_partition(0)
    if gpu is None:
        pytest.skip("this GPU cannot be split")
    machine, expected, made = machine_of(gpu, cuda), {}, {}
    for number, name in enumerate(("hot", "cold")):
        spec, weights = draw_layer("swiglu", 8, 512, 256, cuda, torch.bfloat16)
        generator = torch.Generator(cuda).manual_seed(number)
        hidden = torch.randn(40, 512, device=cuda, generator=generator).bfloat16()
        ids = torch.rand(40, 8, device=cuda, generator=generator).topk(2).indices.int()
        share = torch.rand(40, 2, device=cuda, generator=generator)
        args = (hidden, ids, share, weights, spec)
        expected[name] = run_budgeted(*args)

        def capture(seat: Seat, args=args):
            stream, graph = seat.stream or torch.cuda.Stream(), torch.cuda.CUDAGraph()
            run_budgeted(*args, num_sms=seat.sms)
            torch.cuda.synchronize()
            with torch.cuda.graph(graph, stream=stream):
                out = run_budgeted(*args, num_sms=seat.sms)
            return graph, out, stream

        made[name] = SeatedWork(name, capture)
    assert prepare(made, gpu, machine, splits(machine)[::3]) > 4
    rng = random.Random(0)

    def policy(p, c, m, s) -> Plan:
        if rng.random() < 0.2:
            raise ValueError("drawn")
        sizes = splits(machine)[rng.randrange(0, len(splits(machine)))]
        return Plan(policy="t", reason="", shares=tuple(Share(*x) for x in sizes.items()))

    control = Control(policy, CURVES, machine, made)
    answers_keep_their_bits(made, expected)
    captures, parts = [w.captures for w in made.values()], gpu.parts
    before = (torch.cuda.memory_allocated(), torch.cuda.memory_reserved())
    for step in range(10_000):
        with control.step():
            if step % 50 == 0:
                answers_keep_their_bits(made, expected)
        control.replan(GroupProfile(step=step, groups=GROUPS))
    control.manager.check()
    assert [w.captures for w in made.values()] == captures and gpu.parts == parts
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before
    assert {"ValueError", "no graph"} == set(control.faults)
    assert made["hot"].switches > 1000


def answers_keep_their_bits(made, expected) -> None:
    """Replays the graph of each work's present seat, all beside each other."""
    for work in made.values():
        graph, out, stream = work.current
        out.fill_(float("nan"))
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            graph.replay()
    for work in made.values():
        work.current[2].synchronize()
    for name, work in made.items():
        assert torch.equal(work.current[1], expected[name])
