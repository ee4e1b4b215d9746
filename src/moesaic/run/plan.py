"""How a text is cut into chunks and who goes first in each: pure arithmetic, nothing is read.

    C bytes of a window · W windows of a chunk · a chunk scores up to W*C bytes

Every byte is scored exactly once: a window's inputs are its bytes shifted by one, so its first byte
is predicted from the byte before it, the others from up to C bytes.

>>> [(c.start, c.windows, c.width) for c in Plan(size=23, context=4, windows=2).chunks()]
[(0, 2, 4), (8, 2, 4), (16, 1, 4), (20, 1, 3)]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

CANDIDATES = ("moesaic", "baseline")
ENOUGH_CHUNKS = 16


@dataclass(frozen=True)
class Chunk:
    """Windows scored in one forward: `windows` x `width` bytes from `start`."""

    index: int
    start: int
    windows: int
    width: int
    full: bool

    @property
    def size(self) -> int:
        """Bytes scored."""
        return self.windows * self.width

    @property
    def order(self) -> tuple[str, ...]:
        """Who runs first; it alternates, so that neither always finds warm caches."""
        return CANDIDATES if self.index % 2 == 0 else CANDIDATES[::-1]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A text of `size` bytes, cut.

    Raises:
        ValueError: a number is not positive.
    """

    size: int
    context: int
    windows: int

    def __post_init__(self) -> None:
        if min(self.size, self.context, self.windows) < 1:
            raise ValueError(f"size, context and windows must be positive, got {self}")

    def chunks(self) -> Iterator[Chunk]:
        """Full chunks, then one of the remaining whole windows, then the tail of one window."""
        full, rest = divmod(self.size, self.context * self.windows)
        windows, tail = divmod(rest, self.context)
        shapes = [(windows, self.context), (1 if tail else 0, tail)]
        start = 0
        for index in range(full):
            yield Chunk(index, start, self.windows, self.context, True)
            start += self.windows * self.context
        index = full
        for count, width in shapes:
            if count:
                yield Chunk(index, start, count, width, False)
                start, index = start + count * width, index + 1


def plan_text(size: int, context: int, *, most_tokens: int) -> Plan:
    """A plan with at most `most_tokens` a chunk, fewer where the text would give few chunks.

    Windows are as long as the context, but never longer than a chunk may be.
    """
    width = min(context, most_tokens)
    windows = max(1, min(most_tokens // width, size // (width * ENOUGH_CHUNKS)))
    return Plan(size=size, context=width, windows=windows)
