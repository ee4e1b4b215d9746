"""What a window of energy says: joules, watts, tokens per joule, and shares of it by expert.

A reading is an `Energy`, or an `Unavailable` that prints as "not available: why"; `meter.py` takes
them. An expert's joules cannot be measured, for the counter is the whole board's: `attribute`
shares a window out by a stated model, and says so.

>>> energy = Energy(joules=900.0, seconds=2.0, tdp_w=700.0, meter="nvml", idle_w=100.0)
>>> energy.watts, energy.net_joules, energy.tokens_per_joule(3600), energy.share_of_tdp > 0.64
(450.0, 700.0, 4.0, True)
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ..cost import modelled_joules, net_joules
from ..types import ExpertSpec

STEP_S = 0.1


@dataclass(frozen=True)
class Unavailable:
    """There is no reading, and why."""

    why: str

    def __str__(self) -> str:
        return f"not available: {self.why}"


@dataclass(frozen=True, kw_only=True)
class Energy:
    """What one window took: gross joules of the board, and what is needed to put them in relation.

    `tdp_w` is the design power in watts, `idle_w` the idle board's power, None when not measured.
    """

    joules: float
    seconds: float
    tdp_w: float
    meter: str
    idle_w: float | None = None

    @property
    def watts(self) -> float:
        """Average power."""
        return self.joules / self.seconds

    @property
    def share_of_tdp(self) -> float:
        """Average power over the design power."""
        return self.watts / self.tdp_w

    @property
    def step_share(self) -> float:
        """One step of the counter over the window: how far off the joules may be."""
        return STEP_S / self.seconds

    @property
    def net_joules(self) -> float | None:
        """Joules above idle; None when idle was not measured."""
        if self.idle_w is None:
            return None
        return net_joules(self.joules, self.idle_w, self.seconds)

    def joules_per_token(self, tokens: float, *, net: bool = False) -> float | None:
        """Joules per token, gross, or above idle with `net` (None when idle was not measured)."""
        joules = self.net_joules if net else self.joules
        return None if joules is None else joules / tokens

    def tokens_per_joule(self, tokens: float, *, net: bool = False) -> float | None:
        """Tokens per joule; None also when the joules above idle are not positive."""
        joules = self.joules_per_token(tokens, net=net)
        return 1 / joules if joules is not None and joules > 0 else None


Reading = Energy | Unavailable


@dataclass(frozen=True)
class Repeats:
    """Several readings of the same work; `values` are what is compared, the spread is that of all.

    `spread` is (largest - smallest) / median.
    """

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle value."""
        return statistics.median(self.values)

    @property
    def spread(self) -> float:
        """How far the values lie apart, relative to their median."""
        return (max(self.values) - min(self.values)) / self.median


@dataclass(frozen=True, kw_only=True)
class EnergyModel:
    """The stated model by which joules are attributed: so much per flop, so much per byte moved."""

    joules_per_flop: float
    joules_per_byte: float

    def joules(self, spec: ExpertSpec, rows_E: Sequence[int], itemsize: int) -> list[float]:
        """Joules of each expert as the model has them."""
        return modelled_joules(
            spec,
            rows_E,
            itemsize,
            joules_per_flop=self.joules_per_flop,
            joules_per_byte=self.joules_per_byte,
        )


@dataclass(frozen=True, kw_only=True)
class AttributedEnergy:
    """Joules given to each expert by `model`: no measurement, as `label` says wherever they go.

    They sum to `total`, the measured joules that were shared out.
    """

    joules_E: tuple[float, ...]
    total: float
    net: bool
    model: EnergyModel
    label: str = "attributed"


def attribute(
    energy: Energy, model: EnergyModel, spec: ExpertSpec, rows_E: Sequence[int], itemsize: int
) -> AttributedEnergy:
    """Share a window's joules (above idle, where idle was measured) among experts by their rows.

    Raises:
        ValueError: no expert had a row, so that nobody can have used the energy.
    """
    weights_E = model.joules(spec, rows_E, itemsize)
    whole = math.fsum(weights_E)
    if not whole:
        raise ValueError("energy cannot be attributed: no expert had a row in this window")
    net = energy.net_joules
    total = energy.joules if net is None else net
    return AttributedEnergy(
        joules_E=tuple(total * weight / whole for weight in weights_E),
        total=total,
        net=net is not None,
        model=model,
    )
