"""Many adapters in one launch: each row gets its own adapter's product, the others stay."""

from __future__ import annotations

import doctest

import pytest
import torch
from torch import Tensor

from moesaic.kernels import ragged_lora
from moesaic.kernels.ragged_lora import add_lora_, add_lora_ref_, batch_adapters

RATES = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# tokens, H, O, adapters, rank, the shares of the adapters (one more: of no adapter)
CASES = {
    "uniform": (40, 40, 72, 4, 8, [1, 1, 1, 1, 1]),
    "one row each": (6, 128, 130, 6, 16, [1] * 7),
    "all to one": (90, 24, 16, 3, 5, [0, 1, 0, 0]),
    "skewed": (150, 48, 40, 5, 1, [9, 3, 1, 0, 1, 0]),
    "nobody": (7, 16, 16, 2, 4, [0, 0, 1]),
    "empty": (0, 16, 16, 2, 4, [1, 1, 1]),
    "wide rank": (20, 33, 17, 2, 64, [1, 1, 0]),
}


def draw(case: str, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """out, x, adapters, A, B, scale of a case; few-bit numbers where NumPy sums in any order."""
    tokens, hidden, width, adapters, rank, shares = CASES[case]
    generator = torch.Generator().manual_seed(3)

    def numbers(*shape: int) -> Tensor:
        if device.type == "cuda":
            return torch.randn(*shape, generator=generator).to(device, dtype)
        return (torch.randint(-4, 5, shape, generator=generator) / 4).to(dtype)

    ids_T = torch.multinomial(
        torch.tensor(shares, dtype=torch.float), tokens or 1, True, generator=generator
    )[:tokens]
    scale_N = torch.rand(adapters, generator=generator) + 0.5
    return (
        numbers(tokens, width),
        numbers(tokens, hidden),
        ids_T.to(device),
        numbers(adapters, rank, hidden),
        numbers(adapters, width, rank),
        scale_N.to(device),
    )


def error(
    got: Tensor, out: Tensor, x: Tensor, ids: Tensor, a: Tensor, b: Tensor, s: Tensor
) -> float:
    """Relative error against fp64."""
    want = out.double()
    for adapter in range(len(a)):
        row = ids == adapter
        delta = x[row].double() @ a[adapter].double().T @ b[adapter].double().T
        want[row] += s[adapter].double() * delta
    return float((got.double() - want).norm() / want.norm().clamp(min=1e-30))


def test_docstring_examples(kernel_device: torch.device) -> None:
    result = doctest.testmod(ragged_lora, extraglobs={"torch": torch})
    assert result.attempted and not result.failed
    x_TH = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], device=kernel_device)
    a_NRH = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]], device=kernel_device)
    b_NOR = torch.tensor([[[1.0]], [[10.0]]], device=kernel_device)
    adapters_T = torch.tensor([1, 2, 0], device=kernel_device)
    scale_N = torch.tensor([1.0, 2.0], device=kernel_device)
    out_TO = torch.ones(3, 1, device=kernel_device)
    assert add_lora_(out_TO, x_TH, adapters_T, a_NRH, b_NOR, scale_N) is out_TO
    assert out_TO.tolist() == [[41.0], [1.0], [6.0]]


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", RATES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_as_right_as_the_twin(case: str, dtype: torch.dtype, kernel_device: torch.device) -> None:
    if dtype is torch.bfloat16 and kernel_device.type == "cpu":
        pytest.skip("Triton's interpreter multiplies bf16 wrongly")
    out_TO, *rest = draw(case, kernel_device, dtype)
    got_TO = add_lora_(out_TO.clone(), *rest)
    twin_TO = add_lora_ref_(out_TO.clone(), *rest)
    assert error(got_TO, out_TO, *rest) <= max(RATES[dtype], 1.05 * error(twin_TO, out_TO, *rest))
    alone = rest[1] >= len(rest[2])
    assert torch.equal(got_TO[alone], out_TO[alone])
    if case == "uniform":
        wrong = add_lora_(out_TO.clone(), rest[0], rest[1].roll(1), *rest[2:])
        assert error(wrong, out_TO, *rest) > 10 * RATES[dtype]


