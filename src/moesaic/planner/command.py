"""`moesaic plan`: predict deployments, recommend one or say "don't".

Tables go to stdout, progress to stderr; the last line of stdout is one compact JSON document.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..parallel.placement import Placement
from .cluster import Gpu, load_cluster
from .exchange import Ways, measured_ways
from .kernels import ROOFLINE, KernelTable, device_lines, fit_table, measured_layers, path_of
from .model import Model, load_model
from .offers import HEADS as OFFER_HEADS
from .offers import WITH_TRACE, cells, judged, offer_jobs, offers, shown_offers
from .predict import Prediction, first_token_s, predict
from .queueing import Queued, Service, simulate_queue
from .report import HEADS, Plan, engine_sources, facts, row, shown, write
from .sampling import Sampler
from .search import Question, explain, judge, search
from .shapes import EIGHT, FIELD, SHAPES, SPREAD
from .workload import load_workload

# The cards whose lines stand for those of the same generation.
SAME_KERNELS = {"h100": "h200", "h800": "h200"}
# Where the command looks for measured lines unless told; away from a checkout there are none.
RESULTS = Path("benchmarks/results")


def kernel_table(results: Path, device: str | None, model: Model, gpu: Gpu) -> KernelTable:
    """The table of the device's committed lines, else of its generation's, else the roofline.

    Of the lines those count that ran on the kernels which this model's experts run on.
    """
    path = path_of(model.experts)
    for name in (device, SAME_KERNELS.get(device or "")):
        layers = measured_layers(device_lines(results, name), SHAPES | SPREAD | EIGHT | FIELD)
        layers = [x for x in layers if x.path == path]
        if layers:
            return fit_table(layers, gpu, f"{len(layers)} measured layers of {name}")
    return replace(ROOFLINE, source=f"roofline (no measured lines of {device or 'this GPU'})")


def inside_table(results: Path, device: str | None) -> Ways:
    """This project's measured exchanges of the device; none where there are none yet."""
    return measured_ways(device_lines(results, device))


