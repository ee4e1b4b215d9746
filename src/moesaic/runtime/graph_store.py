"""Live CUDA graphs under one budget: captured when the rules say, replayed, dropped, accounted.

Graphs go when they are the least recently used and memory or number is over budget. Their memory is
what the driver had less of after the capture than before, the pool's part and the driver's own
alike. Whatever goes wrong with a graph, the call is answered eagerly, with the same bits; it is
counted, and logged once.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .capture import (
    CaptureFailed,
    Capturer,
    OutOfMemory,
    Outputs,
    Recording,
    is_out_of_memory,
    one_line,
)
from .graph_rules import GraphConfig, Key, Tracker

log = logging.getLogger("moesaic")


class Watch(Protocol):
    """Where the tensors lie that a function reads beside its inputs: graphs go when they move."""

    def __call__(self) -> Hashable:
        """Their places now."""

    def trains(self) -> bool:
        """Whether one of them wants a gradient."""


@dataclass
class Slot:
    """A live graph: its inputs, how many of their rows hold tokens, where its weights were."""

    recording: Recording
    inputs: tuple[Tensor, ...]
    filled: int
    watched: Hashable
    num_bytes: int

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the input buffers."""
        return sum(t.nbytes for t in self.inputs)


@dataclass(frozen=True, kw_only=True)
class GraphCounts:
    """What a store has done so far, every call under exactly one of `replayed` and `eager`.

    `why_eager` says why for calls that no heuristic kept eager; `forgotten` are shapes of which the
    calls are no longer counted, because others came before they repeated. `held_bytes` is the
    memory of the live graphs as the driver saw it, `buffer_bytes` the part that is input buffers.
    """

    replayed: int
    captured: int
    eager: int
    warmed: int
    evicted: int
    stale: int
    failed: int
    out_of_memory: int
    over_budget: int
    forgotten: int
    graphs: int
    held_bytes: int
    buffer_bytes: int
    why_eager: dict[str, int]


class Task(NamedTuple):
    """One call of a store: whose, which function, where its weights lie, under which SM budget.

    `tokens` are the rows of every input.
    """

    owner: Hashable
    function: Callable[..., Outputs]
    watch: Watch
    inputs: tuple[Tensor, ...]
    tokens: int
    sms: int | None

    def eager(self, inputs: Sequence[Tensor]) -> Outputs:
        """The function on inputs, told its SM budget if there is one."""
        if self.sms is None:
            return self.function(*inputs)
        return self.function(*inputs, sms=self.sms)


def make_task(
    owner: Hashable,
    function: Callable[..., Outputs],
    watch: Watch,
    inputs: tuple[Tensor, ...],
    sms: int | None,
) -> Task:
    """The task of a call.

    Raises:
        ValueError: the inputs do not share their leading dimension.
    """
    tokens = inputs[0].shape[0] if inputs[0].dim() else -1
    for given in inputs:
        if not given.dim() or given.shape[0] != tokens:
            shapes = [tuple(t.shape) for t in inputs]
            raise ValueError(f"inputs must share their leading dimension, got {shapes}")
    return Task(owner, function, watch, inputs, tokens, sms)


def signature_of(inputs: Sequence[Tensor]) -> Hashable:
    """Devices, dtypes and widths of the inputs, and whether autocast would change the call."""
    kind = inputs[0].device.type
    cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return (cast, *[(t.device, t.dtype, t.shape[1:]) for t in inputs])


def leading(outputs: Outputs, tokens: int) -> Outputs:
    """The first rows of every output."""
    if isinstance(outputs, Tensor):
        return outputs if outputs.shape[0] == tokens else outputs[:tokens]
    return tuple(leading(one, tokens) for one in outputs)  # type: ignore[misc]


def copied(outputs: Outputs, out: Tensor | None) -> Outputs:
    """Outputs that the next replay leaves alone: written to `out`, or in new memory."""
    if isinstance(outputs, Tensor):
        return outputs.clone() if out is None else out.copy_(outputs)
    if out is not None:
        raise ValueError("out= needs a function that returns one tensor")
    return tuple(one.clone() for one in outputs)


