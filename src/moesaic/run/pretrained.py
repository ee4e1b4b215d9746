"""`moesaic run DIRECTORY`: a text through a transformers model, by moesaic and by its eager loop.

    T tokens · V vocabulary · E experts · K top-k · L layers

As in the main job both run on the same weights, chunk after chunk, taking turns to go first, and
the same account is kept and the same report written; what is scored are the tokens of the model's
own tokenizer. Rows are counted by running each executor, transformers' eager forward and moesaic's,
on the ids of every layer with witness weights in place of the module's own (see `witness`).
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from .. import __version__
from ..integrations.attach import experts_modules, selected
from ..integrations.transformers import NAME, fallback_function, moesaic_experts
from ..models import heldout_path
from ..models.pretrained import Pretrained, load_pretrained
from ..nn import parameter_names
from ..trace import TraceInfo, TraceWriter
from ..types import ExpertSpec
from .account import Account
from .command import (
    TOLERANCE,
    choose_device,
    chunk_line,
    device_name,
    progress_bar,
    write_report,
)
from .execute import LN2, Pass, Stopwatch, differences
from .facts import ChunkFacts, PassFacts, Rows
from .interrupt import Interrupt
from .plan import Chunk, Plan, plan_text
from .report import ReportDirectory, writing
from .show import print_tables
from .text import inspect_text
from .witness import unit_weights

Executor = Callable[..., Tensor]
MOST_LOGITS = {"cpu": 1 << 26, "cuda": 1 << 30}
MOST_TOKENS = {"cpu": 2048, "cuda": 8192}
BASELINE = "eager"


@dataclass(frozen=True)
class TokenJob:
    """Everything a run needs, checked."""

    loaded: Pretrained
    ids: list[int]
    text_name: str
    text_bytes: int
    text_sha256: str
    plan: Plan
    device: torch.device
    dtype: str
    started: datetime


def read_tokens(loaded: Pretrained, source: Path, limit: int | None) -> tuple[list[int], bytes]:
    """Token ids of a text's first `limit` bytes, and those bytes; a character is never cut.

    Raises:
        OSError, ValueError: see `text.inspect_text`; or it has no tokens.
    """
    info = inspect_text(source, limit=limit)
    with source.open("rb") as file:
        data = file.read(info.size)
    text = data.decode(errors="ignore")
    ids = loaded.encode(text)
    if not ids:
        raise ValueError(f"{source}: gives no tokens; give --text a longer file")
    return ids, text.encode()


def prepare(
    model: Path, text: str | os.PathLike[str] | None, limit: int | None, device: str, dtype: str
) -> TokenJob:
    """Check every argument and load what they name.

    Raises:
        ValueError, OSError, ImportError: an argument is not what it should be.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"--bytes must be at least 1, got {limit}")
    if dtype not in TOLERANCE:
        raise ValueError(f"--dtype must be one of {', '.join(TOLERANCE)}, got {dtype!r}")
    where = choose_device(device)
    source = heldout_path() if text is None else Path(text)
    inspect_text(source, limit=limit)
    loaded = load_pretrained(model, dtype=getattr(torch, dtype), device=where)
    ids, data = read_tokens(loaded, source, limit)
    most = min(MOST_TOKENS[where.type], max(64, MOST_LOGITS[where.type] // loaded.vocabulary))
    return TokenJob(
        loaded=loaded,
        ids=ids,
        text_name="held-out text" if text is None else source.name,
        text_bytes=len(data),
        text_sha256=hashlib.sha256(data).hexdigest(),
        plan=plan_text(len(ids), loaded.context, most_tokens=most),
        device=where,
        dtype=dtype,
        started=datetime.now().astimezone(),
    )


def forward(loaded: Pretrained, name: str, ids_BN: Tensor) -> Pass:
    """Run one chunk with an implementation; the clocks are those of the main job."""
    watch, chosen, hooks = Stopwatch(ids_BN.device), [], []

    def before(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        chosen.append(inputs[1])
        watch.mark()

    with selected(loaded.model, name), torch.no_grad():
        for _, module in experts_modules(loaded.model):
            hooks.append(module.register_forward_pre_hook(before))
            hooks.append(module.register_forward_hook(lambda *_: watch.mark()))
        try:
            _wait(ids_BN.device)
            start = time.perf_counter()
            logits_BNV = loaded.model(input_ids=ids_BN, use_cache=False).logits
            _wait(ids_BN.device)
            seconds = time.perf_counter() - start
        finally:
            for hook in hooks:
                hook.remove()
    return Pass(logits_BNV.flatten(0, 1), tuple(chosen), seconds, watch.seconds())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Witnesses:
    """For every layer a copy of its experts module with witness weights; made once per shape."""

    def __init__(self, loaded: Pretrained) -> None:
        modules = [module for _, module in experts_modules(loaded.model)]
        made: dict[ExpertSpec, dict[str, nn.Parameter]] = {}
        self.twins: list[tuple[nn.Module, ExpertSpec]] = []
        for module, state in zip(modules, loaded.layers, strict=True):
            spec = state.spec
            if spec is None or spec.num_experts > spec.hidden_size:
                raise ValueError(f"{state.name} has no witness: E must be at most H, got {spec}")
            if spec not in made:
                some = next(module.parameters())
                weights = unit_weights(spec, some.dtype, some.device).named()
                names = parameter_names(spec)
                made[spec] = {
                    names[k]: nn.Parameter(v, requires_grad=False) for k, v in weights.items()
                }
            twin = copy.copy(module)
            twin._parameters = dict(made[spec])
            self.twins.append((twin, spec))

    def rows(self, name: str, ids_LTK: tuple[Tensor, ...]) -> Rows:
        """What an implementation computes of the ids of every layer."""
        total = Rows()
        for (twin, spec), ids_TK in zip(self.twins, ids_LTK, strict=True):
            run: Executor = moesaic_experts if name == NAME else fallback_function(twin, name)
            dtype = next(twin.parameters()).dtype
            hidden_TH = torch.zeros(
                len(ids_TK), spec.hidden_size, dtype=dtype, device=ids_TK.device
            )
            hidden_TH[:, 0] = 1.0
            ones_TK = torch.ones(ids_TK.shape, dtype=dtype, device=ids_TK.device)
            with torch.no_grad():
                seen_TH = run(twin, hidden_TH, ids_TK.long(), ones_TK).double()
            expected_TH = torch.zeros_like(seen_TH)
            counts_TE = F.one_hot(ids_TK.long(), spec.num_experts).sum(1)
            expected_TH[:, : spec.num_experts] = counts_TE
            wrong = ~((seen_TH - expected_TH).abs() < 0.1)
            computed = int(seen_TH.nan_to_num(0.0).round().sum())
            total += Rows(ids_TK.numel(), computed, int(wrong.sum()))
        return total


class TokenScorer:
    """Chunk after chunk through both, accounted, until the end or an interrupt."""

    def __init__(self, job: TokenJob, report: ReportDirectory) -> None:
        self.job, self.report = job, report
        self.witnesses = Witnesses(job.loaded)
        self.account = Account(
            len(job.loaded.layers), job.loaded.num_experts, tolerance=TOLERANCE[job.dtype]
        )
        self.stream = torch.tensor([job.loaded.start, *job.ids])

    def _facts(self, name: str, done: Pass, targets_T: Tensor) -> PassFacts:
        nats_T = F.cross_entropy(done.logits_TV.float(), targets_T, reduction="none")
        bits = float(nats_T.double().sum()) / LN2
        rows = self.witnesses.rows(name, done.ids_LTK)
        return PassFacts(done.seconds, done.experts_seconds, bits, rows)

    def chunk(self, chunk: Chunk) -> tuple[ChunkFacts, tuple[Tensor, ...]]:
        """Both passes over one chunk, in its order."""
        piece = self.stream[chunk.start : chunk.start + chunk.size + 1].to(self.job.device)
        shape = (chunk.windows, chunk.width)
        inputs_BN, targets_T = piece[:-1].view(shape), piece[1:]
        implementations = {"moesaic": NAME, "baseline": BASELINE}
        passes = {
            side: forward(self.job.loaded, implementations[side], inputs_BN) for side in chunk.order
        }
        ours, theirs = passes["moesaic"], passes["baseline"]
        largest, same, rerouted = differences(ours, theirs, chunk)
        experts = self.job.loaded.num_experts
        facts = ChunkFacts(
            chunk=chunk,
            moesaic=self._facts(NAME, ours, targets_T),
            baseline=self._facts(BASELINE, theirs, targets_T),
            max_difference=largest,
            same_difference=same,
            flipped=int((ours.logits_TV.argmax(-1) != theirs.logits_TV.argmax(-1)).sum()),
            rerouted=rerouted,
            counts_LE=tuple(
                tuple(torch.bincount(ids.flatten().long(), minlength=experts).tolist())
                for ids in ours.ids_LTK
            ),
        )
        return facts, ours.ids_LTK

    def run(self, trace: TraceWriter, interrupt: Interrupt) -> None:
        """Score everything; the first chunk runs once more before, as a warm-up."""
        with progress_bar(len(self.job.ids), "scoring") as bar:
            for chunk in self.job.plan.chunks():
                if chunk.index == 0:
                    self.chunk(chunk)
                if interrupt.asked:
                    return
                facts, ids_LTK = self.chunk(chunk)
                self.account.add(facts)
                self.report.line("chunk", chunk_line(facts))
                with writing(self.report.out):
                    for layer, counts_E in enumerate(facts.counts_LE):
                        ids = ids_LTK[layer].flatten().tolist() if trace.with_ids else None
                        trace.add(chunk.index, layer, counts_E, ids)
                speed = chunk.size / facts.moesaic.seconds
                bar.update(bar.task_ids[0], advance=chunk.size, note=f"{speed:,.0f} tokens/s")


def document_of(job: TokenJob, account: Account) -> dict[str, Any]:
    """The account with tokens and bytes told apart."""
    scored = account.size
    complete = scored == len(job.ids)
    text_bytes = job.text_bytes if complete else len(job.loaded.decode(job.ids[:scored]).encode())
    document = account.document() | {"unit": "tokens", "text_bytes": text_bytes}
    for side in ("moesaic", "baseline"):
        per_token = document[side]["bits_per_byte"]
        document[side]["bits_per_token"] = per_token
        if per_token is not None:
            document[side]["bits_per_byte"] = per_token * scored / text_bytes
    return {"status": "complete" if complete else "interrupted"} | document


def header(job: TokenJob) -> dict[str, Any]:
    """What is known before the first chunk."""
    import transformers

    return {
        "started": job.started.isoformat(timespec="seconds"),
        "model": job.loaded.name,
        "config": {"model_type": job.loaded.model.config.model_type},
        "text": job.text_name,
        "text_sha256": job.text_sha256,
        "planned_bytes": len(job.ids),
        "device": job.device.type,
        "device_name": device_name(job.device),
        "dtype": job.dtype,
        "moesaic_version": __version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def main(
    model: Path,
    *,
    text: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] = "runs",
    limit: int | None = None,
    device: str = "auto",
    dtype: str = "float32",
    trace_ids: bool = False,
) -> int:
    """Score a text, print the tables and the JSON line, and return the exit code of the main job.

    Raises:
        ValueError, OSError, ImportError: an argument or file is not as needed.
        KeyboardInterrupt: interrupted before there was anything to report, or twice.
    """
    job = prepare(model, text, limit, device, dtype)
    with Interrupt() as interrupt, ReportDirectory(out, job.started) as report:
        about = header(job)
        report.line("run", about)
        scorer = TokenScorer(job, report)
        info = TraceInfo(
            model=job.loaded.name, num_experts=job.loaded.num_experts, top_k=job.loaded.top_k,
            layers=len(job.loaded.layers), text_sha256=job.text_sha256,
        )  # fmt: skip
        with report.trace(info, with_ids=trace_ids) as trace:
            scorer.run(trace, interrupt)
        if not scorer.account.sizes:
            raise KeyboardInterrupt
        document = {**about, **document_of(job, scorer.account)}
        write_report(report, document, scorer.account)
        document["report"] = str(report.commit())
    console = Console()
    print_tables(document, console)
    console.print(f"report: {document['report']}/report.html", soft_wrap=True, highlight=False)
    layers = [{k: v for k, v in layer.items() if k != "load_E"} for layer in document["layers"]]
    print(json.dumps({**document, "layers": layers}, allow_nan=False, separators=(",", ":")))
    if not document["ok"]:
        return 1
    return 0 if document["status"] == "complete" else 130
