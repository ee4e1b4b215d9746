"""Fine-tuning checks of a family: LoRA through PEFT, and FSDP2 on two gloo ranks.

LoRA goes on linear layers of the token mixer and on the experts' own parameters; the model with
moesaic must give the logits and the gradients of the eager one. FSDP2 is compared with one process.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from hf_checks import close, output, select, token_ids
from hf_families import decoder_layers, tiny_model
from hf_fsdp import launch
from torch import Tensor, nn

from moesaic.integrations.attach import experts_modules

TARGETS = ("attention", "experts")


def lora_options(model: nn.Module, target: str) -> dict[str, Any]:
    """What PEFT is to adapt: two kinds of linear layers beside the blocks, or every expert."""
    experts = [name for name, _ in experts_modules(model)]
    if target == "experts":
        module = model.get_submodule(experts[0])
        names = [n for n in ("gate_up_proj", "up_proj", "down_proj") if hasattr(module, n)]
        return {"target_modules": [], "target_parameters": [f"experts.{n}" for n in names]}
    layers = decoder_layers(model)
    blocks = [model.get_submodule(name.rpartition(".")[0]) for name in experts]
    # In some families the experts hang on the decoder layer itself, beside its attention.
    blocks = [block for block in blocks if all(block is not layer for layer in layers)]
    inside = {id(module) for block in blocks for module in block.modules()}
    found: dict[str, None] = {}
    for name, module in layers.named_modules():
        if type(module) is nn.Linear and id(module) not in inside:
            found[name.rpartition(".")[2]] = None
    return {"target_modules": list(found)[:2]}


def adapted(family: str, target: str) -> Any:
    """A tiny model with LoRA adapters whose effect is not zero."""
    from peft import LoraConfig, get_peft_model

    model = tiny_model(family)
    model = get_peft_model(model, LoraConfig(r=4, **lora_options(model, target)))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at the start, which would hide a missing adapter
                parameter.normal_(std=0.1, generator=generator)
    return model


def _outcome(family: str, target: str, name: str) -> tuple[Tensor, dict[str, Tensor]]:
    model = adapted(family, target)
    select(model.get_base_model(), name)
    out = output(model, token_ids(model.get_base_model()))
    generator = torch.Generator().manual_seed(2)
    (out * torch.randn(out.shape, generator=generator)).sum().backward()
    return out.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def lora_on(family: str, target: str) -> float:
    """The largest difference of logits with moesaic from those of eager, gradients compared too."""
    plain = output(select(tiny_model(family), "eager"), token_ids(tiny_model(family)))
    theirs, wanted = _outcome(family, target, "eager")
    ours, found = _outcome(family, target, "moesaic")
    assert not torch.allclose(theirs, plain, atol=1e-3), "the adapters changed nothing"
    assert found.keys() == wanted.keys() and len(found) >= 4, "other parameters have gradients"
    for name, grad in wanted.items():
        if grad is None or not grad.any():
            assert found[name] is None or not found[name].any(), f"{name} has gradients"
        else:
            close(found[name], grad, f"gradients of {name}", 3e-4)
    return close(ours, theirs, "logits with LoRA")


def lora(family: str) -> str:
    """LoRA on attention and on experts, or what PEFT says where it cannot adapt eager either."""
    words = []
    for target in TARGETS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                _outcome(family, target, "eager")
            except Exception as error:
                words.append(f"{target}: not by PEFT ({type(error).__name__})")
                continue
            words.append(f"{target} {lora_on(family, target):.0e}")
    return ", ".join(words)


def fsdp2(families: list[str], timeout_s: float = 240.0) -> dict[str, str]:
    """Three steps sharded over two gloo ranks against one process: words for each family.

    A family that cannot be sharded with grouped_mm either says so.
    """
    alone, sharded = launch(1, families, timeout_s), launch(2, families, timeout_s)
    words = {}
    for family in families:
        one, two = alone[family], sharded[family]
        if isinstance(one, str) or isinstance(two, str):
            problem = next(x for x in (one, two) if isinstance(x, str))
            both = problem.startswith("grouped_mm cannot either")
            words[family] = problem if both else f"FAILED {problem}"[:160]
            continue
        worst = max(abs(a - b) / abs(a) for a, b in zip(one, two, strict=True))
        moved = abs(one[0] - one[-1]) > 1e-3
        right = worst <= 1e-5 and moved
        words[family] = "same losses" if right else f"FAILED losses {one} {two}"[:160]
    return words