class GraphStore:
    """Graphs of any number of owners under one budget, in one memory pool; not thread-safe.

    Args:
        config: heuristics and budgets.
        capturer: how graphs are recorded; None: there are none, every call is eager.
    """

    def __init__(self, config: GraphConfig, capturer: Capturer | None) -> None:
        self.config, self.capturer = config, capturer
        self._slots: OrderedDict[Key, Slot] = OrderedDict()
        self._barred: OrderedDict[Key, None] = OrderedDict()
        self._tracker = Tracker(config)
        self._limit = config.memory_bytes
        self._held = 0
        self._n: Counter[str] = Counter()
        self._why: Counter[str] = Counter()
        self._said: set[str] = set()

    def call(self, task: Task, out: Tensor | None = None) -> Outputs:
        """The answer to a call, replayed where there is a graph, else eager; the same bits."""
        why = self._unfit(task)
        if why:
            self._why[why] += 1
            return self._eager(task, out)
        key = self._key(task)
        slot = self._fresh(key, task)
        if slot is None:
            return self._without_graph(key, task, out)
        self._slots.move_to_end(key)
        self._tracker.replayed(key)
        return self._replay(slot, task, out)

    def prepare(self, task: Task) -> bool:
        """Capture a call now, whatever the rules say; whether it has a graph afterwards.

        The function runs `warmups` times before, and once when the graph is first replayed.
        """
        if self._unfit(task):
            return False
        key = self._key(task)
        if self._fresh(key, task) is None and key not in self._barred:
            for _ in range(self.config.warmups):
                if self._warm(key, task) is None:
                    return False
                self._n.subtract(("eager", "warmed"))  # nobody's call
            self._grow(key, task)
        return key in self._slots

    def _key(self, task: Task) -> Key:
        tokens = self.config.padded(task.tokens)
        return Key(task.owner, tokens, task.sms, signature_of(task.inputs))

    def _unfit(self, task: Task) -> str | None:
        """Why a call can be neither captured nor replayed, whatever its shape."""
        if self.capturer is None:
            return "no graphs on this device"
        if not self.config.worth(task.tokens):
            return "token count"
        if torch.is_grad_enabled() and (
            any(t.requires_grad for t in task.inputs) or task.watch.trains()
        ):
            return "gradients"
        return self.capturer.busy()

    def _fresh(self, key: Key, task: Task) -> Slot | None:
        """The slot of a key, unless its weights have moved, which drops it."""
        slot = self._slots.get(key)
        if slot is None or slot.watched == task.watch():
            return slot
        self._drop(key)
        self._n["stale"] += 1
        self._tracker.forget(key)
        self._say("stale", "weights have moved, their graph is dropped; the call is eager")
        return None

    def _without_graph(self, key: Key, task: Task, out: Tensor | None) -> Outputs:
        if key in self._barred:
            self._why["barred"] += 1
            return self._eager(task, out)
        due = self._tracker.observe(key)
        if self._tracker.forgotten:
            self._say("shapes", "shapes hardly repeat; such calls are never captured")
        if due == "capture":
            slot = self._grow(key, task)
            if slot is not None:
                return self._answer(slot, task, out)
        elif due == "warm" and (answer := self._warm(key, task)) is not None:
            answer = leading(answer, task.tokens)
            return answer if out is None else copied(answer, out)
        return self._eager(task, out)

    def _eager(self, task: Task, out: Tensor | None) -> Outputs:
        """The plain call; when it lacks memory that graphs hold, they go and it is repeated."""
        self._n["eager"] += 1
        inputs = task.inputs
        if self.config.pad_eager:
            inputs = self._pad(inputs, self.config.padded(task.tokens))
        try:
            answer = task.eager(inputs)
        except RuntimeError as error:
            if not (self._slots and is_out_of_memory(error)):
                raise
            self._out_of_memory(f"a call: {one_line(error)}")
            self.clear()
            answer = task.eager(inputs)
        answer = leading(answer, task.tokens)
        return answer if out is None else copied(answer, out)

    def _pad(self, inputs: Sequence[Tensor], tokens: int) -> tuple[Tensor, ...]:
        """New buffers of `tokens` rows that hold the inputs, the rest filled with the pads."""
        buffers = []
        # Buffers born in inference mode could not be written to outside it.
        with torch.inference_mode(False), torch.no_grad():
            for place, given in enumerate(inputs):
                shape = (tokens, *given.shape[1:])
                buffer = torch.empty(shape, dtype=given.dtype, device=given.device)
                buffer[given.shape[0] :].fill_(self._pad_value(place))
                buffers.append(buffer)
        for buffer, given in zip(buffers, inputs, strict=True):
            buffer[: given.shape[0]].copy_(given.detach())
        return tuple(buffers)

    def _pad_value(self, place: int) -> float:
        pads = self.config.pads
        return pads[place] if place < len(pads) else 0

    def _warm(self, key: Key, task: Task) -> Outputs | None:
        """The answer of a warm-up call, or None when it failed and must be given eagerly."""
        assert self.capturer is not None
        try:
            inputs = self._pad(task.inputs, key.tokens)
            answer = self.capturer.warm(partial(task.eager, inputs), task.sms)
        except RuntimeError as error:
            self._failure(key, error)
            return None
        self._n["eager"] += 1
        self._n["warmed"] += 1
        return answer

    def _failure(self, key: Key, error: Exception) -> None:
        """Count a failed attempt: short memory lowers the budget, another reason bars the key."""
        assert self.capturer is not None
        self._tracker.forget(key)
        if isinstance(error, OutOfMemory) or is_out_of_memory(error):
            self._out_of_memory(one_line(error))
        else:
            self._n["failed"] += 1
            self._bar(key)
            self._say("failed", f"a call cannot be captured and stays eager: {one_line(error)}")
        self.capturer.trim()

    def _out_of_memory(self, text: str) -> None:
        self._n["out_of_memory"] += 1
        self._limit = min(self._limit, self._held)
        self._say("memory", f"memory is short, no more than the graphs of now are kept: {text}")

    def _bar(self, key: Key) -> None:
        self._barred[key] = None
        while len(self._barred) > self.config.tracked_shapes:
            self._barred.popitem(last=False)

    def _grow(self, key: Key, task: Task) -> Slot | None:
        """Capture a call, replay it once, and make room; None when it has no graph after all."""
        assert self.capturer is not None
        while self._slots and (
            self._held >= self._limit or len(self._slots) >= self.config.max_graphs
        ):
            self._evict()
        try:
            slot = self._capture(key, task)
        except RuntimeError as error:
            self._failure(key, error)
            return None
        while self._held > self._limit and len(self._slots) > 1:
            self._evict()
        if self._held > self._limit:
            self._drop(key)
            self._bar(key)
            self._n["over_budget"] += 1
            self._say("budget", f"a graph takes {slot.num_bytes} bytes, over the budget; not kept")
            self._n["captured"] -= 1
            return None
        return slot

    def _capture(self, key: Key, task: Task) -> Slot:
        """Record and replay once: the driver takes its memory at the first launch."""
        capturer = self.capturer
        assert capturer is not None
        watched = task.watch()
        inputs = self._pad(task.inputs, key.tokens)
        before = capturer.free_bytes()
        recording = capturer.record(partial(task.eager, inputs), task.sms)
        slot = Slot(recording, inputs, task.tokens, watched, 0)
        try:
            if task.watch() != watched:
                raise CaptureFailed("its weights move within a call")
            capturer.before_replay()
            recording.replay()
            taken = max(0, before - capturer.free_bytes())
        except RuntimeError:
            recording.release()
            raise
        slot.num_bytes = taken + slot.buffer_bytes
        self._held += slot.num_bytes
        self._slots[key] = slot
        self._n["captured"] += 1
        return slot

    def _evict(self) -> None:
        """Drop the graph that was used longest ago; its shape must earn a capture anew."""
        key = next(iter(self._slots))
        self._drop(key)
        self._tracker.forget(key)
        self._n["evicted"] += 1

    def _drop(self, key: Key) -> None:
        """Release one graph. The pool keeps its blocks for others until no graph is left."""
        assert self.capturer is not None
        slot = self._slots.pop(key)
        before = self.capturer.free_bytes()
        slot.recording.release()
        returned = max(0, self.capturer.free_bytes() - before) + slot.buffer_bytes
        self._held = max(0, self._held - returned)
        if not self._slots:
            self.capturer.trim()
            self._held = 0

    def _replay(self, slot: Slot, task: Task, out: Tensor | None) -> Outputs:
        assert self.capturer is not None
        self.capturer.before_replay()
        tokens = task.tokens
        for place, (buffer, given) in enumerate(zip(slot.inputs, task.inputs, strict=True)):
            if given.data_ptr() != buffer.data_ptr() or given.stride() != buffer.stride():
                (buffer if buffer.shape[0] == tokens else buffer[:tokens]).copy_(given)
            if slot.filled > tokens:
                buffer[tokens : slot.filled].fill_(self._pad_value(place))
        slot.filled = tokens
        slot.recording.replay()
        return self._answer(slot, task, out)

    def _answer(self, slot: Slot, task: Task, out: Tensor | None) -> Outputs:
        """What the last replay left, for the caller to keep."""
        self._n["replayed"] += 1
        answer = leading(slot.recording.outputs, task.tokens)
        if self.config.copy_output or out is not None:
            return copied(answer, out)
        return answer

    def _say(self, kind: str, text: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            log.warning("CUDA graphs: %s (told once)", text)

    def clear(self) -> None:
        """Release every graph; counts stay."""
        for key in list(self._slots):
            self._drop(key)

    def buffers(self, key_of: Callable[[Key], bool]) -> tuple[Tensor, ...] | None:
        """The input buffers of the first live graph whose key fits: filled in place by a caller
        that passes them as inputs, they spare the copy."""
        return next((s.inputs for k, s in self._slots.items() if key_of(k)), None)

    def counts(self) -> GraphCounts:
        """What happened so far."""
        names = ("replayed", "captured", "eager", "warmed", "evicted", "stale", "failed")
        n = {name: self._n[name] for name in (*names, "out_of_memory", "over_budget")}
        return GraphCounts(
            **n,
            forgotten=self._tracker.forgotten,
            graphs=len(self._slots),
            held_bytes=self._held,
            buffer_bytes=sum(s.buffer_bytes for s in self._slots.values()),
            why_eager=dict(self._why),
        )
