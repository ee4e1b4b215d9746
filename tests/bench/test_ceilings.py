"""Rates are bytes and flops over the time measured; the dense twin does the layer's products."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moesaic.bench.ceilings import dense_twin, measure_ceilings, read_rate
from moesaic.bench.workloads import MODELS, Model
from moesaic.cost import expert_flops

CPU = torch.device("cpu")


def test_rates_are_work_over_time() -> None:
    found = measure_ceilings(CPU, dtype=torch.float32, num_bytes=2**20, gemm_size=64, budget_s=0.05)
    ms = {name: m.median for name, m in found.timings.items()}
    assert found.copy_gbps == pytest.approx(2 * 2**20 / ms["copy"] / 1e6)
    assert found.read_gbps == pytest.approx(2**20 / ms["read"] / 1e6)
    assert found.gemm_tflops == pytest.approx(2 * 64**3 / ms["gemm"] / 1e9)
    assert read_rate("NVIDIA H200", found) == 4.5e12
    assert read_rate("NVIDIA A100", found) == pytest.approx(found.read_gbps * 1e9)


@pytest.mark.parametrize(
    "model",
    [
        MODELS["paper-small"],
        Model("tiny", 8, 2, 64, 96, family="mixtral"),
        Model("tiny-oss", 8, 2, 32, 48, kind="gpt-oss", family="gpt_oss"),
    ],
    ids=lambda m: m.name,
)
def test_the_twin_has_the_flops_of_the_layer(model: Model) -> None:
    call = dense_twin(model.spec(), 12, dtype=torch.float32, device=CPU)
    with FlopCounterMode(display=False) as counter:
        out = call()
    assert counter.get_total_flops() == expert_flops(model.spec(), 12)
    assert out.shape == (12, model.hidden_size)
