"""The two paths on a GPU: how candidates of a cell are called and timed, under every routing.

T tokens · H hidden width · I intermediate width · E experts · K top-k · S = T*K routed rows
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...kernels.hopper.fit import ONE_LAUNCH
from ...kernels.tune import (
    Config,
    GemmConfig,
    Problem,
    config_to_json,
    fused_stages,
    rows_per_expert,
)
from ...kernels.tune import heuristic as triton_heuristic
from ...types import ExpertWeights
from ..workloads import Model
from .cell import Times
from .clock import Rotation, SameBits, seconds_of
from .grid import Group, Tile, flexes_of, pairs_of
from .routing import time_routing

if TYPE_CHECKING:
    from ...kernels.grouped_mm import Epilogue
    from ...kernels.hopper.experts import LayerConfig


def arithmetic(model: Model) -> dict[str, Any]:
    """What the expert function does between its products."""
    s = model.spec()
    return {"activation": s.activation, "gated": s.gated, "limit": s.limit, "alpha": s.alpha,
            "up_offset": s.up_offset}  # fmt: skip


def epilogue_of(model: Model, part: str) -> Epilogue:
    """What follows a product of the Triton path."""
    from ...kernels.grouped_mm import Epilogue

    s = model.spec()
    if part == "up":
        return Epilogue(s.activation, s.gated, s.interleaved, s.limit, s.alpha, s.up_offset)
    return Epilogue(s.activation) if part == "mid" else Epilogue()


def rows_in(part: str, problem: Problem, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random sorted rows (S, I), which the products after the first read."""
    shape = (problem.tokens * problem.top_k, problem.intermediate)
    generator = torch.Generator(device).manual_seed(len(part))
    return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)


def hidden_of(turns: Mapping[str, Rotation]) -> Tensor:
    """The first hidden states (T, H) of the first routing."""
    return next(iter(turns.values())).hidden_TH[0]


def times_of(
    turns: Mapping[str, Rotation], call: Callable[[str, int], Tensor], question: str,
    bits: SameBits, best: Mapping[str, float],
) -> Times:  # fmt: skip
    """Seconds of `call(routing, turn)` by routing, its bits compared under each.

    Raises:
        Unfit: a call fails or has other bits.
    """
    found: Times = {}
    for routing, turn in turns.items():
        calls = [partial(call, routing, i) for i in range(len(turn))]
        bits.check(f"{question} {routing}", calls[0])
        found[routing] = seconds_of(calls, best.get(routing, float("inf")))
    return found


def kept_batches(
    kept: dict[tuple[Group, str], list[Any]], group: Group, routing: str, turn: Rotation,
    make: Callable[[Tensor], Any],
) -> list[Any]:  # fmt: skip
    """The task maps of a routing for these heights, made once; those of others are let go."""
    if any(heights != group for heights, _ in kept):
        kept.clear()
    if (group, routing) not in kept:
        kept[group, routing] = [make(ids_TK) for ids_TK in turn.ids_TK]
    return kept[group, routing]


@dataclass
class TritonLab:
    """The Triton path: `grouped_mm` per product, `experts_triton` whole."""

    model: Model
    problem: Problem
    turns: Mapping[str, Rotation]
    num_sms: int
    bits: SameBits = field(default_factory=SameBits)
    batches: dict[tuple[Group, str], list[Any]] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)

    def _batches(self, group: Group, routing: str) -> list[Any]:
        from ...kernels.batching import batch_rows

        def make(ids_TK: Tensor) -> Any:
            return batch_rows(ids_TK, self.model.num_experts, heights=group)

        return kept_batches(self.batches, group, routing, self.turns[routing], make)

    def _call(self, part: str, group: Group, cut: GemmConfig, routing: str, i: int) -> Tensor:
        from ...kernels.grouped_mm import grouped_mm

        spec, turn = self.model.spec(), self.turns[routing]
        sort, tasks = self._batches(group, routing)[i]
        weight = turn.set_of(i)
        x = turn.hidden_TH[i] if part == "up" else self.rows[part]
        named = dict(weight.named())
        return grouped_mm(
            x, named[part], sort, tasks, top_k=self.model.top_k if part == "up" else 0,
            heights=group, transposed=spec.transposed, bias=named.get(f"{part}_bias"),
            epilogue=epilogue_of(self.model, part), config=cut,
        )  # fmt: skip

    def part_s(self, part: str, group: Group, cut: GemmConfig, best: Mapping[str, float]) -> Times:
        """Seconds of one product with one cut."""
        hidden = hidden_of(self.turns)
        if part != "up" and part not in self.rows:
            self.rows[part] = rows_in(part, self.problem, hidden.dtype, hidden.device)

        def call(routing: str, i: int) -> Tensor:
            return self._call(part, group, cut, routing, i)

        return times_of(self.turns, call, part, self.bits, best)

    def layer_s(self, config: Config) -> Times:
        """Seconds of the layer."""
        from ...kernels.experts import experts_triton

        spec = self.model.spec()

        def call(routing: str, i: int) -> Tensor:
            turn = self.turns[routing]
            named: dict[str, Any] = dict(turn.set_of(i).named())
            return experts_triton(
                turn.hidden_TH[i], turn.ids_TK[i], turn.shares_TK[i], **named,
                **arithmetic(self.model), interleaved=spec.interleaved,
                transposed=spec.transposed, config=config,
            )  # fmt: skip

        return times_of(self.turns, call, "layer", self.bits, {})

    def combined(self, group: Group, chosen: dict[str, GemmConfig], order: str) -> Config:
        """The configuration of these cuts."""
        return Config(group, **chosen, order=order)  # type: ignore[arg-type]

    def heuristic(self) -> Config:
        """The heuristic's, its reason left out."""
        return triton_heuristic(self.problem)._replace(reason="")

    def more(self, config: Config) -> Sequence[Config]:
        """The fused three-layer launch where it fits."""
        p = self.problem
        fits = p.layers == 3 and fused_stages(p.hidden, p.intermediate, 2, p.arch)
        return [config._replace(fused=True)] if fits else []

    def launches(self, config: Config) -> int:
        """One a product, or one for all."""
        return 1 if config.fused else self.problem.layers

    def row(self, config: Config) -> dict[str, Any]:
        """The table's row."""
        return config_to_json(config)

    def routing_s(self) -> dict[int, float]:
        """The routing kernel by rows a program takes."""
        return time_routing(self.model, self.problem.tokens, hidden_of(self.turns).device)


