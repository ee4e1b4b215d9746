"""What the experts did, as frozen values: what policies and exporters read, and nothing else.

    L layers · E experts · K top-k · T tokens

A `Profile` covers the `steps` steps up to and including `step`. `counts_E` says how many rows each
expert computed in them, `ewma_E` how many it computes a step, smoothed. A policy is a pure function
``Profile -> Plan``; a simulated profile and a measured one are the same value.

>>> layer = layer_profile([6, 1, 1, 0], layer=0, top_k=2)
>>> layer.tokens, layer.balancedness, layer.share_E[0]
(4, 0.3333333333333333, 0.75)
>>> Profile.from_json(Profile(step=0, steps=1, seconds=0.5, layers=(layer,)).to_json()).tokens_per_s
8.0
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..cost import balancedness


@dataclass(frozen=True, kw_only=True)
class LayerProfile:
    """One layer's experts over the steps of a `Profile`; every tuple has E numbers.

    `counts_E` are rows computed; where the experts were not watched (`route` alone), the router's
    choices. `routed_E` are the router's choices (zeros where ids were given), `tiles_E` the tiles
    of the task map. Both of them are empty where nobody counted them. `ewma_E` is in rows a step.
    `hot` and `cold` are disjoint sets of expert ids.

    Raises:
        ValueError: a count is negative, sizes disagree, or an expert is both hot and cold.
    """

    layer: int
    name: str
    top_k: int
    counts_E: tuple[int, ...]
    ewma_E: tuple[float, ...]
    routed_E: tuple[int, ...] = ()
    tiles_E: tuple[int, ...] = ()
    hot: frozenset[int] = frozenset()
    cold: frozenset[int] = frozenset()
    drifted: bool = False

    def __post_init__(self) -> None:
        experts = len(self.counts_E)
        if not experts or self.top_k < 1 or self.layer < 0:
            raise ValueError(f"a layer has experts, top_k >= 1 and layer >= 0, got {self}")
        for name in ("ewma_E", "routed_E", "tiles_E"):
            size = len(getattr(self, name))
            if size != experts and (size or name == "ewma_E"):
                raise ValueError(f"{name} must hold {experts} numbers, got {size}")
        if min(self.counts_E) < 0 or min(self.ewma_E) < 0:
            raise ValueError(f"counts must be 0 or more, got {self.counts_E} and {self.ewma_E}")
        if self.hot & self.cold or not self.hot | self.cold <= set(range(experts)):
            raise ValueError(
                f"hot and cold must be disjoint sets of experts in [0, {experts}), "
                f"got {sorted(self.hot)} and {sorted(self.cold)}"
            )

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.counts_E)

    @property
    def rows(self) -> int:
        """Rows computed by all experts."""
        return sum(self.counts_E)

    @property
    def tokens(self) -> int:
        """Tokens that passed the layer: rows over top_k."""
        return self.rows // self.top_k

    @property
    def balancedness(self) -> float:
        """Mean over maximum of the experts' rows (`cost.balancedness`)."""
        return balancedness(list(self.counts_E))

    @property
    def share_E(self) -> tuple[float, ...]:
        """Each expert's share of the smoothed load, 1 / E each before anything was routed."""
        total = sum(self.ewma_E)
        if not total:
            return (1.0 / self.num_experts,) * self.num_experts
        return tuple(load / total for load in self.ewma_E)


def layer_profile(
    counts_E: Sequence[int], *, layer: int = 0, top_k: int = 1, steps: int = 1, **more: Any
) -> LayerProfile:
    """A profile of known counts over `steps` steps, its mean as the smoothed load: for planning."""
    values = {"name": f"layer{layer}", "ewma_E": tuple(count / steps for count in counts_E)} | more
    return LayerProfile(layer=layer, top_k=top_k, counts_E=tuple(counts_E), **values)


@dataclass(frozen=True, kw_only=True)
class Profile:
    """All watched layers over the `steps` steps that ended with step number `step`.

    `seconds` is the time that these steps took, by the clock of the device; 0 where it is unknown.

    Raises:
        ValueError: a number is negative.
    """

    step: int
    steps: int
    seconds: float
    layers: tuple[LayerProfile, ...]

    def __post_init__(self) -> None:
        if self.steps < 0 or self.seconds < 0:
            raise ValueError(f"steps and seconds must be 0 or more, got {self}")

    @property
    def tokens(self) -> int:
        """Tokens of these steps: the most that any layer saw."""
        return max((layer.tokens for layer in self.layers), default=0)

    @property
    def tokens_per_s(self) -> float:
        """Tokens over seconds; 0 where the time is unknown."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def balancedness(self) -> float:
        """The mean of the layers' balancedness, 1.0 without layers."""
        every = [layer.balancedness for layer in self.layers]
        return sum(every) / len(every) if every else 1.0

    def to_json(self) -> str:
        """One line of JSON, with what is derived (tokens/s, balancedness) beside what is stored."""
        value = asdict(self)
        value |= {"tokens": self.tokens, "tokens_per_s": self.tokens_per_s}
        for layer, entry in zip(self.layers, value["layers"], strict=True):
            entry |= {"hot": sorted(layer.hot), "cold": sorted(layer.cold)}
            entry["balancedness"] = layer.balancedness
        return json.dumps(value, separators=(",", ":"))

    @staticmethod
    def from_json(line: str) -> Profile:
        """The profile that `to_json` wrote.

        Raises:
            ValueError: the line is not one.
        """
        try:
            value = json.loads(line)
            layers = tuple(_layer_from(entry) for entry in value["layers"])
            return Profile(
                step=int(value["step"]),
                steps=int(value["steps"]),
                seconds=float(value["seconds"]),
                layers=layers,
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a profile line ({error!r}): {line[:80]!r}") from error


def _layer_from(entry: dict[str, Any]) -> LayerProfile:
    return LayerProfile(
        layer=int(entry["layer"]),
        name=str(entry["name"]),
        top_k=int(entry["top_k"]),
        counts_E=tuple(map(int, entry["counts_E"])),
        ewma_E=tuple(map(float, entry["ewma_E"])),
        routed_E=tuple(map(int, entry["routed_E"])),
        tiles_E=tuple(map(int, entry["tiles_E"])),
        hot=frozenset(map(int, entry["hot"])),
        cold=frozenset(map(int, entry["cold"])),
        drifted=bool(entry["drifted"]),
    )
