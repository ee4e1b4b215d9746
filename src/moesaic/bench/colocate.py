"""The machinery of the co-location suite: seats, graphs, curves, and one trial of two tenants.

Every split of the GPU gives the watched tenant the first atoms and the other one the remaining ones
(and the SMs that fill no atom); `lend` is such a split whose other tenant borrows the first part's
idle SMs. Beside the splits there are three ways without green contexts:
`no-control` (two ordinary streams), `stream-priority` (the watched tenant's stream and graphs at
the highest priority) and `sm-budgets` (ordinary streams, but persistent launches held to the sizes
of a split).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..hardware.green import Cut, GreenDevice, GreenError, GreenUnavailable, probe_launch
from ..runtime.plan import Curve, MachineSlices
from ..runtime.seats import Seat
from .lending import LEND, Borrower, LendingStep, answers_differ, lend
from .stacks import Replays, Stack, Tenant, differing, replay, time_ms
from .tenants import EventMark, GpuLine, Trial, closed_loop, common_event, open_loop

PLAIN, PRIORITY, BUDGET, GREEN = "plain", "priority", "budget", "green"
HIGHEST, LOWEST = -5, 0
STEP_SMS, PLAN_SMS, FINE_SMS = 8, 4, 2
"""SMs of an atom that every driver gives, by which planners change sizes, and by which the GPU is
cut; the last two where the driver can."""
CLOSE = range(24, 81)
"""Sizes of the watched tenant that are swept in planners' steps, others in steps of `STEP_SMS`."""
log = logging.getLogger("moesaic")


@dataclass
class Pair:
    """Two tenants on one GPU: their graphs, how the GPU can be split, what was measured alone."""

    step: Stack
    other: Stack
    gpu: GreenDevice
    splits: dict[int, tuple[int, int]] = field(default_factory=dict)
    """SMs of both parts, as read back, by the SMs asked for the watched tenant."""
    ran_on: dict[int, tuple[int, int]] = field(default_factory=dict)
    """SMs on which a probe really ran, by the same."""
    lent: dict[int, tuple[LendingStep, Borrower]] = field(default_factory=dict)
    """Both tenants of a split whose first part is lent, by the SMs asked for."""
    differing: int = 0
    compared: int = 0
    """Answers that differ in any bit from those of the whole GPU, of how many compared."""

    @property
    def machine(self) -> MachineSlices:
        """The GPU as planners see it."""
        return machine_of(self.gpu.cut)


def machine_of(cut: Cut) -> MachineSlices:
    """A GPU as planners see it: sizes in steps of `PLAN_SMS` where its atoms allow."""
    step = max(PLAN_SMS, cut.atom_sms)
    slices = cut.atom_sms * cut.atoms // step
    return MachineSlices(total_sms=cut.total_sms, granularity=step, min_sms=step, slices=slices)


def open_gpu(index: int) -> GreenDevice:
    """The GPU split into pairs of SMs, which fill it best, else into atoms of `STEP_SMS`.

    Raises:
        GreenUnavailable: it cannot be split at all.
    """
    try:
        gpu = GreenDevice(index, atom_sms=FINE_SMS, clusters=False)
        gpu.carve([STEP_SMS, gpu.cut.atom_sms * gpu.cut.atoms - STEP_SMS])
        return gpu
    except (GreenUnavailable, GreenError, ValueError) as error:
        log.warning("no parts smaller than %d SMs: %s", STEP_SMS, error)
        return GreenDevice(index, atom_sms=STEP_SMS)


def make_pair(
    step: Tenant, other: Tenant, device: torch.device, dtype: torch.dtype, seed: int
) -> Pair:
    """Weights, inputs and the split of the GPU; kernels compiled before any green context is used.

    Raises:
        GreenUnavailable, GreenError: the GPU cannot be split.
    """
    stacks = [
        Stack(tenant, device, dtype, seed + i, "auto") for i, tenant in enumerate((step, other))
    ]
    for stack in stacks:
        stack.warm_up()
    return Pair(stacks[0], stacks[1], open_gpu(device.index or 0))


