"""Kernels for the tests of the ahead-of-time compiler: sound ones, and ones to be reported."""

from __future__ import annotations

import triton
import triton.language as tl

from moesaic.kernels.aot import AotCase


@triton.jit
def add_one_kernel(x_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + at, tl.load(x_ptr + at, at < n) + 1, at < n)


@triton.jit
def forgotten_kernel(x_ptr):
    tl.store(x_ptr, 1)


@triton.jit
def product_kernel(a_ptr, b_ptr, c_ptr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    m, n, k = tl.arange(0, BM)[:, None], tl.arange(0, BN)[None, :], tl.arange(0, BK)
    a = tl.load(a_ptr + m * BK + k[None, :])
    b = tl.load(b_ptr + k[:, None] * BN + n)
    tl.store(c_ptr + m * BN + n, tl.dot(a, b))


def _product(name: str, tile: tuple[int, int, int], warps: int, **more: object) -> AotCase:
    return AotCase(
        name=name,
        fn=product_kernel,
        signature={"a_ptr": "*fp16", "b_ptr": "*fp16", "c_ptr": "*fp32"},
        constexprs=dict(zip(("BM", "BN", "BK"), tile, strict=True)),
        options={"num_warps": warps},
        archs=(90,),
        **more,  # type: ignore[arg-type]
    )


def aot_cases() -> list[AotCase]:
    """Two sound cases, then five that break one rule each; `forgotten_kernel` has none."""
    good = AotCase(
        name="good",
        fn=add_one_kernel,
        signature={"x_ptr": "*fp32", "n": "i32"},
        constexprs={"BLOCK": 128},
        aligned=("n",),
        ptx={90: ("ld.global",)},
    )
    return [
        good,
        _product("good-wgmma", (128, 128, 64), 4, wgmma=True),
        _product("spills", (256, 256, 64), 4),
        _product("too-much-shared", (256, 128, 512), 8),
        _product("no-wgmma", (16, 128, 64), 4, wgmma=True),
        _product("does-not-compile", (100, 128, 64), 4),
        _product("no-such-ptx", (128, 128, 64), 4, ptx={90: ("tcgen05",)}),
    ]
