"""Lay out a launch of a compiled kernel against the parameters in its PTX, in a process of its own.

Prints the tensor maps that were encoded (type, rank, box) and how a wrong layout was refused.
"""

from __future__ import annotations

import ctypes
import re
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from moesaic.kernels import aot, launching
from moesaic.kernels.hopper import launch, raw


def ptx_sizes(ptx: str) -> list[int]:
    """Bytes of each parameter of the kernel in a PTX text."""
    head = ptx[ptx.index(".entry") :]
    found = re.findall(r"\.param (?:\.align \d+ )?\.[bfsu](\d+)[^\n\[,]*(?:\[(\d+)\])?", head)
    return [int(bits) // 8 * int(count or 1) for bits, count in found]


def compiled(case: aot.AotCase) -> Any:
    signature = aot.typed_signature(case)
    source = GluonASTSource(
        case.fn, signature, dict(case.constexprs), aot._attributes(case, signature)
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(case.options))


def arguments(names: tuple[str, ...]) -> dict[str, Any]:
    rows, weight = torch.empty(8, 128).bfloat16(), torch.empty(4, 64, 128).bfloat16()
    tile = launch.HopperConfig("decode", 16, 64, 12)
    return dict.fromkeys(names, 1) | {
        "x": launch._descriptor(rows, [8, 128], [128, 1], (16, 64)),
        "w_desc": launch.weight_descriptor(weight, False, tile),
        "out_desc": launch.ragged_descriptor(rows, 16, 64),
    }


def main() -> None:
    if not aot.gluon_works():
        print("skipped")
        return
    name = "hopper/decode-16x64-down-bf16"
    case = next(case for case in launch.aot_cases() if case.name == name)
    kernel = compiled(case)
    sizes = ptx_sizes(kernel.asm["ptx"])
    boxes: list[tuple[int, ...]] = []

    def encode(place: int, kind: int, rank: int, address: int, *rest: int) -> int:
        boxes.append((kind, rank, *(ctypes.c_uint32 * rank).from_address(rest[2])))
        return 0

    def parameter(function: int, index: int, offset: int, size: int) -> int:
        ctypes.c_size_t.from_address(size).value = sizes[index]
        return 0

    raw.driver = lambda: raw.Driver(lambda *_: 0, lambda *_: 0, encode, parameter)  # type: ignore
    as_launched = SimpleNamespace(
        src=kernel.src, metadata=kernel.metadata, asm=kernel.asm, function=1
    )
    record = launching.Launch(case.fn, as_launched, 132, arguments(case.fn.arg_names))

    def lay_out() -> raw.RawLaunch:
        return raw.RawLaunch(record, lambda *_: 8, lambda _, v, meta: raw.TensorMap(v, meta))

    lay_out()
    print(boxes)
    sizes[1] += 4
    try:
        lay_out()
    except raw.Unsupported as error:
        print(error)


if __name__ == "__main__":
    main()
