"""The layer on a GPU: as right as transformers, one answer however run, and at any size."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "kernels"))
from layer_cases import draw_ids, draw_layer

from moesaic import functional
from moesaic.bench.baselines import Unavailable, transformers_experts
from moesaic.bench.workloads import Model
from moesaic.ops import WEIGHT_NAMES, experts_op
from moesaic.reference import moe_reference
from moesaic.types import ExpertSpec, ExpertWeights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")


def tokens_of(spec: ExpertSpec, tokens: int, top_k: int, dtype: torch.dtype, seed: int = 0):
    """Hidden states, ids and weights in fp32 that the dtype represents."""
    generator = torch.Generator(CUDA).manual_seed(seed)
    hidden = torch.randn(tokens, spec.hidden_size, device=CUDA, generator=generator).to(dtype)
    ids = draw_ids("uniform", tokens, top_k, spec.num_experts, seed).to(CUDA)
    share = torch.rand(tokens, top_k, device=CUDA, generator=generator).softmax(-1)
    return hidden, ids, share.to(dtype)


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return float((actual.double() - exact).norm() / exact.norm())


FAMILIES = {
    "mixtral": Model("mixtral", 8, 2, 1024, 1792, family="mixtral"),
    "qwen3": Model("qwen3", 32, 8, 1024, 384, family="qwen3_moe"),
    "gpt_oss": Model("gpt_oss", 8, 4, 720, 720, kind="gpt-oss", family="gpt_oss"),
}


@pytest.mark.parametrize("tokens", [5, 600])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("family", FAMILIES)
def test_errors_are_not_above_transformers_eager(family, dtype, tokens) -> None:
    model = FAMILIES[family]
    spec = model.spec()
    shapes = spec.weight_shapes()
    weights = ExpertWeights(
        **{name: (torch.randn(s, device=CUDA) * 0.03).to(dtype) for name, s in shapes.items()}
    )
    hidden, ids, share = tokens_of(spec, tokens, model.top_k, dtype)
    try:
        theirs = transformers_experts(model, weights, "eager")(hidden, ids.long(), share)
    except Unavailable as error:
        pytest.skip(str(error))
    exact = moe_reference(hidden, ids, share, weights, spec, dtype=torch.float64)
    ours = functional.moe(hidden, ids, share, weights, spec, impl="triton")
    allowed = 2.0 if dtype == torch.float32 else 1.05
    assert relative_error(ours, exact) <= allowed * relative_error(theirs, exact)
    assert relative_error(ours.roll(1, 0), exact) > 0.5


@pytest.mark.parametrize("kind", ["swiglu", "gpt_oss", "mlp3"])
def test_one_answer_alone_in_batches_and_in_graphs(kind) -> None:
    spec, weights = draw_layer(kind, 16, 1024, 640, CUDA, torch.bfloat16)
    hidden, ids, share = tokens_of(spec, 5000, 4, torch.bfloat16)
    whole = functional.moe(hidden, ids, share, weights, spec, impl="triton")
    for tokens in (1, 3, 40, 300, 1500):
        start = 7 * tokens % 3000
        part = slice(start, start + tokens)
        args = hidden[part], ids[part], share[part]
        assert torch.equal(functional.moe(*args, weights, spec, impl="triton"), whole[part])
        held = [arg.clone() for arg in (hidden[:tokens], ids[:tokens], share[:tokens])]
        functional.moe(*held, weights, spec, impl="triton")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = functional.moe(*held, weights, spec, impl="triton")
        for buffer, value in zip(held, args, strict=True):
            buffer.copy_(value)
        for _ in range(3):
            graph.replay()
            assert torch.equal(out, whole[part])
    assert not torch.equal(whole[:100], whole[100:200])


@pytest.mark.parametrize("contraction", [2048, 4096, 7168, 14336])
def test_tiles_do_not_show_at_long_contractions(contraction) -> None:
    from moesaic.kernels.batching import batch_rows
    from moesaic.kernels.grouped_mm import Epilogue, grouped_mm
    from moesaic.kernels.tune import GemmConfig

    generator = torch.Generator(CUDA).manual_seed(contraction)
    x, weight = (
        torch.randn(*shape, device=CUDA, generator=generator).bfloat16()
        for shape in ((150, contraction), (2, 512, contraction))
    )
    cuts = [
        ((16,), GemmConfig(64, 128, 4, 4, 1, 64)),
        ((16,), GemmConfig(64, 128, 4, 4, 1, 0)),
        ((16, 64), GemmConfig(128, 64, 4, 4, 1, 64)),
        ((32, 64), GemmConfig(32, 256, 4, 3, 1, 64, 2)),
        ((64,), GemmConfig(64, 32, 8, 3, 8, 0)),
        ((128,), GemmConfig(128, 64, 8, 3, 8, 0)),
        ((128,), GemmConfig(64, 64, 4, 3, 4, 0, 2)),
    ]
    for epilogue in (Epilogue(), Epilogue("silu", gated=True)):
        found = []
        for heights, cut in cuts:
            ids = torch.arange(150, device=CUDA, dtype=torch.int32)[:, None] % 50 // 40
            sort, tasks = batch_rows(ids, 2, heights=heights)
            found.append(
                grouped_mm(
                    x, weight, sort, tasks, top_k=1, heights=heights,
                    epilogue=epilogue, config=cut,
                )
            )  # fmt: skip
        assert [i for i, rows in enumerate(found) if not torch.equal(rows, found[0])] == []


@pytest.mark.parametrize("contraction", [1024, 4096])
def test_fp32_sums_blocks_apart_whatever_the_tile(contraction) -> None:
    from moesaic.kernels.batching import batch_rows
    from moesaic.kernels.grouped_mm import grouped_mm
    from moesaic.kernels.tune import GemmConfig

    generator = torch.Generator(CUDA).manual_seed(contraction)
    x, weight = (
        torch.randn(*shape, device=CUDA, generator=generator)
        for shape in ((150, contraction), (1, 96, contraction))
    )
    exact = x.double() @ weight[0].double().T
    ids = torch.zeros(150, 1, device=CUDA, dtype=torch.int32)
    found = []
    for heights, cut in (
        ((16,), GemmConfig(64, 128, 4, 3)),
        ((16,), GemmConfig(32, 16, 4, 2, 1, 64)),
        ((16, 64), GemmConfig(32, 64, 8, 3)),
        ((64,), GemmConfig(64, 32, 8, 3, 1, 0, 2)),
    ):
        sort, tasks = batch_rows(ids, 1, heights=heights)
        rows = grouped_mm(x, weight, sort, tasks, top_k=1, heights=heights, config=cut)
        found.append(rows[sort.position_S.long()])
    assert all(torch.equal(rows, found[0]) for rows in found)
    # One chain of fused multiply-adds errs by 5.8e-7 and 1.1e-6, blocks of 32 by 1.5 and 2.2e-7.
    assert relative_error(found[0], exact) < 3.5e-7


def test_fused_three_layers_have_the_tiled_bits_at_the_papers_size() -> None:
    from moesaic.kernels.experts import experts_triton

    spec, weights = draw_layer("mlp3", 8, 512, 1024, CUDA, torch.bfloat16)
    for tokens in (1, 40, 1000):
        args = tokens_of(spec, tokens, 2, torch.bfloat16)
        fused, tiled = (
            experts_triton(*args, **weights.named(), activation="relu", gated=False, fused=choice)
            for choice in (True, False)
        )
        assert torch.equal(fused, tiled)
        exact = moe_reference(*args, weights, spec, dtype=torch.float64)
        assert relative_error(fused, exact) < 5e-3


def test_op_passes_opcheck_and_compiles_whole() -> None:
    spec, weights = draw_layer("swiglu", 8, 128, 64, CUDA, torch.bfloat16)
    hidden, ids, share = tokens_of(spec, 9, 2, torch.bfloat16)
    params = [weights.named().get(name) for name in WEIGHT_NAMES]
    args = (hidden, ids, share, *params, spec.key(), "triton")
    torch.library.opcheck(torch.ops.moesaic.experts, args)
    expected = experts_op(*args)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def layer(hidden: torch.Tensor) -> torch.Tensor:
        return functional.moe(hidden * 1, ids, share, weights, spec, impl="triton") + 0

    assert torch.equal(layer(hidden), expected)


@pytest.mark.parametrize("experts", [1, 2, 3, 65, 257, 512])
def test_any_number_of_experts(experts) -> None:
    spec, weights = draw_layer("swiglu", experts, 64, 64, CUDA, torch.bfloat16)
    args = tokens_of(spec, 777, min(4, experts), torch.bfloat16)
    exact = moe_reference(*args, weights, spec, dtype=torch.float64)
    assert relative_error(functional.moe(*args, weights, spec), exact) < 5e-3


def test_a_quarter_million_rows() -> None:
    spec, weights = draw_layer("swiglu", 128, 256, 128, CUDA, torch.bfloat16)
    args = tokens_of(spec, 32768, 8, torch.bfloat16)
    exact = moe_reference(*args, weights, spec, dtype=torch.float64)
    assert relative_error(functional.moe(*args, weights, spec), exact) < 5e-3


def test_more_than_two_to_the_32_weights() -> None:
    experts, hidden, intermediate = 66, 8192, 8192
    assert experts * hidden * intermediate > 2**32
    spec = ExpertSpec(
        num_experts=experts, hidden_size=hidden, intermediate_size=intermediate,
        activation="relu2", gated=False,
    )  # fmt: skip
    shared = torch.empty(experts, intermediate, hidden, dtype=torch.bfloat16, device=CUDA)
    shared.normal_(0, 0.01)
    weights = ExpertWeights(up=shared, down=shared)
    states, ids, share = tokens_of(spec, 40, 2, torch.bfloat16)
    ids[:, 0] = torch.arange(40, device=CUDA, dtype=torch.int32) % 3 + experts - 3
    ids[:, 1] = torch.arange(40, device=CUDA, dtype=torch.int32) % 2
    exact = moe_reference(states, ids, share, weights, spec, dtype=torch.float64)
    assert relative_error(functional.moe(states, ids, share, weights, spec), exact) < 5e-3
