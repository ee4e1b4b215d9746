"""Publishing counters: the ring, its stamps, and a step number that lives beside the kernel."""

from __future__ import annotations

import doctest

import pytest
import torch

pytest.importorskip("triton")
from moesaic.kernels import publish_ref as room
from moesaic.kernels.publish import new_table, publish
from moesaic.kernels.publish_ref import new_ring, new_state, publish_ref


def test_docstring_example() -> None:
    found = doctest.testmod(room, extraglobs={"torch": torch})
    assert found.attempted and not found.failed


def test_docstring_example_of_the_kernel(kernel_device: torch.device) -> None:
    counters = torch.tensor([[5, 1], [5, 1], [2, 1]], dtype=torch.int32, device=kernel_device)
    on_gpu = kernel_device.type == "cuda"
    ring, head = new_ring(2, 6, pinned=on_gpu)
    state = torch.tensor([3, 0, 3], device=kernel_device)
    publish(new_table([counters]), ring, head, state, clock=on_gpu)
    assert state.tolist() == [4, 0, 4]
    assert ring.tolist() == [[0] * 6, [5, 1, 5, 1, 2, 1]]
    assert head[:, 0].tolist() == [0, 4] and (head[1, 1] > 0) == on_gpu


@pytest.mark.parametrize("every", [1, 3])
def test_agrees_with_the_twin(kernel_device: torch.device, every: int) -> None:
    on_gpu = kernel_device.type == "cuda"
    counters = [
        torch.arange(3 * n, dtype=torch.int32, device=kernel_device).view(3, n) for n in (8, 500)
    ]
    mine, other = new_ring(4, 1524, pinned=on_gpu), new_ring(4, 1524)
    state, state_ref = new_state(kernel_device), new_state("cpu")
    table = new_table(counters)
    for step in range(14):
        for tensor in counters:
            tensor += step
        publish(table, *mine, state, every=every, clock=False)
        publish_ref([t.cpu() for t in counters], *other, state_ref, every=every)
        assert torch.equal(state.cpu(), state_ref)
        assert torch.equal(mine[0], other[0]) and torch.equal(mine[1], other[1])
    assert state_ref.tolist() == [14, 0, 14 // every]
    assert int(mine[1][:, 0].max()) == 14 // every
    assert int(mine[1][:, 2].max()) == 14 // every * every
    # Steps that come together, and an end that waits for no others.
    for steps, often in ((3, 3), (2, 3), (4, 1)):
        publish(table, *mine, state, every=often, steps=steps, clock=False)
        publish_ref([t.cpu() for t in counters], *other, state_ref, every=often, steps=steps)
        assert torch.equal(state.cpu(), state_ref) and int(state[1]) == 0
        assert torch.equal(mine[0], other[0]) and torch.equal(mine[1], other[1])
    assert int(mine[1][:, 2].max()) == 23
