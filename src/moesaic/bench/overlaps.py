"""How suite `overlap` measures: two batches side by side, the exchange and the experts on slices.

Every function here is a collective of all ranks. Times are those of the slowest rank, the same on
all, so that every rank finds the same curves and the same plans.

    T tokens of a rank and batch · K top-k · H hidden width · n SMs of the exchange
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..hardware.green import GreenDevice, GreenSlice
from ..parallel.exchange.base import combine, dispatch
from ..parallel.expert_parallel import ExpertParallel, take_experts
from ..parallel.placement import contiguous
from ..parallel.rows import weigh
from ..parallel.two_batches import EXCHANGE, EXPERTS, follow_plan, side_by_side, sides
from ..runtime.plan import Curve, Curves, GroupProfile, MachineSlices, Plan, Share
from ..runtime.policies import POLICIES
from ..runtime.policies.guard import Guard
from ..runtime.policies.sizing import plan_ms
from ..runtime.seats import Seat
from ..runtime.streams import CudaLanes
from .colocate import curve_of, prepared_size
from .ranks import Team, capture_together, replay_sampler, take_turns
from .results import Line, make_line, stamp
from .suite import Cell, Context
from .timing import Call, reason
from .workloads import Model, make_weights, routing_ids

LAYERS, CURVE_CHAIN, ROUNDS = 3, 4, 7
SIZES = (8, 16, 24, 32, 40, 48, 64, 80)
"""SMs of the exchange in the sweep; the experts get the others."""
IN_TURN, STREAMS, SPLIT = "in-turn", "streams", "split@"
WHOLE = Plan(policy="none", reason="")
HISTORY = 16


@dataclass
class Pair:
    """Layers for two batches, their inputs and routes, and how the GPU is cut."""

    layers: list[tuple[ExpertParallel, ExpertParallel]]
    batches_TH: list[Tensor]
    routes: dict[tuple[int, int], tuple[Tensor, Tensor]]
    gpu: GreenDevice
    parts: dict[int, tuple[GreenSlice, GreenSlice]] = field(default_factory=dict)

    def route(self, number: int, batch: int, hidden_TH: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and weights that were drawn for a layer of a batch."""
        return self.routes[number, batch]

    @property
    def machine(self) -> MachineSlices:
        """The GPU as planners see it."""
        cut = self.gpu.cut
        return MachineSlices(
            total_sms=cut.total_sms, granularity=cut.atom_sms, min_sms=cut.atom_sms,
            slices=cut.atoms,
        )  # fmt: skip

    def follow(self, plan: Plan) -> None:
        """Give every layer the budgets of a plan."""
        for layer in (layer for two in self.layers for layer in two):
            follow_plan(layer, plan)

    def cut_for(self, size: int) -> tuple[GreenSlice, GreenSlice]:
        """The parts of the exchange and of the experts, made once."""
        if size not in self.parts:
            atoms = self.gpu.cut.atom_sms * self.gpu.cut.atoms
            self.parts[size] = self.gpu.carve([size, atoms - size], rest_to=1)  # type: ignore[assignment]
        return self.parts[size]


def measure_all(
    wanted: Sequence[Cell], context: Context, *, suite: str, models: dict[str, Model]
) -> None:
    """Measure every cell in order; rank 0 records."""
    team = Team(context.device)
    stamped = stamp(team.device) | {"suite": suite}
    try:
        for number, cell in enumerate(wanted):
            if team.first(context.elapsed_s()) > context.budget_s:
                context.say(f"out of time before {cell}")
                break
            fixed = stamped | {k: getattr(cell, k) for k in ("model", "tokens", "routing", "dtype")}
            fixed |= {"mode": "graph", "ranks": team.size}
            work = partial(
                overlap_lines, team, cell, models[cell.model], fixed, context.seed + number
            )
            lines = attempt(work, fixed)
            team.release()
            if team.rank == 0:
                context.record(lines)
                told = (f"{x['impl']} {x['ms'] or x.get('error')}" for x in lines)
                context.say(f"{cell.model} {cell.tokens}: {', '.join(told)}")
    finally:
        team.close()


def attempt(work: Callable[[], list[Line]], fixed: Line) -> list[Line]:
    """The lines of a cell; what every rank raises alike becomes the error of one line."""
    try:
        lines = work()
    except Exception as error:
        lines = [make_line(fixed, clock="overlap", impl="policy:adaptive", error=reason(error))]
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return lines


