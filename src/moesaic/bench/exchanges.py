"""How suite `ep` measures: one exchange or one layer at a time, every rank in step.

Every function here is a collective of all ranks. What a rank finds wrong counts as wrong for all,
and a time is that of the slowest rank; rank 0 alone writes the lines.

    T tokens (rows) of a rank · H width · K top-k · G ranks · E experts
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..cost import expert_flops
from ..functional import moe
from ..parallel.exchange.base import Exchange, ExpertRows, Received, combine, dispatch, seat_of
from ..parallel.exchange.symmetric import SymmetricExchange
from ..parallel.expert_parallel import ExpertParallel, Options, take_experts
from ..parallel.placement import contiguous
from ..types import ExpertWeights, Measurement
from .ranks import Team, capture_together, loop_sampler, replay_sampler, take_turns
from .results import Line, make_line, stamp
from .suite import Cell, Context
from .timing import Call, Sampler, reason
from .workloads import make_weights, popularity, routing_ids

if TYPE_CHECKING:
    from .suites.ep import Layer

CHAIN = 64
LAYER_CHAIN = 4
FEW_SMS = 32
Key = tuple[str, str, str]


def estimate_s(cell: Cell, layers: Mapping[str, Layer], widths: Mapping[str, int]) -> float:
    """Seconds that a cell takes at rates that are easily reached."""
    if cell.model in widths:
        return 0.8 + 1500 * cell.tokens * widths[cell.model] * 2 / 3e11
    ranks, layer = ranks_of(cell), layers[cell.model]
    flops = expert_flops(layer.spec, cell.tokens * layer.top_k)
    return 2.0 + 60 * flops / ranks / 4e14


def in_graphs(team: Team) -> bool:
    """Whether calls are timed in CUDA graphs and rows pushed: on GPUs."""
    return team.device.type == "cuda"


def ranks_of(cell: Cell) -> int:
    """The ranks that a layer's cell uses; 0 for an exchange, which uses all."""
    return int(cell.clock.removeprefix("layer-ep")) if cell.clock.startswith("layer-ep") else 0


def measure_all(
    wanted: Sequence[Cell],
    context: Context,
    *,
    suite: str,
    widths: Mapping[str, int],
    layers: Mapping[str, Layer],
) -> None:
    """Measure every cell that this many ranks can run, in order, while it fits into the budget."""
    from . import exchanges_cpu

    team = Team(context.device)
    exchange = exchange_lines if in_graphs(team) else exchanges_cpu.exchange_lines
    stamped = stamp(team.device) | {"suite": suite}
    shelf: dict[str, ExpertWeights] = {}
    left_out = 0
    try:
        for number, cell in enumerate(wanted):
            ranks = ranks_of(cell)
            if (ranks and team.size % ranks) or (team.size == 1 and not ranks):
                continue
            spent = team.first(context.elapsed_s())
            if spent + estimate_s(cell, layers, widths) > context.budget_s:
                left_out += 1
                continue
            fixed = stamped | {k: getattr(cell, k) for k in ("model", "tokens", "routing", "dtype")}
            seed = context.seed + 1000 * number
            if ranks:
                work = partial(layer_lines, team, cell, layers[cell.model], shelf, fixed, seed)
            else:
                work = partial(exchange, team, cell, widths[cell.model], fixed, seed)
            lines = attempt(team, work, cell, fixed)
            if team.rank == 0:
                context.record(lines)
                told = [
                    f"{x['clock']} {x['impl']}/{x['mode']} {x['ms'] or x.get('error')}"
                    + (" WRONG" if x.get("wrong") else "")
                    for x in lines
                ]
                context.say(f"{cell.model} {cell.tokens} {cell.routing}: {'; '.join(told)}")
    finally:
        if left_out and team.rank == 0:
            context.say(f"out of time: {left_out} cells left out; run again with --missing")
        shelf.clear()
    team.close()


