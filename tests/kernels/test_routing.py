"""The fused router against its torch twin: random shapes, groups, exact ties, NaN, infinities."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
from moesaic.kernels.routing import choose_experts, plan_route, route, route_kernel
from moesaic.kernels.routing_ref import route_ref

NAN, INF = float("nan"), float("inf")
DEEPSEEK = {"scoring": "sigmoid", "n_group": 8, "topk_group": 4, "scale": 2.5}


def _check(logits: torch.Tensor, bias: torch.Tensor | None, **how: Any) -> None:
    """Ids and counts of the twin exactly, weights to fp32 rounding."""
    ids, weights, counts = route(logits, bias, **how)
    ids_ref, weights_ref, counts_ref = route_ref(logits, bias, **how)
    assert (ids.dtype, weights.dtype, counts.dtype) == (torch.int32, torch.float32, torch.int32)
    assert torch.equal(ids, ids_ref)
    assert torch.equal(counts, counts_ref)
    torch.testing.assert_close(weights, weights_ref, rtol=2e-6, atol=1e-30)


def _distinct_logits(tokens: int, experts: int, seed: int) -> torch.Tensor:
    """Rows that are shuffles of one uneven grid: scores, and sums of two, differ by far more than
    rounding."""
    gen = torch.Generator().manual_seed(seed)
    grid = torch.linspace(-6, 5, experts) + torch.rand(experts, generator=gen) * 5 / experts
    return torch.stack([grid[torch.randperm(experts, generator=gen)] for _ in range(tokens)])


def test_worked_examples(kernel_device: torch.device) -> None:
    logits = torch.tensor([[0, 2, 2, 1], [5, NAN, 1, 1]], device=kernel_device)
    ids, weights, counts = route(logits, top_k=2, scoring="softmax")
    assert ids.tolist() == [[1, 2], [0, 2]]
    assert counts.tolist() == [1, 1, 2, 0]
    e4 = 2.718281828459045**4
    expected = torch.tensor([[0.5, 0.5], [e4 / (e4 + 1), 1 / (e4 + 1)]], device=kernel_device)
    torch.testing.assert_close(weights, expected, rtol=3e-7, atol=0)
    _, weights, _ = route(logits, top_k=2, scoring="softmax", renormalize=False)
    exact = logits.nan_to_num(-1e9).double().softmax(-1).gather(1, ids.long())
    torch.testing.assert_close(weights.double(), exact, rtol=3e-7, atol=0)


def test_groups_by_hand(kernel_device: torch.device) -> None:
    """Group 1 has the best expert, group 0 the best pair; the bias chooses but does not weigh."""
    bias = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 1.0], device=kernel_device)
    logits = torch.tensor([[1.0, 1.0, 3.0, -9.0, 0.0, -9.0]], device=kernel_device)
    how = {"top_k": 2, "scoring": "sigmoid", "n_group": 3, "topk_group": 1}
    assert route(logits, None, **how)[0].tolist() == [[0, 1]]
    ids, weights, _ = route(logits, bias, renormalize=False, scale=4.0, **how)
    assert ids.tolist() == [[5, 4]]
    torch.testing.assert_close(weights, logits[:, [5, 4]].sigmoid() * 4, rtol=1e-6, atol=0)


@st.composite
def _cases(draw: st.DrawFn) -> dict[str, Any]:
    n_group = draw(st.sampled_from([1, 1, 2, 3, 5, 8]))
    experts = n_group * draw(st.integers(1, 96 // n_group))
    topk_group = draw(st.integers(1, n_group))
    top_k = draw(st.integers(1, min(64, topk_group * (experts // n_group))))
    return {
        "tokens": draw(st.integers(1, 12)),
        "experts": experts,
        "biased": draw(st.booleans()),
        "seed": draw(st.integers(0, 9)),
        "levels": draw(st.sampled_from([1, 2, 5])),
        "dtype": draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])),
        "how": {
            "top_k": top_k,
            "scoring": draw(st.sampled_from(["softmax", "topk_softmax", "sigmoid"])),
            "renormalize": draw(st.booleans()),
            "n_group": n_group,
            "topk_group": topk_group,
            "scale": draw(st.sampled_from([1.0, 2.5])),
        },
    }


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(case=_cases())
def test_agrees_with_the_twin(kernel_device: torch.device, case: dict[str, Any]) -> None:
    """Well-separated scores, then few levels: rows full of exact ties, NaN and infinities."""
    how, experts = case["how"], case["experts"]
    sigmoid = how["scoring"] == "sigmoid"
    gen = torch.Generator().manual_seed(case["seed"])
    distinct = _distinct_logits(case["tokens"], experts, case["seed"])
    levels = torch.randint(0, case["levels"], distinct.shape, generator=gen).float()
    wild = torch.tensor([NAN, INF, -INF, -0.0, 0.0])
    at = torch.randint(0, 25, distinct.shape, generator=gen)
    levels = torch.where(at < 5, wild[at.clamp(max=4)], levels)
    bias = torch.randint(-1, 2, (experts,), generator=gen) * 4.0 if case["biased"] else None
    bias = bias.to(kernel_device) if sigmoid and bias is not None else None
    _check(distinct.to(kernel_device), bias if how["n_group"] == 1 else None, **how)
    _check(levels.to(case["dtype"]).to(kernel_device), bias, **how)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(
    ("tokens", "experts", "how"),
    [
        (5, 256, {"top_k": 8, **DEEPSEEK}),
        (3, 1024, {"top_k": 64, "scoring": "softmax", "renormalize": False}),
        (2, 1020, {"top_k": 64, **DEEPSEEK, "n_group": 68, "topk_group": 34}),
        (70, 8, {"top_k": 2, "scoring": "softmax"}),
        (9, 60, {"top_k": 4, "scoring": "topk_softmax"}),
        (3, 1, {"top_k": 1, "scoring": "sigmoid"}),
    ],
)
def test_shapes_of_models_and_extremes(
    kernel_device: torch.device, tokens: int, experts: int, how: dict[str, Any]
) -> None:
    logits = _distinct_logits(tokens, experts, 1).to(kernel_device)
    _check(logits, None, **how)


@pytest.mark.parametrize("value", [NAN, -INF, INF, 0.0, -3e38, 3e38, -1000.0])
@pytest.mark.parametrize("scoring", ["softmax", "topk_softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [True, False])
def test_rows_of_one_value(
    kernel_device: torch.device, value: float, scoring: str, renormalize: bool
) -> None:
    logits = torch.full((3, 12), value, device=kernel_device)
    how = {"top_k": 3, "scoring": scoring, "renormalize": renormalize}
    ids, weights, _ = route(logits, **how)
    assert ids.tolist() == [[0, 1, 2]] * 3
    assert torch.isfinite(weights).all()
    if renormalize or scoring == "topk_softmax":
        torch.testing.assert_close(weights, torch.full_like(weights, 1 / 3))
    _check(logits, None, **how)


def test_zero_ties_with_minus_zero(kernel_device: torch.device) -> None:
    logits = torch.tensor([[-1.0, -0.0, 0.0, -0.0], [0.0, -0.0, 0.0, -1.0]], device=kernel_device)
    ids, _, _ = route(logits, top_k=3, scoring="softmax")
    assert ids.tolist() == [[1, 2, 3], [0, 1, 2]]
    assert torch.equal(ids, route_ref(logits, top_k=3)[0])


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_bits_do_not_depend_on_batch_block_or_stride(
    kernel_device: torch.device, scoring: str
) -> None:
    gen = torch.Generator().manual_seed(3)
    logits = torch.randn((19, 96), generator=gen).to(torch.bfloat16).to(kernel_device)
    how = {"top_k": 6, "scoring": scoring, "renormalize": scoring == "sigmoid"}
    ids, weights, counts = route(logits, **how)
    padded = torch.full((19, 101), NAN, dtype=torch.bfloat16, device=kernel_device)
    padded[:, 3:99] = logits
    for got in (route(padded[:, 3:99], **how), route(logits, **how)):
        assert all(map(torch.equal, got, (ids, weights, counts)))
    for t in (0, 18):
        alone = route(logits[t : t + 1], **how)
        assert torch.equal(alone[0], ids[t : t + 1])
        assert torch.equal(alone[1], weights[t : t + 1])
        assert alone[2].sum() == 6
    _, plan = plan_route(19, 96, n_group=1, topk_group=1, **how)
    for block_t, warps, programs in ((1, 1, 19), (16, 4, 2), (2, 2, 1)):
        out = (torch.empty_like(ids), torch.empty_like(weights), torch.zeros_like(counts))
        other = plan | {"BLOCK_T": block_t, "num_warps": warps}
        route_kernel[(programs,)](logits, None, *out, 19, 96, 1.0, **other)
        assert all(map(torch.equal, out, (ids, weights, counts)))


def test_weights_to_rounding_of_fp64(kernel_device: torch.device) -> None:
    """Far tails too: exp keeps its last bits, except in the interpreter, whose fma rounds twice."""
    rtol = 8e-7 if kernel_device.type == "cuda" else 4e-6
    logits = torch.linspace(-80, 0, 64, device=kernel_device)[None]
    for how, exact in (
        ({"scoring": "softmax", "renormalize": False}, logits.double().softmax(-1)),
        ({"scoring": "sigmoid", "renormalize": False}, logits.double().sigmoid()),
    ):
        ids, weights, _ = route(logits, top_k=64, **how)
        want = exact.gather(1, ids.long())
        torch.testing.assert_close(weights.double(), want, rtol=rtol, atol=0)


def test_empty_batch_and_refusals(kernel_device: torch.device) -> None:
    logits = torch.zeros((4, 8), device=kernel_device)
    ids, weights, counts = route(logits[:0], top_k=2, scoring="softmax")
    assert (ids.shape, weights.shape) == ((0, 2), (0, 2))
    assert counts.tolist() == [0] * 8
    with pytest.raises(ValueError, match="last stride is 1"):
        route(logits.t(), top_k=2, scoring="softmax")
    with pytest.raises(ValueError, match="sigmoid"):
        route(logits, torch.zeros(8, device=kernel_device), top_k=2, scoring="softmax")


@pytest.mark.parametrize("tokens", [0, 1, 40])
def test_a_choice_without_counts_is_that_of_route(kernel_device: torch.device, tokens: int) -> None:
    logits = _distinct_logits(tokens + 1, 96, 3)[1:].to(kernel_device, torch.bfloat16)
    bias = torch.linspace(0, 0.3, 96, device=kernel_device)
    rule = {"top_k": 6, "scoring": "sigmoid", "renormalize": True, "n_group": 8, "topk_group": 4}
    ids, weights, _ = route(logits, bias, scale=2.5, **rule)
    # The interpreter cuts bf16 off.
    half = torch.bfloat16 if kernel_device.type == "cuda" else torch.float16
    for dtype in (torch.float32, half):
        found = choose_experts(logits, bias, weights_dtype=dtype, scale=2.5, **rule)
        assert torch.equal(found[0], ids) and torch.equal(found[1], weights.to(dtype))
    with pytest.raises(ValueError, match="sigmoid"):
        choose_experts(logits, bias, **rule | {"scoring": "softmax"})


def test_plan_keeps_rows_in_a_warp_and_one_launch_alone() -> None:
    how = {"top_k": 2, "scoring": "softmax", "renormalize": True, "n_group": 1, "topk_group": 1}
    programs, plan = plan_route(1, 256, **how)
    assert (programs, plan["ALONE"], plan["num_warps"]) == (1, True, 1)
    programs, plan = plan_route(5, 256, **how)
    assert (programs, plan["ALONE"]) == (3, False)
    assert plan_route(10**6, 256, **how)[0] == 2112
    alone = [plan_route(t, 128, counted=False, **how) for t in (1, 40, 1024, 1025)]
    assert [(n, plan["BLOCK_T"]) for n, plan in alone] == [(1, 1), (40, 1), (1024, 1), (257, 4)]
