"""Publishing counters: words that carry their number, and steps counted beside the kernel."""

from __future__ import annotations

import doctest

import pytest
import torch

pytest.importorskip("triton")
from moesaic.kernels import publish_ref as room
from moesaic.kernels.publish import new_table, publish
from moesaic.kernels.publish_ref import LOW, new_ring, new_state, publish_ref


def test_docstring_example() -> None:
    found = doctest.testmod(room, extraglobs={"torch": torch})
    assert found.attempted and not found.failed


def test_docstring_example_of_the_kernel(kernel_device: torch.device) -> None:
    counters = torch.tensor([[5, 1], [5, 1], [2, 1]], dtype=torch.int32, device=kernel_device)
    on_gpu = kernel_device.type == "cuda"
    ring = new_ring(2, 6, pinned=on_gpu)
    state = torch.tensor([[3, 3]], device=kernel_device)
    publish(new_table([counters]), ring, state, clock=on_gpu)
    assert state.tolist() == [[4, 4]]
    assert ring[0].tolist() == [0] * 10 and set((ring[1] >> 32).tolist()) == {4}
    assert (ring[1, 2:] & LOW).tolist() == [4, 0, 5, 1, 5, 1, 2, 1]
    assert (int(ring[1, 0] & LOW) > 0) == on_gpu


@pytest.mark.parametrize("every", [1, 3])
def test_agrees_with_the_twin(kernel_device: torch.device, every: int) -> None:
    on_gpu = kernel_device.type == "cuda"
    counters = [
        torch.arange(3 * n, dtype=torch.int32, device=kernel_device).view(3, n) for n in (8, 500)
    ]
    counters[1][2, 7] = -(2**31)
    mine, other = new_ring(4, 1524, pinned=on_gpu), new_ring(4, 1524)
    state, state_ref = new_state(2, kernel_device), new_state(2, "cpu")
    table = new_table(counters)

    def both(**how: int) -> None:
        publish(table, mine, state, clock=False, **how)
        publish_ref([t.cpu() for t in counters], other, state_ref, **how)
        assert torch.equal(state.cpu(), state_ref) and torch.equal(mine, other)

    for step in range(14):
        for tensor in counters:
            tensor += step
        both(every=every)
    assert state_ref.tolist() == [[14, 14 // every]] * 2
    assert int((mine >> 32).max()) == 14 // every
    assert int((mine[:, 2] & LOW).max()) == 14 // every * every
    # Steps that come together, and an end that waits for no others.
    for steps, often in ((3, 3), (2, 3), (4, 1)):
        both(every=often, steps=steps)
    assert int((mine[:, 2] & LOW).max()) == 23
