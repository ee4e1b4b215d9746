"""Which calls are worth a CUDA graph: pure rules over counts, by default the slicing paper's.

>>> rules = GraphConfig(min_calls=3, stable_calls=2, warmups=1)
>>> tracker, key = Tracker(rules), Key("layer", 64, None, ())
>>> [tracker.observe(key) for _ in range(3)]
['eager', 'warm', 'capture']
"""

from __future__ import annotations

import bisect
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal, NamedTuple

Due = Literal["eager", "warm", "capture"]


def doubling_buckets(most: int, *, step: int = 8) -> tuple[int, ...]:
    """Token counts 1, 2, 4, 8, every `step` up to 64, then two for each doubling, up to `most`.

    >>> doubling_buckets(256)
    (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 96, 128, 192, 256)
    """
    small = [1, 2, 4, *range(8, 65, step)]
    large = [size for power in range(6, 24) for size in (3 << power >> 1, 2 << power)]
    return (*(b for b in sorted({*small, *large}) if b < most), most)


@dataclass(frozen=True, kw_only=True)
class GraphConfig:
    """When a call becomes a graph, and what graphs may cost; the defaults are the paper's.

    Args:
        min_calls: calls of one shape before its capture; a shape seen once is never captured.
        min_tokens: the least that is worth a graph. Whole layers pay from 1 token on.
        max_tokens: the most that is.
        stable_calls: so many calls of the owner in a row must have had the shape.
        warmups: of the eager calls, how many run on the stream that captures.
        buckets: token counts to which calls are padded, ascending; None: exact counts.
        pads: what fills padded rows of each input, 0 where there is none given.
        pad_eager: pad eager calls too, for functions whose bits depend on the number of rows.
        copy_output: answer with a copy; else with the graph's own output, which the next replay
            overwrites.
        memory_bytes: the budget of all graphs of a store.
        max_graphs: how many it may hold.
        tracked_shapes: of how many shapes calls are counted.

    Raises:
        ValueError: a value that has no meaning.
    """

    min_calls: int = 10
    min_tokens: int = 32
    max_tokens: int | None = None
    stable_calls: int = 3
    warmups: int = 3
    buckets: tuple[int, ...] | None = None
    pads: tuple[float, ...] = ()
    pad_eager: bool = False
    copy_output: bool = True
    memory_bytes: int = 2**30
    max_graphs: int = 64
    tracked_shapes: int = 1024

    def __post_init__(self) -> None:
        least = {"min_calls": 2, "min_tokens": 0, "stable_calls": 1, "warmups": 1, "max_graphs": 1}
        least |= {"memory_bytes": 0, "tracked_shapes": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if self.warmups >= self.min_calls:
            raise ValueError(
                f"warmups must be under min_calls={self.min_calls}, got {self.warmups}"
            )
        if self.buckets is not None and list(self.buckets) != sorted({*self.buckets} - {0}):
            raise ValueError(f"buckets must be positive and ascending, got {self.buckets}")

    def padded(self, tokens: int) -> int:
        """The bucket of a token count; the count itself above the last bucket."""
        if not self.buckets or tokens > self.buckets[-1]:
            return tokens
        return self.buckets[bisect.bisect_left(self.buckets, tokens)]

    def worth(self, tokens: int) -> bool:
        """Whether calls of so many tokens may become graphs."""
        return self.min_tokens <= tokens and (self.max_tokens is None or tokens <= self.max_tokens)


class Key(NamedTuple):
    """What makes two calls the same graph."""

    owner: Hashable
    tokens: int
    sms: int | None
    signature: Hashable


class Tracker:
    """Counts calls by key and says when one is due.

    Of more than `tracked_shapes` keys the longest unused are forgotten; `forgotten` counts them.
    """

    def __init__(self, config: GraphConfig) -> None:
        self._config = config
        self._calls: OrderedDict[Key, int] = OrderedDict()
        self._last: OrderedDict[Hashable, tuple[Key, int]] = OrderedDict()
        self.forgotten = 0

    def observe(self, key: Key) -> Due:
        """Note a call without a graph and say what it is to be."""
        c = self._config
        calls = self._calls.pop(key, 0) + 1
        self._calls[key] = calls
        last, run = self._last.pop(key.owner, (key, 0))
        run = run + 1 if last == key else 1
        self._last[key.owner] = key, run
        while len(self._calls) > c.tracked_shapes:
            self._calls.popitem(last=False)
            self.forgotten += 1
        while len(self._last) > c.tracked_shapes:
            self._last.popitem(last=False)
        if calls >= c.min_calls and run >= c.stable_calls:
            return "capture"
        # Once each: a shape that is never stable would else pay for warming up at every call.
        return "warm" if c.min_calls - c.warmups <= calls < c.min_calls else "eager"

    def replayed(self, key: Key) -> None:
        """Note that the owner's last call was a replay of `key`."""
        self._last[key.owner] = key, self._config.stable_calls

    def forget(self, key: Key) -> None:
        """Count from nothing again."""
        self._calls.pop(key, None)

    def __len__(self) -> int:
        return len(self._calls)
