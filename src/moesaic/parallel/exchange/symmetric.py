"""Exchange by kernels that write into the peers' memory: backend `symmetric`.

No collective, no count, no host: `kernels.push` moves the rows and signals. Every launch has a
fixed shape, so a CUDA graph holds the whole layer, if the exchange exists before the capture and
all ranks replay equally often. Uses of one exchange must stay in the order of one stream; for two
batches at once make two exchanges.

`capacity` tokens a rank fit into the buffers at once; the worst case, all tokens of all ranks to
one of them, needs no more. With fewer than a batch has, the batch goes in as many rounds as it
takes, on every rank alike: slower, never a lost token. `resize` changes it between steps.

On the CPU the same kernels run in Triton's interpreter over a shared file, for tests.

    T tokens · B bound of tokens · K top-k · J = min(K, L) slots a received row may have
    R = G * B received rows · L experts a rank · G ranks · H hidden width
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .base import TIMEOUT_S, ExpertRows, Received, Returned, Seat, at_seat
from .memory import SharedMemory, meet, shared_memory


@dataclass(frozen=True)
class Turn:
    """The handle of one use: how many tokens, and whether the halves are separate launches."""

    tokens: int
    bound: int
    dtype: torch.dtype


def fitting_capacity(recent: Sequence[int], *, headroom: float = 1.25, step: int = 64) -> int:
    """A capacity for `resize` from the tokens that ranks brought lately, a multiple of `step`.

    Batches above it take more rounds and lose nothing.

    >>> fitting_capacity([900, 1000, 1010])
    1280
    """
    wanted = max(recent, default=0) * headroom
    return max(1, -(-int(wanted) // step)) * step


def width_words(width: int, dtype: torch.dtype) -> int:
    """Words of 4 bytes in a row.

    Raises:
        ValueError: rows are not a multiple of 16 bytes.
    """
    num_bytes = width * dtype.itemsize
    if num_bytes % 16:
        raise ValueError(f"rows must be a multiple of 16 bytes, got {width} of {dtype}")
    return num_bytes // 4


@dataclass
class Buffers:
    """What `resize` makes anew and the SM budget, one for all layers that share an exchange."""

    capacity: int
    num_sms: int
    memory: SharedMemory | None = None
    window: Any = None
    position_BK: Tensor | None = None


class SymmetricExchange:
    """Rows pushed into the memory of the peers.

    Args:
        seat: where this rank stands; `place_E` may be overwritten between steps.
        group: all ranks of the placement.
        top_k: K.
        row: width and dtype of a row on its way there.
        back: the same of a row on its way back.
        capacity: tokens a rank that fit at once.
        num_sms: programs of a push, one an SM; None: all SMs.
        timeout_s: how long to wait for a peer before `check` raises and outputs become NaN, and
            before the making of buffers raises.

    Raises:
        ValueError: rows that are not a multiple of 16 bytes, a budget under one SM a rank.
        RuntimeError: the ranks cannot reach each other's memory, or one did not come in time.
    """

    def __init__(
        self,
        seat: Seat,
        group: dist.ProcessGroup,
        *,
        top_k: int,
        row: tuple[int, torch.dtype],
        back: tuple[int, torch.dtype],
        capacity: int,
        num_sms: int | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self.seat, self.group, self.top_k = seat, group, top_k
        self.row, self.back = row, back
        self.device = seat.place_E.device  # of a tensor, so that a GPU has its index
        self.timeout_s = timeout_s
        self.timeout_us = min(round(timeout_s * 1e6), 2**31 - 1)
        self.words = (width_words(*row), width_words(*back))
        self.tiles: dict[tuple[int, int], Any] = {}
        self.buffers = Buffers(capacity, 0)
        self.limit(num_sms)
        self.resize(capacity)

    def at(self, seat: Seat) -> SymmetricExchange:
        """See `Exchange`; who resizes one resizes all of them."""
        return at_seat(self, seat)

    def resize(self, capacity: int) -> None:
        """Make new buffers for `capacity` tokens a rank; a collective, and graphs become stale.

        Raises:
            ValueError: the capacity is not positive, or its rows are over 2**31.
            RuntimeError: a rank did not come in time.
        """
        from ...kernels.peers import Region, Window

        width = min(self.top_k, self.seat.local)
        if not capacity >= 1 or capacity * self.seat.ranks * width >= 2**31:
            raise ValueError(f"capacity must be positive, with slots under 2**31, got {capacity}")
        region = Region.of(
            ranks=self.seat.ranks,
            bound=capacity,
            top_k=self.top_k,
            width=width,
            in_words=self.words[0],
            back_words=self.words[1],
        )
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        made = self.buffers
        made.capacity, made.memory = capacity, None
        made.memory = shared_memory(region.num_bytes, self.group, self.device, self.timeout_s)
        made.window = Window(
            base_G=torch.tensor(made.memory.addresses_G, dtype=torch.int64, device=self.device),
            seen_2G=torch.zeros((2, self.seat.ranks), dtype=torch.int32, device=self.device),
            region=region,
            rank=self.seat.rank,
            top_k=self.top_k,
            width=width,
            local=self.seat.local,
            timeout_us=self.timeout_us,
        )
        shape = (capacity, self.top_k)
        made.position_BK = torch.empty(shape, dtype=torch.int32, device=self.device)
        meet(self.group, "ready", self.timeout_s)

    @property
    def capacity(self) -> int:
        """Tokens a rank that fit at once."""
        return self.buffers.capacity

    @property
    def window(self) -> Any:
        """Where the kernels find the peers."""
        return self.buffers.window

    @property
    def num_bytes(self) -> int:
        """Bytes of this rank's buffers."""
        num_bytes: int = self.window.region.num_bytes
        return num_bytes

    @property
    def fused(self) -> bool:
        """Whether one launch may push and wait: the interpreter runs programs one after another."""
        return self.device.type == "cuda"

    def parts(self, tokens: int, bound: int) -> list[slice]:
        """The tokens of each round of at most `capacity`.

        Raises:
            ValueError: more tokens than `bound`.
        """
        if tokens > bound:
            raise ValueError(
                f"rank {self.seat.rank} brings {tokens} tokens, the bound is {bound}; pass the "
                "most tokens of any rank as bound, the same number on every rank"
            )
        starts = range(0, max(1, bound), self.capacity)
        return [slice(min(i, tokens), min(i + self.capacity, tokens)) for i in starts]

    def _region(self, at: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = torch.Size(shape).numel() * dtype.itemsize
        assert self.buffers.memory is not None
        return self.buffers.memory.own[at : at + size].view(dtype).view(shape)

    def tile(self, rows: int, words: int) -> Any:
        """How a push of so many candidates a peer is cut; kept, and may be set by measurements."""
        from ...kernels.peers import plan_push

        key = (rows, words)
        if key not in self.tiles:
            ranks, device = self.seat.ranks, self.device
            deep = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)
            self.tiles[key] = plan_push(max(1, rows), words, ranks, self.num_sms, deep=deep)
        return self.tiles[key]

    @property
    def num_sms(self) -> int:
        """Programs of a push, one an SM."""
        return self.buffers.num_sms

    @num_sms.setter
    def num_sms(self, num_sms: int) -> None:
        self.limit(num_sms)

    def limit(self, num_sms: int | None) -> None:
        """Another SM budget for the pushes to come, None: all SMs; graphs keep what they have.

        Raises:
            ValueError: under one SM a rank.
        """
        from ...kernels.device import sm_count

        wanted = num_sms or max(sm_count(self.device), self.seat.ranks)
        if wanted < self.seat.ranks:
            least = self.seat.ranks
            raise ValueError(f"num_sms must be at least one a rank, {least}, got {num_sms}")
        self.buffers.num_sms = wanted
        self.tiles.clear()

    def _push(
        self, hidden_TH: Tensor, topk_ids_TK: Tensor, bound: int | None, wait_too: bool
    ) -> Turn:
        from ...kernels.push import push_tokens

        assert self.buffers.position_BK is not None
        if self.device.type == "cuda" and self.device.index != torch.cuda.current_device():
            raise RuntimeError(
                f"the exchange is on {self.device}, the current device is another; "
                f"call torch.cuda.set_device({self.device.index}) first"
            )
        bound = self.capacity if bound is None else min(bound, self.capacity)
        tokens = hidden_TH.shape[0]
        if tokens > bound or topk_ids_TK.shape != (tokens, self.top_k):
            raise ValueError(
                f"at most {bound} tokens of {self.top_k} ids go in one round, got {tokens} with "
                f"ids {tuple(topk_ids_TK.shape)}; take the slices of parts()"
            )
        if (hidden_TH.shape[1], hidden_TH.dtype) != self.row:
            raise ValueError(f"rows must be {self.row}, got {hidden_TH.shape[1]} {hidden_TH.dtype}")
        push_tokens(
            self.window,
            hidden_TH.contiguous().view(torch.int32),
            topk_ids_TK.contiguous(),
            self.seat.place_E,
            self.buffers.position_BK,
            bound=bound,
            tile=self.tile(bound, self.words[0]),
            wait_too=wait_too,
        )
        return Turn(tokens, bound, self.back[1])

    def send(self, hidden_TH: Tensor, topk_ids_TK: Tensor, *, bound: int | None = None) -> Turn:
        """See `Exchange`; does not wait for anything."""
        return self._push(hidden_TH, topk_ids_TK, bound, False)

    def receive(self, handle: Turn) -> Received:
        """See `Exchange`; the device waits, the host does not."""
        from ...kernels.push import wait_for

        wait_for(self.window, 0)
        return self._received(handle)

    def dispatch(
        self, hidden_TH: Tensor, topk_ids_TK: Tensor, *, bound: int | None = None
    ) -> Received:
        """`send` and `receive` in one launch."""
        turn = self._push(hidden_TH, topk_ids_TK, bound, self.fused)
        return self._received(turn) if self.fused else self.receive(turn)

    def _received(self, turn: Turn) -> Received:
        region, rows = self.window.region, self.seat.ranks * turn.bound
        rows_RH = self._region(region.rows_at, (rows, self.row[0]), self.row[1])
        ids_RJ = self._region(region.ids_at, (rows, self.window.width), torch.int32)
        return Received(rows_RH, ids_RJ, turn)

    def _push_back(self, rows: ExpertRows, handle: Turn, wait_too: bool) -> None:
        from ...kernels.push import push_rows

        if (rows.rows_XH.shape[1], rows.rows_XH.dtype) != self.back:
            got = f"{rows.rows_XH.shape[1]} {rows.rows_XH.dtype}"
            raise ValueError(f"rows that go back must be {self.back}, got {got}")
        push_rows(
            self.window,
            rows.rows_XH.contiguous().view(torch.int32),
            rows.position_RJ.to(torch.int32).contiguous(),
            bound=handle.bound,
            tile=self.tile(handle.bound * self.window.width, self.words[1]),
            wait_too=wait_too,
        )

    def send_back(self, rows: ExpertRows, handle: Turn) -> None:
        """See `Exchange`; does not wait for anything."""
        self._push_back(rows, handle, False)

    def receive_back(self, handle: Turn) -> Returned:
        """See `Exchange`; the device waits, the host does not."""
        from ...kernels.push import wait_for

        wait_for(self.window, 1, spoiled=handle.bound * self.top_k * self.words[1])
        return self._returned(handle)

    def combine(self, rows: ExpertRows, handle: Turn) -> Returned:
        """`send_back` and `receive_back` in one launch."""
        self._push_back(rows, handle, self.fused)
        return self._returned(handle) if self.fused else self.receive_back(handle)

    def _returned(self, turn: Turn) -> Returned:
        shape = (turn.bound * self.top_k, self.back[0])
        rows_XH = self._region(self.window.region.back_at, shape, self.back[1])
        assert self.buffers.position_BK is not None
        return Returned(rows_XH, self.buffers.position_BK[: turn.tokens])

    def check(self) -> None:
        """Wait for the device and raise if a peer did not come in time.

        Raises:
            RuntimeError: which rank was missed; outputs since then are NaN.
        """
        at = self.window.flags_at(2)
        status = int(self._region(at, (1,), torch.int32).item())
        if status:
            raise RuntimeError(
                f"rank {self.seat.rank}: rank {status - 1} sent nothing for "
                f"{self.timeout_us / 1e6:g} s; outputs since then are NaN; restart the group"
            )