@pytest.mark.parametrize("order", ["index", "mixed"])
def test_bits_of_a_row_depend_on_the_row_alone(order: str, kernel_device: torch.device) -> None:
    dtype = torch.bfloat16 if kernel_device.type == "cuda" else torch.float32
    out_TO, x_TH, adapters_T, *bank = draw("skewed", kernel_device, dtype)
    batch = batch_adapters(adapters_T, len(bank[0]), order=order)
    whole_TO = add_lora_(out_TO.clone(), x_TH, adapters_T, *bank, batch=batch)
    again_TO = add_lora_(out_TO.clone(), x_TH, adapters_T, *bank)
    assert torch.equal(whole_TO, again_TO)
    for rows in (slice(3, 4), slice(100, 117)):
        part_TO = add_lora_(out_TO[rows].clone(), x_TH[rows], adapters_T[rows], *bank)
        assert torch.equal(part_TO, whole_TO[rows])


def test_bad_input_is_refused() -> None:
    out_TO, x_TH, adapters_T, a_NRH, b_NOR, scale_N = draw(
        "uniform", torch.device("cpu"), torch.float32
    )
    with pytest.raises(ValueError, match=r"b must be contiguous torch.float32 of shape \(4, 72, 8"):
        add_lora_(out_TO, x_TH, adapters_T, a_NRH, b_NOR.mT, scale_N)
    with pytest.raises(ValueError, match="scale must be"):
        add_lora_(out_TO, x_TH, adapters_T, a_NRH, b_NOR, scale_N.double())
    with pytest.raises(ValueError, match=r"rank must be in \[1, 64\], got 80"):
        wide = a_NRH.repeat(1, 10, 1), b_NOR.repeat(1, 1, 10)
        add_lora_(out_TO, x_TH, adapters_T, *wide, scale_N)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 128, 8192])
@pytest.mark.parametrize("adapters", [1, 100, 1024])
def test_large_banks(tokens: int, adapters: int, kernel_device: torch.device) -> None:
    if kernel_device.type != "cuda":
        pytest.skip("too large for the interpreter")
    ids_T = torch.randint(0, adapters + 1, (tokens,), device=kernel_device)
    out_TO, x_TH, a_NRH, b_NOR = (
        torch.randn(*shape, device=kernel_device, dtype=torch.bfloat16) * factor
        for shape, factor in (
            ((tokens, 3072), 1.0),
            ((tokens, 4096), 1.0),
            ((adapters, 32, 4096), 2**-6),
            ((adapters, 3072, 32), 0.2),
        )
    )
    rest = (x_TH, ids_T, a_NRH, b_NOR, torch.ones(adapters, device=kernel_device))
    got_TO = add_lora_(out_TO.clone(), *rest)
    twin_TO = add_lora_ref_(out_TO.clone(), *rest)
    assert error(got_TO, out_TO, *rest) <= 1.05 * error(twin_TO, out_TO, *rest)


@pytest.mark.gpu
def test_a_graph_replays_with_other_adapters(kernel_device: torch.device) -> None:
    if kernel_device.type != "cuda":
        pytest.skip("graphs need a GPU")
    out_TO, x_TH, adapters_T, *bank = draw("skewed", kernel_device, torch.float16)
    result_TO = out_TO.clone()
    add_lora_(result_TO, x_TH, adapters_T, *bank)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        add_lora_(result_TO, x_TH, adapters_T, *bank)
    for shift in range(3):
        adapters_T.copy_(adapters_T.roll(shift))
        result_TO.copy_(out_TO)
        graph.replay()
        assert torch.equal(result_TO, add_lora_(out_TO.clone(), x_TH, adapters_T, *bank))
