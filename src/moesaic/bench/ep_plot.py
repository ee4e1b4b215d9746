"""The scaling figure of suite `ep`: strong scaling and weak-scaling efficiency over ranks.

A curve is a layer; dashed is what perfect scaling would give. Losses are drawn like wins.
"""

from __future__ import annotations

from collections.abc import Mapping
from io import StringIO

Times = Mapping[tuple[str, int, int], float]
"""Milliseconds by model, ranks and tokens of all ranks together."""


def strong(ms: Times, model: str) -> dict[int, float]:
    """By ranks, how much faster than one rank on the same tokens, the most there are for both.

    >>> strong({("m", 1, 8): 4.0, ("m", 2, 8): 2.5, ("m", 2, 16): 4.5}, "m")
    {1: 1.0, 2: 1.6}
    """
    tokens = [t for (name, ranks, t) in ms if name == model and ranks == 1]
    each = max(tokens, default=0)
    found = {r: t for (name, r, total), t in ms.items() if name == model and total == each}
    return {r: found[1] / found[r] for r in sorted(found)} if 1 in found else {}


def weak(ms: Times, model: str) -> dict[int, float]:
    """By ranks, the share of one rank's speed kept at as many tokens a rank.

    >>> weak({("m", 1, 8): 4.0, ("m", 2, 8): 2.5, ("m", 2, 16): 5.0}, "m")
    {1: 1.0, 2: 0.8}
    """
    tokens = [t for (name, ranks, t) in ms if name == model and ranks == 1]
    each = max(tokens, default=0)
    found = {r: t for (name, r, total), t in ms.items() if name == model and total == r * each}
    return {r: found[1] / found[r] for r in sorted(found)} if 1 in found else {}


def scaling_figure(ms: Times, title: str) -> str | None:
    """The SVG text of the figure, or None where nothing ran on several ranks."""
    import matplotlib
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(model for model, _, _ in ms))
    kinds = (("strong: times faster", strong), ("weak: share of one GPU's speed", weak))
    curves = [{m: c for m in models if len(c := of(ms, m)) > 1} for _, of in kinds]
    if not any(curves):
        return None
    with matplotlib.rc_context({"svg.hashsalt": "moesaic", "font.size": 9}):
        plot = Figure(figsize=(9, 3.8), layout="constrained")
        for axis, (label, _), drawn in zip(plot.subplots(1, 2), kinds, curves, strict=True):
            ranks = sorted({r for curve in drawn.values() for r in curve} or {1})
            ideal = [float(r) if label.startswith("strong") else 1.0 for r in ranks]
            axis.plot(ranks, ideal, "--", color="#888888", label="perfect")
            for number, model in enumerate(models):
                if model in drawn:
                    curve = drawn[model]
                    axis.plot(list(curve), list(curve.values()), "o-", color=f"C{number}",
                              label=model)  # fmt: skip
            axis.set_xticks(ranks)
            axis.set_xlabel("GPUs")
            axis.set_ylabel(label)
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
        handles, labels = plot.axes[0].get_legend_handles_labels()
        plot.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
        plot.suptitle(title)
        out = StringIO()
        plot.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()
