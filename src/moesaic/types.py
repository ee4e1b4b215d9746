"""Frozen values that pass between the rooms: what an expert is, what routing said and came out.

Nothing here computes on tensors or launches anything; `__post_init__` checks what the value itself
can know. Shapes are written as suffixes of the names:

    T tokens · H hidden width · I expert intermediate width · E experts · K top-k · S = T*K rows

>>> ExpertSpec(num_experts=8, hidden_size=4096, intermediate_size=14336).up_rows
28672
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, get_args

if TYPE_CHECKING:
    from torch import Tensor

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]
Scoring = Literal["softmax", "sigmoid", "topk_softmax"]


def _refuse(what: str, expected: str, got: object) -> None:
    raise ValueError(f"{what} must be {expected}, got {got!r}")


def _write_key(spec: ExpertSpec | RouterSpec) -> None:
    """Write the key once: a traced function can read an attribute, but not call json."""
    text = json.dumps(asdict(spec), sort_keys=True, separators=(",", ":"))
    object.__setattr__(spec, "_key", text)


@dataclass(frozen=True, kw_only=True)
class ExpertSpec:
    """The shape and arithmetic of every expert of one MoE layer.

    Two layers (`layers=2`): ``down(act(gate) * (up + up_offset))`` when `gated`, else
    ``down(act(up))``. Three layers (`layers=3`, ungated, ``input -> I -> I -> input``): the ReLU
    MLP of the expert-slicing paper. With `limit` L, gate is clamped to ``(-inf, L]`` and up to
    ``[-L, L]`` first. `alpha` scales the sigmoid of silu: ``x * sigmoid(alpha * x)``.
    gpt-oss is ``interleaved, transposed, bias, limit=7, alpha=1.702, up_offset=1``.

    Raises:
        ValueError: when a width is not a positive multiple of 8 or a combination has no meaning.
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    activation: Activation = "silu"
    gated: bool = True
    layers: Literal[2, 3] = 2
    bias: bool = False
    interleaved: bool = False
    transposed: bool = False
    limit: float | None = None
    alpha: float = 1.0
    up_offset: float = 0.0
    _key: ClassVar[str]

    def __post_init__(self) -> None:
        if not 1 <= self.num_experts <= 1024:
            _refuse("num_experts", "in [1, 1024]", self.num_experts)
        for name in ("hidden_size", "intermediate_size"):
            width = getattr(self, name)
            if width <= 0 or width % 8:
                _refuse(name, "a positive multiple of 8 (pad the weights with zeros)", width)
        if self.activation not in get_args(Activation):
            _refuse("activation", f"one of {', '.join(get_args(Activation))}", self.activation)
        if self.layers == 3 and (self.gated or self.transposed):
            _refuse("a three-layer expert", "ungated and not transposed", self)
        if self.interleaved and not self.gated:
            _refuse("interleaved", "False when gated is False", True)
        if not self.gated and self.up_offset:
            _refuse("up_offset", "0 when gated is False", self.up_offset)
        _write_key(self)

    @property
    def up_rows(self) -> int:
        """Output width of the first projection: 2I when gated, else I."""
        return self.intermediate_size * (2 if self.gated else 1)

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the weight tensors, in transformers' layouts."""
        e, h, i, u = self.num_experts, self.hidden_size, self.intermediate_size, self.up_rows
        shapes: dict[str, tuple[int, ...]] = {
            "up": (e, h, u) if self.transposed else (e, u, h),
            "down": (e, i, h) if self.transposed else (e, h, i),
        }
        if self.layers == 3:
            shapes["mid"] = (e, i, i)
        if self.bias:
            shapes |= {"up_bias": (e, u), "down_bias": (e, h)}
            if self.layers == 3:
                shapes["mid_bias"] = (e, i)
        return shapes

    def key(self) -> str:
        """A canonical string of this spec, the form in which it crosses the torch-op boundary."""
        return self._key

    @staticmethod
    @lru_cache(maxsize=1024)
    def from_key(key: str) -> ExpertSpec:
        """The spec that `key()` wrote."""
        return ExpertSpec(**json.loads(key))


@dataclass(frozen=True, kw_only=True)
class RouterSpec:
    """How router logits become top-k ids and weights.

    `softmax`: softmax over E, then top-k, then divide by the sum if `renormalize`.
    `topk_softmax`: top-k of the logits, then softmax over the K chosen.
    `sigmoid`: sigmoid scores; the choice is made on ``score + bias`` (weights without the bias),
    limited to the best `topk_group` of `n_group` groups, a group's worth being the sum of its two
    best choice scores (DeepSeek-V3). Weights are multiplied by `scale` last.
    Ties always go to the lowest expert id.

    Raises:
        ValueError: when a count is out of range or groups do not divide the experts.
    """

    num_experts: int
    top_k: int
    scoring: Scoring = "softmax"
    renormalize: bool = True
    n_group: int = 1
    topk_group: int = 1
    scale: float = 1.0
    _key: ClassVar[str]

    def __post_init__(self) -> None:
        if not 1 <= self.num_experts <= 1024:
            _refuse("num_experts", "in [1, 1024]", self.num_experts)
        if not 1 <= self.top_k <= min(64, self.num_experts):
            _refuse("top_k", f"in [1, min(64, num_experts={self.num_experts})]", self.top_k)
        if self.scoring not in get_args(Scoring):
            _refuse("scoring", f"one of {', '.join(get_args(Scoring))}", self.scoring)
        if self.n_group < 1 or self.num_experts % self.n_group:
            _refuse("n_group", f"a divisor of num_experts={self.num_experts}", self.n_group)
        if not 1 <= self.topk_group <= self.n_group:
            _refuse("topk_group", f"in [1, n_group={self.n_group}]", self.topk_group)
        if self.topk_group * (self.num_experts // self.n_group) < self.top_k:
            _refuse("top_k", "at most the experts of topk_group groups", self.top_k)
        _write_key(self)

    def key(self) -> str:
        """A canonical string of this spec, the form in which it crosses the torch-op boundary."""
        return self._key

    @staticmethod
    @lru_cache(maxsize=1024)
    def from_key(key: str) -> RouterSpec:
        """The spec that `key()` wrote."""
        return RouterSpec(**json.loads(key))


@dataclass(frozen=True)
class ExpertWeights:
    """The weight tensors of one layer's experts, shapes as in `ExpertSpec.weight_shapes`."""

    up: Tensor
    down: Tensor
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    mid: Tensor | None = None
    mid_bias: Tensor | None = None

    def named(self) -> dict[str, Tensor]:
        """The tensors that are present, by name."""
        pairs = ((f.name, getattr(self, f.name)) for f in fields(self))
        return {name: tensor for name, tensor in pairs if tensor is not None}


class Routing(NamedTuple):
    """What the router decided: ids (T, K) int32, weights (T, K) fp32, counts (E,) int32."""

    topk_ids_TK: Tensor
    topk_weights_TK: Tensor
    counts_E: Tensor


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A median and its spread, in the unit that the name of the field says."""

    median: float
    p20: float
    p80: float
    samples: int
