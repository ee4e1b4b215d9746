"""The router's launch of few tokens, made again at a fraction of the host's time.

    T tokens · E experts · K top-k

Few tokens are routed by one program, which also writes the counts, so a call is three allocations
and one launch. As in `plans`, the first call of a kind runs as ever and is recorded; later ones
write addresses into the recorded launch's cells. The same kernel with the same arguments: the same
bits. What cannot be done this way (a batch that wants a memset first, unaligned logits, an
installed launch hook, another Triton's layout) goes through Triton's launcher.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from typing import Any

import torch
from torch import Tensor

from ..launching import Recording, recorded
from ..routing import route
from .plans import ALIGNMENT, hooked
from .raw import RawLaunch, Unsupported, check

NAMES = ("logits_ptr", "ids_ptr", "weights_ptr", "counts_ptr", "bias_ptr", "counters_ptr")
Routed = tuple[Tensor, Tensor, Tensor]
log = logging.getLogger("moesaic")


class RoutePlan:
    """A recorded launch of the router, for other tensors of the same shapes and dtypes.

    Raises:
        Unsupported: the recorded call was more than this launch, or another layout.
    """

    def __init__(self, recording: Recording, logits: Tensor, out: Routed) -> None:
        if recording.problem or len(recording.launches) != 1:
            raise Unsupported(recording.problem or "a route of several launches")
        self._cells = (ctypes.c_uint64 * len(NAMES))()
        self._raw = RawLaunch(recording.launches[0], self._cell_of, self._no_map)
        self._shapes = tuple((tuple(t.shape), t.dtype) for t in out)
        self._device, self._index = logits.device, logits.get_device()

    def _cell_of(self, name: str, _: Any) -> int:
        return ctypes.addressof(self._cells) + ctypes.sizeof(ctypes.c_uint64) * NAMES.index(name)

    @staticmethod
    def _no_map(name: str, *_: object) -> Any:
        raise Unsupported(f"{name} is no pointer")

    def run(self, logits: Tensor, bias: Tensor | None, counters: Tensor | None) -> Routed | None:
        """Ids, weights and counts; None when a tensor is not aligned."""
        device, cells, union = self._device, self._cells, 0
        (ids_shape, ids_dtype), (weights_shape, weights_dtype), (counts_shape, _) = self._shapes
        ids_TK = torch.empty(ids_shape, dtype=ids_dtype, device=device)
        weights_TK = torch.empty(weights_shape, dtype=weights_dtype, device=device)
        counts_E = torch.empty(counts_shape, dtype=ids_dtype, device=device)
        given = (logits, ids_TK, weights_TK, counts_E, bias, counters)
        for number, tensor in enumerate(given):
            if tensor is not None:
                cells[number] = address = tensor.data_ptr()
                union |= address
        if union % ALIGNMENT:
            return None
        self._raw.config.stream = torch._C._cuda_getCurrentRawStream(self._index)
        code = self._raw.go()
        if code:
            check(code)
        return ids_TK, weights_TK, counts_E


class RepeatedRoute:
    """`routing.route` of one rule, of calls that agree in everything but addresses and values.

    Args:
        rule: the arguments of `routing.route` that are no tensors.
    """

    def __init__(self, rule: dict[str, Any]) -> None:
        self._rule = rule
        self._plans: dict[int, RoutePlan | None] = {}

    def __call__(self, logits: Tensor, bias: Tensor | None, counters: Tensor | None) -> Routed:
        """The route of checked, contiguous tensors on the current CUDA device.

        Each thread makes a plan at its first call outside captures.
        """
        thread = threading.get_ident()
        plan = self._plans.get(thread)
        if plan is not None and not hooked():
            routed = plan.run(logits, bias, counters)
            if routed is not None:
                return routed
        if thread in self._plans or torch._C._cuda_isCurrentStreamCapturing():
            return route(logits, bias, counters=counters, **self._rule)
        with recorded() as recording:
            out = route(logits, bias, counters=counters, **self._rule)
        if not any(t is not None and t.data_ptr() % ALIGNMENT for t in (logits, bias, counters)):
            try:
                self._plans[thread] = RoutePlan(recording, logits, out)
            except Unsupported as error:
                self._plans[thread] = None
                log.info("routes go through Triton's launcher: %s", error)
        return out