def hopper_config(tile: Tile) -> Any:
    """The tile as the kernels take it."""
    from ...kernels.hopper.launch import HopperConfig

    return HopperConfig(
        tile.kernel, tile.bm, tile.bn, tile.stages, tile.bk,  # type: ignore[arg-type]
        tile.group_m, tile.ctas_per_sm,
    )  # fmt: skip


@dataclass
class HopperLab:
    """The Hopper path: `grouped_mm_hopper` per product, `experts_hopper` whole."""

    model: Model
    problem: Problem
    turns: Mapping[str, Rotation]
    num_sms: int
    bits: SameBits = field(default_factory=SameBits)
    batches: dict[tuple[Group, str], list[Any]] = field(default_factory=dict)
    rows: list[Tensor] = field(default_factory=list)

    def _batches(self, group: Group, routing: str) -> list[Any]:
        def make(ids_TK: Tensor) -> Any:
            return hopper_batch(ids_TK, self.model.num_experts, group)

        return kept_batches(self.batches, group, routing, self.turns[routing], make)

    def _call(self, part: str, group: Group, tile: Tile, routing: str, i: int) -> Tensor:
        order_S, tasks = self._batches(group, routing)[i]
        turn = self.turns[routing]
        first, last = hopper_products(
            self.model, hopper_config(tile), hopper_config(tile), num_sms=self.num_sms,
            one_token=self.problem.tokens == 1,
        )  # fmt: skip
        if part == "up":
            return first(turn.hidden_TH[i], order_S, tasks, turn.set_of(i))
        return last(self.rows[0], tasks, turn.set_of(i))

    def part_s(self, part: str, group: Group, tile: Tile, best: Mapping[str, float]) -> Times:
        """Seconds of one product with one tile, the copy of rows that tall tiles need included."""
        if not self.rows:
            hidden = hidden_of(self.turns)
            self.rows.append(rows_in("down", self.problem, hidden.dtype, hidden.device))

        def call(routing: str, i: int) -> Tensor:
            return self._call(part, group, tile, routing, i)

        return times_of(self.turns, call, part, self.bits, best)

    def layer_s(self, config: LayerConfig) -> Times:
        """Seconds of the layer."""
        from ...kernels.hopper.experts import experts_hopper

        def call(routing: str, i: int) -> Tensor:
            turn = self.turns[routing]
            return experts_hopper(
                turn.hidden_TH[i], turn.ids_TK[i], turn.shares_TK[i], up=turn.set_of(i).up,
                down=turn.set_of(i).down, **arithmetic(self.model), config=config,
                num_sms=self.num_sms,
            )  # fmt: skip

        return times_of(self.turns, call, "layer", self.bits, {})

    def combined(self, group: Group, chosen: dict[str, Tile], order: str) -> LayerConfig:
        """The configuration of these tiles."""
        from ...kernels.hopper.experts import LayerConfig

        return LayerConfig(hopper_config(chosen["up"]), hopper_config(chosen["down"]), order)

    def heuristic(self) -> LayerConfig:
        """The heuristic's choice."""
        return hopper_heuristic(self.problem, self.num_sms)

    def more(self, config: LayerConfig) -> Sequence[LayerConfig]:
        """Both products in one launch, where rows are few or may be uneven."""
        flexes = flexes_of(self.problem.tokens, rows_per_expert(self.problem))
        one = list(map(hopper_config, (*pairs_of(config.up.bm), *flexes)))
        found = [config._replace(up=tile, down=tile) for tile in one]
        wide = [c for c in found if (c.up.kernel, c.up.bn) == ("flex", 256)]
        return found + [c._replace(order="large_first") for c in wide]

    def launches(self, config: LayerConfig) -> int:
        """Two, or one for both."""
        return 1 if config.up.kernel in ONE_LAUNCH else 2

    def row(self, config: LayerConfig) -> dict[str, Any]:
        """The table's row."""
        return {"up": config.up._asdict(), "down": config.down._asdict(), "order": config.order}

    def routing_s(self) -> dict[int, float]:
        """The routing kernel by rows a program takes."""
        return time_routing(self.model, self.problem.tokens, hidden_of(self.turns).device)


