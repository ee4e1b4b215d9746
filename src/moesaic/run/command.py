"""`moesaic run`: plan, run chunk by chunk, account, report.

Tables go to standard output, which ends with one line of JSON; progress goes to standard error.
Exit codes: 0 done, 1 moesaic and the baseline do not agree, 130 interrupted (with a report of what
was done). What the user can mend is raised as ValueError or OSError of one line.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from .. import __version__
from ..dispatch import choose_impl
from ..functional import moe
from ..models import ByteMoELM, heldout_path, load_model, model_path
from ..models.byte_lm import ExpertsFn
from ..trace import TraceInfo, TraceWriter
from .account import Account, finite
from .execute import candidates, run_chunk, windows_of
from .facts import ChunkFacts, PassFacts
from .interrupt import Interrupt
from .plan import Chunk, Plan, plan_text
from .ranks import on_ranks, world_size
from .report import ReportDirectory, html, writing
from .show import print_tables
from .text import TextInfo, TextReader, inspect_text

# dtype: the largest relative difference of the two bits per byte that counts as the same answer.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 5e-3}
MOST_TOKENS = {"cpu": 4096, "cuda": 16384}


@dataclass(frozen=True)
class Job:
    """Everything a run needs, checked."""

    model: ByteMoELM
    model_name: str
    text: TextInfo
    text_name: str
    plan: Plan
    device: torch.device
    dtype: str
    started: datetime


def choose_device(name: str) -> torch.device:
    """The device called `name`; "auto" is CUDA where there is a GPU.

    Raises:
        ValueError: there is no such device here.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device must be auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs a CUDA GPU, and PyTorch sees none; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def choose_model(model: str | os.PathLike[str] | None) -> Path:
    """The model file meant by the argument; None is the embedded model.

    Raises:
        ValueError: the argument is a directory.
    """
    if model is None:
        return model_path()
    path = Path(model)
    if path.is_dir():
        raise ValueError(
            f"{path}: is a directory; this job runs byte-level MoE models in one .safetensors file "
            "(examples/train_moe_lm.py writes them), run.pretrained those of transformers"
        )
    return path


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, platform.machine())} ({torch.get_num_threads()} threads)"


@contextmanager
def progress_bar(total: int, what: str) -> Iterator[Progress]:
    """A bar on standard error with one task of `total` bytes."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    with bar:
        bar.add_task(what, total=total, note="")
        yield bar


def prepare(
    model: str | os.PathLike[str] | None,
    text: str | os.PathLike[str] | None,
    limit: int | None,
    device: str,
    dtype: str,
) -> Job:
    """Check every argument and load what they name, cheapest first.

    Raises:
        ValueError, OSError: an argument is not what it should be.
        RuntimeError: moesaic cannot run on this device.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"--bytes must be at least 1, got {limit}")
    if dtype not in TOLERANCE:
        raise ValueError(f"--dtype must be one of {', '.join(TOLERANCE)}, got {dtype!r}")
    where, place = choose_device(device), choose_model(model)
    source = heldout_path() if text is None else Path(text)
    with progress_bar(0, "checking the text") as bar:
        if source.is_file():
            bar.update(bar.task_ids[0], total=min(source.stat().st_size, limit or sys.maxsize))
        info = inspect_text(source, limit=limit, advance=lambda n: bar.advance(bar.task_ids[0], n))
    loaded = load_model(place, dtype=getattr(torch, dtype), device=where)
    choose_impl("auto", where, getattr(torch, dtype), loaded.config.expert_spec())
    plan = plan_text(info.size, loaded.config.context, most_tokens=MOST_TOKENS[where.type])
    return Job(
        model=loaded,
        model_name="the embedded model" if model is None else place.name,
        text=info,
        text_name="held-out text" if text is None else source.name,
        plan=plan,
        device=where,
        dtype=dtype,
        started=datetime.now().astimezone(),
    )


