"""Two batches in flight: the exchange of one beside the experts of the other, each on its slices.

    T tokens · H hidden width · K top-k

While the experts of one batch compute, rows of the other travel, and the other way round. The
exchange and the experts of a rank are two slice groups (`sides`) whose sizes a policy finds from
their time(SMs) curves; `follow_plan` gives both their budgets, or takes them away where the plan is
not to slice, and `side_by_side` runs layers so on two streams, of green contexts if seats say so.
Each batch has layers with an exchange of its own. Bits are those of the batches one after the other
under any sizes: budgets and streams move when work runs, never what is summed.

    stream of the exchange   there A   there B   back A, there A'   back B, there B'
    stream of the experts              experts A   experts B          experts A'

>>> exchange, experts = sides()
>>> exchange.kind, options_of(Plan(policy="t", reason=""), Options(num_sms=8)).num_sms
('exchange', None)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..runtime.plan import Plan, SliceGroup
from ..runtime.seats import Seat
from ..runtime.streams import CudaLanes, Lanes, open_lanes
from .exchange.base import combine, dispatch
from .expert_parallel import ExpertParallel, Options
from .rows import weigh

EXCHANGE, EXPERTS = "exchange", "experts"
Route = Callable[[int, int, Tensor], tuple[Tensor, Tensor]]
Two = tuple[ExpertParallel, ExpertParallel]


def sides() -> tuple[SliceGroup, SliceGroup]:
    """The exchange and the experts of a rank as slice groups; their curves have their names."""
    return (
        SliceGroup(name=EXCHANGE, kind="exchange", curve=EXCHANGE, priority=1),
        SliceGroup(name=EXPERTS, kind="hot", curve=EXPERTS),
    )


def options_of(plan: Plan, options: Options) -> Options:
    """The options with the SM budgets of a plan for `sides`; no budgets where it does not slice."""
    sizes = plan.sizes
    return options._replace(num_sms=sizes.get(EXCHANGE), expert_sms=sizes.get(EXPERTS))


def follow_plan(layer: ExpertParallel, plan: Plan) -> None:
    """Give a layer the budgets of a plan, between steps; graphs captured before keep theirs.

    Layers that share an exchange share its budget.

    Raises:
        RuntimeError: the plan slices, and the layer's exchange obeys no budget.
    """
    options = options_of(plan, layer.options)
    limit = getattr(layer.exchange, "limit", None)
    if limit is not None:
        limit(options.num_sms)
    elif options.num_sms is not None:
        raise RuntimeError(
            f"{type(layer.exchange).__name__} obeys no SM budget; use backend 'symmetric'"
        )
    layer.options = options


def side_by_side(
    layers: Sequence[Two],
    batches_TH: Sequence[Tensor],
    route: Route,
    *,
    seats: tuple[Seat, Seat] | None = None,
    bound: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Two batches through layers of experts; what each gives is as if it had been alone.

    Args:
        layers: of each, one for either batch, whose exchanges are two; inference only, one round.
        batches_TH: the hidden states of either batch on this rank.
        route: (layer, batch, hidden) to expert ids and weights (T, K); runs between two layers, as
            attention and norms would have to.
        seats: where the exchange runs and where the experts; None: two streams on the whole GPU.
        bound: as in `ExpertParallel.forward`.

    Raises:
        ValueError: the two batches of a layer have the same exchange.
    """
    if any(first.exchange is second.exchange for first, second in layers):
        raise ValueError("two batches in flight need two exchanges a layer, got the same one twice")
    turns = [_Turn(number, b, pair[b]) for number, pair in enumerate(layers) for b in (0, 1)]
    out = list(batches_TH)
    line = _Line(batches_TH[0].device, seats)

    def there(turn: _Turn) -> None:
        hidden_TH = out[turn.batch]
        turn.bound = turn.layer.options.capacity if bound is None else bound
        ids_TK, turn.weights_TK = route(turn.number, turn.batch, hidden_TH)
        rows_TH = turn.layer.pack(hidden_TH)
        turn.received = dispatch(turn.layer.exchange, rows_TH, ids_TK, bound=turn.bound)

    def compute(turn: _Turn) -> None:
        turn.rows = turn.layer.compute(turn.received, turn.bound, out[turn.batch].dtype)

    def back(turn: _Turn) -> None:
        returned = combine(turn.layer.exchange, turn.rows, turn.received.handle)
        dtype = out[turn.batch].dtype
        turn.out_TH = out[turn.batch] = weigh(returned, turn.weights_TK, dtype)

    with torch.no_grad(), line.lanes.fork([0, 1]):
        arrived = [line.run(0, there, turn) for turn in turns[:2]]
        for place, turn in enumerate(turns):
            computed = line.run(1, compute, turn, after=arrived[place])
            line.run(0, back, turn, after=computed)
            arrived += [line.run(0, there, later) for later in turns[place + 2 : place + 3]]
    return out[0], out[1]


@dataclass
class _Turn:
    """One layer of one batch, and all that it made: memory that one stream made and the other
    reads, which must not be made again before both streams have met.
    """

    number: int
    batch: int
    layer: ExpertParallel
    bound: int = 0
    weights_TK: Any = None
    received: Any = None
    rows: Any = None
    out_TH: Any = None


class _Line:
    """The stream of the exchange and that of the experts, ordered by events alone."""

    def __init__(self, device: torch.device, seats: tuple[Seat, Seat] | None) -> None:
        self._on = device.type == "cuda"
        self.lanes: Lanes = open_lanes(device, 2, "two batches")
        if self._on and seats is not None:
            self.lanes = CudaLanes.of(device, [seat.stream for seat in seats])

    def run(self, lane: int, work: Callable[[_Turn], None], turn: _Turn, after: Any = None) -> Any:
        """Queue work on a lane after an event; gives the event of its end, None without streams."""
        with self.lanes.on(lane):
            if after is not None:
                torch.cuda.current_stream().wait_event(after)
            work(turn)
            if not self._on:
                return None
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            return event
