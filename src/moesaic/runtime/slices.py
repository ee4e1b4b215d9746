"""The slice manager: who holds which slices of the GPU, how much memory, and who must give way.

The algorithm is that of the expert-slicing paper: a group that holds slices keeps what it has; free
slices are given least utilised first; where they do not suffice, groups of lower priority are
evicted, the lowest first, and nobody else; the stream of an allocation is its first slice modulo
the number of streams. Added to it:

- *Atomicity*: a request is worked out on a copy of the books, which replaces them when everything
  succeeded. A request that fails changes nothing.
- *Fairness*: a group gains a step of priority with every `ageing` refusals for want of slices or
  memory, and what it is granted then keeps that standing, which sinks by a step every `ageing`
  requests; so who keeps asking is never starved, nor evicted again at once.
- *Memory*: an allocation holds bytes of a budget as well as SMs, and eviction frees both. A `Pager`
  is told before weights must be there and after they need not be.
- *Steps*: what is held while a step runs cannot be taken; such a request is refused.
- *Books*: every change is an event, and `check` proves that nothing is held twice or lost.

>>> manager = SliceManager(MachineSlices(total_sms=132), ageing=0)
>>> manager.allocate("cold", sms=100).sms, manager.allocate("hot", sms=64, priority=1).slices[:2]
(104, (0, 1))
>>> " ".join(event.kind for event in manager.events)
'allocate evict allocate'
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

from .plan import Allocation, MachineSlices, Plan, Slice, SliceGroup

SMOOTHING = 0.2
"""Weight of a new observation in a slice's utilisation."""


class SliceError(RuntimeError):
    """A request that cannot be granted; nothing was changed. The message says why."""


class SliceBusy(SliceError):
    """Too little is free or can be taken now; asking again earns priority."""


class SliceLeak(AssertionError):
    """The books contradict themselves."""


class Pager(Protocol):
    """Moves weights in and out of GPU memory as allocations come and go; may raise in `enter`."""

    def enter(self, allocation: Allocation) -> None:
        """Called before an allocation counts: its bytes must be there afterwards."""

    def leave(self, allocation: Allocation) -> None:
        """Called once an allocation is gone or smaller: the bytes of this value may be freed."""


@dataclass(frozen=True)
class Event:
    """One change or refusal: its number, what happened to whom, and why."""

    number: int
    kind: str
    group: str
    sms: int
    memory_bytes: int
    why: str = ""


@dataclass(frozen=True)
class _Books:
    """Everything that a request may change: allocations by group, standing of each when granted."""

    held: dict[str, Allocation]
    granted: dict[str, int]

    def copy(self) -> _Books:
        return _Books(dict(self.held), dict(self.granted))


