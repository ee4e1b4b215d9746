"""Train the embedded byte-level MoE language model, and put the result where the package reads it.

    python examples/train_moe_lm.py train --minutes 4 --out DIR    # a GPU, or a CPU with patience
    python examples/train_moe_lm.py install --from DIR             # assets/, docs/model.md, curve

`train` reads the sources of the running interpreter's standard library (and of every --text-root),
leaves out what `heldout.json` lists and whatever resembles it, trains for the given time, keeps the
weights that were best on validation files, and writes four files: the model (safetensors, bf16),
`training.jsonl`, `curve.png` and `summary.json`. Bits per byte on the held-out text are computed
from the exported file through moesaic's reference experts, and n-gram baselines from the same
training bytes.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from moe_lm.corpus import Corpus, load_corpus, stdlib_root
from moe_lm.grouped import BalancedRouter, grouped_experts
from moe_lm.ngram import baselines
from moe_lm.report import draw_curve, install
from torch import Tensor
from torch.nn import functional as F

import moesaic
from moesaic.cost import balancedness
from moesaic.models import (
    ByteLMConfig,
    ByteMoELM,
    byte_windows,
    heldout_path,
    load_model,
    model_path,
    save_model,
)
from moesaic.reference import moe_reference

MODEL, LOG, CURVE, SUMMARY = model_path().name, "training.jsonl", "curve.png", "summary.json"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train; `minutes` is the time of the loop alone."""

    minutes: float = 4.0
    max_steps: int = 1_000_000
    window: int = 1024
    batch: int = 64
    lr: float = 3e-3
    weight_decay: float = 0.1
    warmup: float = 0.02
    balance: float = 0.01
    seed: int = 20
    logs: int = 200
    validations: int = 12
    validation_bytes: int = 300_000


class Log:
    """JSON lines, each flushed as it is written, and echoed short on stderr."""

    def __init__(self, path: Path) -> None:
        self.file, self.start = path.open("w", encoding="utf-8"), time.perf_counter()

    def write(self, kind: str, **values: Any) -> None:
        """One line."""
        line = {"kind": kind, "seconds": round(time.perf_counter() - self.start, 2), **values}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        print(json.dumps(line)[:240], file=sys.stderr)


def rate(progress: float, recipe: Recipe) -> float:
    """The learning rate: linear warm-up, then a cosine to 2 % of the peak."""
    if progress < recipe.warmup:
        return recipe.lr * (progress + 1e-3) / recipe.warmup
    turn = math.pi * (progress - recipe.warmup) / (1 - recipe.warmup)
    return recipe.lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(min(turn, math.pi))))


