"""Where every expert of every MoE layer lives: a frozen value, and its JSON file.

    L MoE layers · E experts · G ranks

An expert may have replicas, never two on one rank. Which replica serves which token is part of the
value, so that one file says everything: replica ``i`` serves the tokens of the source ranks from
``starts[i]`` up to the next start. The choice depends on the source rank alone, costs no message,
and is the same in every run; a planner that orders replicas and starts along the nodes keeps
traffic inside them.

>>> placement = Placement(ranks=4, layers=(((0,), (1, 3)),))
>>> placement.destinations(0).tolist()
[[0, 1], [0, 1], [0, 3], [0, 3]]
>>> placement.hosted(0)
((0,), (1,), (), (1,))
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

FORMAT = "moesaic-placement-1"
MAX_RANKS = 1 << 17

Ranks = tuple[int, ...]
Layer = tuple[Ranks, ...]


def even_starts(replicas: int, ranks: int) -> Ranks:
    """The first source rank of each replica when each serves an equal block of sources."""
    return tuple(-(-i * ranks // replicas) for i in range(replicas))


def _wrong(where: str, expected: str, got: object) -> ValueError:
    return ValueError(f"{where} must be {expected}, got {got!r}")


def _check_expert(where: str, hosts: Ranks, starts: Ranks, ranks: int) -> None:
    if not hosts:
        raise _wrong(where, "on at least one rank (an expert without a rank loses tokens)", hosts)
    if min(hosts) < 0 or max(hosts) >= ranks:
        raise _wrong(where, f"on ranks in [0, {ranks})", list(hosts))
    if len(set(hosts)) != len(hosts):
        raise _wrong(where, "on distinct ranks (two replicas on one rank are waste)", list(hosts))
    rising = all(a < b for a, b in pairwise(starts))
    if len(starts) != len(hosts) or starts[0] != 0 or not rising or starts[-1] >= ranks:
        expected = f"{len(hosts)} rising source ranks in [0, {ranks}) that begin with 0"
        raise _wrong(f"{where}: starts", expected, list(starts))


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Expert -> ranks, layer by layer.

    Args:
        ranks: G.
        layers: per MoE layer and expert, the ranks that hold it, in the order of `starts`.
        starts: in the same form, the first source rank that each replica serves; None gives every
            replica of an expert an equal block of source ranks.

    Raises:
        ValueError: an expert without a rank, a rank out of range, two replicas on one rank, layers
            of different numbers of experts, or starts that do not cover every source once.
    """

    ranks: int
    layers: tuple[Layer, ...]
    starts: tuple[Layer, ...] | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.ranks <= MAX_RANKS:
            raise _wrong("ranks", f"in [1, {MAX_RANKS}]", self.ranks)
        if not self.layers or not self.layers[0]:
            raise _wrong("layers", "at least one layer of at least one expert", self.layers)
        if self.starts is not None and len(self.starts) != len(self.layers):
            raise _wrong("starts", f"{len(self.layers)} layers or None", len(self.starts))
        for number, layer in enumerate(self.layers):
            if len(layer) != self.num_experts:
                raise _wrong(f"layer {number}", f"{self.num_experts} experts", len(layer))
            if self.starts is not None and len(self.starts[number]) != len(layer):
                raise _wrong(f"starts of layer {number}", "one entry an expert", "another number")
            for expert, hosts in enumerate(layer):
                where = f"layer {number} expert {expert}"
                _check_expert(where, hosts, self.starts_of(number, expert), self.ranks)

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.layers[0])

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.layers)

    def starts_of(self, layer: int, expert: int) -> Ranks:
        """The first source rank that each replica of an expert serves."""
        if self.starts is not None:
            return self.starts[layer][expert]
        hosts = self.layers[layer][expert]
        if len(hosts) > self.ranks:
            return ()
        return even_starts(len(hosts), self.ranks)

    def destinations(self, layer: int) -> npt.NDArray[np.int32]:
        """(G, E) int32: the rank to which source rank g sends its tokens for expert e."""
        table = np.empty((self.ranks, self.num_experts), np.int32)
        for expert, hosts in enumerate(self.layers[layer]):
            starts = self.starts_of(layer, expert)
            for host, start in zip(hosts, starts, strict=True):
                table[start:, expert] = host
        return table

    def hosted(self, layer: int) -> tuple[Ranks, ...]:
        """Per rank, the experts it holds in this layer, ascending: the order of its weights."""
        found: list[list[int]] = [[] for _ in range(self.ranks)]
        for expert, hosts in enumerate(self.layers[layer]):
            for host in hosts:
                found[host].append(expert)
        return tuple(tuple(experts) for experts in found)

    def slots(self, layer: int) -> int:
        """The most experts that one rank holds in this layer."""
        return max(len(experts) for experts in self.hosted(layer))

    @property
    def at_most_one(self) -> bool:
        """Whether no rank holds more than one expert of a layer."""
        return all(self.slots(layer) == 1 for layer in range(self.num_layers))

    def to_json(self) -> dict[str, Any]:
        """The document that `save` writes."""
        return {
            "format": FORMAT,
            "ranks": self.ranks,
            "experts": self.num_experts,
            "layers": self.layers,
            "starts": self.starts,
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the value as JSON; the file gets its name when it is complete.

        Raises:
            OSError: the file cannot be written.
        """
        target = Path(path)
        partial = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            partial.write_text(json.dumps(self.to_json(), separators=(",", ":")) + "\n", "utf-8")
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)

    @staticmethod
    def load(
        path: str | os.PathLike[str], *, ranks: int | None = None, num_experts: int | None = None
    ) -> Placement:
        """Read what `save` wrote, checked whole.

        Args:
            path: the file.
            ranks: G of the group it is meant for; None accepts any.
            num_experts: E of the model it is meant for; None accepts any.

        Raises:
            OSError: the file is missing or unreadable.
            ValueError: it is no such document, or another model's or group's; names the file.
        """
        try:
            placement = from_json(json.loads(Path(path).read_text("utf-8")))
            placement.must_fit(ranks=ranks, num_experts=num_experts)
        except ValueError as error:
            raise ValueError(f"{path}: {error}; write one with `moesaic plan`") from error
        return placement

    def must_fit(self, *, ranks: int | None = None, num_experts: int | None = None) -> None:
        """Raise ValueError unless this is a placement over `ranks` of `num_experts` experts."""
        if ranks not in (None, self.ranks):
            raise _wrong("the placement", f"over {ranks} ranks", self.ranks)
        if num_experts not in (None, self.num_experts):
            raise _wrong("the placement", f"of {num_experts} experts", self.num_experts)


def _integers(value: Any, where: str) -> Ranks:
    whole = isinstance(value, list) and all(type(x) is int for x in value)
    if not whole:
        raise _wrong(where, "a list of integers", value)
    return tuple(value)


def _layers(value: Any, what: str) -> tuple[Layer, ...]:
    if not isinstance(value, list) or not all(isinstance(layer, list) for layer in value):
        raise _wrong(what, "a list of layers, each a list of experts", value)
    return tuple(
        tuple(_integers(x, f"{what} of layer {n} expert {e}") for e, x in enumerate(layer))
        for n, layer in enumerate(value)
    )


def from_json(document: Any) -> Placement:
    """The value of a parsed document, see `Placement.to_json`.

    Raises:
        ValueError: the document is not of this format or breaks a rule of `Placement`.
    """
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        got = document.get("format") if isinstance(document, dict) else document
        raise _wrong("format", repr(FORMAT), got)
    known = {"format", "ranks", "experts", "layers", "starts"}
    if extra := sorted(set(document) - known):
        raise _wrong("the fields", f"among {sorted(known)}", extra)
    ranks, starts = document.get("ranks"), document.get("starts")
    if type(ranks) is not int:
        raise _wrong("ranks", "an integer", ranks)
    placement = Placement(
        ranks=ranks,
        layers=_layers(document.get("layers"), "layers"),
        starts=None if starts is None else _layers(starts, "starts"),
    )
    if document.get("experts") != placement.num_experts:
        raise _wrong("experts", f"{placement.num_experts}, as layers has", document.get("experts"))
    return placement


def contiguous(num_experts: int, ranks: int, num_layers: int = 1) -> Placement:
    """Without replicas and without knowledge: expert e on rank ``e * G // E`` (``e`` if E <= G).

    >>> contiguous(4, 2).hosted(0)
    ((0, 1), (2, 3))
    """
    hosts: Sequence[int] = (
        range(num_experts)
        if num_experts <= ranks
        else [expert * ranks // num_experts for expert in range(num_experts)]
    )
    return Placement(ranks=ranks, layers=(tuple((host,) for host in hosts),) * num_layers)
