"""Every baseline computes the layer that it is compared on."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from moesaic.bench import baselines
from moesaic.bench.baselines import BASELINES, baselines_of, prepare
from moesaic.bench.workloads import MODELS, Model, make_inputs, make_weights
from moesaic.reference import moe_reference

SMALL = [
    Model("mixtral", 8, 2, 64, 96, family="mixtral"),
    Model("qwen3", 16, 4, 32, 48, family="qwen3_moe"),
    Model("deepseek", 16, 8, 64, 32, family="deepseek_v3"),
    Model("olmoe", 8, 3, 32, 32, family="olmoe"),
    Model("gpt-oss", 8, 2, 32, 48, kind="gpt-oss", family="gpt_oss"),
    Model("paper", 8, 2, 32, 64, kind="relu3", family="paper"),
]
PAIRS = [(m, b) for m in SMALL for b in (*baselines_of(m), BASELINES["torch-loop"])]


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize(("model", "baseline"), PAIRS, ids=lambda v: v.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_baseline_is_the_layer(
    model: Model, baseline: baselines.Baseline, dtype: torch.dtype
) -> None:
    pytest.importorskip("transformers")
    generator = torch.Generator().manual_seed(0)
    weights = make_weights(model.spec(), dtype=dtype, generator=generator)
    inputs = make_inputs(model, 23, "zipf1", dtype=dtype, generator=generator)
    with torch.no_grad():
        got = baseline.build(model, weights)(*prepare(inputs))
        want = moe_reference(*inputs, weights, model.spec(), dtype=torch.float64)
        ids = inputs.topk_ids_TK
        wrong = moe_reference(
            inputs.hidden_TH, ids.roll(1, 0), inputs.topk_weights_TK, weights, model.spec()
        )
    bound = 1e-5 if dtype is torch.float32 else 1.5e-2
    assert got.dtype == dtype and got.shape == inputs.hidden_TH.shape
    assert relative_error(got, want) < bound
    assert relative_error(wrong, want) > 10 * bound


def test_weights_are_shared_not_copied() -> None:
    pytest.importorskip("transformers")
    model = SMALL[1]
    weights = make_weights(model.spec(), dtype=torch.float32, generator=torch.Generator())
    experts: Any = baselines.transformers_experts(model, weights, "grouped_mm")
    assert experts.gate_up_proj.data_ptr() == weights.up.data_ptr()
    assert experts.down_proj.data_ptr() == weights.down.data_ptr()


def test_batched_mm_says_how_much_memory_it_would_take() -> None:
    refuses = BASELINES["transformers-batched_mm"].refuses
    mixtral, limit = MODELS["Mixtral-8x7B"], 32 * 2**30
    assert refuses(mixtral, 16, torch.bfloat16, limit) is None
    text = refuses(mixtral, 64, torch.bfloat16, limit)
    assert text is not None and "128 rows, 42.0 GiB" in text


def test_without_transformers_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str, *_: object) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(baselines, "import_module", missing)
    weights = make_weights(SMALL[0].spec(), dtype=torch.float32, generator=torch.Generator())
    with pytest.raises(baselines.Unavailable, match="is not installed"):
        BASELINES["transformers-eager"].build(SMALL[0], weights)


def test_liger_gets_the_layer_in_its_own_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the package's calling convention stood in for: sorted weights, int32 ids, 1024 first."""
    model, seen = SMALL[0], []

    class Fused:
        @staticmethod
        def apply(x: Any, gate_up: Any, down: Any, ids: Any, shares: Any) -> torch.Tensor:
            assert ids.dtype == torch.int32 and x.dtype == gate_up.dtype
            seen.append(len(x))
            gate, up = (torch.einsum("th,ekh->tek", x, half) for half in gate_up.chunk(2, 1))
            every = torch.einsum("tei,ehi->teh", torch.nn.functional.silu(gate) * up, down)
            chosen = every.gather(1, ids.long()[..., None].expand(-1, -1, x.shape[1]))
            return (chosen * shares[..., None].to(x.dtype)).sum(1)

    monkeypatch.setitem(sys.modules, "liger_kernel.ops.fused_moe", SimpleNamespace(
        LigerFusedMoEFunction=Fused))  # fmt: skip
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", ModuleType("liger_kernel.ops"))
    generator = torch.Generator().manual_seed(0)
    weights = make_weights(model.spec(), dtype=torch.float32, generator=generator)
    inputs = make_inputs(model, 23, "zipf1", dtype=torch.float32, generator=generator)
    got = baselines.liger_fused(model, weights)(*inputs)
    want = moe_reference(*inputs, weights, model.spec(), dtype=torch.float64)
    assert relative_error(got, want) < 1e-5 and seen == [1024, 23]
    monkeypatch.setitem(sys.modules, "liger_kernel.ops.fused_moe", None)
    for other in (model, SMALL[-1]):
        with pytest.raises(baselines.Unavailable):
            baselines.liger_fused(other, weights)