def hopper_heuristic(problem: Problem, num_sms: int) -> LayerConfig:
    """What `experts_hopper` runs where nothing was measured."""
    from ...kernels.hopper.experts import choose_layer

    p, up_rows = problem, problem.intermediate * (2 if problem.gated else 1)
    return choose_layer(p.tokens, p.top_k, p.num_experts, up_rows, num_sms)


def hopper_batch(ids_TK: Tensor, experts: int, group: Group) -> tuple[Tensor, Any]:
    """Order and task map of a routing, as `experts_hopper` makes them."""
    from ...kernels.batching import batch_rows
    from ...kernels.hopper.single import one_token

    if ids_TK.shape[0] == 1:
        return one_token(ids_TK)
    sort, tasks = batch_rows(ids_TK, experts, heights=group, pdl=True)
    return sort.order_S, tasks


def pair_products(
    model: Model, tile: Any, hidden: Tensor, order_S: Tensor, tasks: Any, weight: ExpertWeights,
    *, num_sms: int, one_token: bool, few: bool = False,
) -> None:  # fmt: skip
    """The one launch of both products, as `experts_hopper` makes it, on scratch of its own.

    `few`: the launch finds the tasks of the tokens itself, `order_S` and `tasks` are not read.
    """
    from ...kernels.hopper.flex import flex_mm_hopper
    from ...kernels.hopper.pair import pair_mm_hopper
    from ...kernels.hopper.zeros import WORDS

    tokens, device = hidden.shape[0], hidden.device
    more: dict[str, Any] = {} if few else {"order_S": order_S}
    slots = tokens * model.top_k if few else order_S.numel()
    if one_token or few:
        shares = hidden.new_empty((tokens, model.top_k), dtype=torch.float32)
        more["counters"] = torch.zeros(WORDS, dtype=torch.int32, device=device)
        more["weighted"] = (shares, torch.empty_like(hidden))
    ids = torch.zeros((tokens, model.top_k), dtype=torch.int32, device=device)
    product: Any = flex_mm_hopper if tile.kernel == "flex" else pair_mm_hopper
    product(
        hidden, weight.up, weight.down, ids if few else tasks,
        hidden.new_empty((slots, model.intermediate_size)),
        hidden.new_empty((slots, model.hidden_size)), config=tile, num_sms=num_sms,
        top_k=model.top_k, pdl=True, **arithmetic(model), **more,
    )  # fmt: skip


def hopper_products(
    model: Model, up: Any, down: Any, *, num_sms: int, one_token: bool
) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """The two launches of `products`, each alone, with the same constants."""
    from ...kernels.gather import gather_rows
    from ...kernels.hopper.launch import grouped_mm_hopper

    sorts = up.kernel == "tall"

    def first(hidden: Tensor, order_S: Tensor, tasks: Any, weight: ExpertWeights) -> Tensor:
        act_SI = hidden.new_empty((order_S.numel(), model.intermediate_size))
        x = gather_rows(hidden, order_S, model.top_k, pdl=True) if sorts else hidden
        return grouped_mm_hopper(
            x, weight.up, tasks, act_SI, config=up, num_sms=num_sms,
            order_S=None if sorts else order_S, top_k=model.top_k, **arithmetic(model),
            ticket=None if one_token else 0, pdl="wait",
        )  # fmt: skip

    def last(act_SI: Tensor, tasks: Any, weight: ExpertWeights) -> Tensor:
        rows_SH = act_SI.new_empty((act_SI.shape[0], model.hidden_size))
        return grouped_mm_hopper(
            act_SI, weight.down, tasks, rows_SH, config=down, num_sms=num_sms,
            ticket=None if one_token else 1, pdl="prefetch",
        )  # fmt: skip

    return first, last
