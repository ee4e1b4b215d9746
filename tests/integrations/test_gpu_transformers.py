"""On a GPU: tiny models attached with fused routers, and decoding by one CUDA graph a step."""

from __future__ import annotations

import pytest
import torch
from hf_checks import output, select, token_ids
from hf_families import tiny_model

import moesaic
from moesaic.integrations.blocks import BLOCK
from moesaic.run.generate import Decoder
from moesaic.runtime.capture import CudaCapturer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")
FAMILIES = ("qwen3_moe", "deepseek_v3", "minimax_m3_vl", "gpt_oss", "openai_privacy_filter")


@pytest.mark.parametrize("family", FAMILIES)
def test_attached_models_agree_with_eager(family: str) -> None:
    model = tiny_model(family).to(CUDA)
    ids_BN = token_ids(model).to(CUDA)
    with torch.no_grad():
        want = output(select(model, "eager"), ids_BN)
        layers = moesaic.attach(model).layers
        got = output(model, ids_BN)
    assert [layer.router for layer in layers] == ["fused"] * len(layers)
    blocks = "fused" if family in ("qwen3_moe", "deepseek_v3") else "it"
    assert all(layer.block.startswith(blocks) for layer in layers)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-3)


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen2_moe"])
def test_a_shared_expert_beside_the_others_changes_no_bit(family: str) -> None:
    model = tiny_model(family).to(CUDA, torch.bfloat16).eval().requires_grad_(False)
    moesaic.attach(model)
    block = next(module for module in model.modules() if BLOCK in vars(module))
    for tokens in (1, 7, 600):
        hidden = torch.randn(1, tokens, model.config.hidden_size).to(CUDA, torch.bfloat16)
        want = block(hidden)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            block(hidden)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = [block(hidden) for _ in range(3)]
        for _ in range(5):
            hidden.mul_(1.0)
            graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(found, want) for found in got)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_a_decode_step_is_one_graph_and_gives_the_same_tokens(family: str) -> None:
    model = tiny_model(family).to(CUDA)
    ids = token_ids(model, 1, 9)[0].tolist()
    moesaic.attach(model)
    tokens = {}
    for captured in (False, True):
        with moesaic.profile(model) as profiler, torch.no_grad():
            decoder = Decoder(model, CUDA, 64, profiler.step, static=True)
            decoder.prefill(ids)
            if captured:
                decoder.capture(CudaCapturer(CUDA), profiler.counters)
                # The forward of gpt_oss waits for the device in transformers 5.17.
                waits = decoder.graph.startswith("none: waits for the device")
                assert waits if family == "gpt_oss" else decoder.graph == "captured"
            tokens[captured] = [decoder.step() for _ in range(16)]
            torch.cuda.synchronize()
            profiler.poll()
            rows = [int(total[1].sum()) for total in profiler.totals]
        assert rows == [(len(ids) + 16) * 2] * len(rows)
    assert tokens[True] == tokens[False]
