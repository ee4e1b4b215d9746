"""`attach` and `detach`: what they set, refuse and put back."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from hf_checks import output, select, token_ids
from hf_families import families, tiny_model
from torch import nn

import moesaic
from moesaic.integrations import routers
from moesaic.integrations import transformers as adapter
from moesaic.integrations.attach import LayerState
from moesaic.integrations.layouts import UnsupportedExperts, is_experts
from moesaic.integrations.routers import recognise


def attributes(model: nn.Module) -> dict[str, dict[str, Any]]:
    return {
        name: {k: id(v) for k, v in vars(module).items() if k != "_parameters"}
        for name, module in model.named_modules()
    }


def experts_of(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if is_experts(module)]


def test_every_layer_has_its_index_and_detach_leaves_no_trace() -> None:
    model = tiny_model("qwen3_moe")
    select(model, "grouped_mm")
    before, keys = attributes(model), list(model.state_dict())
    attachment = moesaic.attach(model, fuse_routers="always")
    assert [(x.index, x.name, x.top_k) for x in attachment.layers] == [
        (i, f"model.layers.{i}.mlp.experts", 2) for i in range(2)
    ]
    assert all(x.spec is not None and x.spec.num_experts == 8 for x in attachment.layers)
    assert list(model.state_dict()) == keys and attributes(model) != before
    with pytest.raises(RuntimeError, match="attached already"):
        moesaic.attach(model)
    moesaic.detach(model)
    assert attributes(model) == before and model.config._experts_implementation == "grouped_mm"
    with pytest.raises(RuntimeError, match="not attached"):
        moesaic.detach(model)


def test_router_logits_and_hooks_see_what_they_saw_before() -> None:
    model = select(tiny_model("mixtral"), "eager")
    ids_BN, seen = token_ids(model), []
    routers = [m for n, m in model.named_modules() if n.endswith("mlp.gate")]
    for router in routers:
        router.register_forward_hook(lambda _, inputs, out: seen.append(out))
    want = model(ids_BN, output_router_logits=True, labels=ids_BN)
    moesaic.attach(model, fuse_routers="always")
    got = model(ids_BN, output_router_logits=True, labels=ids_BN)
    assert len(got.router_logits) == len(want.router_logits) == 2
    for ours, theirs in zip(got.router_logits, want.router_logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    torch.testing.assert_close(got.aux_loss, want.aux_loss)
    torch.testing.assert_close(got.loss, want.loss)
    for theirs, ours in zip(seen[:2], seen[2:], strict=True):
        assert [t.shape for t in theirs] == [t.shape for t in ours]
        assert theirs[2].tolist() == ours[2].tolist()


def test_observers_see_every_layer_and_the_profiler_counts_every_row() -> None:
    model = tiny_model("deepseek_v3")
    ids_BN, seen = token_ids(model), []
    attachment = moesaic.attach(model)

    def observe(state: LayerState, ids_TK: torch.Tensor) -> None:
        seen.append((state.index, tuple(ids_TK.shape)))

    for layer in attachment.layers:
        layer.observe = observe
    with moesaic.profile(model) as profiler, torch.no_grad():
        output(model, ids_BN)
        profiler.step()
        profile = profiler.poll()
        assert all(layer.profiler is profiler for layer in attachment.layers)
        assert copy.deepcopy(attachment.layers[0]).profiler is None
    assert all(layer.profiler is None for layer in attachment.layers)
    assert seen == [(layer.index, (ids_BN.numel(), 2)) for layer in attachment.layers]
    assert profile is not None
    assert [x.rows for x in profile.layers] == [2 * ids_BN.numel()] * len(seen)
    moesaic.detach(model)
    assert not any(hasattr(m, name) for m in experts_of(model) for name in ("counters", "spec"))


@pytest.mark.parametrize("fuse", ["always", "never"])
def test_a_layer_is_held_to_the_sms_that_a_scheduler_gave_it(fuse: Any) -> None:
    model = tiny_model("qwen3_moe").requires_grad_(False)
    ids_BN = token_ids(model)
    attachment = moesaic.attach(model, fuse_routers=fuse)
    want = output(model, ids_BN)
    attachment.layers[1].num_sms = 64
    with pytest.raises(RuntimeError, match="obeys no SM budget"):  # as on any CPU
        output(model, ids_BN)
    attachment.layers[1].num_sms = None
    assert torch.equal(output(model, ids_BN), want)


def test_an_unsupported_activation_names_family_attribute_and_remedy() -> None:
    model = tiny_model("mixtral")
    experts_of(model)[1].act_fn = nn.Tanh()
    with pytest.raises(
        UnsupportedExperts, match=r"mixtral \(MixtralExperts\): act_fn is Tanh.*fall"
    ):
        moesaic.attach(model)
    with pytest.raises(UnsupportedExperts, match="act_fn is Tanh"):
        output(select(model, "moesaic"), token_ids(model))
    with pytest.raises(ValueError, match="fallback must be one of"):
        moesaic.attach(model, fallback="fast")


@pytest.mark.parametrize("fallback", ["grouped_mm", "eager"])
def test_the_fallback_asked_for_runs_the_layers_that_moesaic_cannot(fallback: str) -> None:
    model = tiny_model("mixtral")
    experts_of(model)[1].act_fn = nn.Tanh()
    ids_BN = token_ids(model)
    with torch.no_grad():
        want = output(select(model, "eager"), ids_BN)
        attachment = moesaic.attach(model, fallback=fallback, fuse_routers="always")
        torch.testing.assert_close(output(model, ids_BN), want, rtol=0, atol=1e-5)
    assert [layer.fallback for layer in attachment.layers] == [None, fallback]
    assert attachment.layers[1].router.startswith("left to its layer's fallback")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda m: setattr(type(m), "_apply_gate", lambda self, x: x), "_apply_gate is the family"),
        (lambda m: m.to(torch.float64), "weights are torch.float64"),
        (lambda m: setattr(m, "down_proj", nn.Parameter(torch.zeros(8, 32, 20))), "multiples of 8"),
    ],
)
def test_every_refusal_is_clear(change: Any, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("olmoe")
    experts = experts_of(model)[0]
    monkeypatch.setattr(type(experts), "_apply_gate", type(experts)._apply_gate)
    change(experts)
    with pytest.raises(UnsupportedExperts, match=problem):
        moesaic.attach(model)
    assert not hasattr(model, "_moesaic_attachment")


def test_families_without_the_interface_are_told_so() -> None:
    from transformers import Llama4ForCausalLM, Llama4TextConfig, LlamaConfig, LlamaForCausalLM

    if "llama4" in families():
        pytest.skip("this transformers gives llama4 the interface")
    llama4 = Llama4ForCausalLM(
        Llama4TextConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
            head_dim=16, vocab_size=64, intermediate_size=32, intermediate_size_mlp=32,
            num_local_experts=2, pad_token_id=0,
        )
    )  # fmt: skip
    with pytest.raises(UnsupportedExperts, match="llama4 has experts of its own"):
        moesaic.attach(llama4)
    dense = LlamaForCausalLM(
        LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, vocab_size=64,
                    num_attention_heads=2)
    )  # fmt: skip
    with pytest.raises(UnsupportedExperts, match="is it a dense model"):
        moesaic.attach(dense)


def test_fp8_experts_are_refused_by_name() -> None:
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS

    refuse = ALL_FP8_EXPERTS_FUNCTIONS["moesaic"]
    with pytest.raises(UnsupportedExperts, match="FP8 blocks, for which moesaic has no kernels"):
        refuse(experts_of(tiny_model("qwen3_moe"))[0], None, None, None)


def test_a_version_outside_the_tested_range_warns_and_inside_does_not() -> None:
    with pytest.warns(UserWarning, match="is tested with transformers >= 5.17"):
        adapter.check_version("6.0.1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter.check_version("5.17.0")
        adapter.check_version("5.23.1")


def test_expert_parallel_sentinels_add_nothing() -> None:
    model = tiny_model("qwen3_moe")
    experts = experts_of(model)[0]
    hidden_TH = torch.randn(6, 32)
    ids_TK = torch.tensor([[0, 1], [3, 2], [1, 3], [2, 0], [0, 3], [1, 2]])
    weights_TK = torch.rand(6, 2)
    with torch.no_grad():
        whole = adapter.moesaic_experts(experts, hidden_TH, ids_TK, weights_TK)
        parts = []
        for low in (0, 4):
            local = tiny_model("qwen3_moe").model.layers[0].mlp.experts
            for name in ("gate_up_proj", "down_proj"):
                part = getattr(experts, name)[low : low + 4].clone()
                setattr(local, name, nn.Parameter(part))
            mine = (ids_TK >= low) & (ids_TK < low + 4)
            ids = torch.where(mine, ids_TK - low, 4)
            parts.append(adapter.moesaic_experts(local, hidden_TH, ids, weights_TK))
    torch.testing.assert_close(parts[0] + parts[1], whole)
    assert not parts[1].any()


def test_autocast_and_mixed_dtypes_follow_transformers() -> None:
    model = tiny_model("qwen3_moe")
    ids_BN = token_ids(model)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = output(select(model, "eager"), ids_BN)
        ours = output(select(model, "moesaic"), ids_BN)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=0.1, atol=0.1)
    experts = experts_of(model.bfloat16())[0]
    out = adapter.moesaic_experts(
        experts, torch.randn(3, 32), torch.tensor([[0], [1], [2]]), torch.ones(3, 1).half()
    )
    assert out.dtype == torch.float32


def test_a_router_of_another_rule_is_not_recognised() -> None:
    model = tiny_model("mixtral")
    router = model.model.layers[0].mlp.gate
    assert not isinstance(recognise(router), str)

    class Squared(type(router)):  # type: ignore[misc]
        def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
            logits, weights, ids = super().forward(hidden_states)
            return logits, weights**2, ids

    router.__class__ = Squared
    assert recognise(router) == "it follows no rule of RouterSpec"


def test_a_router_whose_bias_alone_is_trained_is_not_one_op(monkeypatch: Any) -> None:
    model = tiny_model("gpt_oss").bfloat16().requires_grad_(False)
    moesaic.attach(model, fuse_routers="always")
    calls: list[int] = []
    real = routers.route_hidden_op
    monkeypatch.setattr(routers, "route_hidden_op", lambda *a: (calls.append(1), real(*a))[1])
    router = next(m for m in model.modules() if routers.PLAN in vars(m))
    hidden_TH = torch.randn(5, router.weight.shape[1]).bfloat16()
    router(hidden_TH)
    assert calls == [1]
    router.bias.requires_grad_(True)
    grads = []
    for forward in (router, lambda x: type(router).forward(router, x)):
        router.bias.grad = None
        forward(hidden_TH)[1].float().square().sum().backward()
        grads.append(router.bias.grad)
    assert calls == [1] and torch.allclose(grads[0], grads[1], rtol=0.02, atol=1e-3)
    assert grads[0].abs().sum() > 0


def test_detach_refuses_when_a_router_was_wrapped_since() -> None:
    model = tiny_model("mixtral")
    moesaic.attach(model, fuse_routers="always")
    router = model.model.layers[0].mlp.gate
    inner = router.forward
    router.forward = lambda hidden_states: inner(hidden_states)
    with pytest.raises(RuntimeError, match="was replaced after"):
        moesaic.detach(model)
    router.forward = inner
    moesaic.detach(model)


def test_attached_models_can_be_copied_and_pickled() -> None:
    model = tiny_model("mixtral")
    ids_BN = token_ids(model)
    moesaic.attach(model, fuse_routers="always")
    with torch.no_grad():
        want = output(model, ids_BN)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        for again in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
            torch.testing.assert_close(output(again, ids_BN), want, rtol=0, atol=1e-6)
            again.model.layers[0].mlp.gate.weight.zero_()
            moesaic.detach(again)
        assert torch.equal(output(model, ids_BN), want)
