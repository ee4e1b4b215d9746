"""The exchange of one rank: nothing moves."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import ExpertRows, Received, Returned, Seat, places_of


class LocalExchange:
    """Every expert is here; rows pass through.

    Raises:
        ValueError: the seat is one of several.
    """

    def __init__(self, seat: Seat) -> None:
        if seat.ranks != 1:
            raise ValueError(f"backend 'local' needs a placement over 1 rank, got {seat.ranks}")
        self.seat = seat

    def at(self, seat: Seat) -> LocalExchange:
        """See `Exchange`."""
        return LocalExchange(seat)

    def parts(self, tokens: int, bound: int) -> list[slice]:
        """One round."""
        return [slice(0, tokens)]

    def send(
        self, hidden_TH: Tensor, topk_ids_TK: Tensor, *, bound: int | None = None
    ) -> list[Tensor | Returned]:
        """See `Exchange`; the handle carries what passes."""
        return [hidden_TH, places_of(topk_ids_TK, self.seat).to(torch.int32)]

    def receive(self, handle: list[Tensor | Returned]) -> Received:
        """See `Exchange`."""
        hidden_TH, ids_TK = handle[0], handle[1]
        assert isinstance(hidden_TH, Tensor) and isinstance(ids_TK, Tensor)
        return Received(hidden_TH, ids_TK, handle)

    def send_back(self, rows: ExpertRows, handle: list[Tensor | Returned]) -> None:
        """See `Exchange`."""
        handle.append(Returned(*rows))

    def receive_back(self, handle: list[Tensor | Returned]) -> Returned:
        """See `Exchange`."""
        returned = handle.pop()
        assert isinstance(returned, Returned)
        return returned
