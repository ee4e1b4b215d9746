"""Layers whose shapes repeat, made again at a fraction of the host's time.

The first call of a shape runs as ever and is recorded; `LayerPlan` lays its launches out anew (see
`raw`), with all scratch in one block. Later calls write the addresses of their tensors into the
plan's cells and launch: one or two allocations of torch's allocator a call, which a graph captures,
no descriptor built, the same kernels with the same arguments and therefore the same bits.

A plan is of shapes, not of tensors: every address is written by the call that uses it, so weights
may be freed, moved or unsharded between calls. Each thread has plans of its own. What a plan cannot
do (another Triton's layout, unaligned or overlapping tensors, an installed launch hook) goes
through Triton's launcher: `told()` says how often each way was taken, and why.
"""

from __future__ import annotations

import ctypes
import logging
import struct
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from triton import knobs

from ..device import for_good
from ..launching import Recording, recorded
from .raw import CELL, RawLaunch, TensorMap, Unsupported, check, driver
from .zeros import given, prepare, zeroed

ALIGNMENT = 16
ARENA_ALIGNMENT = 256
KEPT_BYTES = 1 << 20
MAX_STREAMS = 64
MAX_PLANS = 1024
_threads = threading.local()
_told: Counter[str] = Counter()
log = logging.getLogger("moesaic")


def told() -> dict[str, int]:
    """How many calls went through a plan ("raw"), and how many did not, by reason."""
    return dict(_told)


