"""Exchange by `all_to_all_single` (gloo or NCCL): flat, or node by node.

One *hop* moves rows inside a group: each row once to every member that has any of its slots, rows
sorted by destination and there by the first expert they are for. A flat exchange is one hop. A
two-level exchange is two: to each destination *node* (to the member of the same index there), then
on to the ranks of that node, so that a token crosses the network once a node.

Splits are arguments on the host: after the counts are exchanged, on a stream of their own, the host
waits for them. What the compute stream still has queued goes on meanwhile. This is the one place of
the data path that reads the device; backend `symmetric` does not.

    T tokens · K top-k · R received rows · S live slots of them · N rows sent · G members · H width
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from .base import (
    TIMEOUT_S,
    ExpertRows,
    Received,
    Returned,
    Seat,
    Wire,
    at_seat,
    places_of,
)

MAX_LABEL = 1 << 32


@dataclass
class Trip:
    """What a hop remembers for the way back."""

    slots_N: Tensor
    """Slot t * K + k of each row expected back, in the order in which they come."""
    back_splits: list[int]
    home_splits: list[int]
    shape_TK: tuple[int, int]
    returned: Tensor | None = None
    work: dist.Work | None = None
    kept: tuple[Tensor, ...] = ()


@dataclass
class Arrival:
    """Rows on their way in: what `Hop.finish` waits for."""

    rows_RH: Tensor
    label_RK: Tensor
    works: list[dist.Work]
    kept: tuple[Tensor, ...]
    trip: Trip


def first_of_each(dest_TK: Tensor) -> Tensor:
    """Where a slot is the first of its token to its destination; False where it has none.

    >>> first_of_each(torch.tensor([[2, 0, 2], [-1, 1, 1]])).tolist()
    [[True, True, False], [False, True, False]]
    """
    same_TKK = dest_TK[:, :, None] == dest_TK[:, None, :]
    again_TK = same_TKK.tril(-1).any(-1)
    return (dest_TK >= 0) & ~again_TK


def select(mask: Tensor, count: int) -> Tensor:
    """Flat indices of the `count` true values of a mask, ascending, without asking the device."""
    if mask.device.type == "cpu":
        return mask.flatten().nonzero()[:, 0]
    return (~mask).flatten().to(torch.uint8).argsort(stable=True)[:count]


def tally(index: Tensor, bins: int) -> Tensor:
    """How often each of [0, bins) occurs; -1 counts for nobody. int64, no host read."""
    index_S = index.flatten() + 1
    zeros = torch.zeros(bins + 1, dtype=torch.int64, device=index.device)
    return zeros.scatter_add_(0, index_S, torch.ones_like(index_S))[1:]


class Hop:
    """Moves rows inside one process group and brings others back.

    Whatever the host waits for, it waits for `timeout_s` at most, then raises RuntimeError. What a
    GPU's stream waits for, NCCL's watchdog ends after the time-out of the group.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, timeout_s: float) -> None:
        self.group, self.device, self.timeout_s = group, device, timeout_s
        self.members = dist.get_process_group_ranks(group)
        on_gpu = device.type == "cuda"
        self.side = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]

    def _counts(self, sent_G2: Tensor) -> tuple[list[list[int]], list[list[int]]]:
        """Exchange counts; those sent and those to come, on the host."""
        if self.side is None:
            coming_G2 = torch.empty_like(sent_G2)
            work = dist.all_to_all_single(coming_G2, sent_G2, group=self.group, async_op=True)
            self.wait(work)
            return sent_G2.tolist(), coming_G2.tolist()
        self.side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.side):
            coming_G2 = torch.empty_like(sent_G2)
            dist.all_to_all_single(coming_G2, sent_G2, group=self.group)
            both = torch.stack((sent_G2, coming_G2)).to("cpu", non_blocking=True)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
        sent_G2.record_stream(self.side)
        self.wait_event(done)
        sent, coming = both.tolist()
        return sent, coming

    def wait(self, work: dist.Work) -> None:
        """Wait for a collective: the host with gloo, the stream with NCCL."""
        if self.device.type == "cpu":
            work.wait(timedelta(seconds=self.timeout_s))
        else:
            work.wait()

    def wait_event(self, event: torch.cuda.Event) -> None:
        """Wait on the host for what the other ranks send.

        Raises:
            RuntimeError: it did not come in time.
        """
        until = time.monotonic() + self.timeout_s
        while not event.query():  # type: ignore[no-untyped-call]
            if time.monotonic() > until:
                raise RuntimeError(
                    f"rank {dist.get_rank(self.group)}: the counts of ranks {self.members} did not "
                    f"come in {self.timeout_s:g} s; every rank must call the layer equally often; "
                    "restart the group"
                )

    def start(
        self, rows_TH: Tensor, dest_TK: Tensor, label_TK: Tensor, wire: dict[int, int]
    ) -> Arrival:
        """Send each row to every member in `dest_TK` (-1: nobody) with its labels for it."""
        size = len(self.members)
        first_TK = first_of_each(dest_TK)
        rows_to = torch.where(first_TK, dest_TK, -1)
        sent, coming = self._counts(torch.stack((tally(rows_to, size), tally(dest_TK, size)), 1))
        out_splits, in_splits = [s[0] for s in sent], [c[0] for c in coming]
        count, top_k = sum(out_splits), dest_TK.shape[1]
        last = torch.iinfo(torch.int64).max
        key_S = torch.where(first_TK, dest_TK * MAX_LABEL + label_TK, last).flatten()
        order_N = key_S.argsort(stable=True)[:count]
        token_N = order_N // top_k
        here_NK = dest_TK[token_N] == dest_TK.flatten()[order_N][:, None]
        label_NK = torch.where(here_NK, label_TK[token_N], -1).to(torch.int32)
        send_NH = rows_TH[token_N]
        rows_RH = rows_TH.new_empty((sum(in_splits), rows_TH.shape[1]))
        label_RK = label_NK.new_empty((sum(in_splits), top_k))
        works = [
            dist.all_to_all_single(
                out, data, in_splits, out_splits, group=self.group, async_op=True
            )
            for out, data in ((rows_RH, send_NH), (label_RK, label_NK))
        ]
        row_bytes = send_NH.shape[1] * send_NH.element_size() + 4 * top_k
        self._account(wire, out_splits, row_bytes)
        slot_NK = token_N[:, None] * top_k + torch.arange(top_k, device=token_N.device)
        slots = sum(s[1] for s in sent)
        trip = Trip(
            slots_N=slot_NK.flatten()[select(here_NK, slots)],
            back_splits=[s[1] for s in sent],
            home_splits=[c[1] for c in coming],
            shape_TK=(dest_TK.shape[0], top_k),
        )
        return Arrival(rows_RH, label_RK, works, (send_NH, label_NK), trip)

    def _account(self, wire: dict[int, int], splits: list[int], row_bytes: int) -> None:
        own = dist.get_rank(self.group)
        for index, count in enumerate(splits):
            if index != own and count:
                to = self.members[index]
                wire[to] = wire.get(to, 0) + count * row_bytes

    def finish(self, arrival: Arrival) -> tuple[Tensor, Tensor]:
        """Wait for the rows: (R, H) and labels int32 (R, K), -1 where a slot is not for here."""
        for work in arrival.works:
            self.wait(work)
        arrival.kept = ()
        return arrival.rows_RH, arrival.label_RK

    def start_back(
        self, rows_XH: Tensor, position_RK: Tensor, trip: Trip, wire: dict[int, int]
    ) -> None:
        """Send the row of every live slot to where its token came from."""
        live_S = select(position_RK >= 0, sum(trip.home_splits))
        send_SH = rows_XH[position_RK.flatten()[live_S].long()]
        trip.returned = rows_XH.new_empty((sum(trip.back_splits), rows_XH.shape[1]))
        trip.work = dist.all_to_all_single(
            trip.returned,
            send_SH,
            trip.back_splits,
            trip.home_splits,
            group=self.group,
            async_op=True,
        )
        trip.kept = (send_SH,)
        self._account(wire, trip.home_splits, rows_XH.shape[1] * rows_XH.element_size())

    def finish_back(self, trip: Trip) -> Returned:
        """Wait for the rows that come back, and say which slot each is of."""
        if trip.work is None or trip.returned is None:
            raise RuntimeError("receive_back needs send_back with the same handle before it")
        self.wait(trip.work)
        rows_XH, trip.returned, trip.work, trip.kept = trip.returned, None, None, ()
        tokens, top_k = trip.shape_TK
        position_S = torch.full((tokens * top_k,), -1, dtype=torch.int32, device=rows_XH.device)
        index_N = torch.arange(rows_XH.shape[0], dtype=torch.int32, device=rows_XH.device)
        position_S[trip.slots_N] = index_N
        return Returned(rows_XH, position_S.view(tokens, top_k))


