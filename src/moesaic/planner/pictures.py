"""Pictures of predictions: the Pareto front, the time line, and a trace for Perfetto."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from .predict import Prediction
from .search import pareto
from .simulate import TimeLine

COLORS = {
    "attention": "#4c78a8", "gate": "#9ecae9", "shared": "#72b7b2", "experts": "#f58518",
    "dispatch": "#54a24b", "combine": "#88d27a", "all-reduce": "#b279a2", "dense": "#e45756",
    "head": "#9d755d", "move experts": "#bab0ac",
}  # fmt: skip
FAMILY_COLORS = {"one-per-gpu": "#d62728", "literal": "#e377c2", "ep": "#1f77b4", "tp-ep-dp":
                 "#17becf", "tp-pp": "#2ca02c", "disaggregated": "#9467bd"}  # fmt: skip
MARKS = {"one-per-gpu": "o", "literal": "D", "ep": "s", "tp-ep-dp": "^", "tp-pp": "v",
         "disaggregated": "P"}  # fmt: skip


def _svg(figure: Any) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None}, bbox_inches="tight")
    found = text.getvalue()
    return found[found.index("<svg") :]


def _figure(width: float, height: float) -> tuple[Any, Any]:
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "moesaic"
    figure = Figure(figsize=(width, height))
    return figure, figure.add_subplot()


def pareto_svg(predictions: Sequence[Prediction]) -> str:
    """Throughput per GPU over tokens per second of a sequence, by family; hollow: does not fit."""
    figure, axes = _figure(8, 4.5)
    for family, mark in MARKS.items():
        for fits in (True, False):
            some = [p for p in predictions if p.strategy.family == family and p.fits == fits]
            if some:
                axes.scatter(
                    [p.step_s * 1e3 for p in some], [p.per_gpu for p in some], marker=mark, s=26,
                    color=FAMILY_COLORS[family] if fits else None,
                    facecolors=None if fits else "none", edgecolors=None if fits else "lightgray",
                    label=family if fits else f"{family} (does not fit)",
                )  # fmt: skip
    front = pareto([p for p in predictions if p.fits])
    axes.step([p.step_s * 1e3 for p in front], [p.per_gpu for p in front], where="post",
              color="black", linewidth=0.8)  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel("ms a step")
    axes.set_ylabel("tokens/s per GPU")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    return _svg(figure)


def timeline_svg(line: TimeLine, *, layers: int = 4) -> str:
    """The first layers with experts, a row per resource and micro-batch."""
    wanted = sorted({s.layer for s in line.spans if s.name == "experts"})[:layers]
    spans = [s for s in line.spans if s.layer in wanted]
    rows = sorted({(s.resource, s.micro_batch) for s in spans})
    figure, axes = _figure(10, 0.5 + 0.4 * len(rows))
    begin = min((s.start for s in spans), default=0.0)
    named: set[str] = set()
    for s in spans:
        y = rows.index((s.resource, s.micro_batch))
        label = s.name if s.name not in named else None
        named.add(s.name)
        axes.barh(y, (s.end - s.start) * 1e6, left=(s.start - begin) * 1e6, height=0.8,
                  color=COLORS.get(s.name, "gray"), label=label)  # fmt: skip
    axes.set_yticks(range(len(rows)), [f"{resource} {mb}" for resource, mb in rows], fontsize=7)
    axes.set_xlabel("µs")
    axes.legend(fontsize=6, ncols=9, loc="upper center", bbox_to_anchor=(0.5, 1.25))
    return _svg(figure)


def perfetto(line: TimeLine) -> dict[str, Any]:
    """The time line as a document that ui.perfetto.dev opens: a process per resource."""
    resources = sorted({s.resource for s in line.spans})
    events: list[dict[str, Any]] = [
        {"name": "process_name", "ph": "M", "pid": number, "args": {"name": resource}}
        for number, resource in enumerate(resources)
    ]
    events += [
        {
            "name": s.name, "ph": "X", "ts": s.start * 1e6, "dur": (s.end - s.start) * 1e6,
            "pid": resources.index(s.resource), "tid": s.micro_batch, "args": {"layer": s.layer},
        }
        for s in line.spans
    ]  # fmt: skip
    return {"traceEvents": events, "displayTimeUnit": "ms"}
