"""The paper's fused expert: all three layers in one launch, hidden activations never in memory.

`kernels.expert_mlp` for the rows of all experts at once. It fits on chip up to H = 512 and I = 1024
in bf16 (`tune.fused_stages`); wider layers are refused.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ....types import ExpertWeights
from ...baselines import Forward
from ...workloads import Model
from ..executor import Executor
from ..triton_rows import compute_capability
from .static import as_they_are


def build(model: Model, weights: ExpertWeights) -> Forward:
    """The layer as sort, one launch of the fused expert, combine.

    Raises:
        ValueError: the expert does not fit on chip.
    """
    from ....kernels.experts import experts_triton
    from ....kernels.tune import fused_stages

    h, i = model.hidden_size, model.intermediate_size
    if not fused_stages(h, i, weights.up.element_size(), compute_capability(weights.up.device)):
        raise ValueError(f"the fused expert does not fit on chip with H={h}, I={i}")

    def forward(hidden_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        named: dict[str, Any] = dict(weights.named())
        return experts_triton(
            hidden_TH, ids_TK, weights_TK, **named, activation="relu", gated=False, fused=True
        )

    return forward


EXECUTOR = Executor(
    name="fused-expert",
    label="fused three-layer kernel",
    about="all three layers of all experts in one launch, where the expert fits on chip",
    build=build,
    exact=build,
    ours=True,
    inputs=as_they_are,
    needs="cuda",
    order=80,
)