def header(job: Job) -> dict[str, Any]:
    """What is known before the first chunk."""
    return {
        "started": job.started.isoformat(timespec="seconds"),
        "model": job.model_name,
        "config": asdict(job.model.config),
        "text": job.text_name,
        "text_sha256": job.text.sha256,
        "planned_bytes": job.text.size,
        "device": job.device.type,
        "device_name": device_name(job.device),
        "dtype": job.dtype,
        **({"ranks": world_size()} if world_size() > 1 else {}),
        "moesaic_version": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def chunk_line(facts: ChunkFacts) -> dict[str, Any]:
    """The JSON line of one chunk."""

    def one(done: PassFacts) -> dict[str, Any]:
        return {
            "seconds": done.seconds,
            "experts_seconds": done.experts_seconds,
            "bits_per_byte": finite(done.bits / facts.chunk.size),
            "rows": asdict(done.rows),
        }

    return {
        **asdict(facts.chunk),
        "first": facts.chunk.order[0],
        "moesaic": one(facts.moesaic),
        "baseline": one(facts.baseline),
        "max_logit_difference": finite(facts.max_difference),
        "max_logit_difference_same_experts": finite(facts.same_difference),
        "top_byte_differs": facts.flipped,
        "slots_routed_differently": facts.rerouted,
    }


class Scorer:
    """The loop: reads, runs, accounts, writes lines and trace, until the end or an interrupt."""

    def __init__(self, job: Job, report: ReportDirectory, experts: ExpertsFn) -> None:
        config = job.model.config
        self.job, self.report = job, report
        self.pair = candidates(job.model, experts)
        self.account = Account(
            config.num_layers, config.num_experts, tolerance=TOLERANCE[job.dtype]
        )

    def _chunk(
        self, chunk: Chunk, data: bytes, before: int | None
    ) -> tuple[ChunkFacts, tuple[torch.Tensor, ...]]:
        inputs_BN, targets_BN = windows_of(data, before, chunk)
        device = self.job.device
        return run_chunk(self.pair, chunk, inputs_BN.to(device), targets_BN.to(device))

    def run(self, trace: TraceWriter, bar: Progress, interrupt: Interrupt) -> None:
        """Score chunk after chunk; the first one runs once more before, as a warm-up."""
        before: int | None = None
        with TextReader(self.job.text) as text:
            for chunk in self.job.plan.chunks():
                data = text.read(chunk.size)
                if chunk.index == 0:
                    self._chunk(chunk, data, before)
                if interrupt.asked:
                    return
                facts, ids_LTK = self._chunk(chunk, data, before)
                before = data[-1]
                self.account.add(facts)
                self.report.line("chunk", chunk_line(facts))
                with writing(self.report.out):
                    self._trace(trace, facts, ids_LTK)
                speed = chunk.size / facts.moesaic.seconds
                bar.update(bar.task_ids[0], advance=chunk.size, note=f"{speed:,.0f} tokens/s")

    @staticmethod
    def _trace(trace: TraceWriter, facts: ChunkFacts, ids_LTK: tuple[torch.Tensor, ...]) -> None:
        for layer, counts_E in enumerate(facts.counts_LE):
            ids = ids_LTK[layer].flatten().tolist() if trace.with_ids else None
            trace.add(facts.chunk.index, layer, counts_E, ids)


def write_report(report: ReportDirectory, document: dict[str, Any], account: Account) -> None:
    """The pictures, the page and the last lines."""
    from .picture import heatmap_png, series_png

    offsets, total = [], 0
    for size in account.sizes:
        offsets.append(total)
        total += size
    both = (account.moesaic, account.baseline)
    speeds = [[n / s for n, s in zip(account.sizes, c.forward, strict=True)] for c in both]
    bits = [[b / n for n, b in zip(account.sizes, c.bits, strict=True)] for c in both]
    heatmap = heatmap_png(document["layers"])
    series = series_png(offsets, (speeds[0], speeds[1]), (bits[0], bits[1]))
    report.file("heatmap.png", heatmap)
    report.file("report.html", html(document, heatmap, series).encode())
    for layer, counts_E in zip(document["layers"], account.counts_LE, strict=True):
        report.line("layer", {**layer, "counts_E": counts_E})
    report.line("summary", document)


def score(
    job: Job, report: ReportDirectory, experts: ExpertsFn, trace_ids: bool, interrupt: Interrupt
) -> dict[str, Any]:
    """Run the job and write every file of its report; the run's document.

    Raises:
        KeyboardInterrupt: interrupted before the first chunk was done.
        OSError: a file cannot be written.
    """
    config = job.model.config
    about = header(job)
    report.line("run", about)
    info = TraceInfo(
        model=job.model_name,
        num_experts=config.num_experts,
        top_k=config.top_k,
        layers=config.num_layers,
        text_sha256=job.text.sha256,
    )
    scorer = Scorer(job, report, experts)
    with (
        report.trace(info, with_ids=trace_ids) as trace,
        progress_bar(job.text.size, "scoring") as bar,
    ):
        scorer.run(trace, bar, interrupt)
    if not scorer.account.sizes:
        raise KeyboardInterrupt
    status = "complete" if scorer.account.size == job.text.size else "interrupted"
    document = {"status": status, **about, **scorer.account.document()}
    write_report(report, document, scorer.account)
    return document


def main(
    model: str | os.PathLike[str] | None = None,
    *,
    text: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] = "runs",
    limit: int | None = None,
    device: str = "auto",
    dtype: str = "float32",
    trace_ids: bool = False,
    experts: ExpertsFn = moe,
) -> int:
    """Run the main job, print its tables and its JSON line, and return the exit code.

    Under torchrun the experts are spread over its ranks, and rank 0 alone prints and reports.

    Args:
        model: a .safetensors file of a byte-level MoE model; None is the embedded one.
        text: any UTF-8 file; None is the held-out text of the package.
        out: the directory in which the run's directory appears.
        limit: score at most that many bytes.
        device: auto, cpu or cuda.
        dtype: float32, bfloat16 or float16, of weights and computing.
        trace_ids: record every token's expert ids in the trace, not only the counts.
        experts: moesaic's side of the comparison.

    Raises:
        ValueError, OSError: an argument or file is not as needed; one line with the remedy.
        RuntimeError: moesaic cannot run on this device.
        KeyboardInterrupt: interrupted before there was anything to report, or twice.
    """
    if world_size() > 1 and experts is moe:
        place = choose_device(device)
        return on_ranks(
            main, place, MOST_TOKENS[place.type], model=model, text=text, out=out, limit=limit,
            device=device, dtype=dtype, trace_ids=trace_ids,
        )  # fmt: skip
    job = prepare(model, text, limit, device, dtype)
    with Interrupt() as interrupt, ReportDirectory(out, job.started) as report:
        document = score(job, report, experts, trace_ids, interrupt)
        document["report"] = str(report.commit())
    console = Console()
    print_tables(document, console)
    console.print(f"report: {document['report']}/report.html", soft_wrap=True, highlight=False)
    layers = [{k: v for k, v in layer.items() if k != "load_E"} for layer in document["layers"]]
    print(json.dumps({**document, "layers": layers}, allow_nan=False, separators=(",", ":")))
    sys.stdout.flush()
    if not document["ok"]:
        return 1
    return 0 if document["status"] == "complete" else 130
