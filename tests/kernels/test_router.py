"""The router from hidden states against its torch twin, spread over programs and not."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from moesaic.kernels import router
from moesaic.kernels import tickets as tickets_file
from moesaic.kernels.router import plan_router, route_hidden, route_hidden_ref
from moesaic.kernels.routing_ref import route_ref
from moesaic.kernels.tickets import Tickets

SOFTMAX = {"top_k": 2, "scoring": "softmax"}
DEEPSEEK: dict[str, Any] = {
    "top_k": 4, "scoring": "sigmoid", "n_group": 5, "topk_group": 2, "scale": 2.5
}  # fmt: skip


def _inputs(
    tokens: int, experts: int, hidden: int, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens + experts)
    shapes = ((tokens, hidden), (experts, hidden))
    made = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    return made[0], made[1]


def _kinds(device: torch.device) -> list[torch.dtype]:
    """The interpreter multiplies bf16 wrongly."""
    return [torch.float16, torch.bfloat16] if device.type == "cuda" else [torch.float16]


def test_worked_example(kernel_device: torch.device) -> None:
    hidden = torch.zeros(1, 16, dtype=torch.float16, device=kernel_device)
    hidden[0, :2] = torch.tensor([1.0, 2.0])
    weight = torch.zeros(3, 16, dtype=torch.float16, device=kernel_device)
    weight[:, :2] = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    logits, ids, weights = route_hidden(hidden, weight, **SOFTMAX)
    assert logits.tolist() == [[1, 2, 3]] and ids.tolist() == [[2, 1]]
    expected = torch.tensor([[0.731058578, 0.268941421]], device=kernel_device)
    torch.testing.assert_close(weights, expected, rtol=3e-7, atol=0)


@pytest.mark.parametrize(
    ("tokens", "experts", "hidden", "rule"),
    [
        (1, 8, 512, SOFTMAX),
        (19, 40, 272, DEEPSEEK),
        (33, 60, 1024, SOFTMAX | {"renormalize": False}),
        (5, 16, 256, {"top_k": 4, "scoring": "topk_softmax"}),
    ],
)
def test_spread_and_alone_agree_with_the_twin(
    kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch, tokens: int, experts: int,
    hidden: int, rule: dict[str, Any],
) -> None:  # fmt: skip
    for dtype in _kinds(kernel_device):
        inputs = _inputs(tokens, experts, hidden, kernel_device, dtype)
        linear = torch.linspace(-1, 1, experts).to(kernel_device, dtype)
        bias = linear.flip(0).float() if rule["scoring"] == "sigmoid" else None
        how = rule | {"logits_dtype": torch.float32, "weights_dtype": dtype}
        found = []
        for limits in (router.SPREAD_PROGRAMS, (0, 0)):
            monkeypatch.setattr(router, "SPREAD_PROGRAMS", limits)
            found.append(route_hidden(*inputs, linear, bias, **how))
        wanted = route_hidden_ref(*inputs, linear, bias, **how)
        for logits, ids, weights in found:
            torch.testing.assert_close(logits, wanted[0], rtol=1e-5, atol=1e-4)
            # The choice is the twin's, exactly, on the logits that were made.
            ids_ref, weights_ref, _ = route_ref(logits, bias, **rule)
            assert torch.equal(ids, ids_ref) and weights.dtype == dtype
            torch.testing.assert_close(weights, weights_ref.to(dtype), rtol=1e-2, atol=0)
        if kernel_device.type == "cuda":
            assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_plans_spread_few_tokens_only() -> None:
    how = {"top_k": 8, "scoring": "softmax", "renormalize": True, "n_group": 1, "topk_group": 1}
    seen = {t: plan_router(t, 128, 2048, **how) for t in (1, 128, 1024, 8192)}
    assert {t: (p, b, plan["SPREAD"], plan["BLOCK_T"]) for t, (p, b, plan) in seen.items()} == {
        1: (32, 1, True, 16), 128: (256, 8, True, 16), 1024: (512, 16, True, 64),
        8192: (128, 128, False, 64),
    }  # fmt: skip


def test_what_the_tensor_cores_cannot_take_is_refused(kernel_device: torch.device) -> None:
    hidden, weight = _inputs(2, 4, 32, kernel_device, torch.float32)
    with pytest.raises(ValueError, match=r"hidden states are torch\.float32"):
        route_hidden(hidden, weight, **SOFTMAX)
    with pytest.raises(ValueError, match="multiple of 16"):
        route_hidden(hidden[:, :24].half(), weight[:, :24].half(), **SOFTMAX)
    with pytest.raises(ValueError, match=r"sigmoid. only"):
        route_hidden(hidden.half(), weight.half(), None, torch.zeros(4), **SOFTMAX)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_token_is_routed_alike_in_every_batch_stream_and_graph() -> None:
    device = torch.device("cuda")
    for experts, hidden, rule in ((128, 2048, {"top_k": 8}), (8, 4096, {"top_k": 2}),
                                  (256, 7168, {"top_k": 8, "scoring": "sigmoid"})):  # fmt: skip
        states, weight = _inputs(4500, experts, hidden, device, torch.bfloat16)
        whole = route_hidden(states, weight, **rule)
        for rows in (slice(0, 1), slice(3, 20), slice(100, 228), slice(1000, 2500)):
            part = route_hidden(states[rows], weight, **rule)
            assert all(torch.equal(a, b[rows]) for a, b in zip(part, whole, strict=True))
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        route_hidden(states[:64], weight, **rule)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            captured = [route_hidden(states[:64], weight, **rule) for _ in range(3)]
        for _ in range(20):  # a graph beside eager launches: their tickets are not shared
            graph.replay()
            with torch.cuda.stream(side):
                beside = route_hidden(states[:64], weight, **rule)
        torch.cuda.synchronize()
        for found in (*captured, beside):
            assert all(torch.equal(a, b[:64]) for a, b in zip(found, whole, strict=True))


def test_tickets_are_zeros_for_every_launch() -> None:
    tickets = Tickets(torch.device("cpu"))
    first, second = tickets.take(3), tickets.take(3)
    assert first.tolist() == [0, 0, 0] and first.data_ptr() != second.data_ptr()


def test_tickets_of_captured_launches_stay_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph holds addresses alone: what it was given may never be freed or given again."""
    capturing, made = [False], []

    def zeros(_: Tickets, blocks: int) -> torch.Tensor:
        made.append(weakref.ref(block := torch.zeros(blocks, dtype=torch.int32)))
        return block

    monkeypatch.setattr(Tickets, "_zeros", zeros)
    monkeypatch.setattr(tickets_file, "RESERVE", 4)
    monkeypatch.setattr(tickets_file, "for_good", lambda make, device: make())
    stream = SimpleNamespace(cuda_stream=7)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    tickets = Tickets(torch.device("cpu"))
    tickets.device = torch.device("cuda")
    eager, taken = tickets.take(2).data_ptr(), set()
    for _ in range(6):
        capturing[0] = True
        taken |= {tickets.take(3).data_ptr() for _ in range(5)}
        capturing[0] = False
        assert tickets.take(2).data_ptr() == eager
    assert len(made) == 8 and all(block() is not None for block in made)
    assert len(taken) == 30 and eager not in taken
    capturing[0], before = True, len(made)
    assert len(tickets.take(100)) == 100 and len(made) == before + 1
