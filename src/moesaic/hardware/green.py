"""Green contexts: disjoint parts of one GPU's SMs, each with a stream whose kernels stay inside.

The GPU is split **once** into equal atoms (on an H200 15 of 8 SMs, 12 SMs remain); a part is some
of these atoms fused into one descriptor, so parts of unequal sizes are disjoint when their atoms
are. (Two separate splits would each begin at the first SM, and overlap.) SMs that fill no atom are
the *rest*; a part may take them too. The SMs of every part are read back from the driver.

Only streams are used. No green context is ever made current: Triton loads its modules into the
current context, and torch would route work to a stream of the wrong one. So kernels are compiled
and loaded under the primary context, and `probe_launch` says whether a Triton kernel then really
runs where it should. A CUDA graph keeps the SMs of the stream that it was captured on.

Wait for a part's stream, or an event on it: on driver 580 `torch.cuda.synchronize` has been seen to
return before a graph on such a stream had ended. Right after a part was used, its SMs come free for
another, overlapping part with a delay.

SMs are all that is divided: caches, memory bandwidth, copy engines and power stay shared.

    with GreenDevice(0) as gpu:
        decode, prefill = gpu.carve([32, 96])
        with torch.cuda.stream(decode.stream):
            ...
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import TracebackType
from typing import Any

import torch

INSTALL = "pip install 'moesaic[slices]'"
MAX_PARTS = 64
IGNORE_CLUSTERS = 1
"""CU_DEV_SM_RESOURCE_SPLIT_IGNORE_SM_COSCHEDULING."""
log = logging.getLogger("moesaic")


class GreenUnavailable(RuntimeError):
    """This machine has no green contexts; the message says what is missing and the remedy."""


class GreenError(RuntimeError):
    """The driver refused a step, or gave another partition than was asked for."""


def load_driver() -> Any:
    """The driver functions of cuda-bindings, initialised.

    Raises:
        GreenUnavailable: the package or the driver is missing, or the driver is too old.
    """
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise GreenUnavailable(f"green contexts need cuda-bindings: {INSTALL}") from error
    try:
        code = driver.cuInit(0)[0]
    except RuntimeError as error:
        raise GreenUnavailable(f"no NVIDIA driver: {error}") from error
    if int(code):
        raise GreenUnavailable(f"the NVIDIA driver does not start: cuInit gave {code.name}")
    return driver


@dataclass(frozen=True)
class Cut:
    """How the driver splits this GPU: `atoms` of `atom_sms` each and a rest that fills none."""

    total_sms: int
    atom_sms: int
    atoms: int
    rest_sms: int
    min_sms: int
    alignment: int


@dataclass
class GreenSlice:
    """A part of the GPU: its atoms, the SMs that the driver says it has, and its stream's handle.

    `priority`: of the stream; lower runs first.
    """

    atoms: tuple[int, ...]
    with_rest: bool
    sms: int
    handle: int
    device: int
    priority: int
    context: Any = field(repr=False)

    @cached_property
    def stream(self) -> torch.cuda.ExternalStream:
        """The stream as torch uses it; kernels launched on it stay on this part's SMs."""
        return torch.cuda.ExternalStream(self.handle, device=self.device)  # type: ignore[no-untyped-call]

    def disjoint(self, other: GreenSlice) -> bool:
        """Whether the two parts share no SM."""
        return not set(self.atoms) & set(other.atoms) and not (self.with_rest and other.with_rest)


