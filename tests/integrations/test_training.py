"""Training through transformers' companions: FSDP2, PEFT, Trainer and accelerate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_checks import close, output, select, token_ids
from hf_families import tiny_model
from hf_fsdp import launch

import moesaic

LAYOUTS = ("qwen3_moe", "minimax_m3_vl", "gpt_oss", "openai_privacy_filter", "nemotron_h")


def same_losses(chosen: list[str]) -> None:
    alone, sharded = launch(1, chosen), launch(2, chosen)
    for family in chosen:
        assert sharded[family] == pytest.approx(alone[family], rel=1e-5), family
        assert abs(alone[family][0] - alone[family][-1]) > 1e-3, f"{family} did not train"


def test_fsdp2_on_two_gloo_ranks_trains_to_the_same_losses() -> None:
    same_losses(list(LAYOUTS))


TARGETS = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "experts": {
        "target_modules": [],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    },
}


def adapted(family: str, target: str) -> Any:
    from peft import LoraConfig, get_peft_model

    options = dict(TARGETS[target])
    if family == "nemotron_h" and target == "experts":
        options["target_parameters"] = ["experts.up_proj", "experts.down_proj"]
    model = get_peft_model(tiny_model(family), LoraConfig(r=4, **options))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at the start, which would hide a missing adapter
                parameter.normal_(std=0.1, generator=generator)
    return model


@pytest.mark.filterwarnings("ignore::UserWarning:peft.*", "ignore::RuntimeWarning:peft.*")
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", LAYOUTS)
def test_lora_gives_the_logits_and_gradients_of_eager(family: str, target: str) -> None:
    outcomes, plain = {}, output(select(tiny_model(family), "eager"), token_ids(tiny_model(family)))
    for name in ("eager", "moesaic"):
        model = adapted(family, target)
        select(model.get_base_model(), name)
        out = output(model, token_ids(model.get_base_model()))
        out.square().mean().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        outcomes[name] = out, grads
    (theirs, wanted), (ours, found) = outcomes["eager"], outcomes["moesaic"]
    close(ours, theirs, "logits with LoRA")
    assert not torch.allclose(theirs, plain, atol=1e-3), "the adapters changed nothing"
    assert found.keys() == wanted.keys() and len(found) >= 4
    for name, grad in wanted.items():
        close(found[name], grad, f"gradients of {name}", 1e-4)


def trained(tmp_path: Path, name: str) -> list[float]:
    from transformers import Trainer, TrainingArguments

    model = tiny_model("qwen3_moe").train()
    if name == "attached":
        moesaic.attach(model, fuse_routers="always")
    else:
        select(model, name)
    rows = [{"input_ids": ids, "labels": ids} for ids in token_ids(model, 4, 12)] * 6
    arguments = TrainingArguments(
        output_dir=str(tmp_path / name), max_steps=6, per_device_train_batch_size=4,
        learning_rate=5e-3, logging_steps=1, report_to=[], save_strategy="no", seed=7,
        use_cpu=True, disable_tqdm=True, max_grad_norm=1.0,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_trainer_reaches_the_same_losses(tmp_path: Path) -> None:
    theirs = trained(tmp_path, "eager")
    assert len(theirs) == 6 and theirs[-1] < theirs[0]
    for name in ("moesaic", "attached"):
        assert trained(tmp_path, name) == pytest.approx(theirs, abs=2e-4)


def accelerated(name: str) -> list[float]:
    from accelerate import Accelerator

    model = select(tiny_model("mixtral"), name).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    for step in range(6):
        ids_BN = token_ids(accelerator.unwrap_model(model), 4, 12, seed=step)
        with accelerator.accumulate(model):
            loss = model(input_ids=ids_BN, labels=ids_BN).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_accelerate_reaches_the_same_losses() -> None:
    theirs = accelerated("eager")
    assert accelerated("moesaic") == pytest.approx(theirs, abs=2e-4)
