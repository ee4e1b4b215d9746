"""What a transformers model must still do with moesaic selected, as functions of a tiny model.

Each check takes a family (see `hf_families`), raises AssertionError where moesaic differs from the
eager path by more than rounding, and returns a few words for the table.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
from hf_families import tiny_model
from torch import Tensor, nn

import moesaic
import moesaic.integrations.transformers

TOLERANCE = 2e-5


def select(model: nn.Module, name: str) -> nn.Module:
    """The model with an experts implementation selected."""
    model.set_experts_implementation(name)  # type: ignore[operator]
    return model


def token_ids(model: nn.Module, batch: int = 2, length: int = 9, seed: int = 1) -> Tensor:
    """Random tokens above the special ones."""
    generator = torch.Generator().manual_seed(seed)
    size: int = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    return torch.randint(3, size, (batch, length), generator=generator)


def output(model: nn.Module, ids_BN: Tensor, **kwargs: Any) -> Tensor:
    """Logits, or the last hidden states of a model without a head."""
    out = model(input_ids=ids_BN, use_cache=False, **kwargs)
    found: Tensor = out.logits if hasattr(out, "logits") else out.last_hidden_state
    return found


def close(ours: Tensor, theirs: Tensor, what: str, tolerance: float = TOLERANCE) -> float:
    """The largest difference relative to the largest value.

    Raises:
        AssertionError: it is over the tolerance, or nothing was computed.
    """
    ours, theirs = ours.detach(), theirs.detach()
    scale = float(theirs.abs().max())
    worst = float((ours - theirs).abs().max()) / scale if scale else float("inf")
    assert worst <= tolerance, f"{what} differ by {worst:.1e} of the largest"
    return worst


def logits(family: str) -> str:
    """Logits of moesaic and of the eager path, also with every router fused; detach restores."""
    model = tiny_model(family)
    ids_BN = token_ids(model)
    with torch.no_grad():
        want = output(select(model, "eager"), ids_BN)
        worst = close(output(select(model, "moesaic"), ids_BN), want, "logits")
        select(model, "eager")
        attachment = moesaic.attach(model, fuse_routers="always")
        close(output(model, ids_BN), want, "logits with fused routers")
        moesaic.detach(model)
        assert torch.equal(output(model, ids_BN), want), "detach did not restore the model"
    fused = sum(layer.router == "fused" for layer in attachment.layers)
    return f"{worst:.0e}, {fused} of {len(attachment.layers)} routers fused"


def _gradients(model: nn.Module, ids_BN: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    out = output(model, ids_BN)
    generator = torch.Generator().manual_seed(2)
    (out * torch.randn(out.shape, generator=generator)).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys() and theirs, "other parameters have gradients"
    worst = [close(ours[n], g, f"gradients of {n}", 3e-4) for n, g in theirs.items() if g.any()]
    assert all(not ours[n].any() for n, g in theirs.items() if not g.any())
    return max(worst)


def gradients(family: str) -> str:
    """Gradients of every parameter, routers included, and the same with fused routers."""
    model = tiny_model(family)
    ids_BN = token_ids(model)
    theirs = _gradients(select(model, "eager"), ids_BN)
    worst = _same_gradients(_gradients(select(model, "moesaic"), ids_BN), theirs)
    moesaic.attach(model, fuse_routers="always")
    _same_gradients(_gradients(model, ids_BN), theirs)
    return f"{worst:.0e}"


# Families whose models say nothing about a next token.
NO_NEXT_TOKEN = {
    "diffusion_gemma": "it denoises, no next token",
    "openai_privacy_filter": "it labels tokens, no next one",
}


def _greedy(model: nn.Module, ids_BN: Tensor, steps: int) -> Tensor:
    """Greedy generation of a model without a head, whose embeddings serve as one."""
    head_VH: Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
    for _ in range(steps):
        last_BH = output(model, ids_BN)[:, -1]
        ids_BN = torch.cat((ids_BN, (last_BH @ head_VH.T).argmax(-1, keepdim=True)), 1)
    return ids_BN


@torch.no_grad()
def generation(family: str) -> str:
    """The same tokens by greedy generation in fp32."""
    if family in NO_NEXT_TOKEN:
        return NO_NEXT_TOKEN[family]
    model, steps = tiny_model(family), 8
    ids_BN = token_ids(model)
    found = []
    for name in ("eager", "moesaic"):
        select(model, name)
        if hasattr(model, "generate"):
            found.append(
                model.generate(  # type: ignore[operator]
                    ids_BN, max_new_tokens=steps, do_sample=False,
                    attention_mask=torch.ones_like(ids_BN),
                )
            )  # fmt: skip
        else:
            found.append(_greedy(model, ids_BN, steps))
    assert torch.equal(*found), "other tokens"
    words = f"{found[0].shape[1] - ids_BN.shape[1]} tokens"
    return words if hasattr(model, "generate") else f"{words}, embeddings as head"


def bf16_agreement(family: str, seeds: int = 4) -> tuple[Tensor, Tensor]:
    """Whether the likeliest token in bf16 is that of the fp32 model, by sequence and position:
    moesaic's, then grouped_mm's."""
    agree: dict[str, list[Tensor]] = {"moesaic": [], "grouped_mm": []}
    for seed in range(seeds):
        model = tiny_model(family, seed)
        ids_BN = token_ids(model, 8, 48, seed)
        with torch.no_grad():
            want = output(select(model, "eager"), ids_BN).argmax(-1)
            low = copy.deepcopy(model).bfloat16()
            for name, found in agree.items():
                found.append(output(select(low, name), ids_BN).argmax(-1).eq(want))
    return torch.cat(agree["moesaic"]), torch.cat(agree["grouped_mm"])


def not_worse(ours_SN: Tensor, theirs_SN: Tensor) -> bool:
    """Whether ours wins as many sequences as theirs, but for chance.

    Two ways of rounding disagree at random on near ties, and everything after one in its sequence
    with them. Of the sequences in which they have not equally many right positions, the share that
    theirs wins must lie within 3.3 standard deviations of a half: 0.05 % on one side, so that a
    table of 54 families has a false alarm in one of forty.
    """
    margin_S = ours_SN.sum(1) - theirs_SN.sum(1)
    won, lost = int((margin_S > 0).sum()), int((margin_S < 0).sum())
    return bool(lost - won <= 3.3 * (won + lost) ** 0.5)


def bf16(family: str) -> str:
    """Top-1 agreement with fp32 in bf16, not under that of grouped_mm by more than chance."""
    ours, theirs = bf16_agreement(family)
    shares = f"{ours.float().mean():.4f} (grouped_mm {theirs.float().mean():.4f})"
    assert not_worse(ours, theirs), f"top-1 agreement {shares}"
    return shares


def save_and_load(family: str) -> str:
    """Saved while attached, loaded with the implementation selected: the same bits, no new keys."""
    model = tiny_model(family)
    ids_BN = token_ids(model)
    keys = list(model.state_dict())
    moesaic.attach(model)
    assert list(model.state_dict()) == keys, "attach changed the state_dict"
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        want = output(model, ids_BN)
        model.save_pretrained(folder)  # type: ignore[operator]
        again = type(model).from_pretrained(folder, experts_implementation="moesaic")  # type: ignore[attr-defined]
        assert torch.equal(output(again.eval(), ids_BN), want), "loaded model differs"
    return "same bits"


def or_neither(check: Callable[[str, str], str]) -> Callable[[str], str]:
    """A check of a family whose failure counts only where grouped_mm passes it."""

    def run(family: str) -> str:
        try:
            return check(family, "moesaic")
        except Exception:
            try:
                check(family, "grouped_mm")
            except Exception:
                return "grouped_mm cannot either"
            raise

    run.__doc__ = check.__doc__
    return run


@or_neither
def compiled(family: str, name: str) -> str:
    """`torch.compile(fullgraph=True)`, forward and backward."""
    model = select(tiny_model(family), name)
    ids_BN = token_ids(model)
    torch._dynamo.reset()
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch's own tracing of Function
        with torch.no_grad():
            worst = close(output(run, ids_BN), output(model, ids_BN), "compiled logits")
        ours = _gradients(run, ids_BN)
    theirs = {f"_orig_mod.{n}": g for n, g in _gradients(model, ids_BN).items()}
    _same_gradients(ours, theirs)
    return "same bits" if worst == 0 else f"{worst:.0e}"


class _Exported(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids_BN: Tensor) -> Tensor:
        """The model's output, as a tensor."""
        return output(self.model, ids_BN)