class GreenDevice:
    """One GPU, split once; makes parts of it and keeps them until `close`.

    Args:
        device: index of the GPU among torch's.
        atom_sms: SMs of an atom; the driver may make it larger.
        clusters: whether kernels launched as thread block clusters must work on every part. Without
            that, atoms may be smaller (2 SMs on Hopper) and fill the GPU better; no kernel of this
            package is launched as a cluster, but some of cuBLAS's are.
        driver: instead of cuda-bindings' module, for tests.

    Raises:
        GreenUnavailable: the package, the driver or its support is missing, and the remedy.
        GreenError: the driver refuses the split for another reason.
    """

    def __init__(
        self, device: int = 0, *, atom_sms: int = 8, clusters: bool = True, driver: Any = None
    ) -> None:
        if driver is None:
            if not torch.cuda.is_available():
                raise GreenUnavailable("green contexts need an NVIDIA GPU that torch can use")
            torch.empty(1, device=f"cuda:{device}")  # the primary context exists before any other
        self._driver = load_driver() if driver is None else driver
        self.device = device
        self._parts: dict[tuple[tuple[int, ...], bool, int], GreenSlice] = {}
        self._fuses: bool | None = None
        self._more_streams: list[int] = []
        for name in ("cuDeviceGetDevResource", "cuDevSmResourceSplitByCount", "cuGreenCtxCreate"):
            if not hasattr(self._driver, name):
                raise GreenUnavailable(f"this cuda-bindings has no {name}: {INSTALL}")
        self._handle = self._call("cuDeviceGet", device)
        kind = self._driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM
        try:
            whole = self._call("cuDeviceGetDevResource", self._handle, kind)
            groups, self._rest = self._split(whole, atom_sms, 0 if clusters else IGNORE_CLUSTERS)
        except GreenError as error:
            raise GreenUnavailable(
                f"this driver has no green contexts ({error}); driver 550 (CUDA 12.4) brought them"
            ) from error
        self._atoms = groups
        sms = [int(group.sm.smCount) for group in groups]
        if len(set(sms)) != 1:
            raise GreenError(f"the split gave atoms of unequal sizes: {sms}")
        self.cut = Cut(
            total_sms=int(whole.sm.smCount),
            atom_sms=sms[0],
            atoms=len(groups),
            rest_sms=int(whole.sm.smCount) - sum(sms),
            min_sms=int(getattr(whole.sm, "minSmPartitionSize", 0)) or sms[0],
            alignment=int(getattr(whole.sm, "smCoscheduledAlignment", 0)) or sms[0],
        )

    def _call(self, name: str, *args: Any) -> Any:
        """The results of a driver function: nothing, the only one, or all of them.

        Raises:
            GreenError: it gave another code than success.
        """
        code, *results = getattr(self._driver, name)(*args)
        if int(code):
            raise GreenError(f"{name} gave {getattr(code, 'name', code)}")
        return results[0] if len(results) == 1 else tuple(results)

    def _split(self, whole: Any, atom_sms: int, flags: int) -> tuple[list[Any], Any]:
        """All atoms of one split, and what is left over."""
        most = max(1, int(whole.sm.smCount) // atom_sms)
        name = "cuDevSmResourceSplitByCount"
        groups, count, rest = self._call(name, most, whole, flags, atom_sms)
        return list(groups)[: int(count)], rest

    def slice(
        self, atoms: Iterable[int], *, with_rest: bool = False, priority: int = 0
    ) -> GreenSlice:
        """The part made of these atoms (and the rest); made once, then given again.

        Raises:
            ValueError: no atom, one that does not exist, or the rest where there is none.
            GreenError: the driver refuses, gives other SMs, or there are too many parts already.
        """
        chosen = tuple(sorted(set(atoms)))
        if not chosen or chosen[0] < 0 or chosen[-1] >= self.cut.atoms:
            raise ValueError(f"atoms must be some of 0 to {self.cut.atoms - 1}, got {chosen}")
        if with_rest and not self.cut.rest_sms:
            raise ValueError("with_rest needs SMs that fill no atom, this GPU has none")
        key = (chosen, with_rest, priority)
        if key not in self._parts:
            if len(self._parts) >= MAX_PARTS:
                raise GreenError(f"{MAX_PARTS} parts exist already; close the device first")
            self._parts[key] = self._make(*key)
        return self._parts[key]

    def _make(self, atoms: tuple[int, ...], with_rest: bool, priority: int) -> GreenSlice:
        driver = self._driver
        resources = [self._atoms[atom] for atom in atoms] + ([self._rest] if with_rest else [])
        described = self._call("cuDevResourceGenerateDesc", resources, len(resources))
        default = int(driver.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM)
        context = self._call("cuGreenCtxCreate", described, self._handle, default)
        try:
            kind = driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM
            sms = int(self._call("cuGreenCtxGetDevResource", context, kind).sm.smCount)
            asked = len(atoms) * self.cut.atom_sms + (self.cut.rest_sms if with_rest else 0)
            if sms != asked:
                raise GreenError(f"asked for {asked} SMs, the driver gave {sms}")
            flags = int(driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
            stream = self._call("cuGreenCtxStreamCreate", context, flags, priority)
        except GreenError:
            self._call("cuGreenCtxDestroy", context)
            raise
        return GreenSlice(atoms, with_rest, sms, int(stream), self.device, priority, context)

    def carve(
        self,
        sizes: Sequence[int],
        *,
        priorities: Sequence[int] | None = None,
        rest_to: int | None = None,
    ) -> tuple[GreenSlice, ...]:
        """Disjoint parts of these many SMs, side by side from the first atom on.

        The rest goes to the part `rest_to`, by default the largest when the sizes use every atom.

        Raises:
            ValueError: a size is no multiple of an atom, or together they exceed the GPU.
        """
        step, ranks = self.cut.atom_sms, priorities or (0,) * len(sizes)
        if not sizes or any(size <= 0 or size % step for size in sizes):
            raise ValueError(f"sizes must be positive multiples of {step}, got {tuple(sizes)}")
        if sum(sizes) > step * self.cut.atoms:
            raise ValueError(
                f"sizes must add up to at most {step * self.cut.atoms} SMs, got {sum(sizes)}"
            )
        if rest_to is None and sum(sizes) == step * self.cut.atoms:
            rest_to = max(range(len(sizes)), key=lambda i: sizes[i])
        takes_rest = rest_to if rest_to is not None and self.rest_usable() else -1
        parts, first = [], 0
        for i, (size, rank) in enumerate(zip(sizes, ranks, strict=True)):
            atoms = range(first, first + size // step)
            parts.append(self.slice(atoms, with_rest=i == takes_rest, priority=rank))
            first += size // step
        return tuple(parts)

    def rest_usable(self) -> bool:
        """Whether there are SMs that fill no atom and the driver fuses them with an atom."""
        if self._fuses is None:
            self._fuses = False
            if self.cut.rest_sms:
                try:
                    self._call("cuDevResourceGenerateDesc", [self._atoms[0], self._rest], 2)
                    self._fuses = True
                except GreenError as error:
                    log.warning("%d SMs stay unused: %s", self.cut.rest_sms, error)
        return self._fuses

    def second_stream(self, part: GreenSlice, *, priority: int) -> torch.cuda.ExternalStream:
        """Another stream on a part's SMs, of another priority; kept until `close`.

        Raises:
            GreenError: the driver refuses.
        """
        flags = int(self._driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
        handle = int(self._call("cuGreenCtxStreamCreate", part.context, flags, priority))
        self._more_streams.append(handle)
        return torch.cuda.ExternalStream(handle, device=self.device)  # type: ignore[no-untyped-call]

    def write(self, stream: int, address: int, value: int) -> None:
        """Queue the writing of one int32 into device memory on a stream's handle; takes no SM.

        Raises:
            GreenError: the driver refuses.
        """
        self._call("cuStreamWriteValue32", stream, address, value, 0)

    @property
    def parts(self) -> int:
        """Parts that exist now; each holds driver memory."""
        return len(self._parts)

    def close(self) -> None:
        """Wait for and destroy every stream and context that was made."""
        while self._more_streams:
            handle = self._more_streams.pop()
            self._call("cuStreamSynchronize", handle)
            self._call("cuStreamDestroy", handle)
        while self._parts:
            _, part = self._parts.popitem()
            self._call("cuStreamSynchronize", part.handle)
            self._call("cuStreamDestroy", part.handle)
            self._call("cuGreenCtxDestroy", part.context)

    def __enter__(self) -> GreenDevice:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.close()


def probe_launch(part: GreenSlice, sms_used: Callable[[torch.cuda.Stream], set[int]]) -> set[int]:
    """The SMs on which a Triton kernel launched on a part's stream really ran.

    Args:
        sms_used: runs a kernel on a stream and tells the SMs, see `kernels.smid.sms_used`.

    Raises:
        GreenError: it could not run, or ran on more SMs than the part has.
    """
    try:
        used = sms_used(part.stream)
    except Exception as error:
        raise GreenError(f"Triton cannot launch on a part's stream: {error}") from error
    if len(used) > part.sms:
        raise GreenError(f"a kernel used {len(used)} SMs of a part that has {part.sms}")
    return used
