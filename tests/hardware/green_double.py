"""A driver with green contexts that is made of Python sets: 132 SMs, or any number."""

from __future__ import annotations

from enum import IntEnum
from itertools import count
from types import SimpleNamespace
from typing import Any


class Code(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NOT_SUPPORTED = 801


class Kind(IntEnum):
    CU_DEV_RESOURCE_TYPE_SM = 1


class Resource:
    """Some SMs, by number."""

    def __init__(self, sms: frozenset[int]) -> None:
        self.members = sms
        self.sm = SimpleNamespace(smCount=len(sms), minSmPartitionSize=8, smCoscheduledAlignment=8)


class FakeDriver:
    """The functions of `cuda.bindings.driver` that green contexts use, with a fault on demand.

    `fail`: codes by function name. `swallow`: SMs that a new context lacks although asked for.
    """

    CUdevResourceType = Kind
    CUgreenCtxCreate_flags = SimpleNamespace(CU_GREEN_CTX_DEFAULT_STREAM=1)
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)

    def __init__(self, total: int = 132, *, align: int = 8) -> None:
        self.whole = Resource(frozenset(range(total)))
        self.align = align
        self.fail: dict[str, Code] = {}
        self.swallow = 0
        self.contexts: dict[int, Resource] = {}
        self.streams: dict[int, int] = {}
        self.splits = 0
        self.written: list[tuple[int, int, int]] = []
        self._numbers = count(1000)

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("cu") and name in object.__getattribute__(self, "fail"):
            return lambda *_: (self.fail[name],)
        return object.__getattribute__(self, name)

    def cuDeviceGet(self, ordinal: int) -> tuple[Any, ...]:
        return Code.CUDA_SUCCESS, ordinal

    def cuDeviceGetDevResource(self, device: int, kind: int) -> tuple[Any, ...]:
        assert kind == Kind.CU_DEV_RESOURCE_TYPE_SM
        return Code.CUDA_SUCCESS, self.whole

    def cuDevSmResourceSplitByCount(
        self, groups: int, resource: Resource, flags: int, least: int
    ) -> tuple[Any, ...]:
        self.splits += 1
        align = 2 if flags == 1 else self.align
        size = -(-least // align) * align
        members = sorted(resource.members)
        made = min(groups, len(members) // size)
        parts = [Resource(frozenset(members[i * size : (i + 1) * size])) for i in range(made)]
        return Code.CUDA_SUCCESS, parts, made, Resource(frozenset(members[made * size :]))

    def cuDevResourceGenerateDesc(self, resources: list[Resource], n: int) -> tuple[Any, ...]:
        assert n == len(resources)
        union = frozenset().union(*(r.members for r in resources))
        if len(union) != sum(len(r.members) for r in resources):
            return (Code.CUDA_ERROR_INVALID_VALUE,)
        return Code.CUDA_SUCCESS, Resource(union)

    def cuGreenCtxCreate(self, desc: Resource, device: int, flags: int) -> tuple[Any, ...]:
        if flags != 1:
            return (Code.CUDA_ERROR_INVALID_VALUE,)
        number = next(self._numbers)
        members = sorted(desc.members)
        self.contexts[number] = Resource(frozenset(members[: len(members) - self.swallow]))
        return Code.CUDA_SUCCESS, number

    def cuGreenCtxGetDevResource(self, context: int, kind: int) -> tuple[Any, ...]:
        return Code.CUDA_SUCCESS, self.contexts[context]

    def cuGreenCtxStreamCreate(self, context: int, flags: int, priority: int) -> tuple[Any, ...]:
        if flags != 1:
            return (Code.CUDA_ERROR_INVALID_VALUE,)
        number = next(self._numbers)
        self.streams[number] = context
        return Code.CUDA_SUCCESS, number

    def cuStreamWriteValue32(
        self, stream: int, address: int, value: int, flags: int
    ) -> tuple[Any, ...]:
        if stream not in self.streams or address % 4 or flags:
            return (Code.CUDA_ERROR_INVALID_VALUE,)
        self.written.append((stream, address, value))
        return (Code.CUDA_SUCCESS,)

    def cuStreamSynchronize(self, stream: int) -> tuple[Any, ...]:
        return ((Code.CUDA_SUCCESS if stream in self.streams else Code.CUDA_ERROR_INVALID_VALUE),)

    def cuStreamDestroy(self, stream: int) -> tuple[Any, ...]:
        del self.streams[stream]
        return (Code.CUDA_SUCCESS,)

    def cuGreenCtxDestroy(self, context: int) -> tuple[Any, ...]:
        assert context not in self.streams.values(), "a stream of this context still exists"
        del self.contexts[context]
        return (Code.CUDA_SUCCESS,)

    def sms_of(self, handle: int) -> frozenset[int]:
        """The SMs of a stream, which no driver would tell."""
        return self.contexts[self.streams[handle]].members
