"""Requests: when they come, how long they are, and which engines a plan lets serve them.

    R requests, in the order in which they come

A benchmark keeps so many under way, or sends all in a burst; users come at random or as a trace
says. Lengths that spread are drawn from an exponential distribution with the given mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .documents import Block
from .scheduler import ENGINES

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
# A burst or a closed loop of so many requests a user is long enough to be mostly full.
REPEATS = 10
GPUS = (1, 2, 4, 8)
COLUMNS = ("seconds", "prompt", "output")


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """Requests: `rate` a second for `seconds`, evenly random, or times read from a file."""

    rate: float
    seconds: float
    times: tuple[float, ...] = ()

    def drawn(self, seed: int) -> list[float]:
        """The times at which requests come.

        Raises:
            ValueError: nothing arrives within the time.
        """
        if self.times:
            found = [t for t in self.times if t <= self.seconds]
        else:
            random = np.random.default_rng(seed)
            count = max(1, round(3 * self.rate * self.seconds))
            times = np.cumsum(random.exponential(1 / self.rate, count))
            found = [float(t) for t in times[times <= self.seconds]]
        if not found:
            raise ValueError(f"no request arrives within {self.seconds} s; raise rate or seconds")
        return found


@dataclass(frozen=True, eq=False)
class Requests:
    """Seconds at which each comes, the first at 0, and tokens of its prompt and its answer."""

    seconds_R: Floats
    prompt_R: Ints
    output_R: Ints

    def __len__(self) -> int:
        return len(self.seconds_R)


@dataclass(frozen=True, kw_only=True)
class Load:
    """Requests of a benchmark.

    Args:
        total: how many there are; at_once: how many may be under way, None for all.
        prompt, output: tokens, means where they `spread`.
        rate: requests a second, evenly random; None: as soon as allowed.
    """

    total: int
    prompt: int
    output: int
    at_once: int | None = None
    spread: bool = False
    rate: float | None = None
    longest: int = 2048

    def lengths(self, seed: int = 0) -> tuple[Ints, Ints]:
        """Prompt and output tokens of every request."""
        if not self.spread:
            shape = self.total
            return np.full(shape, self.prompt, np.int64), np.full(shape, self.output, np.int64)
        random = np.random.default_rng(seed)
        # Quantiles, shuffled, and brought back to the mean that a cut at the longest takes away.
        at = (np.arange(self.total) + 0.5) / self.total
        found = []
        for mean, most in ((self.prompt, self.longest // 2), (self.output, self.longest)):
            values = np.minimum(-np.log1p(-at) * mean, most)
            values = np.maximum(1, np.round(values * mean / values.mean()))
            found.append(random.permutation(values).astype(np.int64))
        return found[0], found[1]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a plan asks of serving engines.

    Args:
        engines: names of `scheduler.ENGINES`.
        gpus: of one copy, each is tried; empty: every power of two of a node.
        at_once: users of a copy, each of whom waits for an answer before asking again; empty:
            requests come by the workload's `arrival`, or by `trace`.
        requests: how many in all for a copy; None: ten a user.
        spread: whether lengths spread around the workload's `prompt` and `output`.
        trace: recorded requests.
        budget, most, memory: instead of the engine's own, see `scheduler.Engine`.
        cache: bytes of a number in the cache.
        where: the file's line, for messages.
    """

    engines: tuple[str, ...]
    gpus: tuple[int, ...] = ()
    at_once: tuple[int, ...] = ()
    requests: int | None = None
    spread: bool = False
    trace: Requests | None = None
    budget: int | None = None
    most: int | None = None
    memory: float | None = None
    cache: int = 2
    where: str = "served"


def arrival_from(block: Block | None, folder: Path) -> Arrival | None:
    """The `arrival` of a workload file."""
    if block is None:
        return None
    name = block.text("times", None)
    times: tuple[float, ...] = ()
    if name is not None:
        try:
            lines = (folder / name).read_text("utf-8").split()
            times = tuple(sorted(float(line) for line in lines))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{block.where('times')}: {name} must be a file of seconds, one a line ({error})"
            ) from error
        if not times or times[0] < 0:
            raise block.wrong("times", "a file of at least one second of 0 or more", name)
    seconds = block.number("seconds", times[-1] if times else 60.0, above=True)
    default = len(times) / seconds if times else None
    rate = block.number("rate", *(() if default is None else (default,)), above=True)
    block.done()
    return Arrival(rate=rate, seconds=seconds, times=times)


def asked_from(block: Block | None, folder: Path, arrival: Arrival | None) -> Asked | None:
    """The `served` of a workload file: users at once, or a trace, or the workload's arrival."""
    if block is None:
        return None
    at_once, name = block.integers("at_once", ()), block.text("requests_file", None)
    given = [word for word, there in (("at_once", at_once), ("requests_file", name),
                                      ("arrival", arrival)) if there]  # fmt: skip
    if len(given) != 1:
        raise ValueError(
            f"{block.source}:{block.line}: served needs one of at_once, requests_file and the "
            f"workload's arrival, got {' and '.join(given) or 'none'}"
        )
    gpus = block.integers("gpus", ())
    if not set(gpus) <= set(GPUS):
        raise block.wrong("gpus", f"out of {GPUS}, whose all-reduces are published", gpus)
    trace = None
    if name is not None:
        try:
            trace = read_requests(folder / name)
        except OSError as error:
            raise ValueError(f"{block.where('requests_file')}: cannot read {name}") from error
    found = Asked(
        engines=block.texts("engines", ("vllm", "sglang", "trtllm"), among=tuple(ENGINES)),
        gpus=gpus,
        at_once=at_once,
        requests=block.integer("requests", None),
        spread=block.boolean("spread", False),
        trace=trace,
        budget=block.integer("budget", None),
        most=block.integer("most", None),
        memory=block.number("memory", None, high=1.0, above=True),
        cache=block.integer("cache_bytes", 2, high=2),
        where=f"{block.source}:{block.line}",
    )
    if found.requests is not None and not at_once:
        raise ValueError(f"{block.where('requests')}: requests needs at_once; a trace has its own")
    if found.spread and trace is not None:
        raise ValueError(f"{block.where('spread')}: the requests of a file have their own lengths")
    block.done()
    return found


def read_requests(path: Path) -> Requests:
    """A request trace: CSV with the columns seconds, prompt and output, a line a request.

    Raises:
        OSError: the file is missing.
        ValueError: a line that is none; names it.
    """
    lines = path.read_text("utf-8").splitlines()
    if not lines or tuple(word.strip() for word in lines[0].split(",")) != COLUMNS:
        raise ValueError(f"{path}:1: the columns must be {','.join(COLUMNS)}")
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        try:
            seconds, prompt, output = (word.strip() for word in line.split(","))
            row = float(seconds), int(prompt), int(output)
            if not 0 <= row[0] < float("inf") or min(row[1:]) < 1:
                raise ValueError
        except ValueError:
            raise ValueError(
                f"{path}:{number}: a request is seconds of 0 or more, then tokens of prompt and "
                f"answer of 1 or more, got {line!r}"
            ) from None
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}:2: no request follows the columns")
    rows.sort()
    seconds_R, prompt_R, output_R = zip(*rows, strict=True)
    first = seconds_R[0]
    return Requests(np.array(seconds_R) - first, np.array(prompt_R), np.array(output_R))
