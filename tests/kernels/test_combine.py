"""The combine kernel has the bits of its torch twin, whatever the blocks, batch and dtype."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from moesaic.kernels.combine import combine, combine_kernel, combine_ref, plan_combine


def _case(
    tokens: int, hidden: int, top_k: int, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, a shuffled position with slots of nobody, and weights."""
    gen = torch.Generator().manual_seed(seed)
    rows_SH = torch.randn((tokens * top_k, hidden), generator=gen).to(dtype)
    position = torch.randperm(tokens * top_k, generator=gen).to(torch.int32)
    position[torch.rand(tokens * top_k, generator=gen) < 0.1] = -1
    weights_TK = torch.randn((tokens, top_k), generator=gen)
    return rows_SH.to(device), position.view(tokens, top_k).to(device), weights_TK.to(device)


def test_worked_example(kernel_device: torch.device) -> None:
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], device=kernel_device)
    position = torch.tensor([[2, 0], [1, -1]], device=kernel_device)
    weights = torch.tensor([[0.5, 2.0], [1.0, 9.0]], device=kernel_device)
    assert combine(rows, position, weights).tolist() == [[4.5, 7.0], [3.0, 4.0]]


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("tokens", "hidden", "top_k"), [(1, 512, 8), (5, 200, 3), (3, 2880, 4), (2, 72, 64), (7, 8, 1)]
)
def test_bits_of_the_twin(
    kernel_device: torch.device, tokens: int, hidden: int, top_k: int, dtype: torch.dtype
) -> None:
    rows, position, weights = _case(tokens, hidden, top_k, dtype, kernel_device)
    for position_TK, weights_TK in ((position, weights), (position.long(), weights.to(dtype))):
        for out_dtype in (torch.float32, dtype):
            if out_dtype == torch.bfloat16 and kernel_device.type == "cpu":
                continue  # Triton's interpreter truncates to bf16 where the GPU rounds.
            out = torch.empty((tokens, hidden), dtype=out_dtype, device=kernel_device)
            combine(rows, position_TK, weights_TK, out=out)
            assert torch.equal(out, combine_ref(rows, position_TK, weights_TK, out_dtype))
    assert combine(rows, position, weights).dtype == dtype


def test_twin_is_right() -> None:
    rows, position, weights = _case(6, 40, 5, torch.float32, torch.device("cpu"))
    for t in range(6):
        live = [(p, w) for p, w in zip(position[t], weights[t], strict=True) if p >= 0]
        exact_H = sum((w.double() * rows[p].double() for p, w in live), torch.zeros(40).double())
        got_H = combine_ref(rows, position, weights)[t].double()
        torch.testing.assert_close(got_H, exact_H, rtol=1e-6, atol=1e-6)


def test_slots_of_nobody_add_nothing(kernel_device: torch.device) -> None:
    """Not even when their weight and row 0 are NaN."""
    rows, position, weights = _case(4, 64, 4, torch.float32, kernel_device)
    rows[0] = float("nan")
    position[position == 0] = -1
    weights[position < 0] = float("nan")
    position[3] = -1
    got = combine(rows, position, weights)
    assert torch.isfinite(got).all()
    assert (got[3] == 0).all()


def test_bits_do_not_depend_on_blocks_or_batch(kernel_device: torch.device) -> None:
    rows, position, weights = _case(6, 328, 5, torch.bfloat16, kernel_device)
    whole = combine(rows, position, weights)
    for block, warps, unroll in ((64, 1, 8), (128, 2, 2), (512, 4, 3)):
        out = torch.empty_like(whole)
        plan = {"HIDDEN": 328, "TOP_K": 5, "BLOCK_H": block, "UNROLL": unroll}
        grid = (6 * -(-328 // block),)
        combine_kernel[grid](
            rows, position, weights, out, **plan, num_warps=warps, enable_fp_fusion=False
        )
        assert torch.equal(out, whole)
    out = torch.empty_like(whole[2:3])
    assert combine(rows, position[2:3], weights[2:3], out=out) is out
    assert torch.equal(out, whole[2:3])


def test_refusals_and_empty_batch(kernel_device: torch.device) -> None:
    rows, position, weights = _case(2, 16, 2, torch.float32, kernel_device)
    assert combine(rows, position[:0], weights[:0]).shape == (0, 16)
    with pytest.raises(ValueError, match="weights"):
        combine(rows, position, weights[:1])
    with pytest.raises(ValueError, match="contiguous"):
        combine(rows.t().contiguous().t(), position, weights)


def test_plan_fills_the_machine_and_keeps_wide_accesses() -> None:
    assert plan_combine(1, 7168, 8, 2)["BLOCK_H"] == 64
    for tokens, hidden, itemsize in ((64, 7168, 2), (4096, 512, 2), (4096, 4096, 4)):
        plan = plan_combine(tokens, hidden, 8, itemsize)
        assert tokens * -(-hidden // plan["BLOCK_H"]) >= 132
        assert plan["BLOCK_H"] * itemsize == 16 * 32 * plan["num_warps"]


@pytest.mark.slow
def test_rows_beyond_two_to_the_31_elements(kernel_device: torch.device) -> None:
    if kernel_device.type != "cuda":
        pytest.skip("needs 4.3 GB of GPU memory")
    rows_SH = torch.zeros((300_000, 7168), dtype=torch.bfloat16, device=kernel_device)
    rows_SH[-2:] = torch.tensor([[3.0], [5.0]])
    position = torch.tensor([[299_999, 299_998]], dtype=torch.int32, device=kernel_device)
    weights = torch.tensor([[2.0, 1.0]], device=kernel_device)
    assert (combine(rows_SH, position, weights) == 13.0).all()