def make_pair(team: Team, cell: Cell, model: Model, seed: int) -> Pair:
    """Weights of this rank's experts, layers that share two exchanges, inputs and routes."""
    spec, device, dtype = model.spec(), team.device, getattr(torch, cell.dtype)
    place = contiguous(spec.num_experts, team.size, LAYERS)
    weights = make_weights(spec, dtype=dtype, generator=torch.Generator(device).manual_seed(7))
    own = take_experts(weights, place, layer=0, rank=team.rank)
    del weights
    generator = torch.Generator(device).manual_seed(seed * 1000 + team.rank)
    group = dist.group.WORLD if team.size > 1 else None
    sets = []
    for _ in range(2):
        options = options_for(team, cell.tokens)
        kept = ExpertParallel(
            spec, place, own, top_k=model.top_k, group=group, options=options, device=device
        )
        others = [
            ExpertParallel(spec, place, own, top_k=model.top_k, group=group, layer=n, like=kept)
            for n in range(1, LAYERS)
        ]
        sets.append([kept, *others])
    shape = (cell.tokens, spec.hidden_size)
    batches = [torch.randn(shape, device=device, generator=generator).to(dtype) for _ in sets]
    routes = {}
    for number in range(LAYERS):
        for batch in (0, 1):
            ids_TK = routing_ids(
                cell.routing, tokens=cell.tokens, num_experts=spec.num_experts,
                top_k=model.top_k, generator=generator,
            )  # fmt: skip
            share_TK = torch.rand(ids_TK.shape, device=device, generator=generator).softmax(-1)
            routes[number, batch] = (ids_TK, share_TK)
    gpu = GreenDevice(device.index or 0, atom_sms=8, clusters=False)
    return Pair(list(zip(*sets, strict=True)), batches, routes, gpu)


def options_for(team: Team, tokens: int) -> Any:
    """How the layers exchange: by symmetric memory, sized for the batch."""
    from ..parallel.expert_parallel import Options

    return Options("symmetric" if team.size > 1 else "local", capacity=tokens)


def in_turn(pair: Pair) -> tuple[Tensor, Tensor]:
    """Every layer for one batch, then for the other, all on the whole GPU."""
    out = list(pair.batches_TH)
    tokens = out[0].shape[0]
    with torch.no_grad():
        for number, two in enumerate(pair.layers):
            for b, layer in enumerate(two):
                out[b] = layer(out[b], *pair.route(number, b, out[b]), bound=tokens)
    return out[0], out[1]


def beside(pair: Pair, seats: tuple[Seat, Seat] | None) -> tuple[Tensor, Tensor]:
    """Both batches side by side."""
    tokens = pair.batches_TH[0].shape[0]
    return side_by_side(pair.layers, pair.batches_TH, pair.route, seats=seats, bound=tokens)


def budgets_of(parts: tuple[GreenSlice, GreenSlice]) -> Plan:
    """A plan whose shares are what two parts really have."""
    shares = (Share(EXCHANGE, parts[0].sms), Share(EXPERTS, parts[1].sms))
    return Plan(policy="split", reason="", shares=shares)


def on_part(pair: Pair, part: GreenSlice | None, work: Call) -> Call:
    """Work on the stream of a part; on the current one for None."""
    device = pair.batches_TH[0].device
    if part is None or device.type != "cuda":
        return work
    lanes = CudaLanes.of(device, [part.stream])

    def call() -> Any:
        with lanes.fork([0]), lanes.on(0):
            return work()

    return call


def measure_curves(team: Team, pair: Pair) -> dict[str, Curve]:
    """Time alone over SMs: of an exchange there and back, and of the experts of one batch."""
    layer, hidden_TH = pair.layers[0][0], pair.batches_TH[0]
    tokens = hidden_TH.shape[0]
    ids_TK, weights_TK = pair.route(0, 0, hidden_TH)
    with torch.no_grad():
        received = dispatch(layer.exchange, hidden_TH, ids_TK, bound=tokens)
        rows = layer.compute(received, tokens, hidden_TH.dtype)

    def there_and_back() -> Tensor:
        with torch.no_grad():
            handle = dispatch(layer.exchange, hidden_TH, ids_TK, bound=tokens).handle
            return weigh(combine(layer.exchange, rows, handle), weights_TK, hidden_TH.dtype)

    def experts() -> Any:
        with torch.no_grad():
            return layer.compute(received, tokens, hidden_TH.dtype)

    points: dict[str, dict[int, float]] = {EXCHANGE: {}, EXPERTS: {}}
    for size in (*SIZES, None):
        parts = (None, None) if size is None else pair.cut_for(size)
        pair.follow(WHOLE if size is None else budgets_of(parts))  # type: ignore[arg-type]
        for name, part, work in (
            (EXCHANGE, parts[0], there_and_back),
            (EXPERTS, parts[1], experts),
        ):
            held = capture_together(team, [on_part(pair, part, work)] * CURVE_CHAIN)
            sampler = replay_sampler(team, held)
            sampler()
            found = take_turns({name: sampler}, rounds=5, seed=0)
            sms = pair.machine.total_sms if part is None else part.sms
            points[name][sms] = found[name].median
    pair.follow(WHOLE)
    return {name: curve_of(name, found) for name, found in points.items()}


