"""On a GPU: tiny models attached with fused routers, and decoding by one CUDA graph a step."""

from __future__ import annotations

import pytest
import torch
from hf_checks import output, select, token_ids
from hf_families import tiny_model

import moesaic
from moesaic.bench.whole_models import random_model, typical_error
from moesaic.integrations.blocks import BLOCK
from moesaic.ops import router_product
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


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_a_compiled_block_gives_the_answers_of_its_parts(family: str) -> None:
    model = tiny_model(family).to(CUDA, torch.bfloat16).eval().requires_grad_(False)
    moesaic.attach(model)
    block = next(module for module in model.modules() if BLOCK in vars(module))
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, dynamic=False)
    for tokens in (1, 5, 600):
        hidden = torch.randn(1, tokens, model.config.hidden_size).to(CUDA, torch.bfloat16)
        want = type(block).forward(block, hidden)
        assert torch.equal(block(hidden), want)
        assert typical_error([compiled(hidden)], [want]) < 5e-3


@pytest.mark.parametrize("tokens", [1, 4, 600])
def test_a_budget_of_sms_changes_no_bit(tokens: int) -> None:
    sizes = {
        "vocab_size": 64, "hidden_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 128, "num_experts_per_tok": 2, "num_experts": 8, "moe_intermediate_size": 256,
    }  # fmt: skip
    model = random_model("Qwen3-30B-A3B", CUDA, 2, **sizes)
    layers = moesaic.attach(model).layers
    ids_BN = torch.arange(tokens, device=CUDA).view(1, tokens) % 64
    found = []
    for budget in (None, 24):
        for layer in layers:
            layer.num_sms = budget
        found.append(output(model, ids_BN))
    assert torch.equal(*found)


def test_fp32_logits_of_16_bit_states_are_those_of_fp32() -> None:
    gen = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 7168, generator=gen).to(CUDA, torch.bfloat16) for n in (70, 9))
    exact = hidden.double() @ weight.double().T
    errors = []
    for logits in (router_product(hidden, weight, None, True), hidden @ weight.T):
        errors.append(float((logits.double() - exact).abs().max() / exact.abs().max()))
    assert errors[0] < 2e-5 < 1e-3 < errors[1]


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


def _sharded_answers(device: torch.device) -> list[torch.Tensor]:
    """Logits of a model whole and sharded, in turn, at 1 to 64 tokens, with weights that move."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    sizes = {
        "vocab_size": 64, "hidden_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 128, "num_experts_per_tok": 2, "num_experts": 8, "moe_intermediate_size": 128,
    }  # fmt: skip
    whole, sharded = (random_model("Qwen3-30B-A3B", device, 2, **sizes) for _ in range(2))
    for model in (whole, sharded):
        moesaic.attach(model, fuse_routers="always")
    mesh = DeviceMesh(device.type, [0])
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    answers, junk = [], []
    with torch.no_grad():
        for number, tokens in enumerate((1, 1, 4, 1, 64, 4, 1, 64)):
            ids_BN = torch.arange(tokens, device=device).view(1, tokens)
            answers += [output(whole, ids_BN), output(sharded, ids_BN)]
            # What was freed is taken, so that the next unshard finds another place.
            junk.append(torch.full((1 << (18 + number % 4),), float("nan"), device=device))
            for model in (whole, sharded):
                for parameter in model.parameters():
                    parameter.mul_(0.9)
    return answers


def test_weights_may_move_between_the_calls_of_a_sharded_model() -> None:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    try:
        answers = _sharded_answers(CUDA)
    finally:
        torch.distributed.destroy_process_group()
    assert all(torch.equal(*pair) for pair in zip(answers[::2], answers[1::2], strict=True))
    assert not torch.equal(answers[0], answers[2])
