"""The sequential PyTorch loop: one sort, one read of the counts, then expert after expert.

What the paper calls the standard implementation, in the leanest form that still gathers, multiplies
and adds into the output expert by expert (`baselines.torch_loop`). Its sum runs over experts in the
dtype of the model, so its bits are its own.
"""

from __future__ import annotations

from ...baselines import torch_loop
from ..executor import LOOP, Executor

EXECUTOR = Executor(
    name=LOOP,
    label="sequential loop",
    about="PyTorch, expert after expert: gather, five launches, index_add",
    build=torch_loop,
    exact=None,
    host_counts=True,
    order=10,
)