def progress_bar(total: list[Any]) -> Callable[[int, int], None]:
    """A rich progress bar on stderr; `total` keeps it to be stopped."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

    bar = Progress("strategies", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                   console=Console(stderr=True), transient=True)  # fmt: skip
    task = bar.add_task("strategies", total=None)
    bar.start()
    total.append(bar)

    def told(done: int, of: int) -> None:
        bar.update(task, completed=done, total=of)

    return told


def make_plan(
    question: Question, *, explained: bool, workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Plan:  # fmt: skip
    """Search, judge, and look closer at what is recommended."""
    if question.workload.served is not None:
        offer_jobs(question)  # refuses what is impossible before anything takes its time
    predictions = search(question, workers=workers, progress=progress)
    verdict = judge(predictions, question.workload, question.cluster.gpus)
    if explained:
        verdict = explain(question, predictions, verdict)
    ttft, queued = None, None
    best = verdict.best
    q = question
    if best is not None and best.phase == "decode":
        ttft = first_token_s(
            q.model, q.cluster, q.workload, best.strategy, table=q.table, inside=q.inside
        )
        if q.workload.arrival is not None:
            queued = serve(q, best, ttft)
    found = offers(q, workers=workers, progress=progress) if q.workload.served else []
    notes = []
    if found and q.workload.trace is not None:
        notes.append(f"serving engines take routing {WITH_TRACE}, not the trace")
    if best is not None and q.workload.ttft_ms and ttft and ttft * 1e3 > q.workload.ttft_ms:
        notes.append(
            f"the recommended strategy's first token takes {ttft * 1e3:.0f} ms, "
            f"over the limit of {q.workload.ttft_ms:g} ms"
        )
    return Plan(question=q, predictions=tuple(predictions), verdict=verdict, ttft_s=ttft,
                queued=queued, offers=tuple(found), notes=tuple(notes),
                served=judged(found, q.workload) if found else None)  # fmt: skip


def serve(question: Question, best: Prediction, ttft_s: float) -> Queued:
    """The workload's arrivals at the recommended deployment."""
    q, strategy = question, best.strategy
    assert q.workload.arrival is not None
    batches, steps = [], []
    for part in (8, 4, 2, 1):
        sequences = max(1, q.workload.sequences // part)
        some = replace(q.workload, sequences=sequences)
        one = predict(q.model, q.cluster, some, strategy, table=q.table, inside=q.inside)
        batches.append(one.sequences * strategy.homes)
        steps.append(one.step_s)
    service = Service(
        copies=best.copies, slots=max(1, int(batches[-1])), batches=tuple(batches),
        step_s=tuple(steps), prefill_s=ttft_s / strategy.homes, first_s=ttft_s,
        output=q.workload.output,
    )  # fmt: skip
    return simulate_queue(service, q.workload.arrival, seed=q.workload.seed)


def placement_of(question: Question, best: Prediction) -> Placement | None:
    """The placement of all MoE layers of the recommended strategy, as the runtime loads it."""
    if best.strategy.family == "tp-pp":
        return None
    q = question
    work = replace(q.workload, sequences=best.batch, batches=())
    sampler = Sampler(q.model, q.cluster, work, layers=q.model.moe_layers, deploy=True)
    homes = best.strategy.homes
    tokens = max(1, round(best.sequences if best.phase == "decode" else q.workload.prefill_tokens))
    counts = sampler.counts(homes, tokens)
    if counts.shape[0] != q.model.moe_layers:
        return None
    return sampler.placement(best.strategy, tokens)


def show(plan: Plan, explained: bool) -> None:
    """Print the table, the facts and the verdict."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    wide = console if console.is_terminal else Console(width=200)
    table = Table(box=None, header_style="bold")
    for number, head in enumerate(HEADS):
        table.add_column(head, justify="left" if number in (0, 12) else "right")
    for p in shown(plan.predictions, plan.verdict.best):
        table.add_row(*(Text(cell, "" if p.fits else "dim") for cell in row(p)))
    wide.print(table)
    for name, text in facts(plan):
        wide.print(Text(f"{name}: ", "bold") + Text(text))
    if plan.verdict.best is not None:
        wide.print(Text("memory: ", "bold") + Text(plan.verdict.best.memory.why()))
    wide.print(Text("verdict: ", "bold") + Text(plan.verdict.sentence))
    wide.print(Text(plan.verdict.one_per_gpu))
    if explained:
        if plan.verdict.binds is not None:
            wide.print(Text("what binds: ", "bold") + Text(plan.verdict.binds))
        for change in plan.verdict.changes:
            wide.print(Text(f"  {change}"))
    if plan.served is not None:
        engines = Table(box=None, header_style="bold")
        for head in OFFER_HEADS:
            engines.add_column(head, justify="left" if head in OFFER_HEADS[:2] else "right")
        for offer in shown_offers(plan.offers):
            engines.add_row(*(Text(cell, "" if offer.served else "dim") for cell in cells(offer)))
        wide.print(engines)
        wide.print(Text("experts' times: ", "bold") + Text("; ".join(engine_sources(plan))))
        wide.print(Text("engines: ", "bold") + Text(plan.served))


def main(
    *, model: Path, cluster: str, workload: Path | None, out: Path | None, explained: bool,
    results: Path, workers: int | None, layers: int,
) -> int:  # fmt: skip
    """Plan, show, write; 0 also when the advice is "don't"."""
    if results != RESULTS and not results.is_dir():
        raise ValueError(f"--results {results}: no such folder; without it {RESULTS}")
    what = load_model(model)
    where = load_cluster(cluster)
    load = load_workload(workload, num_experts=what.experts.num_experts, layers=what.moe_layers)
    question = Question(
        model=what, cluster=where, workload=load, sampled_layers=layers,
        table=kernel_table(results, where.device, what, where.gpu),
        inside=inside_table(results, where.device),
    )  # fmt: skip
    bars: list[Any] = []
    progress = progress_bar(bars) if sys.stderr.isatty() else None
    try:
        plan = make_plan(question, explained=explained, workers=workers, progress=progress)
    finally:
        for bar in bars:
            bar.stop()
    show(plan, explained)
    files: list[str] = []
    if out is not None:
        title = f"{what.name} on {where.name}"
        files = [str(path) for path in write(plan, out, title)]
        placement = None if plan.verdict.best is None else placement_of(question, plan.verdict.best)
        if placement is not None:
            placement.save(out / "placement.json")
            files.append(str(out / "placement.json"))
    best = plan.verdict.best
    print(
        json.dumps(
            {
                "predictions": len(plan.predictions),
                "recommended": None if best is None else best.strategy.name,
                "tokens_per_s_per_gpu": None if best is None else round(best.per_gpu, 1),
                "step_ms": None if best is None else round(best.step_s * 1e3, 3),
                "ttft_ms": None if plan.ttft_s is None else round(plan.ttft_s * 1e3, 1),
                "engine": plan.served,
                "files": files,
            },
            separators=(",", ":"),
        ),
        flush=True,
    )
    return 0
