"""Plots of benchmark lines: time and share of the floor over tokens, one panel per model.

Losses are drawn like wins; the dashed line is the floor. SVG without a date inside, so that the
same lines give the same file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from io import StringIO
from typing import Any

from .results import Line

OURS = "moesaic"


def draw(lines: Sequence[Line], stem: str) -> dict[str, str]:
    """One figure per mode with uniform routing: SVG text by file name, `<stem>-<mode>.svg`."""
    drawn: dict[str, str] = {}
    for mode in ("graph", "eager"):
        some = [
            x for x in lines
            if x["mode"] == mode and x["routing"] == "uniform" and x["ms"] and x["tokens"]
        ]  # fmt: skip
        if any(x["impl"] == OURS for x in some):
            drawn[f"{stem}-{mode}.svg"] = figure(some, f"{stem}, {mode}")
    return drawn


def figure(lines: Sequence[Line], title: str) -> str:
    """The SVG text of one figure: milliseconds over tokens, both logarithmic."""
    import matplotlib
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(x["model"] for x in lines))
    impls = list(dict.fromkeys(x["impl"] for x in lines))
    columns = min(3, len(models))
    rows = math.ceil(len(models) / columns)
    with matplotlib.rc_context({"svg.hashsalt": "moesaic", "font.size": 9}):
        plot = Figure(figsize=(4.2 * columns, 3.2 * rows + 0.6), layout="constrained")
        axes = plot.subplots(rows, columns, squeeze=False)
        for axis in axes.flat[len(models) :]:
            axis.set_axis_off()
        for axis, model in zip(axes.flat, models, strict=False):
            _panel(axis, [x for x in lines if x["model"] == model], impls)
            axis.set_title(model)
        handles, labels = axes.flat[0].get_legend_handles_labels()
        plot.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
        plot.suptitle(title)
        out = StringIO()
        plot.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def _panel(axis: Any, lines: Sequence[Line], impls: Sequence[str]) -> None:
    for number, impl in enumerate(impls):
        mine = sorted((x for x in lines if x["impl"] == impl), key=lambda x: x["tokens"])
        strong = impl == OURS
        axis.errorbar(
            [x["tokens"] for x in mine],
            [x["ms"] for x in mine],
            yerr=[
                [max(0.0, x["ms"] - x["ms_p20"]) for x in mine],
                [max(0.0, x["ms_p80"] - x["ms"]) for x in mine],
            ],
            label=impl,
            color=f"C{number}",
            marker="o",
            markersize=4 if strong else 3,
            linewidth=2.2 if strong else 1.2,
            zorder=3 if strong else 2,
        )
    floors = {x["tokens"]: x["floor_ms"] for x in lines if x["floor_ms"]}
    axis.plot(sorted(floors), [floors[t] for t in sorted(floors)], "k--", lw=1, label="floor")
    axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms per layer")
    axis.grid(True, which="major", alpha=0.3)
