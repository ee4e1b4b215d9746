"""Suite `ep` on CPU processes over gloo: the same cells in small, to see that they run and agree.

Processes share the cores, so that their times say nothing about scaling; bits do. Nothing is held
in a graph: every line is eager.

    T rows of a rank · H width
"""

from __future__ import annotations

from functools import partial

import torch.distributed as dist

from ..parallel.exchange.base import ExpertRows, combine, dispatch, seat_of
from ..parallel.exchange.collective import FlatExchange
from ..parallel.placement import contiguous
from .exchanges import draw_batch, nccl_calls, positions, round_trip, times
from .ranks import Team, loop_sampler, take_turns
from .results import Line, make_line
from .suite import Cell
from .timing import Call

REPEATS, ROUNDS = 4, 3


def exchange_lines(team: Team, cell: Cell, width: int, fixed: Line, seed: int) -> list[Line]:
    """Dispatch and combine of one batch: ours and bare `all_to_all_single`, both by gloo."""
    batch = draw_batch(team, cell.tokens, width, cell.routing, seed)
    seat = seat_of(contiguous(team.size, team.size), 0, rank=team.rank)
    group = dist.group.WORLD
    assert group is not None
    exchange = FlatExchange(seat, group)
    same, received, back_XH = round_trip(exchange, batch)
    rows = ExpertRows(back_XH, positions(received))
    calls: dict[tuple[str, str], Call] = {
        ("dispatch", "moesaic"): partial(
            dispatch, exchange, batch.rows_TH, batch.ids_T1, bound=cell.tokens
        ),
        ("combine", "moesaic"): partial(combine, exchange, rows, received.handle),
    }
    for (clock, impl, _), call in nccl_calls(team, batch).items():
        calls[clock, impl.replace("nccl", "gloo")] = call
    wrong = team.largest(float(not same)) > 0
    samplers = {key: loop_sampler(team, call, REPEATS) for key, call in calls.items()}
    for sampler in samplers.values():
        sampler()
    moved = batch.busiest_bytes()
    return [
        make_line(
            fixed | {"clock": clock, "impl": impl, "mode": "eager", "ranks": team.size},
            **times(found),
            gbps=moved / found.median / 1e6 if moved else None,
            **({"wrong": wrong} if impl == "moesaic" else {}),
        )
        for (clock, impl), found in sorted(take_turns(samplers, rounds=ROUNDS, seed=seed).items())
    ]
