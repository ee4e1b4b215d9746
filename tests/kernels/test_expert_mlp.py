"""The fused three-layer expert: right, with the bits of the tiled products, refused if too wide."""

from __future__ import annotations

import pytest
import torch
from layer_cases import ROUTINGS, draw_layer
from test_experts import check, run, tokens_of

from moesaic.kernels.batching import batch_rows
from moesaic.kernels.expert_mlp import expert_mlp
from moesaic.kernels.tune import FUSED_ROWS, fused_stages


@pytest.mark.parametrize("kind", ["mlp3", "mlp3_plain"])
@pytest.mark.parametrize("widths", [(64, 32), (40, 88)], ids=str)
def test_fused_is_right_and_has_the_bits_of_tiled(
    kernel_device, poisoned_empty, kind, widths
) -> None:
    gpu = kernel_device.type == "cuda"
    dtypes = (torch.float16, torch.bfloat16) if gpu else (torch.float16,)
    for dtype in (*dtypes, torch.float32):
        scale = {2: 8, 4: 2}[dtype.itemsize] if gpu else 1
        hidden, intermediate = widths[0] * scale, widths[1] * scale
        assert fused_stages(hidden, intermediate, dtype.itemsize, 90)
        spec, weights = draw_layer(kind, 4, hidden, intermediate, kernel_device, dtype)
        inputs = tokens_of(kernel_device, dtype, tokens=21, hidden=hidden, routing="skewed")
        fused = run(*inputs, weights, spec, fused=True)
        check(fused, *inputs, weights, spec)
        assert torch.equal(fused, run(*inputs, weights, spec, fused=False))


@pytest.mark.parametrize("routing", ROUTINGS)
def test_fused_on_every_routing(kernel_device, poisoned_empty, routing) -> None:
    spec, weights = draw_layer("mlp3", 5, 24, 40, kernel_device, torch.float32)
    inputs = tokens_of(
        kernel_device, torch.float32, tokens=19, hidden=24, experts=5, routing=routing
    )
    check(run(*inputs, weights, spec, fused=True), *inputs, weights, spec)
    assert torch.equal(
        run(*inputs, weights, spec, fused=True, num_sms=1),
        run(*inputs, weights, spec, fused=True),
    )


def test_worked_example(kernel_device) -> None:
    eye = torch.eye(8, device=kernel_device)[None]
    ids = torch.zeros(1, 1, dtype=torch.int32, device=kernel_device)
    sort, tasks = batch_rows(ids, 1, heights=(FUSED_ROWS,))
    out = expert_mlp(eye[0, :1].contiguous(), 2 * eye, 2 * eye, -eye, sort, tasks, top_k=1, arch=90)
    assert out.tolist() == [[-4.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]]


def test_refuses_what_does_not_fit(kernel_device) -> None:
    spec, weights = draw_layer("mlp3", 1, 8, 2048, kernel_device, torch.float16)
    inputs = tokens_of(kernel_device, torch.float16, tokens=1, hidden=8, experts=1, top_k=1)
    with pytest.raises(ValueError, match="does not fit on chip with H=8, I=2048"):
        run(*inputs, weights, spec, fused=True)
