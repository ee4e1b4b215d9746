"""The sizes with the least mean time over several possible loads: planning for what may come.

    K possible loads · N groups · M candidate sizes

A prediction is never right, and the slowest group decides: sizes that are best for the predicted
loads leave no room for the group that errs. So a plan is judged by its mean time over predictions
that are shifted by recent errors.

>>> groups = [SliceGroup(name=name, kind="hot", curve="any") for name in "ab"]
>>> from moesaic.runtime.plan import Curve
>>> curves = {"any": Curve(work="any", sms=(8, 128), ms=(16.0, 1.0))}
>>> table = Table.of(groups, curves, MachineSlices(total_sms=128))
>>> table.best(np.array([[2.0, 2.0], [2.0, 2.0]])), table.best(np.array([[3.0, 1.0]]))
((64, 64), (96, 32))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..plan import Curves, MachineSlices, SliceGroup
from ..predictors import Array
from .sizing import shortest

Places = NDArray[np.int64]


@dataclass(frozen=True)
class Table:
    """Curves as numbers: time = fixed_N + slope_SN * load, for S sizes and, last, the whole GPU."""

    groups: tuple[SliceGroup, ...]
    curves: Curves
    machine: MachineSlices
    slope_SN: Array
    fixed_N: Array
    alike_WN: Array
    """1 where a group has that kind of work."""

    @staticmethod
    def of(groups: Sequence[SliceGroup], curves: Curves, machine: MachineSlices) -> Table:
        """The table of some groups on a machine."""
        found = [curves[group.curve] for group in groups]
        sizes = (*machine.sizes, machine.total_sms)
        slope = [[(c.ms_at(s) - c.fixed_ms) / c.load for c in found] for s in sizes]
        kinds = list(dict.fromkeys(curve.work for curve in found))
        alike = [[float(curve.work == kind) for curve in found] for kind in kinds]
        fixed_N = np.array([c.fixed_ms for c in found])
        return Table(tuple(groups), curves, machine, np.array(slope), fixed_N, np.array(alike))

    def whole_ms(self, loads_KN: Array) -> Array:
        """Times (K,) without slices: one group after the other, a fixed part once."""
        own_KN = self.slope_SN[-1] * loads_KN
        times_K: Array = own_KN.sum(axis=1) + self.fixed_N.max(initial=0.0)
        return times_K

    def sliced_ms(self, places_MN: Places, loads_KN: Array) -> Array:
        """Times (M, K) under candidate sizes, given as places in `machine.sizes`; see `plan_ms`."""
        slope_MN = np.take_along_axis(self.slope_SN, places_MN, axis=0)
        alone_MK = (self.fixed_N + slope_MN[:, None, :] * loads_KN).max(axis=2)
        whole_KN = self.fixed_N + self.slope_SN[-1] * loads_KN
        together_K = (whole_KN @ self.alike_WN.T).max(axis=1)
        times_MK: Array = np.maximum(alone_MK, together_K)
        return times_MK

    def best(self, loads_KN: Array) -> tuple[int, ...] | None:
        """Sizes with the least mean time over the loads, or None where `shortest` finds none.

        From the best sizes for the mean load, one step at a time goes from one group to another
        for as long as that helps.
        """
        mean_N = tuple(map(float, loads_KN.mean(axis=0)))
        first = shortest(self.groups, mean_N, self.curves, self.machine)
        if first is None:
            return None
        sizes = self.machine.sizes
        least_N = np.array([self._least(group) for group in self.groups])
        here_N = np.array([sizes.index(size) for size in first])
        here = float(self.sliced_ms(here_N[None], loads_KN).mean())
        moves_MN = self._moves()
        while len(moves_MN):
            next_MN = here_N + moves_MN
            next_MN = next_MN[(next_MN >= least_N).all(axis=1)]
            if not len(next_MN):
                break
            means_M = self.sliced_ms(next_MN, loads_KN).mean(axis=1)
            place = int(means_M.argmin())
            if means_M[place] >= here * (1 - 1e-9):
                break
            here_N, here = next_MN[place], float(means_M[place])
        return tuple(sizes[place] for place in here_N)

    def _least(self, group: SliceGroup) -> int:
        """The place of the smallest size that a group accepts."""
        if group.slo is None:
            return 0
        least = self.curves[group.curve].smallest(self.machine, slowdown=group.slo)
        return self.machine.sizes.index(least)

    def _moves(self) -> Places:
        """Every way (M, N) to take one step from a group and give it to another."""
        count = len(self.groups)
        pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
        moves_MN = np.zeros((len(pairs), count), dtype=np.int64)
        for row, (giver, taker) in enumerate(pairs):
            moves_MN[row, giver], moves_MN[row, taker] = -1, 1
        return moves_MN
