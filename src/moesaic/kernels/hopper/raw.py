"""Launches of compiled kernels straight through the CUDA driver, with arguments laid out once.

Triton compiles; here only what a launch needs is kept: the function's handle, its grid, and a block
of host memory with one cell a parameter. The layout is Triton's (3.6 to 3.8): parameters in order,
a tensor descriptor as the 128-byte map, its shape (int32) and its strides (int64), at the end two
scratch pointers. The driver is asked for the offset and the size of every parameter, so a
Triton with another layout is refused by `RawLaunch`, never launched wrongly.

Addresses live in cells that several launches share. A tensor map's address is put in by the driver
(`cuTensorMapReplaceAddress`), so one map serves any tensor of its shape, and nothing here knows,
or outlives, the memory of a call.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from ..launching import Launch

CELL = 8
MAP_BYTES = 128
NUMBERS: dict[str, Any] = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}
MAP_TYPES = {torch.float16: 6, torch.bfloat16: 9}
L2_PROMOTION_128B = 2
SERIALIZATION = 6
"""CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION."""


class Unsupported(Exception):
    """Why a launch cannot be made without Triton's launcher."""


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_uint), ("pad", ctypes.c_char * 4), ("value", ctypes.c_ubyte * 64)]


class _Config(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.c_void_p), ("count", ctypes.c_uint),
    ]  # fmt: skip


class Driver(NamedTuple):
    """The functions of the CUDA driver that are called."""

    launch: Callable[..., int]
    replace_address: Callable[..., int]
    encode: Callable[..., int]
    parameter: Callable[..., int]


@functools.cache
def driver() -> Driver:
    """The CUDA driver of this process; a launch gives up Python's lock, the others do not.

    Raises:
        Unsupported: it is missing or too old.
    """
    pointers = ctypes.c_void_p
    try:
        free, held = ctypes.CDLL("libcuda.so.1"), ctypes.PyDLL("libcuda.so.1")
        functions = Driver(
            free.cuLaunchKernelEx, held.cuTensorMapReplaceAddress,
            held.cuTensorMapEncodeTiled, held.cuFuncGetParamInfo,
        )  # fmt: skip
    except (OSError, AttributeError) as error:
        raise Unsupported(f"the CUDA driver: {error}") from error
    unsigned = ctypes.c_uint
    functions.launch.argtypes = [pointers] * 4  # type: ignore[attr-defined]
    functions.replace_address.argtypes = [pointers] * 2  # type: ignore[attr-defined]
    functions.encode.argtypes = [  # type: ignore[attr-defined]
        pointers, unsigned, unsigned, *[pointers] * 5, *[unsigned] * 4,
    ]  # fmt: skip
    functions.parameter.argtypes = [pointers, ctypes.c_size_t, *[pointers] * 2]  # type: ignore[attr-defined]
    return functions


def check(code: int) -> None:
    """Raise what the driver reported.

    Raises:
        RuntimeError: `code` is not success.
    """
    if code:
        raise RuntimeError(f"the CUDA driver refused a launch with error {code}")