@or_neither
def exported(family: str, name: str) -> str:
    """`torch.export` with a dynamic length, run at another length."""
    model = _Exported(select(tiny_model(family), name))
    length = torch.export.Dim("length", min=4, max=64)
    example = token_ids(model.model, 2, 11)
    with torch.no_grad():
        program = torch.export.export(model, (example,), dynamic_shapes=({1: length},))
        other = token_ids(model.model, 2, 17)
        worst = close(program.module()(other), model(other), "exported logits")
    calls = any("moesaic.experts" in str(node.target) for node in program.graph.nodes)
    assert calls == (name == "moesaic"), "the exported graph calls another implementation"
    return "same bits" if worst == 0 else f"{worst:.0e}"


def checkpointed(family: str) -> str:
    """Gradient checkpointing: the same gradients."""
    model = select(tiny_model(family), "moesaic").train()
    if not getattr(model, "supports_gradient_checkpointing", False):
        return "not supported by the family"
    ids_BN = token_ids(model)
    theirs = _gradients(model, ids_BN)
    try:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    except ValueError as error:
        return f"not supported by the family: {str(error)[:60]}"
    return f"{_same_gradients(_gradients(model, ids_BN), theirs):.0e}"


CHECKS: dict[str, Callable[[str], str]] = {
    "logits": logits,
    "gradients": gradients,
    "greedy": generation,
    "bf16 top-1": bf16,
    "save/load": save_and_load,
    "compile": compiled,
    "export": exported,
    "checkpointing": checkpointed,
}
