"""What a plan says: rows for tables, a JSON document, and one HTML file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .offers import HEADS as OFFER_HEADS
from .offers import Offer, cells, offer_entry, shown_offers
from .pictures import pareto_svg, perfetto, timeline_svg
from .predict import Prediction
from .queueing import Queued
from .search import Question, Verdict

HEADS = ("strategy", "batch", "GPUs", "tok/s/GPU", "tok/s/node", "step ms", "tok/s/seq",
         "memory GB", "fits", "balance", "overlap", "J/token", "waits for")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A question, its predictions (best first) and the verdict."""

    question: Question
    predictions: tuple[Prediction, ...]
    verdict: Verdict
    ttft_s: float | None = None
    queued: Queued | None = None
    offers: tuple[Offer, ...] = ()
    served: str | None = None
    notes: tuple[str, ...] = ()


def row(p: Prediction) -> tuple[str, ...]:
    """A prediction as text under `HEADS`."""
    return (
        p.strategy.name,
        str(p.batch) if p.phase == "decode" else "-",
        str(p.gpus),
        f"{p.per_gpu:.0f}",
        f"{p.per_node:.0f}",
        f"{p.step_s * 1e3:.1f}",
        f"{1 / p.step_s:.1f}" if p.phase == "decode" else "-",
        f"{p.memory.total / 1e9:.0f}",
        "yes" if p.fits else "no",
        f"{p.balancedness:.2f}",
        f"{100 * p.hidden:.0f}%",
        f"{p.joules_per_token:.3g}",
        p.binding,
    )


