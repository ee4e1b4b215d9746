"""Gather: the rows of many tokens in the order of their experts, at copy bandwidth.

    out[row] = x[order[row] // top_k]

Products that read their rows by TMA need them side by side. The copy pays where a product is wide:
it moves S*H numbers, and the product then does 4*I flops on each of them.

    T tokens · S routed rows · H width

>>> gather_rows_ref(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([3, 0, 1, 2]), 2)
tensor([[3., 4.],
        [1., 2.],
        [1., 2.],
        [3., 4.]])
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .aot import AotCase
from .launching import launch


@triton.jit
def gather_kernel(
    x_ptr,
    order_ptr,
    out_ptr,
    rows,
    top_k,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """ROWS rows and one block of columns per program.

    x_ptr: (T, WIDTH) row-major. order_ptr: (S,) int32, slot of each row, token = slot // top_k.
    out_ptr: (S, WIDTH) row-major. Program p copies columns ``(p % B) * BLOCK ...`` of the rows from
    ``p // B * ROWS`` on, B = ceil(WIDTH / BLOCK).

    Example: x [[1, 2], [3, 4]], order [3, 0, 1, 2] and top_k 2 give
    [[3, 4], [1, 2], [1, 2], [3, 4]].
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    row = program // blocks * ROWS + tl.arange(0, ROWS)
    column = program % blocks * BLOCK + tl.arange(0, BLOCK)
    live = (row < rows)[:, None] & (column < WIDTH)[None, :]
    token = tl.load(order_ptr + row, row < rows, other=0) // top_k
    value = tl.load(x_ptr + token.to(tl.int64)[:, None] * WIDTH + column[None, :], live)
    tl.store(out_ptr + row.to(tl.int64)[:, None] * WIDTH + column[None, :], value, live)


def plan_gather(width: int, itemsize: int) -> dict[str, Any]:
    """Constants and options of a launch: four 16-byte accesses in flight for every thread."""
    lanes = 16 // itemsize
    block = min(128 * lanes, triton.next_power_of_2(width))
    return {
        "WIDTH": width,
        "ROWS": 4,
        "BLOCK": block,
        "num_warps": max(1, block // (32 * lanes)),
        "enable_fp_fusion": True,
    }


def gather_rows(x: Tensor, order_S: Tensor, top_k: int, *, pdl: bool = False) -> Tensor:
    """Rows ``x[order_S // top_k]``, one launch: (S, H).

    Args:
        x: (T, H), contiguous.
        order_S: int32, slots; token = slot // top_k.
        pdl: start while the launch before still runs and wait for it on the device (sm_90 and up).
    """
    width = x.shape[1]
    out = x.new_empty((order_S.numel(), width))
    if out.numel():
        plan = plan_gather(width, x.element_size())
        grid = triton.cdiv(len(out), plan["ROWS"]) * triton.cdiv(width, plan["BLOCK"])
        overlap = {"PDL": True, "launch_pdl": True} if pdl else {}
        launch(gather_kernel, grid, x, order_S, out, len(out), top_k, **plan, **overlap)
    return out


def gather_rows_ref(x: Tensor, order_S: Tensor, top_k: int) -> Tensor:
    """The torch twin of `gather_rows`."""
    return x[order_S.long() // top_k]


def aot_cases() -> list[AotCase]:
    """A width that blocks do not divide and a small one; overlapping launches on sm_90 and up."""
    cases = []
    for dtype, itemsize, width in (("bf16", 2, 2880), ("bf16", 2, 256), ("fp16", 2, 7168)):
        plan = plan_gather(width, itemsize)
        constexprs = {name: plan[name] for name in ("WIDTH", "ROWS", "BLOCK")}
        case = AotCase(
            name=f"gather/{dtype}-{width}",
            fn=gather_kernel,
            signature={
                "x_ptr": f"*{dtype}", "order_ptr": "*i32", "out_ptr": f"*{dtype}",
                "rows": "i32", "top_k": "i32",
            },
            constexprs={**constexprs, "PDL": False},
            options={name: plan[name] for name in ("num_warps", "enable_fp_fusion")},
            ptx={80: ("ld.global.v4", "st.global.v4")},
        )  # fmt: skip
        cases.append(case)
    first = cases[0]
    overlapping = replace(
        first,
        name="gather/pdl",
        archs=(90, 100),
        ptx={90: ("griddepcontrol.wait",)},
        constexprs={**first.constexprs, "PDL": True},
        options={**first.options, "launch_pdl": True},
    )
    return [*cases, overlapping]