def attempt(team: Team, work: Callable[[], list[Line]], cell: Cell, fixed: Line) -> list[Line]:
    """The lines of a cell; what every rank raises alike becomes the error of one line."""
    try:
        lines = work()
    except Exception as error:
        clock = cell.clock if ranks_of(cell) else "dispatch"
        text = reason(error)
        lines = [make_line(fixed, clock=clock, impl="moesaic", mode="graph", error=text)]
    team.release()
    if team.device.type == "cuda":
        torch.cuda.empty_cache()
    return lines


@dataclass(frozen=True)
class Batch:
    """Rows of one rank and who gets them; `splits_GG[i][j]` rows go from rank i to rank j."""

    rows_TH: Tensor
    ids_T1: Tensor
    splits_GG: list[list[int]]

    def busiest_bytes(self) -> int:
        """Bytes into or out of the busiest GPU, whichever are more; what stays is not counted."""
        ranks = range(len(self.splits_GG))
        out = [sum(self.splits_GG[i][j] for j in ranks if j != i) for i in ranks]
        into = [sum(self.splits_GG[j][i] for j in ranks if j != i) for i in ranks]
        return max(out + into) * self.rows_TH.shape[1] * self.rows_TH.element_size()


def draw_batch(team: Team, tokens: int, width: int, routing: str, seed: int) -> Batch:
    """Fresh rows, ids by the routing, and everybody's splits."""
    device, ranks = team.device, team.size
    generator = torch.Generator(device).manual_seed(seed + team.rank)
    if routing == "even":
        ids_T = (torch.arange(tokens, device=device) + team.rank + 1) % ranks
    else:
        shares_G = popularity(routing, ranks).to(device)
        ids_T = torch.multinomial(shares_G, tokens, replacement=True, generator=generator)
    rows_TH = torch.randn(tokens, width, device=device, generator=generator).to(torch.bfloat16)
    own_G = torch.bincount(ids_T, minlength=ranks)
    all_GG = [torch.empty_like(own_G) for _ in range(ranks)]
    dist.all_gather(all_GG, own_G)
    splits = [row.tolist() for row in all_GG]
    return Batch(rows_TH, ids_T.to(torch.int32)[:, None].contiguous(), splits)


def positions(received: Received) -> Tensor:
    """Expert rows in the order of arrival: the row of each live slot."""
    live_S = received.ids_RJ.flatten() >= 0
    position_S = torch.where(live_S, live_S.cumsum(0) - 1, -1)
    return position_S.to(torch.int32).view_as(received.ids_RJ)


def round_trip(exchange: Exchange, batch: Batch) -> tuple[bool, Received, Tensor]:
    """Whether rows sent and brought back are the rows; what was received; rows to send back."""
    tokens = batch.rows_TH.shape[0]
    received = dispatch(exchange, batch.rows_TH, batch.ids_T1, bound=tokens)
    position_RJ = positions(received)
    back_XH = received.rows_RH[(position_RJ >= 0).any(-1)].clone()
    returned = combine(exchange, ExpertRows(back_XH, position_RJ), received.handle)
    same = torch.equal(returned.rows_XH[returned.position_TK.flatten().long()], batch.rows_TH)
    spare_XH = back_XH if len(back_XH) else batch.rows_TH.new_zeros((1, batch.rows_TH.shape[1]))
    return same, received, spare_XH


