"""The training curve, and the installation of a training result: model, log, curve, model card."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import moesaic
from moesaic.models import ByteMoELM, heldout_path, load_model, model_path

GOAL = 0.85
BEGIN, END = "<!-- numbers: begin -->", "<!-- numbers: end -->"


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a training log."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def draw_curve(log: Path, out: Path) -> None:
    """Bits per byte over training (steps, validation, n-grams) and each layer's balancedness."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = read_log(log)
    steps = [line for line in lines if line["kind"] == "step"]
    checks = [line for line in lines if line["kind"] == "validation"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    left.plot([s["step"] for s in steps], [s["bpb"] for s in steps], lw=0.8, label="training batch")
    left.plot([c["step"] for c in checks], [c["bpb"] for c in checks], "o-", label="validation")
    for line in lines:
        if line["kind"] == "ngram" and line["order"] in (3, 5):
            style = "--" if line["order"] == 3 else ":"
            label = f"{line['order']}-gram, held-out: {line['heldout_bpb']:.2f}"
            left.axhline(line["heldout_bpb"], ls=style, color="gray", label=label)
        if line["kind"] == "final":
            label = f"model, held-out: {line['heldout_bpb']:.2f}"
            left.axhline(line["heldout_bpb"], color="black", lw=0.8, label=label)
    left.set(xlabel="step", ylabel="bits per byte", ylim=(1, 5), title="Learning")
    left.legend()
    for layer in range(len(steps[0]["balancedness"])):
        values = [s["balancedness"][layer] for s in steps]
        right.plot([s["step"] for s in steps], values, lw=0.8, label=f"layer {layer}")
    right.set(xlabel="step", ylabel="mean / max load", ylim=(0, 1), title="Balancedness")
    right.legend()
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


def numbers(summary: dict[str, Any], measured: dict[str, float]) -> str:
    """The tables of the model card, all from the training summary and the check at installation."""
    recipe, config = summary["recipe"], summary["config"]
    rows = [
        ("parameters", f"{summary['parameters']:,}"),
        ("file", f"{summary['file_bytes'] / 1e6:.2f} MB (bf16)"),
        (
            "layers × experts, top-k",
            f"{config['num_layers']} × {config['num_experts']}, top-{config['top_k']}",
        ),
        (
            "trained on",
            f"{summary['train_bytes'] / 1e6:.1f} MB, {summary['train_files']} files of "
            f"{' and '.join(summary['text_roots'])} (corpus {summary['corpus_sha256'][:12]})",
        ),
        (
            "steps × batch × window",
            f"{summary['steps']} × {recipe['batch']} × {recipe['window']} = "
            f"{summary['tokens'] / 1e6:.0f} M bytes in {summary['train_seconds']:.0f} s",
        ),
        (
            "device",
            f"{summary['versions']['device']}, torch {summary['versions']['torch']}, "
            f"Python {summary['versions']['python']}, {summary['date'][:10]}",
        ),
        ("validation bits per byte", f"{summary['validation_bpb']:.3f}"),
        (
            "**held-out bits per byte**",
            f"**{summary['heldout_bpb']:.3f}** ({summary['heldout_bytes']:,} bytes)",
        ),
        *((f"the same, recomputed here, impl={name}", f"{v:.3f}") for name, v in measured.items()),
        *(
            (
                f"{row['order']}-gram on held-out ({row['smoothing']}, {row['parameter']:g})",
                f"{row['heldout_bpb']:.3f}",
            )
            for row in summary["ngrams"]
        ),
        (
            "64-byte pieces of training files found in the held-out text",
            f"{summary['shared_windows']}",
        ),
        (f"ratio to the 3-gram (goal ≤ {GOAL})", f"{summary['ratio_to_trigram']:.3f}"),
    ]
    table = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    shares = [
        "",
        f"Share of the routed slots on held-out text (balanced: {1 / config['num_experts']:.4f}):",
        "",
        "| layer | least | most | mean / max |",
        "|---|---|---|---|",
    ]
    for layer, row in enumerate(summary["expert_shares"]):
        mean = sum(row) / len(row)
        shares.append(f"| {layer} | {min(row):.4f} | {max(row):.4f} | {mean / max(row):.2f} |")
    return "\n".join(table + shares)


def fill_card(card: Path, summary: dict[str, Any], measured: dict[str, float]) -> None:
    """Put the numbers between the two marks of the model card.

    Raises:
        ValueError: the marks are not there.
    """
    filled = f"{BEGIN}\n{numbers(summary, measured)}\n{END}"
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    page, count = pattern.subn(lambda _: filled, card.read_text(encoding="utf-8"))
    if count != 1:
        raise ValueError(f"{card}: needs the lines {BEGIN} and {END} once; restore the page")
    card.write_text(page, encoding="utf-8")


def install(source: Path, root: Path, bits_per_byte: Callable[[ByteMoELM, bytes], float]) -> None:
    """Copy a result into the repository after checking it, and fill the model card's numbers.

    Raises:
        ValueError: the model misses its goal, or gives other bits per byte than its summary says.
    """
    summary = json.loads((source / "summary.json").read_text(encoding="utf-8"))
    if summary["ratio_to_trigram"] > GOAL:
        raise ValueError(
            f"{source}: {summary['ratio_to_trigram']:.3f} of the 3-gram, the goal is {GOAL}; "
            "train longer"
        )
    text = heldout_path().read_bytes()
    measured: dict[str, float] = {}
    for impl in ("reference", "auto"):
        model = load_model(source / model_path().name, experts_impl=partial(moesaic.moe, impl=impl))
        measured[impl] = bits_per_byte(model, text)
        if abs(measured[impl] - summary["heldout_bpb"]) > 0.001:
            raise ValueError(
                f"{source}: held-out bits per byte are {measured[impl]:.4f} here with impl={impl}, "
                f"but {summary['heldout_bpb']:.4f} in summary.json; take both from one run"
            )
    shutil.copyfile(source / model_path().name, model_path())
    shutil.copyfile(source / "training.jsonl", root / "docs" / "model_training.jsonl")
    (root / "docs" / "assets").mkdir(exist_ok=True)
    draw_curve(source / "training.jsonl", root / "docs" / "assets" / "model_curve.png")
    fill_card(root / "docs" / "model.md", summary, measured)
    print(f"installed: {summary['heldout_bpb']:.3f} bits per byte on held-out text")