def prepare_whole(pair: Pair) -> None:
    """Graphs on ordinary streams and on streams of the highest and the lowest priority."""
    total = pair.gpu.cut.total_sms
    for stack, priority in ((pair.step, HIGHEST), (pair.other, LOWEST)):
        stack.work.prepare(Seat(total, None, PLAIN))
        replay(stack.work.use(total, PLAIN))
        stream = torch.cuda.Stream(priority=priority)  # type: ignore[no-untyped-call]
        stack.work.prepare(Seat(total, stream, PRIORITY))


def prepare_split(pair: Pair, size: int) -> None:
    """Graphs of both tenants on the two parts of a split; the parts probed, answers compared."""
    from ..kernels.smid import sms_used

    if size in pair.splits:
        return
    atoms = pair.gpu.cut.atom_sms * pair.gpu.cut.atoms
    parts = pair.gpu.carve([size, atoms - size], rest_to=1)
    used = [probe_launch(part, sms_used) for part in parts]
    if used[0] & used[1]:
        raise RuntimeError(f"the parts of {size} SMs and the rest overlap on {used[0] & used[1]}")
    pair.ran_on[size] = (len(used[0]), len(used[1]))
    for stack, part in zip((pair.step, pair.other), parts, strict=True):
        stack.work.prepare(Seat(part.sms, part.stream, GREEN))
        compare(pair, stack, stack.work.use(part.sms, GREEN))
    pair.splits[size] = (parts[0].sms, parts[1].sms)


def prepare_budgets(pair: Pair, size: int) -> None:
    """Graphs on ordinary streams whose launches are held to the sizes of a split."""
    for stack, sms in zip((pair.step, pair.other), pair.splits[size], strict=True):
        stack.work.prepare(Seat(sms, None, BUDGET))
        compare(pair, stack, stack.work.use(sms, BUDGET))


def prepare_lending(pair: Pair, size: int) -> None:
    """Both tenants on the parts of a split, the first of which is lent; answers compared."""
    if size in pair.lent:
        return
    atoms = pair.gpu.cut.atom_sms * pair.gpu.cut.atoms
    parts = pair.gpu.carve([size, atoms - size], rest_to=1)
    step, other = lend(pair.gpu, pair.step, pair.other, (parts[0], parts[1]))
    compare(pair, pair.step, step.replays)
    expected = whole(pair.other).outputs[0]
    pair.differing += answers_differ(expected, other, step.lending)
    pair.compared += 2
    pair.lent[size] = (step, other)


def compare(pair: Pair, stack: Stack, replays: Replays) -> None:
    """Count the answers of a seat, and those that differ from the whole GPU's in any bit."""
    pair.differing += differing(whole(stack).outputs, replays)
    pair.compared += len(replays.outputs)


def whole(stack: Stack) -> Replays:
    """A tenant's graphs on the whole GPU."""
    sms = max(sms for sms, label in stack.work.sizes if label == PLAIN)
    return stack.work.use(sms, PLAIN)


Work = Replays | LendingStep | Borrower


def seats_of(pair: Pair, way: str, size: int | None) -> tuple[Work, Work]:
    """Both tenants' graphs under a way of sharing; `size` names the split."""
    if way == LEND:
        return pair.lent[size or 0]
    if way in (PLAIN, PRIORITY):
        total = pair.gpu.cut.total_sms
        return pair.step.work.use(total, way), pair.other.work.use(total, way)
    step_sms, other_sms = pair.splits[size or 0]
    return pair.step.work.use(step_sms, way), pair.other.work.use(other_sms, way)


@dataclass(frozen=True)
class Loop:
    """How steps come: back to back (`interval_ms` None) or at fixed arrivals."""

    name: str
    interval_ms: float | None = None


@dataclass(frozen=True)
class Clockwork:
    """What all trials of a process share: the common event, and a stream with nothing to do."""

    base: Any
    idle: GpuLine

    @staticmethod
    def on(device: torch.device) -> Clockwork:
        """The clockwork of a device."""
        base = common_event(device)
        return Clockwork(base, GpuLine([], torch.cuda.Stream(priority=HIGHEST), base))  # type: ignore[no-untyped-call]

    def arrivals(self) -> EventMark:
        """A mark now."""
        return self.idle.mark()