def nccl_calls(team: Team, batch: Batch) -> dict[Key, Call]:
    """NCCL both ways with known splits, and with counts exchanged and read first."""
    out = batch.splits_GG[team.rank]
    into = [row[team.rank] for row in batch.splits_GG]
    order_T = batch.ids_T1[:, 0].argsort(stable=True)
    sent_TH = batch.rows_TH[order_T]
    got_RH = sent_TH.new_empty((sum(into), sent_TH.shape[1]))
    counts_G = torch.tensor(out, device=team.device)

    def move(target: Tensor, source: Tensor, in_: list[int], out_: list[int]) -> None:
        dist.all_to_all_single(target, source, in_, out_)

    def counted(source: Tensor, counts_G: Tensor) -> Tensor:
        coming_G = torch.empty_like(counts_G)
        dist.all_to_all_single(coming_G, counts_G)
        out_, in_ = torch.stack((counts_G, coming_G)).tolist()
        target = source.new_empty((sum(in_), source.shape[1]))
        dist.all_to_all_single(target, source, in_, out_)
        return target

    back_G = torch.tensor(into, device=team.device)
    return {
        ("dispatch", "nccl", "graph"): lambda: move(got_RH, sent_TH, into, out),
        ("combine", "nccl", "graph"): lambda: move(sent_TH, got_RH, out, into),
        ("dispatch", "nccl-counts", "eager"): lambda: counted(sent_TH, counts_G),
        ("combine", "nccl-counts", "eager"): lambda: counted(got_RH, back_G),
    }


def exchange_lines(team: Team, cell: Cell, width: int, fixed: Line, seed: int) -> list[Line]:
    """Dispatch and combine of one batch, ours and NCCL's."""
    batch = draw_batch(team, cell.tokens, width, cell.routing, seed)
    row = (width, torch.bfloat16)
    seat = seat_of(contiguous(team.size, team.size), 0, rank=team.rank, device=team.device)
    group = dist.group.WORLD
    assert group is not None
    exchange = SymmetricExchange(seat, group, top_k=1, row=row, back=row, capacity=cell.tokens)
    wrong: dict[Key, bool] = {}
    samplers: dict[Key, Sampler] = {}
    all_sms = exchange.num_sms
    for impl, sms in (("moesaic", all_sms), ("moesaic-32sm", min(FEW_SMS, all_sms))):
        exchange.limit(sms)
        same, received, back_XH = round_trip(exchange, batch)
        rows = ExpertRows(back_XH, positions(received))
        calls: dict[str, Call] = {
            "dispatch": partial(dispatch, exchange, batch.rows_TH, batch.ids_T1, bound=cell.tokens),
            "combine": partial(combine, exchange, rows, received.handle),
        }
        bad = team.largest(float(not same)) > 0
        for clock, call in calls.items():
            key = (clock, impl, "graph")
            samplers[key] = replay_sampler(team, capture_together(team, [call] * CHAIN))
            wrong[key] = bad
    for key, call in nccl_calls(team, batch).items():
        if key[2] == "graph":
            samplers[key] = replay_sampler(team, capture_together(team, [call] * CHAIN))
        else:
            call()
            samplers[key] = loop_sampler(team, call, 16)
    rounds = 3 if cell.tokens * width > 2**27 else 7
    for sampler in samplers.values():
        sampler()
    timed = take_turns(samplers, rounds=rounds, seed=seed)
    exchange.check()
    moved = batch.busiest_bytes()
    return [
        make_line(
            fixed | {"clock": clock, "impl": impl, "mode": mode, "ranks": team.size},
            **times(found),
            gbps=moved / found.median / 1e6 if moved else None,
            **({"wrong": wrong[clock, impl, mode]} if (clock, impl, mode) in wrong else {}),
        )
        for (clock, impl, mode), found in sorted(timed.items())
    ]


def times(found: Measurement) -> dict[str, Any]:
    """A measurement as a line has it."""
    return {
        "ms": found.median,
        "ms_p20": found.p20,
        "ms_p80": found.p80,
        "samples": found.samples,
    }


def full_weights(
    team: Team, cell: Cell, layer: Layer, shelf: dict[str, ExpertWeights], seed: int
) -> ExpertWeights:
    """All experts of a model, the same on every rank; one model at a time is kept."""
    if cell.model not in shelf:
        shelf.clear()
        if team.device.type == "cuda":
            torch.cuda.empty_cache()
        generator = torch.Generator(team.device).manual_seed(seed)
        dtype = getattr(torch, cell.dtype)
        shelf[cell.model] = make_weights(layer.spec, dtype=dtype, generator=generator)
    return shelf[cell.model]