def shown(
    predictions: Sequence[Prediction], best: Prediction | None = None, limit: int = 24
) -> list[Prediction]:
    """The recommended one, the best that fit, and of every family the best that do and do not."""
    found: dict[tuple[str, int], Prediction] = {}
    if best is not None:
        found[best.strategy.name, best.batch] = best
    for p in [p for p in predictions if p.fits][: limit // 2]:
        found[p.strategy.name, p.batch] = p
    for family in dict.fromkeys(p.strategy.family for p in predictions):
        for fits in (True, False):
            some = [p for p in predictions if p.strategy.family == family and p.fits == fits][:2]
            found |= {(p.strategy.name, p.batch): p for p in some}
    some = list(found.values())[:limit]
    return sorted(some, key=lambda p: (p is not best, not p.fits, -p.tokens_per_s))


def entry(p: Prediction) -> dict[str, Any]:
    """A prediction as JSON."""
    return {
        "strategy": p.strategy.name,
        "family": p.strategy.family,
        "batch": p.batch,
        "gpus": p.gpus,
        "copies": p.copies,
        "step_ms": p.step_s * 1e3,
        "tokens_per_s": p.tokens_per_s,
        "tokens_per_s_per_gpu": p.per_gpu,
        "tokens_per_s_per_node": p.per_node,
        "tpot_ms": p.step_s * 1e3 if p.phase == "decode" else None,
        "ttft_ms": p.step_s * 1e3 if p.phase == "prefill" else None,
        "fits": p.fits,
        "memory": p.memory.why(),
        "memory_gb": p.memory.total / 1e9,
        "breakdown_ms": {name: s * 1e3 for name, s in p.breakdown.items()},
        "utilisation": p.utilisation,
        "bubble": p.bubble,
        "hidden": p.hidden,
        "balancedness": p.balancedness,
        "joules_per_token": p.joules_per_token,
        "usd_per_million_tokens": p.usd_per_million,
        "binding": p.binding,
        "slices_sms": p.slices,
    }


def document(plan: Plan) -> dict[str, Any]:
    """The whole plan as JSON."""
    q, v = plan.question, plan.verdict
    return {
        "model": q.model.name,
        "parameters": q.model.parameters,
        "cluster": q.cluster.name,
        "gpus": q.cluster.gpus,
        "phase": q.workload.phase,
        "routing": q.workload.routing if q.workload.trace is None else "trace",
        "kernels": q.table.source,
        "predicted": len(plan.predictions),
        "recommended": None if v.best is None else v.best.strategy.name,
        "verdict": v.sentence,
        "one_expert_per_gpu": v.one_per_gpu,
        "binds": v.binds,
        "changes": [asdict(c) for c in v.changes],
        "ttft_ms": None if plan.ttft_s is None else plan.ttft_s * 1e3,
        "queue": None if plan.queued is None else plan.queued.__dict__,
        "notes": plan.notes,
        "served": plan.served,
        "offers": [offer_entry(o) for o in plan.offers],
        "predictions": [entry(p) for p in plan.predictions],
    }


def facts(plan: Plan) -> list[tuple[str, str]]:
    """What was asked, in words."""
    m, c, w = plan.question.model, plan.question.cluster, plan.question.workload
    a, gpu = m.attention, c.gpu
    work = (
        f"decode, {' or '.join(map(str, w.batches or (w.sequences,)))} sequences a "
        f"{'deployment' if w.total else 'GPU'}, {w.context} "
        "tokens of context each"
        if w.phase == "decode"
        else f"prefill of {w.prompt}-token prompts, "
        + (f"{w.sequences} in all" if w.total else f"{w.prefill_tokens} tokens a GPU")
    )
    found = [
        ("model", f"{m.name}: {m.layers} layers ({m.dense_layers} dense), H {m.hidden}, "
                  f"{m.experts.num_experts} experts of width {m.experts.intermediate_size}, top-"
                  f"{m.top_k}, {a.kind} with {a.heads} heads, {m.parameters / 1e9:.1f} billion "
                  f"parameters, {m.dtype}"),
        ("cluster", f"{c.name}: {c.nodes} nodes of {c.gpus_per_node} GPUs, {gpu.flops / 1e12:.0f} "
                    f"TFLOP/s x {gpu.mfu:.2f}, {gpu.memory_bytes / 1e9:.0f} GB, "
                    f"{gpu.bytes_per_s / 1e12:.2f} TB/s x {gpu.bandwidth_efficiency:.2f}"),
        ("workload", work),
        ("routing", w.routing if w.trace is None else "a recorded trace"),
        ("kernel times", plan.question.table.source),
    ]  # fmt: skip
    best = plan.verdict.best
    if best is not None and best.usd_per_million is not None:
        found.append(("cost", f"{best.usd_per_million:.3g} USD per million tokens, at "
                      f"{c.usd_per_gpu_hour:g} USD per GPU and hour"))  # fmt: skip
    if best is not None and best.slices:
        sizes = ", ".join(f"{name} {sms} SMs" for name, sms in best.slices.items())
        found.append(("slices", f"{sizes}, by policy {w.policy}"))
    if plan.ttft_s is not None:
        found.append(("time to first token", f"{plan.ttft_s * 1e3:.0f} ms on an idle deployment"))
    if plan.queued is not None:
        found.append(("requests", str(plan.queued)))
    return [*found, *(("note", note) for note in plan.notes)]


def engine_sources(plan: Plan) -> list[str]:
    """Whence each engine's times of experts come."""
    return list(dict.fromkeys(f"{o.deployment.engine.name}: {o.kernels}" for o in plan.offers))


def html(plan: Plan, title: str) -> str:
    """One HTML file without outside references."""
    import jinja2

    folder = Path(__file__).parent
    loader = jinja2.FileSystemLoader(folder)
    template = jinja2.Environment(loader=loader, autoescape=True).get_template("report.html.j2")
    best = plan.verdict.best or plan.predictions[0]
    return template.render(
        title=title, plan=plan, heads=HEADS, facts=facts(plan), best=best,
        kernels=engine_sources(plan), offer_heads=OFFER_HEADS,
        offers=[(o.served, cells(o)) for o in shown_offers(plan.offers)],
        rows=[(p.fits, row(p)) for p in shown(plan.predictions, plan.verdict.best)],
        pareto=pareto_svg(plan.predictions), timeline=timeline_svg(best.line),
        breakdown=sorted(best.breakdown.items(), key=lambda x: -x[1]),
    )  # fmt: skip


def write(plan: Plan, out: Path, title: str) -> list[Path]:
    """Write report.html, plan.json, pareto.svg, timeline.svg and timeline.perfetto.json.

    Raises:
        OSError: the folder cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    best = plan.verdict.best or plan.predictions[0]
    texts = {
        "report.html": html(plan, title),
        "plan.json": json.dumps(document(plan), indent=1) + "\n",
        "pareto.svg": pareto_svg(plan.predictions),
        "timeline.svg": timeline_svg(best.line),
        "timeline.perfetto.json": json.dumps(perfetto(best.line)) + "\n",
    }
    for name, text in texts.items():
        (out / name).write_text(text, "utf-8")
    return [out / name for name in texts]