def trial(
    clockwork: Clockwork,
    loop: Loop,
    step: Work,
    other: Work | None,
    *,
    steps: int,
    limit_s: float,
    warm_s: float = 0.0,
) -> Trial:
    """One run of a loop: the step's graphs, beside the other's when there are any."""
    line = line_of(step, clockwork.base)
    rival = None if other is None else line_of(other, clockwork.base)
    torch.cuda.synchronize()
    if loop.interval_ms is None:
        found = closed_loop(line, rival, steps=steps, limit_s=limit_s, warm_s=warm_s)
    else:
        found = open_loop(
            line, rival, clockwork.arrivals,
            steps=steps, interval_ms=loop.interval_ms, limit_s=limit_s, warm_s=warm_s,
        )  # fmt: skip
    step.stream.synchronize()
    if other is not None:
        other.stream.synchronize()
    return found


def line_of(work: Work, base: Any) -> GpuLine:
    """A tenant's work as something that can be launched again and again."""
    if isinstance(work, Replays):
        return GpuLine(work.graphs, work.stream, base)
    return work.line(base)


def alone_per_s(
    clockwork: Clockwork, other: Replays, *, seconds: float, warm_s: float = 0.0
) -> float:
    """Launches per second of the other tenant, back to back with the whole GPU to itself."""
    line = GpuLine(other.graphs, other.stream, clockwork.base)
    found = closed_loop(line, None, steps=10**9, limit_s=seconds, warm_s=warm_s)
    other.stream.synchronize()
    return 1e3 * len(found.latencies_ms) / sum(found.latencies_ms)


def measure_curves(pair: Pair, *, copy_bytes: int = 2**29) -> dict[str, Curve]:
    """Time alone over SMs of a step, of the other's work and of a copy, over all splits prepared.

    The last point of each is the whole GPU.
    """
    source = torch.empty(copy_bytes // 4, device=pair.step.weights[0].up.device).normal_()
    target = torch.empty_like(source)
    points: dict[str, dict[int, float]] = {"decode": {}, "prefill": {}, "copy": {}}
    for _, (step_sms, other_sms) in sorted(pair.splits.items()):
        step = pair.step.work.use(step_sms, GREEN)
        other = pair.other.work.use(other_sms, GREEN)
        points["decode"][step_sms] = time_ms(step.graphs, step.stream)
        points["prefill"][other_sms] = time_ms(other.graphs, other.stream)
        points["copy"][step_sms] = _copy_ms(source, target, step.stream)
    total = pair.gpu.cut.total_sms
    step, other = whole(pair.step), whole(pair.other)
    points["decode"][total] = time_ms(step.graphs, step.stream)
    points["prefill"][total] = time_ms(other.graphs, other.stream)
    points["copy"][total] = _copy_ms(source, target, step.stream)
    return {name: curve_of(name, found) for name, found in points.items()}


def curve_of(work: str, points: Mapping[int, float]) -> Curve:
    """A curve of measured points; its load counts milliseconds on the whole GPU."""
    sms = tuple(sorted(points))
    return Curve(work=work, sms=sms, ms=tuple(points[n] for n in sms), load=points[sms[-1]])


def _copy_ms(source: torch.Tensor, target: torch.Tensor, stream: Any) -> float:
    """Milliseconds of one copy on a stream, the least of three."""
    times: list[float] = []
    for _ in range(3):
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            start.record()
            torch.add(source, 0.0, out=target)
            end.record()
        end.synchronize()
        times.append(float(start.elapsed_time(end)))
    return min(times)


def split_sizes(pair: Pair) -> list[int]:
    """The sizes of the exhaustive sweep: planners' steps where promises are met or missed, wider
    ones elsewhere, and where possible two that are smaller."""
    cut = pair.gpu.cut
    small = [n for n in (FINE_SMS, 2 * FINE_SMS) if n % cut.atom_sms == 0]
    step = machine_of(cut).granularity
    most = cut.atom_sms * cut.atoms
    return small + [n for n in range(STEP_SMS, most, step) if n % STEP_SMS == 0 or n in CLOSE]


def prepared_size(sizes: Iterable[int], wanted: int) -> int:
    """The smallest of `sizes` that is at least what was wanted, else the largest.

    >>> prepared_size((8, 16, 24), 12), prepared_size((8, 16), 99)
    (16, 16)
    """
    known = sorted(sizes)
    return next((size for size in known if size >= wanted), known[-1])
