"""Benchmarks over several processes: who runs them, what they agree on, how a time is taken.

`torchrun --nproc-per-node N -m moesaic bench --suite ep` and `moesaic bench --suite ep --gpus N`
are the same: the second starts the first. Every rank runs the suite; rank 0 alone writes lines.
A sample is the time of the slowest rank.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from ..types import Measurement
from .results import Line, Recorder
from .timing import Call, Captured, GraphError, Sampler, _events_ms, capture, summary

Name = TypeVar("Name", bound=Hashable)


def world_size() -> int:
    """Ranks that torchrun started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def own_rank() -> int:
    """This process's rank, 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def launched() -> bool:
    """Whether torchrun started this process."""
    return "RANK" in os.environ


class Silent(Recorder):
    """What a rank other than 0 records into: nothing."""

    def __init__(self, other: Recorder) -> None:
        self.__dict__.update(other.__dict__)

    def record(self, lines: Iterable[Line]) -> None:
        """Keep nothing, write nothing."""


def relaunch(gpus: int, arguments: Sequence[str]) -> None:
    """Become torchrun of the same command over `gpus` processes; does not return.

    Raises:
        ValueError: fewer than one.
    """
    if gpus < 1:
        raise ValueError(f"--gpus must be at least 1, got {gpus}")
    # A multicast object can take a host's GPUs out of service, and nothing here needs one.
    for name, value in (("NCCL_NVLS_ENABLE", "0"), ("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")):
        os.environ.setdefault(name, value)
    os.environ.setdefault("OMP_NUM_THREADS", "4")
    head = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    os.execv(sys.executable, [*head, f"--nproc-per-node={gpus}", "-m", "moesaic", *arguments])


def cut_into(ranks: int, size: int) -> dist.ProcessGroup:
    """This rank's group when a world of `size` is cut into groups of `ranks`; every rank calls it.

    Every rank belongs to a group: torch counts rendezvous of symmetric memory in each process, and
    a group of some ranks alone would make a later one of all of them hang (pytorch issue 196082).
    """
    cuts = [list(range(r, r + ranks)) for r in range(0, size, ranks)]
    found, _ = dist.new_subgroups_by_enumeration(cuts)  # type: ignore[no-untyped-call]
    assert found is not None
    mine: dist.ProcessGroup = found
    return mine


class Team:
    """The ranks of one run, and the decisions they share."""

    def __init__(self, device: torch.device) -> None:
        self.rank, self.size = own_rank(), world_size()
        self.started = self.size > 1 and not dist.is_initialized()
        on_gpu = device.type == "cuda"
        if on_gpu:
            local = int(os.environ.get("LOCAL_RANK", "0"))
            torch.cuda.set_device(local)
            device = torch.device("cuda", local)
        self.device = device
        if self.started:
            dist.init_process_group(
                "nccl" if on_gpu else "gloo",
                timeout=timedelta(seconds=60),
                device_id=device if on_gpu else None,
            )
        self.groups: dict[int, dist.ProcessGroup | None] = {1: None}
        self.captured: list[Captured] = []

    def group(self, ranks: int) -> dist.ProcessGroup | None:
        """This rank's group when the world is cut into groups of `ranks`; None of one rank."""
        if ranks not in self.groups:
            whole = ranks == self.size
            self.groups[ranks] = dist.group.WORLD if whole else cut_into(ranks, self.size)
        return self.groups[ranks]

    def first(self, value: float) -> float:
        """The value of rank 0, on every rank."""
        return self._share(value, lambda t: dist.broadcast(t, 0))

    def largest(self, value: float) -> float:
        """The largest value of all ranks, on every rank."""
        return self._share(value, lambda t: dist.all_reduce(t, op=dist.ReduceOp.MAX))

    def _share(self, value: float, collective: Callable[[torch.Tensor], object]) -> float:
        if self.size == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.float64, device=self.device)
        collective(tensor)
        return float(tensor.item())

    def together(self) -> None:
        """Wait for every rank and its device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self.size > 1:
            dist.barrier()

    def release(self) -> None:
        """Give back the graphs captured so far: one that dies by itself may do so in a capture."""
        for captured in self.captured:
            captured.graph.reset()
        self.captured.clear()

    def close(self) -> None:
        """Leave the group that this made."""
        if self.started:
            dist.destroy_process_group()


def capture_together(team: Team, calls: Sequence[Call]) -> Captured:
    """All calls in one CUDA graph on every rank, or on none.

    Raises:
        GraphError: a rank could not capture them; on that rank why.
    """
    held, error = None, None
    try:
        held = capture(calls)
    except GraphError as raised:
        error = raised
    if team.largest(float(error is not None)) or held is None:
        raise error or GraphError("another rank could not capture this")
    team.captured.append(held)
    return held


def replay_sampler(team: Team, captured: Captured) -> Sampler:
    """Milliseconds a call of one replay, on the slowest rank, all starting together."""

    def sample() -> float:
        team.together()
        ms = _events_ms(captured.graph.replay, head_start=True) / captured.calls
        return team.largest(ms)

    return sample


def loop_sampler(team: Team, call: Callable[[], object], repeats: int) -> Sampler:
    """Milliseconds a call of `repeats` eager calls, on the slowest rank, all starting together."""
    import time

    def calls() -> None:
        for _ in range(repeats):
            call()

    def sample() -> float:
        team.together()
        if team.device.type == "cuda":
            ms = _events_ms(calls, head_start=False)
        else:
            start = time.perf_counter()
            calls()
            ms = (time.perf_counter() - start) * 1e3
        return team.largest(ms / repeats)

    return sample


def take_turns(
    samplers: Mapping[Name, Sampler], *, rounds: int, seed: int
) -> dict[Name, Measurement]:
    """Sample every candidate `rounds` times, in an order that is new each round and the same on
    every rank; a sampler is a collective, so none may leave early."""
    rng = random.Random(seed)
    samples: dict[Name, list[float]] = {name: [] for name in samplers}
    for _ in range(rounds):
        order = list(samplers)
        rng.shuffle(order)
        for name in order:
            samples[name].append(samplers[name]())
    return {name: summary(values) for name, values in samples.items()}