def layer_lines(
    team: Team,
    cell: Cell,
    layer: Layer,
    shelf: dict[str, ExpertWeights],
    fixed: Line,
    seed: int,
) -> list[Line]:
    """A layer on groups of ranks, all groups at once: its bits against one GPU's, its times."""
    ranks = ranks_of(cell)
    group = team.group(ranks)
    samplers: dict[tuple[str, str], Sampler] = {}
    bad: dict[str, float] = {}
    candidates = {"moesaic": "local"}
    if ranks > 1 and in_graphs(team):
        candidates = {"moesaic": "symmetric", "moesaic-nccl": dist.get_backend()}
    elif ranks > 1:
        candidates = {"moesaic": dist.get_backend()}

    def prepare() -> None:
        weights = full_weights(team, cell, layer, shelf, seed=7)
        calls, wants = layer_calls(team, cell, layer, weights, group, candidates, seed)
        bad.update({impl: float(not torch.equal(call(), wants)) for impl, call in calls.items()})
        for impl, call in calls.items():
            if impl == "moesaic" and in_graphs(team):
                held = capture_together(team, [call] * LAYER_CHAIN)
                held.graph.replay()
                bad[impl] = max(bad[impl], float(not torch.equal(held.first_output, wants)))
                samplers[impl, "graph"] = replay_sampler(team, held)
            else:
                samplers[impl, "eager"] = loop_sampler(team, call, 4)

    error: Exception | None = None
    try:
        prepare()
    except Exception as raised:
        error = raised
    if team.largest(float(error is not None)):
        raise error or RuntimeError("another rank could not prepare this layer")
    wrong = {impl: team.largest(bad.get(impl, 0.0)) > 0 for impl in candidates}
    for sampler in samplers.values():
        sampler()
    timed = take_turns(samplers, rounds=5, seed=seed)
    flops = expert_flops(layer.spec, cell.tokens * layer.top_k)
    return [
        make_line(
            fixed | {"clock": cell.clock, "impl": impl, "mode": mode, "ranks": ranks},
            **times(found),
            tflops=flops / max(found.median, 1e-9) / 1e9,
            wrong=wrong[impl],
        )
        for (impl, mode), found in sorted(timed.items())
    ]


def layer_calls(
    team: Team,
    cell: Cell,
    layer: Layer,
    weights: ExpertWeights,
    group: dist.ProcessGroup | None,
    candidates: Mapping[str, str],
    seed: int,
) -> tuple[dict[str, Call], Tensor]:
    """One call of each candidate on this rank's tokens, and what one GPU makes of them."""
    ranks, spec = ranks_of(cell), layer.spec
    tokens = cell.tokens // ranks
    rank = team.rank % ranks
    generator = torch.Generator(team.device).manual_seed(seed + rank)
    hidden_TH = torch.randn(tokens, spec.hidden_size, device=team.device, generator=generator)
    hidden_TH = hidden_TH.to(getattr(torch, cell.dtype))
    ids_TK = routing_ids(
        cell.routing,
        tokens=tokens,
        num_experts=spec.num_experts,
        top_k=layer.top_k,
        generator=generator,
    )
    shape = (tokens, layer.top_k)
    share_TK = torch.rand(shape, device=team.device, generator=generator).softmax(-1)
    placement = contiguous(spec.num_experts, ranks)
    own = weights if ranks == 1 else take_experts(weights, placement, layer=0, rank=rank)
    calls: dict[str, Call] = {}
    for impl, backend in candidates.items():
        options = Options(backend=backend, capacity=tokens)  # type: ignore[arg-type]
        spread = ExpertParallel(
            spec, placement, own, top_k=layer.top_k, group=group, options=options
        )
        calls[impl] = partial(spread, hidden_TH, ids_TK, share_TK, bound=tokens)
    return calls, moe(hidden_TH, ids_TK, share_TK, weights, spec)
