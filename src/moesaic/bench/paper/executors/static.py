"""The static batch: every expert's rows in one launch a layer, as `impl="auto"` runs the layer."""

from __future__ import annotations

from ...layers import ours
from ...workloads import Inputs
from ..executor import OURS, Executor


def as_they_are(inputs: Inputs) -> Inputs:
    """Inputs unchanged: int32 ids and fp32 weights are what the router of moesaic gives."""
    return inputs


EXECUTOR = Executor(
    name=OURS,
    label="moesaic, static batch",
    about="all experts in one launch a layer, or in one for all three layers where that is faster",
    build=ours("auto").build,
    exact=ours("auto").build,
    ours=True,
    inputs=as_they_are,
    order=90,
)