class FlatExchange:
    """One hop over all ranks: backends `gloo` and `nccl`."""

    def __init__(
        self, seat: Seat, group: dist.ProcessGroup, *, timeout_s: float = TIMEOUT_S
    ) -> None:
        self.seat, self.wire = seat, Wire()
        self.hop = Hop(group, seat.place_E.device, timeout_s)

    def at(self, seat: Seat) -> FlatExchange:
        """See `Exchange`."""
        return at_seat(self, seat)

    def parts(self, tokens: int, bound: int) -> list[slice]:
        """One round."""
        return [slice(0, tokens)]

    def send(self, hidden_TH: Tensor, topk_ids_TK: Tensor, *, bound: int | None = None) -> Arrival:
        """See `Exchange`; the host waits for the counts."""
        place_TK = places_of(topk_ids_TK, self.seat)
        dest_TK = torch.where(place_TK >= 0, place_TK // self.seat.local, -1)
        return self.hop.start(hidden_TH, dest_TK, place_TK % self.seat.local, self.wire.dispatch)

    def receive(self, handle: Arrival) -> Received:
        """See `Exchange`."""
        return Received(*self.hop.finish(handle), handle)

    def send_back(self, rows: ExpertRows, handle: Arrival) -> None:
        """See `Exchange`."""
        self.hop.start_back(rows.rows_XH, rows.position_RJ, handle.trip, self.wire.combine)

    def receive_back(self, handle: Arrival) -> Returned:
        """See `Exchange`."""
        return self.hop.finish_back(handle.trip)


@dataclass
class Journey:
    """The handle of a two-level exchange: the hop to the node, then the one inside it."""

    outer: Arrival
    inner: Arrival | None = None


class TwoLevelExchange:
    """To each destination node once, then to the ranks of that node.

    Ranks are numbered node by node: rank = node * per_node + index. `outer` joins the ranks of this
    rank's index on every node, `inner` those of this rank's node; see `node_groups`.
    """

    def __init__(
        self,
        seat: Seat,
        outer: dist.ProcessGroup,
        inner: dist.ProcessGroup,
        *,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self.seat, self.wire = seat, Wire()
        device = seat.place_E.device
        self.outer, self.inner = (Hop(g, device, timeout_s) for g in (outer, inner))
        self.per_node = len(self.inner.members)
        if self.per_node * len(self.outer.members) != seat.ranks:
            raise ValueError(
                f"{len(self.outer.members)} nodes of {self.per_node} ranks must be the "
                f"{seat.ranks} ranks of the placement"
            )

    def at(self, seat: Seat) -> TwoLevelExchange:
        """See `Exchange`."""
        return at_seat(self, seat)

    def parts(self, tokens: int, bound: int) -> list[slice]:
        """One round."""
        return [slice(0, tokens)]

    def send(self, hidden_TH: Tensor, topk_ids_TK: Tensor, *, bound: int | None = None) -> Journey:
        """See `Exchange`; starts the hop between the nodes."""
        place_TK = places_of(topk_ids_TK, self.seat)
        node_TK = torch.where(place_TK >= 0, place_TK // (self.seat.local * self.per_node), -1)
        return Journey(self.outer.start(hidden_TH, node_TK, place_TK, self.wire.dispatch))

    def receive(self, handle: Journey) -> Received:
        """See `Exchange`; forwards inside the node."""
        rows_RH, place_RK = self.outer.finish(handle.outer)
        local, place_RK = self.seat.local, place_RK.long()
        dest_RK = torch.where(place_RK >= 0, place_RK // local % self.per_node, -1)
        handle.inner = self.inner.start(rows_RH, dest_RK, place_RK % local, self.wire.dispatch)
        return Received(*self.inner.finish(handle.inner), handle)

    def send_back(self, rows: ExpertRows, handle: Journey) -> None:
        """See `Exchange`; gathers inside the node, then starts the hop between the nodes."""
        if handle.inner is None:
            raise RuntimeError("send_back needs receive with the same handle before it")
        wire = self.wire.combine
        self.inner.start_back(rows.rows_XH, rows.position_RJ, handle.inner.trip, wire)
        gathered = self.inner.finish_back(handle.inner.trip)
        self.outer.start_back(gathered.rows_XH, gathered.position_TK, handle.outer.trip, wire)

    def receive_back(self, handle: Journey) -> Returned:
        """See `Exchange`."""
        return self.outer.finish_back(handle.outer.trip)


def node_groups(
    group: dist.ProcessGroup, per_node: int
) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """The outer and inner groups of this rank for nodes of `per_node` ranks; every rank calls it.

    Raises:
        ValueError: `per_node` does not divide the group.
    """
    members = dist.get_process_group_ranks(group)
    if per_node < 1 or len(members) % per_node:
        raise ValueError(f"ranks a node must divide {len(members)}, got {per_node}")
    inner = [members[i : i + per_node] for i in range(0, len(members), per_node)]
    outer = [list(ranks) for ranks in zip(*inner, strict=True)]
    found: list[dist.ProcessGroup] = []
    for grid in (outer, inner):
        mine, _ = dist.new_subgroups_by_enumeration(grid)  # type: ignore[no-untyped-call]
        assert mine is not None
        found.append(mine)
    return found[0], found[1]
