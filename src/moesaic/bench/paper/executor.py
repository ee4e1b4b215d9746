"""What an executor of the paper's layer is, and the registry: the modules of `executors/`.

    T tokens · H hidden width · E experts · K top-k · S = T*K routed rows

An executor computes the layer from ids and weights. Each stands in a file of its own that names
an `EXECUTOR`; a new file there is a new row in every table. The rungs of the paper's ablation are
names (`LADDER`): a rung without an executor is reported as not measured.

Executors of rows end in one of two combines: torch's own (a gather and one batched product, the
leanest there is), or moesaic's (slot order, fp32, one rounding). `exact` builds an executor with
the latter, so that its bits can be compared with moesaic's whatever it is timed with.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ...kernels.activation import pointwise_ref
from ...types import ExpertSpec, ExpertWeights
from ..baselines import Build, Forward, prepare
from ..layers import Candidate
from ..workloads import Inputs, Model

OURS = "moesaic"
STATIC_TRITON = "static-triton"
LOOP = "loop"
GROUPED = "torch-grouped-mm"
LADDER = (
    (LOOP, "baseline: sequential PyTorch loop"),
    ("triton-experts", "+ Triton kernels"),
    ("expert-graphs", "+ CUDA graphs, one per expert"),
    ("slices", "+ dynamic slicing"),
    ("slices-streams", "+ streams"),
)


class ExpertRows(NamedTuple):
    """Expert rows (at least S, H), and the row of every slot (T, K)."""

    rows_SH: Tensor
    position_TK: Tensor


Rows = Callable[[Tensor, Tensor], ExpertRows]
BuildRows = Callable[[Model, ExpertWeights], Rows]
Combine = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Executor:
    """A way to run the layer.

    Attributes:
        name: how lines call it.
        label: how tables call it.
        about: one sentence for the docs.
        build: from a model and its weights, the function that is timed.
        exact: the same with moesaic's combine, for the comparison of bits; None where the sum over
            experts is part of the executor.
        ours: whether its bits must be moesaic's, so that a difference is a defect.
        host_counts: it reads the counts on the host, so no graph can hold it.
        inputs: what it likes its ids and weights to be, prepared outside the timing.
        needs: the device it cannot do without.
        order: its place in tables.
        state: facts of a built function for its line, after the timing.
    """

    name: str
    label: str
    about: str
    build: Build
    exact: Build | None
    ours: bool = False
    host_counts: bool = False
    inputs: Callable[[Inputs], Inputs] = prepare
    needs: Literal["cuda"] | None = None
    order: int = 50
    state: Callable[[Forward], dict[str, int | float]] | None = None

    def candidate(self) -> Candidate:
        """This executor as a candidate of `layers.measure_cell`."""

        def build(model: Model, weights: ExpertWeights) -> Forward:
            if self.needs and weights.up.device.type != self.needs:
                raise RuntimeError(f"needs a {self.needs} device, got {weights.up.device}")
            return self.build(model, weights)

        return Candidate(self.name, build, self.inputs)


@cache
def registry() -> dict[str, Executor]:
    """Every executor by name, in the order of tables."""
    from . import executors

    found = []
    for info in pkgutil.iter_modules(executors.__path__):
        module = importlib.import_module(f"{executors.__name__}.{info.name}")
        executor = getattr(module, "EXECUTOR", None)
        if isinstance(executor, Executor):
            found.append(executor)
    return {x.name: x for x in sorted(found, key=lambda x: (x.order, x.name))}


def combine_torch(rows_SH: Tensor, position_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """The weighted sum over slots in two launches: a gather and a batched product."""
    slots_TKH = rows_SH[position_TK]
    return torch.bmm(weights_TK[:, None, :].to(rows_SH.dtype), slots_TKH)[:, 0]


def combine_slots(rows_SH: Tensor, position_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """moesaic's own combine: slot order in fp32, one rounding."""
    from ...kernels.combine import combine, combine_ref

    run = combine if rows_SH.device.type == "cuda" else combine_ref
    return run(rows_SH, position_TK, weights_TK)


def layer_of(build_rows: BuildRows, combine: Combine = combine_torch) -> Build:
    """A layer from expert rows and a combine."""

    def build(model: Model, weights: ExpertWeights) -> Forward:
        rows = build_rows(model, weights)

        def forward(hidden_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
            rows_SH, position_TK = rows(hidden_TH, ids_TK)
            return combine(rows_SH, position_TK, weights_TK)

        return forward

    return build


class Slots(NamedTuple):
    """Slots sorted by expert: ids (S,), slot at each place (S,), place of each slot (T, K)."""

    ids_S: Tensor
    order_S: Tensor
    position_TK: Tensor


def sort_slots(ids_TK: Tensor) -> Slots:
    """Torch's dispatch: a stable sort and its inverse, three launches, no host sync."""
    ids_S, order_S = ids_TK.reshape(-1).sort(stable=True)
    position_S = torch.empty_like(order_S)
    position_S[order_S] = torch.arange(order_S.numel(), device=order_S.device)
    return Slots(ids_S, order_S, position_S.view(ids_TK.shape))


def expert_forward(weights: ExpertWeights, spec: ExpertSpec) -> Callable[..., Tensor]:
    """One three-layer expert in five launches of torch: ``call(rows_RH, e, out=...)``."""
    named = weights.named()

    def call(rows_RH: Tensor, e: int, out: Tensor | None = None) -> Tensor:
        rows = rows_RH
        for name in ("up", "mid"):
            rows = torch.addmm(named[f"{name}_bias"][e], rows, named[name][e].T)
            rows = rows.relu_() if spec.activation == "relu" else pointwise_ref(
                rows, spec.activation, spec.alpha
            )  # fmt: skip
        return torch.addmm(named["down_bias"][e], rows, named["down"][e].T, out=out)

    return call