def batches(data: Tensor, recipe: Recipe, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs and targets (B, N) from random places of `data` (uint8, on its device)."""
    starts_B1 = torch.randint(
        len(data) - recipe.window, (recipe.batch, 1), generator=generator, device=data.device
    )
    rows = data[starts_B1 + torch.arange(recipe.window + 1, device=data.device)].long()
    return rows[:, :-1], rows[:, 1:]


@torch.inference_mode()
def bits_per_byte(model: ByteMoELM, text: bytes, *, batch: int = 16, bf16: bool = False) -> float:
    """Mean bits per byte of `text` in windows of the model's context, each byte scored once."""
    device = model.head.weight.device
    pairs = byte_windows(text, model.config.context)
    full = [pair for pair in pairs if len(pair[0]) == model.config.context]
    groups = [full[i : i + batch] for i in range(0, len(full), batch)]
    groups += [[pair] for pair in pairs if len(pair[0]) < model.config.context]
    total = torch.zeros((), dtype=torch.float64, device=device)
    for group in groups:
        ids, targets = (torch.stack([p[i] for p in group]).to(device) for i in (0, 1))
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            logits = model(ids)
        total += F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")
    return float(total) / math.log(2) / len(text)


def optimizer(model: ByteMoELM, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; norms and the embedding do not decay."""
    named = list(model.named_parameters())
    still = [p for n, p in named if p.dim() == 1 or n == "embedding.weight"]
    decaying = [p for n, p in named if not (p.dim() == 1 or n == "embedding.weight")]
    groups = [
        {"params": decaying, "weight_decay": recipe.weight_decay},
        {"params": still, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95), fused=True)


class Trainer:
    """One training run: the loop, what it logs, and the best weights it saw."""

    def __init__(self, model: ByteMoELM, corpus: Corpus, recipe: Recipe, log: Log) -> None:
        self.model, self.corpus, self.recipe, self.log = model, corpus, recipe, log
        self.device = model.head.weight.device
        self.router = BalancedRouter()
        model.route_impl, model.experts_impl = self.router, grouped_experts
        self.sample = corpus.validation[: recipe.validation_bytes]
        self.optimizer = optimizer(model, recipe)
        self.best, self.best_state = math.inf, model.state_dict()

    def step(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """One update: the loss in nats (on the device) and the counts (L, E)."""
        gpu = self.device.type == "cuda"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=gpu):
            logits = self.model(ids)
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        balance, counts_LE = self.router.take()
        (loss + self.recipe.balance * balance).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach(), counts_LE

    def validate(self, step: int) -> None:
        """Bits per byte on the validation files; the best weights are kept."""
        gpu = self.device.type == "cuda"
        value = bits_per_byte(self.model, self.sample, bf16=gpu)
        self.router.take()
        self.log.write("validation", step=step, bpb=value)
        if value < self.best:
            self.best = value
            self.best_state = {n: t.detach().clone() for n, t in self.model.state_dict().items()}

    def run(self) -> int:
        """Train until the time or the steps are used up; returns the steps taken."""
        recipe = self.recipe
        data = torch.frombuffer(bytearray(self.corpus.train), dtype=torch.uint8).to(self.device)
        generator = torch.Generator(device=self.device).manual_seed(recipe.seed)
        start = logged = time.perf_counter()
        step, last_step, progress, next_log = 0, 0, 0.0, 0.0
        next_validation = 1 / recipe.validations
        while progress < 1.0:
            lr = rate(progress, recipe)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            loss, counts_LE = self.step(*batches(data, recipe, generator))
            step += 1
            if step % 8 == 0 or step <= 4 or step >= recipe.max_steps:
                if not math.isfinite(nats := float(loss)):
                    raise FloatingPointError(f"the loss is {nats} at step {step}; lower --lr")
                now = time.perf_counter()
                progress = max((now - start) / (60 * recipe.minutes), step / recipe.max_steps)
                if progress >= next_log:
                    self.write_step(step, nats, lr, (step - last_step) / (now - logged), counts_LE)
                    logged, last_step = now, step
                    next_log = progress + 1 / recipe.logs
                if progress >= min(next_validation, 1.0):
                    self.validate(step)
                    next_validation = progress + 1 / recipe.validations
        return step

    def write_step(
        self, step: int, nats: float, lr: float, steps_per_s: float, counts_LE: Tensor
    ) -> None:
        """One line of the log about the training step just done."""
        self.log.write(
            "step",
            step=step,
            loss=nats,
            bpb=nats / math.log(2),
            lr=lr,
            tokens_per_s=round(steps_per_s * self.recipe.batch * self.recipe.window),
            balancedness=[round(balancedness(row), 4) for row in counts_LE.tolist()],
        )


def versions(device: torch.device) -> dict[str, str]:
    """What ran."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "moesaic": moesaic.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": name,
    }


def expert_shares(model: ByteMoELM, text: bytes) -> list[list[float]]:
    """Share of the slots of each expert in each layer on the start of `text`."""
    counts = torch.zeros(model.config.num_layers, model.config.num_experts)

    def observe(layer: int, routing: moesaic.Routing) -> None:
        counts[layer] += routing.counts_E

    for ids, _ in byte_windows(text[:65_536], model.config.context):
        with torch.inference_mode():
            model(ids[None], observe=observe)
    return [[round(float(v), 5) for v in c / c.sum()] for c in counts]


def train(recipe: Recipe, config: ByteLMConfig, roots: list[Path], out: Path, device: str) -> None:
    """Train, export, evaluate what was exported, and write the four files into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    where, log = torch.device(device), Log(out / LOG)
    corpus = load_corpus(heldout_path().parent, roots)
    about = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(where),
        "corpus_sha256": corpus.sha256(),
        "text_roots": [root.name for root in roots],
        "train_bytes": len(corpus.train),
        "train_files": corpus.files,
        "validation_bytes": len(corpus.validation),
        "heldout_bytes": len(corpus.heldout),
        "excluded_files": list(corpus.excluded),
        "shared_windows": corpus.shared_windows,
        "config": asdict(config),
        "recipe": asdict(recipe),
    }
    log.write("start", **about)
    model = ByteMoELM(config).to(where)
    model.reset_parameters(recipe.seed)
    with ThreadPoolExecutor(max_workers=1) as pool:
        future = pool.submit(baselines, corpus.train, corpus.validation, corpus.heldout)
        trainer = Trainer(model, corpus, recipe, log)
        begin = time.perf_counter()
        steps = trainer.run()
        seconds = time.perf_counter() - begin
        ngrams = future.result()
    for row in ngrams:
        log.write("ngram", **row)
    model.load_state_dict(trainer.best_state)
    notes = {"trained_on": "Python standard library sources", "corpus_sha256": corpus.sha256()}
    save_model(model, out / MODEL, notes=notes)
    exported = load_model(out / MODEL, experts_impl=moe_reference)
    trigram = next(float(str(row["heldout_bpb"])) for row in ngrams if row["order"] == 3)
    bpb = bits_per_byte(exported, corpus.heldout)
    result = {
        "steps": steps,
        "train_seconds": round(seconds, 1),
        "tokens": steps * recipe.batch * recipe.window,
        "parameters": sum(p.numel() for p in model.parameters()),
        "file_bytes": (out / MODEL).stat().st_size,
        "validation_bpb": trainer.best,
        "heldout_bpb": bpb,
        "trigram_bpb": trigram,
        "ratio_to_trigram": bpb / trigram,
        "expert_shares": expert_shares(exported, corpus.heldout),
    }
    log.write("final", **result)
    (out / SUMMARY).write_text(json.dumps({**about, **result, "ngrams": ngrams}, indent=1) + "\n")
    draw_curve(out / LOG, out / CURVE)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    trainer = commands.add_parser("train", help="train and evaluate")
    trainer.add_argument("--minutes", type=float, default=Recipe.minutes)
    trainer.add_argument("--max-steps", type=int, default=Recipe.max_steps)
    trainer.add_argument("--batch", type=int, default=Recipe.batch, help="windows a step")
    trainer.add_argument("--window", type=int, default=Recipe.window, help="bytes a window")
    trainer.add_argument("--lr", type=float, default=Recipe.lr)
    trainer.add_argument("--seed", type=int, default=Recipe.seed)
    trainer.add_argument("--validation-bytes", type=int, default=Recipe.validation_bytes)
    trainer.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    trainer.add_argument("--out", type=Path, required=True)
    trainer.add_argument("--text-root", type=Path, action="append", default=[], metavar="DIR")
    trainer.add_argument("--only-text-root", type=Path, metavar="DIR", help="no standard library")
    trainer.add_argument("--tiny", action="store_true", help="a toy, to try the script")
    installer = commands.add_parser("install", help="put a training result into the repository")
    installer.add_argument("--from", type=Path, required=True, dest="source", metavar="DIR")
    args = parser.parse_args()
    if args.command == "install":
        install(args.source, Path(__file__).resolve().parent.parent, bits_per_byte)
        return
    recipe = replace(
        Recipe(),
        minutes=args.minutes,
        max_steps=args.max_steps,
        batch=args.batch,
        window=args.window,
        lr=args.lr,
        seed=args.seed,
        validation_bytes=args.validation_bytes,
    )
    roots = [args.only_text_root or stdlib_root(), *args.text_root]
    config = replace(ByteLMConfig(), hidden_size=16, num_layers=2) if args.tiny else ByteLMConfig()
    train(recipe, config, roots, args.out, args.device)


if __name__ == "__main__":
    main()
