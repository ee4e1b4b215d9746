"""What is asked into the L2 ahead of time: how much, and that it changes nothing."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from moesaic.kernels import ahead
from moesaic.kernels.ahead import fetch_ahead, fetch_starts, plan_ahead


def test_what_is_fetched_is_cut_at_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = (12 << 10, 20 << 10, 3 << 10, 256 << 10)
    tensors = [torch.zeros(n, dtype=torch.uint8) for n in sizes]
    assert plan_ahead([]) == plan_ahead(tensors[2:3]) == (0, ())
    # Chunks of 4 KiB, 32 a program: 3, 5 and, of too few bytes, none; then all of the last.
    programs, arguments = plan_ahead(tensors)
    assert programs == 3 and arguments[4:] == (3, 8, 72, 72)
    assert [t.numel() for t in arguments[:4]] == [sizes[0], sizes[1], sizes[3], sizes[3]]
    monkeypatch.setattr(ahead, "LIMIT", 28 << 10)
    programs, arguments = plan_ahead([tensors[3][1:], tensors[0].view(2, -1).T, *tensors])
    assert programs == 1 and arguments[4:] == (3, 7, 7, 7)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_fetching_changes_no_bit_and_keeps_the_order_of_launches() -> None:
    device = torch.device("cuda")
    later = [torch.randn(n, device=device).bfloat16() for n in (3_000_000, 5_000_001, 9_000_000)]
    before = [tensor.clone() for tensor in later]
    stack = torch.randn(8, 3000, 512, device=device).bfloat16()
    x, total = torch.ones(1 << 26, device=device), torch.zeros(1 << 26, device=device)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    fetch_ahead(later)
    fetch_starts(stack)
    with torch.cuda.graph(graph):
        for _ in range(8):
            torch.add(total, x, out=total)
            fetch_ahead(later)  # its end is the end of the launch before it, too
            fetch_starts(stack)
    graph.replay()
    torch.cuda.synchronize()
    assert bool((total == 8).all())
    assert all(torch.equal(a, b) for a, b in zip(later, before, strict=True))