class LayerPlan:
    """The launches of one layer call, made again for other tensors of the same shapes.

    Args:
        recording: a call's launches.
        inputs: the tensors of that call that another call replaces.
        out: what it returned.
        constants: tensors that stay, and are kept.

    Raises:
        Unsupported: the launches cannot be made this way.
    """

    def __init__(
        self,
        recording: Recording,
        inputs: Sequence[Tensor],
        out: Tensor,
        constants: Sequence[Tensor],
    ) -> None:
        if recording.problem:
            raise Unsupported(recording.problem)
        self._constants = tuple(constants)
        self._ranges: list[tuple[int, int, int, int]] = []
        for base, tensor in enumerate((*inputs, out)):
            self._claim(tensor, base, 0)
        self.device = out.device
        self._index = out.device.index
        self._zeros_at: int | None = None
        self._pointers = _pointers(recording)
        self.arena_bytes = self._lay_out(recording.scratch, out, len(inputs) + 1)
        self._cell_at: dict[tuple[int, int], int] = {}
        self._cells = (ctypes.c_uint64 * 64)()
        self._maps: list[tuple[int, int, int, TensorMap]] = []
        self._fixed: list[Any] = []
        self._launches = [
            RawLaunch(record, self._cell_of, self._map_of) for record in recording.launches
        ]
        self._goes = [launch.go for launch in self._launches]
        self._sources = list(self._cell_at)
        self._pack = struct.Struct(f"{len(self._sources)}Q").pack_into
        self._kept: dict[int, tuple[tuple[int, ...], tuple[Tensor, ...]]] = {}
        self._bases: tuple[int, ...] | None = None
        self._stream: int | None = None
        self._ranges.clear()
        self._pointers.clear()

    def _claim(self, tensor: Tensor, base: int, offset: int) -> None:
        start = tensor.data_ptr()
        end = start + tensor.numel() * tensor.element_size()
        if any(start < other_end and other < end for other, other_end, _, _ in self._ranges):
            raise Unsupported("tensors that overlap")
        self._ranges.append((start, end, base, offset))

    def _lay_out(self, scratch: Sequence[Tensor], out: Tensor, base: int) -> int:
        used = 0
        for tensor in scratch:
            if tensor.data_ptr() != out.data_ptr() and tensor.numel():
                self._claim(tensor, base, used)
                self._claim_zeros(tensor, base + 1, used)
                size = tensor.numel() * tensor.element_size()
                used += -(-size // ARENA_ALIGNMENT) * ARENA_ALIGNMENT
        return used

    def _claim_zeros(self, tensor: Tensor, base: int, offset: int) -> None:
        """Counters that belong to this piece of scratch belong to the arena from now on."""
        counters = given(tensor.device, tensor.data_ptr())
        # A call before may have had its counters at this address: these launches know none of them.
        if counters is not None and counters.data_ptr() in self._pointers:
            if self._zeros_at is not None:
                raise Unsupported("several sets of counters")
            self._claim(counters, base, 0)
            self._zeros_at = offset

    def _find(self, name: str, address: int) -> tuple[int, int] | None:
        for start, end, base, offset in self._ranges:
            if start <= address < end:
                return base, offset + address - start
        for tensor in self._constants:
            if 0 <= address - tensor.data_ptr() < tensor.numel() * tensor.element_size():
                return None
        raise Unsupported(f"{name} is memory of unknown origin")

    def _cell_of(self, name: str, tensor: Tensor) -> int:
        address = tensor.data_ptr()
        source = self._find(name, address)
        if source is None:
            cell = ctypes.c_uint64(address)
            self._fixed.append(cell)
            return ctypes.addressof(cell)
        index = self._cell_at.setdefault(source, len(self._cell_at))
        if index >= len(self._cells):
            raise Unsupported(f"more than {len(self._cells)} addresses")
        return ctypes.addressof(self._cells) + CELL * index

    def _map_of(self, name: str, descriptor: Any, meta: Mapping[str, Any]) -> TensorMap:
        source = self._find(name, descriptor.base.data_ptr())
        if source is None:
            raise Unsupported(f"{name} describes a constant")
        tensor_map = TensorMap(descriptor, meta)
        self._maps.append((*source, tensor_map.at, tensor_map))
        return tensor_map

    def _point(self, bases: tuple[int, ...]) -> None:
        """Write the addresses of a call where they differ from those of the call before."""
        before, self._bases = self._bases, None
        self._pack(self._cells, 0, *[bases[base] + at for base, at in self._sources])
        for base, offset, place, _ in self._maps:
            if before is None or bases[base] != before[base]:
                check(driver().replace_address(place, bases[base] + offset))
        self._bases = bases

    def _scratch(self, stream: int) -> tuple[tuple[int, ...], tuple[Tensor, ...]]:
        """The addresses of scratch and of the counters that belong to it, and what holds them.

        A little scratch is kept for the eager calls of a stream, which follow one another. A graph
        has its own, from its own pool.
        """

        def make() -> tuple[Tensor, ...]:
            arena = torch.empty(self.arena_bytes, dtype=torch.uint8, device=self.device)
            if self._zeros_at is None:
                return (arena,)
            return arena, zeroed(self.device, arena.data_ptr() + self._zeros_at)

        keep = self.arena_bytes <= KEPT_BYTES and not torch._C._cuda_isCurrentStreamCapturing()
        made = for_good(make, self.device) if keep else make()
        held = tuple(tensor.data_ptr() for tensor in made), made
        if keep:
            if len(self._kept) >= MAX_STREAMS:
                self._kept.clear()
            self._kept[stream] = held
        return held

    def run(self, *inputs: Tensor) -> Tensor | None:
        """The output for these tensors, of the recorded shapes; None when one is not aligned."""
        stream = torch._C._cuda_getCurrentRawStream(self._index)
        held = self._kept.get(stream)
        if held is None or torch._C._cuda_isCurrentStreamCapturing():
            held = self._scratch(stream)
        out = torch.empty_like(inputs[0])
        bases = (*[t.data_ptr() for t in inputs], out.data_ptr(), *held[0])
        if bases != self._bases:
            union = 0
            for address in bases:
                union |= address
            if union % ALIGNMENT:
                return None
            self._point(bases)
        if stream != self._stream:
            for launch in self._launches:
                launch.config.stream = stream
            self._stream = stream
        for go in self._goes:
            code = go()
            if code:
                check(code)
        return out


def _pointers(recording: Recording) -> set[int]:
    """The addresses of all tensors that launches were given."""
    values = (value for launch in recording.launches for value in launch.values.values())
    return {value.data_ptr() for value in values if isinstance(value, Tensor)}


def hooked() -> bool:
    """Whether somebody listens to Triton's launches, who would not hear of ours."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    # A hook is a chain of calls, or one function that was put in its place.
    return bool((enter and getattr(enter, "calls", 1)) or (leave and getattr(leave, "calls", 1)))


def planned(
    key: Hashable,
    inputs: tuple[Tensor, ...],
    constants: Callable[[], Sequence[Tensor]],
    call: Callable[[], Tensor],
) -> Tensor:
    """`call()`, or the same launches by the plan of `key`; the first outside captures makes it.

    Args:
        key: everything that decides what `call` launches, shapes, dtypes and layouts of `inputs`
            included, but for their addresses.
        inputs: contiguous tensors of one CUDA device, the current one.
        constants: tensors that `call` uses whatever the inputs.
    """
    plans: dict[Hashable, LayerPlan | str] | None = getattr(_threads, "plans", None)
    if plans is None:
        plans = _threads.plans = {}
    plan = plans.get(key)
    if type(plan) is LayerPlan and not hooked():
        out = plan.run(*inputs)
        if out is not None:
            _told["raw"] += 1
            return out
        _told["an unaligned tensor"] += 1
        return call()
    if plan is not None:
        _told[plan if isinstance(plan, str) else "a launch hook is installed"] += 1
        return call()
    if torch._C._cuda_isCurrentStreamCapturing():
        # Constants made now would have no values before the graph has run.
        _told["the first of its shapes, in a capture"] += 1
        return call()
    return _first(plans, key, inputs, constants, call)


def _first(
    plans: dict[Hashable, LayerPlan | str],
    key: Hashable,
    inputs: tuple[Tensor, ...],
    constants: Callable[[], Sequence[Tensor]],
    call: Callable[[], Tensor],
) -> Tensor:
    """The first call of a key: run as ever, recorded, and laid out for the next."""
    kept = constants()
    if inputs[0].is_cuda:
        prepare(inputs[0].device)
    with recorded() as recording:
        out = call()
    _told["the first of its shapes"] += 1
    aligned = not any(t.data_ptr() % ALIGNMENT for t in inputs)
    try:
        plan: LayerPlan | str = LayerPlan(recording, inputs, out, kept)
    except Unsupported as error:
        plan = str(error)
        log.info("launches go through Triton's launcher: %s", plan)
    if len(plans) >= MAX_PLANS:
        plans.clear()
    if aligned and plan != "tensors that overlap":
        plans[key] = plan
    return out