class SliceManager:
    """Allocates slices and memory of one GPU; safe to call from several threads.

    Args:
        machine: the GPU; `memory_bytes` 0 leaves memory unaccounted.
        ageing: refusals after which a group gains a step of priority; 0: never.
        pager: told of memory that must be there or may go.
        keep: events that are remembered.
    """

    def __init__(
        self,
        machine: MachineSlices,
        *,
        ageing: int = 8,
        pager: Pager | None = None,
        keep: int = 4096,
    ) -> None:
        if ageing < 0 or keep < 1:
            raise ValueError(f"ageing must be 0 or more, keep positive, got {ageing} and {keep}")
        self.machine, self.ageing, self.pager = machine, ageing, pager
        self.events: deque[Event] = deque(maxlen=keep)
        self.counts: Counter[str] = Counter()
        self._books = _Books({}, {})
        self._utilisation = [0.0] * machine.atoms
        self._refused: Counter[str] = Counter()
        self._requests = 0
        self._running: Counter[str] = Counter()
        self._lock = threading.RLock()

    @property
    def allocations(self) -> dict[str, Allocation]:
        """What every group holds now."""
        return dict(self._books.held)

    @property
    def free_sms(self) -> int:
        """SMs that nobody holds."""
        return self.machine.granularity * len(self._free(self._books))

    @property
    def memory_bytes(self) -> int:
        """Bytes that allocations hold."""
        return self._held_bytes(self._books)

    def slices(self) -> tuple[Slice, ...]:
        """Every slice with its holder, its stream and its share of the holder's memory."""
        holder = {n: a for a in self._books.held.values() for n in a.slices}
        return tuple(
            Slice(
                id=n,
                sms=self.machine.granularity,
                stream=n % self.machine.streams,
                utilisation=self._utilisation[n],
                group=holder[n].group if n in holder else None,
                priority=holder[n].priority if n in holder else None,
                memory_bytes=holder[n].memory_bytes // len(holder[n].slices) if n in holder else 0,
            )
            for n in range(self.machine.atoms)
        )

    def allocate(
        self, group: str, *, sms: int, memory_bytes: int = 0, priority: int = 0
    ) -> Allocation:
        """Slices for a group: those it has, else free ones, else those of lower priority.

        Raises:
            SliceError: more than the GPU has, or too little can be freed; nothing was changed.
        """
        with self._request(group, sms, memory_bytes):
            if group in self._books.held:
                return self._books.held[group]
            books = self._books.copy()
            made = self._place(books, group, sms, memory_bytes, priority, standing=priority)
            self._commit(books, "allocate", made)
            return made

    def resize(
        self, group: str, *, sms: int | None = None, memory_bytes: int | None = None
    ) -> Allocation:
        """Another size for what a group holds; a larger one may evict as `allocate` does.

        A smaller one gives the most utilised slices back.

        Raises:
            SliceError: the group holds nothing, is in a step, or the size cannot be had.
        """
        old = self._known(group)
        sms = old.sms if sms is None else sms
        memory_bytes = old.memory_bytes if memory_bytes is None else memory_bytes
        with self._request(group, sms, memory_bytes):
            self._refuse_running([group])
            old = self._known(group)
            books, standing = self._books.copy(), self._standing(self._books, old)
            del books.held[group]
            made = self._place(
                books, group, sms, memory_bytes, old.priority, standing=standing, kept=old.slices
            )
            self._commit(books, "resize", made)
            return made

    def release(self, group: str) -> None:
        """Give back everything that a group holds.

        Raises:
            SliceError: it holds nothing, or is in a step.
        """
        self._drop(group, "release", "")

    def evict(self, group: str, why: str = "asked for") -> None:
        """Take everything from a group, whatever its priority; raises as `release`."""
        self._drop(group, "evict", why)

    def layout(self, plan: Plan) -> dict[str, tuple[int, ...]]:
        """The slices that `apply` would give each group: side by side from the first one on."""
        found, first = dict[str, tuple[int, ...]](), 0
        for share in plan.shares:
            count = -(-share.sms // self.machine.granularity)
            found[share.group] = tuple(range(first, first + count))
            first += count
        return found

    def apply(self, plan: Plan, groups: Sequence[SliceGroup]) -> tuple[Allocation, ...]:
        """Make the allocations of some groups those of a plan, as `layout` says.

        Groups without a share give back what they hold; without slices, all of them do. The memory
        and priority of an allocation are those of its group. What others than `groups` hold stays;
        it is evicted where it is in the way and of lower priority than all that have a share.

        Raises:
            SliceError: a step is running, the plan does not fit, or somebody of no lower priority
                is in its way; nothing was changed.
        """
        known = {group.name: group for group in groups}
        with self._request("plan", sum(plan.sizes.values()) or self.machine.granularity, 0):
            self._refuse_running(self._books.held)
            books = _Books({}, {})
            for name, slices in self.layout(plan).items():
                if name not in known:
                    raise SliceError(f"the plan has a share for {name!r}, a group unknown")
                group = known[name]
                made = self._allocation(name, slices, group.memory_bytes, group.priority)
                old = self._books.held.get(name)
                same = old is not None and replace(old, since=made.since) == made
                books.held[name] = old if old is not None and same else made
                books.granted[name] = group.priority
            self._keep_others(books, known)
            self._refuse_excess(books)
            self._commit(books, "plan", None, why=f"{plan.policy}: {plan.reason}")
            return tuple(books.held.values())

    @contextmanager
    def step(self) -> Iterator[tuple[Allocation, ...]]:
        """What is held now, which stays as it is until the block ends."""
        with self._lock:
            held = tuple(self._books.held.values())
            self._running.update(a.group for a in held)
        try:
            yield held
        finally:
            with self._lock:
                self._running -= Counter(a.group for a in held)

    def observe(self, group: str, utilisation: float) -> None:
        """Note how busy a group's slices were, in [0, 1]; groups that hold nothing are ignored.

        Raises:
            ValueError: not a number in [0, 1].
        """
        if not 0 <= utilisation <= 1:
            raise ValueError(f"utilisation must be in [0, 1], got {utilisation}")
        with self._lock:
            found = self._books.held.get(group)
            for n in found.slices if found else ():
                self._utilisation[n] += SMOOTHING * (utilisation - self._utilisation[n])

    def standing(self, group: str) -> int:
        """The priority that a holder has now: its own, or what waiting earned it, sinking."""
        with self._lock:
            return self._standing(self._books, self._known(group))

    def check(self) -> None:
        """Prove that the books are whole.

        Raises:
            SliceLeak: a slice is held twice or does not exist, a sum is wrong, memory is exceeded.
        """
        with self._lock:
            held = self._books.held
            taken = [n for a in held.values() for n in a.slices]
            size = self.machine.granularity
            if len(taken) != len(set(taken)) or not set(taken) <= set(range(self.machine.atoms)):
                raise SliceLeak(f"slices held twice or unknown: {sorted(taken)}")
            if any(a.sms != size * len(a.slices) or a.group != g for g, a in held.items()):
                raise SliceLeak(f"an allocation's SMs are not those of its slices: {held}")
            if len(self._free(self._books)) + len(taken) != self.machine.atoms:
                raise SliceLeak("free and held slices are not all slices")
            if self.machine.memory_bytes and self.memory_bytes > self.machine.memory_bytes:
                raise SliceLeak(f"{self.memory_bytes} bytes held of {self.machine.memory_bytes}")
            if set(self._books.granted) != set(held):
                raise SliceLeak("standing is noted for others than those that hold slices")

    def _known(self, group: str) -> Allocation:
        if group not in self._books.held:
            raise SliceError(f"{group!r} holds no slices; allocate some first")
        return self._books.held[group]

    def _free(self, books: _Books) -> list[int]:
        """Slices that nobody holds, least utilised first."""
        taken = {n for a in books.held.values() for n in a.slices}
        free = (n for n in range(self.machine.atoms) if n not in taken)
        return sorted(free, key=lambda n: (self._utilisation[n], n))

    def _allocation(
        self, group: str, slices: Sequence[int], memory_bytes: int, priority: int
    ) -> Allocation:
        return Allocation(
            group=group,
            slices=tuple(slices),
            sms=self.machine.granularity * len(slices),
            memory_bytes=memory_bytes,
            stream=slices[0] % self.machine.streams,
            priority=priority,
            since=self._requests,
        )

    def _standing(self, books: _Books, allocation: Allocation) -> int:
        granted = books.granted[allocation.group]
        sunk = (self._requests - allocation.since) // self.ageing if self.ageing else 0
        return max(allocation.priority, granted - sunk)

    def _place(
        self,
        books: _Books,
        group: str,
        sms: int,
        memory_bytes: int,
        priority: int,
        *,
        standing: int,
        kept: Sequence[int] = (),
    ) -> Allocation:
        """Enter a group into the books, evicting lower ones; slices in `kept` are preferred."""
        count = -(-sms // self.machine.granularity)
        earned = self._refused[group] // self.ageing if self.ageing else 0
        claim = max(priority + earned, standing)
        lower = [a for a in books.held.values() if self._standing(books, a) < claim]
        lower = [a for a in lower if not self._running[a.group]]
        lower.sort(key=lambda a: (self._standing(books, a), a.since, a.group))
        while self._short(books, count, memory_bytes):
            if len(self._free(books)) >= count:
                lower = [a for a in lower if a.memory_bytes]
            if not lower:
                raise SliceBusy(
                    f"{group!r} asks for {count} slices and {memory_bytes} bytes; "
                    f"{len(self._free(books))} slices can be had and "
                    f"{self._held_bytes(books)} of {self.machine.memory_bytes} bytes stay held: "
                    f"nobody of lower priority than {claim} is left to evict"
                )
            victim = lower.pop(0)
            del books.held[victim.group], books.granted[victim.group]
        free = self._free(books)
        order = [n for n in free if n in kept] + [n for n in free if n not in kept]
        made = self._allocation(group, sorted(order[:count]), memory_bytes, priority)
        books.held[group], books.granted[group] = made, claim
        return made

    def _held_bytes(self, books: _Books) -> int:
        return sum(a.memory_bytes for a in books.held.values())

    def _short(self, books: _Books, count: int, memory_bytes: int) -> bool:
        held, budget = self._held_bytes(books) + memory_bytes, self.machine.memory_bytes
        return len(self._free(books)) < count or bool(budget and held > budget)

    def _keep_others(self, books: _Books, known: Mapping[str, SliceGroup]) -> None:
        """Enter what groups outside a plan hold, but for lower ones that are in its way."""
        taken = {n for a in books.held.values() for n in a.slices}
        claim = min((a.priority for a in books.held.values()), default=0)
        others = [a for g, a in self._books.held.items() if g not in known]
        others.sort(key=lambda a: (-self._standing(self._books, a), a.since, a.group))
        for other in others:
            if taken & set(other.slices) or self._short(books, 0, other.memory_bytes):
                if self._standing(self._books, other) >= claim:
                    raise SliceError(f"{other.group!r}, of no lower priority, is in the plan's way")
                continue
            books.held[other.group] = other
            books.granted[other.group] = self._books.granted[other.group]

    def _refuse_excess(self, books: _Books) -> None:
        taken = [n for a in books.held.values() for n in a.slices]
        if taken and max(taken) >= self.machine.atoms:
            raise SliceError(f"the plan needs {len(taken)} slices of {self.machine.atoms}")
        if self._short(books, 0, 0):
            raise SliceError(f"the plan needs more than {self.machine.memory_bytes} bytes")

    def _refuse_running(self, groups: Sequence[str] | dict[str, Allocation]) -> None:
        if busy := sorted(group for group in groups if self._running[group]):
            raise SliceError(f"{', '.join(busy)}: a step is running on these slices; ask after it")

    @contextmanager
    def _request(self, group: str, sms: int, memory_bytes: int) -> Iterator[None]:
        """One request under the lock: counted, its size checked, a refusal noted."""
        with self._lock:
            self._requests += 1
            try:
                most, budget = self.machine.sizes[-1], self.machine.memory_bytes
                if not 1 <= sms <= most:
                    raise SliceError(f"{group!r} asks for {sms} SMs, the GPU has 1 to {most}")
                if memory_bytes < 0 or (budget and memory_bytes > budget):
                    raise SliceError(f"{group!r} asks for {memory_bytes} of {budget} bytes")
                yield
            except SliceError as error:
                if isinstance(error, SliceBusy):
                    self._refused[group] += 1
                self._note("refuse", group, sms, memory_bytes, str(error))
                raise

    def _drop(self, group: str, kind: str, why: str) -> None:
        found = self._books.held.get(group)
        with self._request(group, found.sms if found else self.machine.min_sms, 0):
            old = self._known(group)
            self._refuse_running([group])
            books = self._books.copy()
            del books.held[group], books.granted[group]
            self._books = books
            self._note(kind, group, old.sms, old.memory_bytes, why)
            if self.pager is not None:
                self.pager.leave(old)

    def _commit(self, books: _Books, kind: str, made: Allocation | None, why: str = "") -> None:
        """Let the pager bring in what is new, then make these the books, then let the rest go."""
        before = self._books.held
        changed = [a for g, a in books.held.items() if before.get(g) != a]
        gone = [a for g, a in before.items() if books.held.get(g) != a]
        if self.pager is not None:
            for number, allocation in enumerate(changed):
                try:
                    self.pager.enter(allocation)
                except Exception as error:
                    for entered in changed[:number]:
                        self.pager.leave(entered)
                    raise SliceError(f"the pager refused {allocation.group!r}: {error}") from error
        self._books = books
        for allocation in changed:
            self._refused.pop(allocation.group, None)
        for old in gone:
            if old.group not in books.held:
                by = f"for {made.group}" if made else "not in the plan"
                self._note("evict", old.group, old.sms, old.memory_bytes, by)
            if self.pager is not None:
                self.pager.leave(old)
        if made is not None:
            self._note(kind, made.group, made.sms, made.memory_bytes, why)
        elif changed or gone:
            sms = sum(a.sms for a in books.held.values())
            self._note(kind, "*", sms, sum(a.memory_bytes for a in books.held.values()), why)

    def _note(self, kind: str, group: str, sms: int, memory_bytes: int, why: str) -> None:
        self.counts[kind] += 1
        self.events.append(Event(self._requests, kind, group, sms, memory_bytes, why))
