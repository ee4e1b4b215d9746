"""The static batch on the Triton kernels, which run on any GPU: what Hopper's own kernels add.

Executors that launch per expert use the same kernels and tiles, so they differ from this one in
their launches alone.
"""

from __future__ import annotations

from ...layers import ours
from ..executor import STATIC_TRITON, Executor
from .static import as_they_are

EXECUTOR = Executor(
    name=STATIC_TRITON,
    label="static batch, Triton kernels",
    about="the static batch on the kernels that run on any GPU",
    build=ours("triton").build,
    exact=ours("triton").build,
    ours=True,
    inputs=as_they_are,
    needs="cuda",
    order=80,
)
