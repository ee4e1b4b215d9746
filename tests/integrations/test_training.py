"""Training through transformers' companions: FSDP2, PEFT, Trainer and accelerate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hf_training
import pytest
import torch
from hf_checks import select, token_ids
from hf_families import families, tiny_model

import moesaic
from moesaic.integrations import transformers as adapter

LAYOUTS = ("qwen3_moe", "minimax_m3_vl", "gpt_oss", "openai_privacy_filter", "nemotron_h")
# The families whose tiny models the pinned version builds; a newer one may have more.
TABLE = Path(__file__).parents[2] / "benchmarks" / "transformers-families.json"
OTHERS = [f for f in json.loads(TABLE.read_text("utf-8")) if f in families() and f not in LAYOUTS]


def test_fsdp2_on_two_gloo_ranks_trains_to_the_same_losses() -> None:
    assert hf_training.fsdp2(list(LAYOUTS)) == dict.fromkeys(LAYOUTS, "same losses")


@pytest.mark.slow
def test_fsdp2_of_every_family() -> None:
    words = hf_training.fsdp2(OTHERS, 900.0)
    assert words.keys() == set(OTHERS)
    assert not {f: w for f, w in words.items() if w.startswith("FAILED")}


def test_other_losses_of_shards_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    losses: dict[int, Any] = {1: {"a": [3.0, 2.0], "b": "X"}, 2: {"a": [3.0, 2.1], "b": "X"}}
    monkeypatch.setattr(hf_training, "launch", lambda world, *_: losses[world])
    words = hf_training.fsdp2(["a", "b"])
    assert words == {"a": "FAILED losses [3.0, 2.0] [3.0, 2.1]", "b": "FAILED X"}


@pytest.mark.parametrize(
    "family", [*LAYOUTS, *(pytest.param(f, marks=pytest.mark.slow) for f in OTHERS)]
)
def test_lora_gives_the_logits_and_gradients_of_eager(family: str) -> None:
    words = hf_training.lora(family)
    assert words.startswith("attention ") and ", experts " in words, words


def test_a_wrong_adapter_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations.moe import ExpertsInterface

    def other(module: Any, hidden: torch.Tensor, *routing: Any) -> torch.Tensor:
        return adapter.moesaic_experts(module, 1.01 * hidden, *routing)

    monkeypatch.setitem(ExpertsInterface._global_mapping, "moesaic", other)
    with pytest.raises(AssertionError, match="differ by"):
        hf_training.lora("qwen3_moe")


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
