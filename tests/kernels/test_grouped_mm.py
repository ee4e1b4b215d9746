"""The grouped product against its torch twin, and its bits against every way to cut it."""

from __future__ import annotations

import itertools

import pytest
import torch
from layer_cases import ROUTINGS, draw, draw_ids

from moesaic.kernels.batching import batch_rows_ref
from moesaic.kernels.grouped_mm import Epilogue, grouped_mm, grouped_mm_ref
from moesaic.kernels.tune import GemmConfig

EPILOGUES = {
    "none": Epilogue(),
    "relu2": Epilogue("relu2"),
    "gelu": Epilogue("gelu"),
    "swiglu": Epilogue("silu", gated=True),
    "gelu_tanh": Epilogue("gelu_tanh", gated=True),
    "clamped": Epilogue("silu", True, True, limit=0.75, alpha=1.702, up_offset=1.0),
}
SMALL = GemmConfig(block_n=16, block_k=16, num_stages=2, group_m=2)


def _to(values: tuple, device: torch.device) -> tuple:
    return type(values)(*(value.to(device) for value in values))


def _case(device, dtype, *, width, routing="uniform", heights=(16,), experts=4, tokens=19, top_k=2,
          contraction=24, gated=False, transposed=False):  # fmt: skip
    ids = draw_ids(routing, tokens, top_k, experts)
    sort, tasks = batch_rows_ref(ids, experts, heights=heights)
    rows = 2 * width if gated else width
    shape = (experts, contraction, rows) if transposed else (experts, rows, contraction)
    x = draw(tokens, contraction, device=device, dtype=dtype, seed=1)
    weight = draw(*shape, device=device, dtype=dtype, seed=2)
    bias = draw(experts, rows, device=device, dtype=dtype, seed=3)
    return x, weight, bias, _to(sort, device), _to(tasks, device)


def _live(sort) -> int:
    return int(sort.offsets_E1[-1])


def _close(actual, expected, dtype) -> None:
    tolerance = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    scale = float(expected.double().abs().max()) or 1.0
    torch.testing.assert_close(
        actual.double().cpu() / scale, expected.double().cpu() / scale, rtol=0, atol=tolerance
    )


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "transposed"])
@pytest.mark.parametrize("swap", [0, 64], ids=["plain", "swap"])
@pytest.mark.parametrize("name", EPILOGUES)
def test_epilogues_and_layouts(kernel_device, poisoned_empty, name, swap, transposed) -> None:
    epilogue = EPILOGUES[name]
    dtype = torch.float16
    x, weight, bias, sort, tasks = _case(
        kernel_device, dtype, width=40, gated=epilogue.gated, transposed=transposed
    )
    config = SMALL._replace(swap_up_to=swap)
    out = grouped_mm(
        x, weight, sort, tasks, top_k=2, heights=(16,), bias=bias, transposed=transposed,
        epilogue=epilogue, config=config,
    )  # fmt: skip
    expected = grouped_mm_ref(
        x.double(), weight.double(), sort, top_k=2, bias=bias.double(),
        transposed=transposed, epilogue=epilogue,
    )  # fmt: skip
    _close(out, expected, dtype)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_routings_and_dtypes(kernel_device, poisoned_empty, routing, dtype) -> None:
    if dtype == torch.bfloat16 and kernel_device.type == "cpu":
        pytest.skip("Triton's interpreter multiplies bf16 wrongly")
    heights = (16, 32)
    x, weight, _, sort, tasks = _case(
        kernel_device, dtype, width=24, routing=routing, heights=heights, tokens=40
    )
    out = grouped_mm(x, weight, sort, tasks, top_k=2, heights=heights, config=SMALL)
    expected = grouped_mm_ref(x.double(), weight.double(), sort, top_k=2)
    _close(out[: _live(sort)], expected[: _live(sort)], dtype)


def test_sorted_rows_are_read_in_place(kernel_device, poisoned_empty) -> None:
    _, weight, bias, sort, tasks = _case(kernel_device, torch.float32, width=16)
    rows = draw(38, 24, device=kernel_device, dtype=torch.float32, seed=9)
    out = grouped_mm(rows, weight, sort, tasks, top_k=0, heights=(16,), bias=bias, config=SMALL)
    expected = grouped_mm_ref(rows.double(), weight.double(), sort, top_k=0, bias=bias.double())
    _close(out, expected, torch.float32)


def test_worked_example(kernel_device) -> None:
    sort, tasks = batch_rows_ref(torch.tensor([[0]]), 1, heights=(16,))
    sort, tasks = _to(sort, kernel_device), _to(tasks, kernel_device)
    x = torch.zeros(1, 8, device=kernel_device)
    x[0, :2] = torch.tensor([1.0, 2.0])
    weight = torch.zeros(1, 8, 8, device=kernel_device)
    weight[0, 0, :2], weight[0, 1, :2] = torch.tensor([1.0, 1.0]), torch.tensor([3.0, -1.0])
    out = grouped_mm(x, weight, sort, tasks, top_k=1, heights=(16,), config=SMALL)
    assert out[0, :2].tolist() == [3.0, 1.0]
    assert out[0, 2:].abs().sum() == 0


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_bits_do_not_show_the_tile(kernel_device, gated) -> None:
    dtype = torch.float16
    gpu = kernel_device.type == "cuda"
    contraction, width = (2048, 160) if gpu else (40, 40)
    epilogue = EPILOGUES["swiglu"] if gated else Epilogue()
    results = []
    cuts = itertools.product((16, 32), (16, 32), (0, 64), (0, 1))
    for height, block, swap, resident in cuts:
        heights = (height,) if swap else (16, 2 * height)
        x, weight, bias, sort, tasks = _case(
            kernel_device, dtype, width=width, contraction=contraction, gated=gated,
            heights=heights, routing="skewed", tokens=45,
        )  # fmt: skip
        config = GemmConfig(block, 48 - block, 4 if swap else 8, 2, resident + 1, swap, resident)
        out = grouped_mm(
            x, weight, sort, tasks, top_k=2, heights=heights, bias=bias, epilogue=epilogue,
            config=config._replace(block_k=64 if gpu and resident else 32 if block == 16 else 16),
            num_sms=3 if resident else None,
        )  # fmt: skip
        results.append(out)
    assert all(torch.equal(results[0], other) for other in results[1:])
    assert not torch.equal(results[0], results[0].roll(1, dims=0))


def test_refuses_what_it_cannot_do(kernel_device) -> None:
    x, weight, _, sort, tasks = _case(kernel_device, torch.float32, width=16)
    with pytest.raises(ValueError, match="must contract 24 elements"):
        grouped_mm(x, weight[:, :, :16], sort, tasks, top_k=2, heights=(16,))
    with pytest.raises(ValueError, match="multiples of 8"):
        grouped_mm(x, weight[:, :12], sort, tasks, top_k=2, heights=(16,))