def profile_of(curves: Curves) -> GroupProfile:
    """What policies see: one layer of two batches, again and again."""
    exchange, experts = (2 * curves[name].ms[-1] for name in (EXCHANGE, EXPERTS))
    busy = (exchange / (exchange + experts), experts / (exchange + experts))
    return GroupProfile(
        step=HISTORY, groups=sides(), loads_WN=((exchange, experts),) * HISTORY,
        busy_WN=(busy,) * HISTORY,
    )  # fmt: skip


def plans_of(curves: Curves, machine: MachineSlices) -> dict[str, Plan]:
    """The plan of every policy."""
    profile = profile_of(curves)
    return {name: Guard(policy, curves, machine)(profile) for name, policy in POLICIES.items()}


def way_of(plan: Plan) -> str:
    """How a plan is carried out: a split of the sweep, or one batch after the other."""
    return f"{SPLIT}{prepared_size(SIZES, plan.sizes[EXCHANGE])}" if plan.sliced else IN_TURN


def settled(curves: Curves, took: Mapping[str, float], steps: int = 32) -> list[str]:
    """The ways that `adaptive` goes, step by step, when it is told how long each step took.

    Args:
        took: milliseconds of one layer of both batches, by way.
    """
    total = curves[EXPERTS].sms[-1]
    guard = Guard(POLICIES["adaptive"], curves, MachineSlices(total_sms=total))
    profile, ways, ms = profile_of(curves), list[str](), None
    for step in range(steps):
        ways.append(way_of(guard(replace(profile, step=HISTORY + step, took_ms=ms))))
        ms = took[ways[-1]]
    return ways


def overlap_lines(team: Team, cell: Cell, model: Model, fixed: Line, seed: int) -> list[Line]:
    """The curves, every way, and what each policy chooses from the curves."""
    pair = make_pair(team, cell, model, seed)
    expected = in_turn(pair)
    curves = measure_curves(team, pair)
    plans = plans_of(curves, pair.machine)
    samplers, held = {}, {}
    ways: dict[str, int | None] = {IN_TURN: None, STREAMS: None}
    ways |= {f"{SPLIT}{size}": size for size in SIZES}
    for way, size in ways.items():
        seats = None
        if size is not None:
            parts = pair.cut_for(size)
            seats = (Seat(parts[0].sms, parts[0].stream), Seat(parts[1].sms, parts[1].stream))
        pair.follow(WHOLE if size is None else budgets_of(pair.parts[size]))
        call = partial(in_turn, pair) if way == IN_TURN else partial(beside, pair, seats)
        held[way] = capture_together(team, [call])
        samplers[way] = replay_sampler(team, held[way])
        samplers[way]()
    wrong = {way: wrong_in(team, held[way], expected) for way in ways}
    timed = take_turns(samplers, rounds=ROUNDS, seed=seed)
    lines = curve_lines(fixed, curves)
    base = timed[IN_TURN].median
    for impl, way, plan in [
        *((way, way, None) for way in ways),
        *((f"policy:{name}", way_of(plan), plan) for name, plan in plans.items()),
    ]:
        found, told = timed[way], {}
        if plan is not None:
            loads_N = profile_of(curves).loads_WN[-1]
            expect = plan_ms(profile_of(curves), loads_N, plan, curves, pair.machine)
            told = {"policy": plan.policy, "reason": plan.reason, "predicted_ms": expect}
        sizes = pair.parts.get(ways[way] or 0)
        if sizes is not None:
            told |= {"sms": sizes[0].sms, "other_sms": sizes[1].sms}
        lines.append(
            make_line(
                fixed, clock="overlap", impl=impl, ms=found.median / LAYERS,
                ms_p20=found.p20 / LAYERS, ms_p80=found.p80 / LAYERS, samples=found.samples,
                over_in_turn=base / found.median, wrong=wrong[way], **told,
            )
        )  # fmt: skip
    samplers.clear()
    held.clear()
    pair.gpu.close()
    return lines


def wrong_in(team: Team, held: Any, expected: tuple[Tensor, Tensor]) -> bool:
    """Whether a replay differs in any bit from the batches one after the other, on any rank."""
    team.together()
    held.graph.replay()
    team.together()
    bits = [t.view(torch.uint8) for t in (*held.first_output, *expected)]
    same = torch.equal(bits[0], bits[2]) and torch.equal(bits[1], bits[3])
    return team.largest(float(not same)) > 0


def curve_lines(fixed: Line, curves: Curves) -> list[Line]:
    """A line for each point of the curves."""
    return [
        make_line(
            fixed, clock="curve", impl=f"{work}@{sms}", ms=ms, sms=sms, work=work,
            slowdown=curve.slowdown(sms),
        )
        for work, curve in curves.items()
        for sms, ms in zip(curve.sms, curve.ms, strict=True)
    ]  # fmt: skip
