"""How many replicas each expert gets, and which source ranks each replica serves.

    L layers · E experts · G ranks · I instances (experts and their replicas)

One more replica goes, again and again, to the expert with the largest load per replica: that is
the best possible division of a number of slots for the largest load per replica. A replica serves
a run of neighbouring source ranks with about its share of the expert's rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def replica_counts(loads_LE: npt.NDArray[Any], slots: int, ranks: int) -> Ints:
    """Replicas of every expert, at most `slots` in all and `ranks` of one expert.

    An expert without load keeps one replica, so fewer slots may be used.

    >>> replica_counts(np.array([[8.0, 3.0, 1.0]]), slots=6, ranks=4).tolist()
    [[3, 2, 1]]

    Raises:
        ValueError: fewer slots than experts.
    """
    loads = np.asarray(loads_LE, np.float64)
    layers, experts = loads.shape
    if slots < experts:
        raise ValueError(
            f"{experts} experts need as many slots, got {slots}; "
            "use more ranks, or allow more experts a rank"
        )
    counts = np.ones((layers, experts), np.int64)
    share = loads.copy()
    share[counts >= ranks] = 0.0
    rows = np.arange(layers)
    for _ in range(slots - experts):
        hottest = share.argmax(axis=1)
        grows = share[rows, hottest] > 0
        if not grows.any():
            break
        at = (rows[grows], hottest[grows])
        counts[at] += 1
        share[at] = np.where(counts[at] < ranks, loads[at] / counts[at], 0.0)
    return counts


@dataclass(frozen=True)
class Instances:
    """The instances of one layer: replica after replica of expert after expert.

    Args:
        expert_I: the expert of each.
        start_I: the first source rank that it serves.
        end_I: the source rank after the last one.
    """

    expert_I: Ints
    start_I: Ints
    end_I: Ints

    def rows_IG(self, counts_GE: npt.NDArray[Any]) -> Floats:
        """(I, G): the rows each instance gets from each source rank."""
        source = np.arange(counts_GE.shape[0])
        serves = (source >= self.start_I[:, None]) & (source < self.end_I[:, None])
        return np.where(serves, np.asarray(counts_GE, np.float64).T[self.expert_I], 0.0)


def cut_sources(rows_G: npt.NDArray[Any], replicas: int) -> list[int]:
    """The first source rank of each replica, so that the shares are as even as whole ranks allow.

    >>> cut_sources(np.array([4, 1, 1, 2]), 2)
    [0, 1]
    """
    ranks = len(rows_G)
    if replicas == 1:
        return [0]
    before = np.concatenate([[0.0], np.cumsum(rows_G, dtype=np.float64)])
    wanted = before[-1] * np.arange(1, replicas) / replicas
    right = np.clip(np.searchsorted(before, wanted), 1, ranks)
    nearer = np.where(wanted - before[right - 1] < before[right] - wanted, right - 1, right)
    starts = [0]
    for i, cut in enumerate(nearer.tolist(), 1):
        starts.append(min(max(cut, starts[-1] + 1), ranks - replicas + i))
    return starts


def instances(counts_GE: npt.NDArray[Any], replicas_E: npt.NDArray[Any]) -> Instances:
    """The instances of one layer for its source-rank × expert counts."""
    ranks = counts_GE.shape[0]
    cuts = [cut_sources(counts_GE[:, e], int(n)) for e, n in enumerate(replicas_E)]
    return Instances(
        np.repeat(np.arange(len(cuts)), replicas_E),
        np.array([start for starts in cuts for start in starts]),
        np.array([end for starts in cuts for end in (*starts[1:], ranks)]),
    )
