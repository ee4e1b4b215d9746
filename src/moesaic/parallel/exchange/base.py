"""What every exchange does: send tokens to the ranks of their experts, bring rows back.

    hidden_TH, ids_TK ─ send ─► receive ─► rows_RH, ids_RJ ─ experts ─► send_back ─► receive_back

`dispatch` is both halves of the way there, `combine` both halves of the way back; between the
halves of one exchange other work may run. A token goes once to each rank that has any of its
experts; on the way back every (token, slot) is a row of its own, never a partial sum, so that the
sum over k is the one of a single process: same order, same rounding, same bits.

    T tokens · K top-k · R received rows · J slots a received row may have · X expert rows
    H hidden width · E experts · L experts a rank · G ranks

>>> placement = Placement(ranks=2, layers=(((0,), (1,), (0,)),))
>>> seat_of(placement, 0, rank=0).place_E.tolist()  # rank * L + index there, L = 2
[0, 2, 1]
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from ..placement import Placement

TIMEOUT_S = 120.0
"""How long a rank waits for another, unless told otherwise."""


class Received(NamedTuple):
    """What `receive` gives: rows (R, H), the local experts each is for, and the handle."""

    rows_RH: Tensor
    ids_RJ: Tensor
    """int32: index of a local expert, or -1. A row without any is undefined."""
    handle: Any

    def counts_L(self, local: int) -> Tensor:
        """Slots of each local expert, int64 (L,), on the device, without waiting for it."""
        bins = torch.zeros(local + 1, dtype=torch.int64, device=self.ids_RJ.device)
        index_S = self.ids_RJ.flatten().long() + 1
        return bins.scatter_add_(0, index_S, torch.ones_like(index_S))[1:]


class ExpertRows(NamedTuple):
    """Rows of the experts: slot (r, j) of what was received is row position_RJ[r, j], or -1."""

    rows_XH: Tensor
    position_RJ: Tensor


class Returned(NamedTuple):
    """Rows that came back: slot (t, k) is row position_TK[t, k], or -1 where it is of nobody."""

    rows_XH: Tensor
    position_TK: Tensor


@dataclass
class Wire:
    """Bytes this rank has sent to each other rank, in both directions of the exchange."""

    dispatch: dict[int, int] = field(default_factory=dict)
    combine: dict[int, int] = field(default_factory=dict)

    def to(self, ranks: Sequence[int]) -> int:
        """Bytes sent to any of `ranks`."""
        return sum(way.get(rank, 0) for way in (self.dispatch, self.combine) for rank in ranks)


class Exchange(Protocol):
    """One way to move rows between the ranks of a group.

    Every rank calls the same methods in the same order; between `send` and `receive`, and between
    `send_back` and `receive_back`, anything may run that does not use the same exchange.
    """

    def at(self, seat: Seat) -> Exchange:
        """The same exchange for another layer of as many experts a rank; buffers are shared.

        Raises:
            ValueError: the seat is of another rank or another number of experts a rank.
        """
        ...

    def parts(self, tokens: int, bound: int) -> list[slice]:
        """The tokens of each round, as many rounds on every rank; `bound`: the most of any rank.

        Raises:
            ValueError: more tokens than `bound`, where that limits them.
        """
        ...

    def send(self, hidden_TH: Tensor, topk_ids_TK: Tensor, *, bound: int | None = None) -> Any:
        """Start the way there; returns a handle.

        Args:
            hidden_TH: contiguous.
            topk_ids_TK: int32 or int64; a slot outside [0, E) is of nobody.
            bound: the most tokens that any rank sends, the same number on every rank.
        """
        ...

    def receive(self, handle: Any) -> Received:
        """Finish the way there."""
        ...

    def send_back(self, rows: ExpertRows, handle: Any) -> None:
        """Start the way back."""
        ...

    def receive_back(self, handle: Any) -> Returned:
        """Finish the way back."""
        ...


def dispatch(
    exchange: Exchange, hidden_TH: Tensor, topk_ids_TK: Tensor, *, bound: int | None = None
) -> Received:
    """The whole way there; one launch where the exchange can."""
    whole = getattr(exchange, "dispatch", None)
    if whole is not None:
        received: Received = whole(hidden_TH, topk_ids_TK, bound=bound)
        return received
    return exchange.receive(exchange.send(hidden_TH, topk_ids_TK, bound=bound))


def combine(exchange: Exchange, rows: ExpertRows, handle: Any) -> Returned:
    """The whole way back; one launch where the exchange can."""
    whole = getattr(exchange, "combine", None)
    if whole is not None:
        returned: Returned = whole(rows, handle)
        return returned
    exchange.send_back(rows, handle)
    return exchange.receive_back(handle)


class Seated(Protocol):
    """What has a seat."""

    seat: Seat


Kind = TypeVar("Kind", bound=Seated)


class Seat(NamedTuple):
    """Where one rank stands in a layer: how many ranks, experts a rank, and where to send."""

    rank: int
    ranks: int
    local: int
    """L: the most experts that one rank holds."""
    place_E: Tensor
    """int32: ``rank * L + index there`` of the replica of each expert that serves this rank."""


def seat_of(
    placement: Placement, layer: int, *, rank: int, device: torch.device | str = "cpu"
) -> Seat:
    """The seat of `rank` in a layer of a placement.

    Raises:
        ValueError: the placement has no such rank or layer.
    """
    if not 0 <= rank < placement.ranks or not 0 <= layer < placement.num_layers:
        raise ValueError(
            f"rank and layer must be in [0, {placement.ranks}) and [0, {placement.num_layers}), "
            f"got {rank} and {layer}"
        )
    local = placement.slots(layer)
    index = [{e: i for i, e in enumerate(own)} for own in placement.hosted(layer)]
    hosts = placement.destinations(layer)[rank].tolist()
    place = [host * local + index[host][expert] for expert, host in enumerate(hosts)]
    return Seat(rank, placement.ranks, local, torch.tensor(place, dtype=torch.int32, device=device))


def at_seat(exchange: Kind, seat: Seat) -> Kind:
    """The same exchange for another seat, see `Exchange.at`.

    Raises:
        ValueError: the seats differ in what an exchange is made for.
    """
    old = exchange.seat
    if seat[:3] != old[:3] or seat.place_E.device != old.place_E.device:
        raise ValueError(
            "layers that share an exchange must have the same rank, ranks, experts a rank and "
            f"device, got {(*seat[:3], seat.place_E.device)} and {(*old[:3], old.place_E.device)}"
        )
    other = copy(exchange)
    other.seat = seat
    return other


def places_of(topk_ids_TK: Tensor, seat: Seat) -> Tensor:
    """Place of each slot, int64 (T, K), -1 where the slot is of nobody."""
    ids_TK = topk_ids_TK.long()
    valid_TK = (ids_TK >= 0) & (ids_TK < seat.place_E.numel())
    return torch.where(valid_TK, seat.place_E.long()[ids_TK * valid_TK], -1)