class TensorMap:
    """A 128-byte tensor map of fixed shape, whose address is put in before each launch."""

    def __init__(self, descriptor: Any, meta: Mapping[str, Any]) -> None:
        shape, strides, box = descriptor.shape, descriptor.strides, meta["block_size"]
        kind = MAP_TYPES.get(descriptor.base.dtype)
        odd = meta.get("fp4_padded") or meta.get("is_im2col") or descriptor.padding != "zero"
        if kind is None or odd or strides[-1] != 1:
            raise Unsupported("a tensor map of an unknown kind")
        self._memory = ctypes.create_string_buffer(2 * MAP_BYTES)
        self.at = -(-ctypes.addressof(self._memory) // MAP_BYTES) * MAP_BYTES
        rank, size = len(shape), descriptor.base.element_size()
        sizes = (ctypes.c_uint64 * rank)(*reversed(shape))
        steps = (ctypes.c_uint64 * rank)(*(size * s for s in reversed(strides[:-1])))
        extent = (ctypes.c_uint32 * rank)(*reversed(box))
        ones = (ctypes.c_uint32 * rank)(*[1] * rank)
        arrays = (ctypes.addressof(array) for array in (sizes, steps, extent, ones))
        address = descriptor.base.data_ptr()
        how = (0, meta["swizzle"], L2_PROMOTION_128B, 0)
        check(driver().encode(self.at, kind, rank, address, *arrays, *how))


class RawLaunch:
    """One recorded launch, ready to be made again.

    Args:
        record: as `launching.launch` kept it.
        cell_of: the address of the cell of a pointer argument.
        map_of: the map of a descriptor argument, told its kernel's metadata for it.

    Raises:
        Unsupported: a parameter of an unknown type, or a layout other than the kernel's.
    """

    def __init__(
        self,
        record: Launch,
        cell_of: Callable[[str, Any], int],
        map_of: Callable[[str, Any, Mapping[str, Any]], TensorMap],
    ) -> None:
        compiled, metadata = record.compiled, record.compiled.metadata
        self._kept: list[Any] = [compiled]
        places: list[tuple[int, int]] = []
        maps = list(getattr(metadata, "tensordesc_meta", None) or [])
        for name, kind in compiled.src.signature.items():
            value = record.values.get(name)
            if kind == "constexpr":
                continue
            if kind.startswith("*"):
                places.append((cell_of(name, value), CELL))
            elif kind.startswith("tensordesc") and maps:
                places += self._described(value, map_of(name, value, maps.pop(0)))
            elif kind in NUMBERS:
                places.append(self._number(kind, value))
            else:
                raise Unsupported(f"an argument of type {kind}")
        places += [self._number("i64", 0)] * 2
        self._check(compiled, [size for _, size in places])
        self._parameters = (ctypes.c_void_p * len(places))(*(place for place, _ in places))
        self._attribute = _Attribute(id=SERIALIZATION)
        self._attribute.value[0] = 1
        self.config = _Config(
            (record.grid, 1, 1), (32 * metadata.num_warps, 1, 1), metadata.shared, None,
            ctypes.addressof(self._attribute), int(metadata.launch_pdl),
        )  # fmt: skip
        self.go = functools.partial(
            driver().launch, ctypes.addressof(self.config), compiled.function,
            ctypes.addressof(self._parameters), None,
        )  # fmt: skip

    def _number(self, kind: str, value: Any) -> tuple[int, int]:
        cell = NUMBERS[kind](value)
        self._kept.append(cell)
        return ctypes.addressof(cell), ctypes.sizeof(cell)

    def _described(self, descriptor: Any, tensor_map: TensorMap) -> list[tuple[int, int]]:
        sizes = [self._number("i32", extent) for extent in descriptor.shape]
        steps = [self._number("i64", stride) for stride in descriptor.strides]
        return [(tensor_map.at, MAP_BYTES), *sizes, *steps]

    @staticmethod
    def _check(compiled: Any, sizes: list[int]) -> None:
        metadata = compiled.metadata
        odd = metadata.num_ctas != 1 or metadata.launch_cooperative_grid
        if odd or metadata.global_scratch_size or metadata.profile_scratch_size:
            raise Unsupported("a launch with clusters, cooperation or scratch")
        offset, size = ctypes.c_size_t(), ctypes.c_size_t()
        at = ctypes.addressof(offset), ctypes.addressof(size)
        # Asking the driver for one more than there are is an error, which memory checkers report.
        head = compiled.asm["ptx"].partition(".entry")[2].partition(")")[0]
        found: list[int] = []
        for index in range(head.count(".param ")):
            if driver().parameter(compiled.function, index, *at):
                break
            found.append(size.value)
        if found != sizes:
            raise Unsupported(f"parameters of {sizes} bytes, the kernel has {found}")
