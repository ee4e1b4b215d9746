"""The YAML files of `configs/`: the paper's three layers, what is measured, what the paper claims.

>>> layers()["small"].model.num_experts, layers()["small"].counted_parameters
(8, 16777216)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from ...cost import expert_weight_elements
from ..suite import Cell
from ..workloads import Model

SIZES = ("small", "medium", "large")
CLOCKS = ("experts", "energy", "stage", "launch", "break-even")


def read_yaml(name: str) -> dict[str, Any]:
    """A file of `configs/`, as data.

    Raises:
        ValueError: it holds something else than a mapping.
    """
    import yaml

    text = files(__package__).joinpath("configs", f"{name}.yaml").read_text(encoding="utf-8")
    value = yaml.safe_load(text)
    if not isinstance(value, dict):
        raise ValueError(f"{name}.yaml must hold a mapping, got {type(value).__name__}")
    return value


@dataclass(frozen=True)
class PaperLayer:
    """A configuration of the paper: the layer, what it is called, the parameters it claims."""

    title: str
    model: Model
    claimed_parameters: float

    @property
    def counted_parameters(self) -> int:
        """Weights of all experts, biases left out."""
        one = expert_weight_elements(self.model.spec())
        biases = 2 * self.model.intermediate_size + self.model.hidden_size
        return self.model.num_experts * (one - biases)

    @property
    def active_parameters(self) -> int:
        """Weights that one token meets."""
        return self.counted_parameters // self.model.num_experts * self.model.top_k


def layer_from(values: dict[str, Any]) -> PaperLayer:
    """A layer from a mapping like those in `configs/`.

    Raises:
        ValueError: a key is missing or unknown.
    """
    shape = ("num_experts", "top_k", "hidden_size", "intermediate_size")
    wanted = {"name", "title", "claimed_parameters", *shape}
    if set(values) != wanted:
        wrong = sorted(wanted.symmetric_difference(values))
        raise ValueError(f"a configuration has the keys {sorted(wanted)}; wrong: {wrong}")
    experts, top_k, hidden, intermediate = (int(values[key]) for key in shape)
    model = Model(values["name"], experts, top_k, hidden, intermediate, "relu3", "paper")
    return PaperLayer(values["title"], model, float(values["claimed_parameters"]))


@cache
def layers() -> dict[str, PaperLayer]:
    """The paper's layers by size, smallest first."""
    return {size: layer_from(read_yaml(size)) for size in SIZES}


@cache
def claims() -> dict[str, Any]:
    """What the paper says, as in claims.yaml."""
    return read_yaml("claims")


@cache
def grid() -> dict[str, Any]:
    """What is measured, as in grid.yaml."""
    return read_yaml("grid")


def break_even_name(num_experts: int, top_k: int) -> str:
    """The name of a layer of the break-even map.

    >>> break_even_name(16, 2), break_even_model("e16-k2").top_k
    ('e16-k2', 2)
    """
    return f"e{num_experts}-k{top_k}"


def break_even_model(name: str) -> Model:
    """The layer of that name, with the expert of grid.yaml."""
    experts, top_k = (int(part[1:]) for part in name.split("-"))
    sizes = grid()["break_even"]
    return Model(
        name, experts, top_k, sizes["hidden_size"], sizes["intermediate_size"],
        kind="relu3", family="paper",
    )  # fmt: skip


def model_of(name: str) -> Model:
    """The layer of a cell."""
    named = {layer.model.name: layer.model for layer in layers().values()}
    return named[name] if name in named else break_even_model(name)


def main_cells(part: str, clock: str = "experts") -> list[Cell]:
    """Every layer at the batches called `part` in grid.yaml."""
    names = [layers()[size].model.name for size in grid()["models"]]
    return [Cell(name, tokens, clock=clock) for name in names for tokens in grid()["batches"][part]]


def break_even_cells() -> list[Cell]:
    """The map over E and K, then batch and routing along one of its layers."""
    b = grid()["break_even"]
    name = break_even_name(**b["along"])
    cells = [
        Cell(break_even_name(e, k), b["batch"], clock="break-even")
        for e in b["num_experts"]
        for k in b["top_k"]
        if k <= e
    ]
    cells += [Cell(name, tokens, clock="break-even") for tokens in b["batches"]]
    cells += [Cell(name, b["batch"], routing, clock="break-even") for routing in b["routings"]]
    return list(dict.fromkeys(cells))


def every_cell() -> list[Cell]:
    """All cells of the suite, those of the targets first."""
    names = [layers()[size].model.name for size in grid()["models"]]
    at: Sequence[int] = grid()["stages"]
    wide = grid()["energy"]["wide"]
    return [
        *main_cells("paper"),
        *main_cells("wide"),
        *main_cells("paper", "energy"),
        Cell("launch", 1, "-", clock="launch"),
        *(Cell(name, tokens, clock="stage") for name in names for tokens in at),
        *break_even_cells(),
        *(Cell(name, tokens, clock="energy") for name in names for tokens in wide),
    ]
