"""The paper's figures from lines, as SVG text: throughput, activity over time, energy, ablation,
break-even.

    E experts · K top-k

SVG without a date inside, so that the same lines give the same file. A figure without a line to
draw is not made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from io import StringIO
from typing import Any

from ..results import Line
from .break_even import COMPONENTS, gains, on_map
from .configuration import break_even_name, claims, grid, layers
from .executor import LOOP, OURS, registry
from .tables import RUNGS, Variant, head_of, one, pick, value_of, variants

Draw = Callable[[Any, Sequence[Line]], bool]
WIDTH, HEIGHT = 4.2, 3.4
SAID = {"loop": "loop", "ours": "theirs"}
TICKS = (1, 8, 32, 64, 128, 256, 512, 1024, 8192)


def canvas(panels: int, title: str, draw: Callable[[Sequence[Any]], bool], columns: int = 3) -> str:
    """The SVG of a row of panels, or "" when `draw` had nothing to draw."""
    import matplotlib
    from matplotlib.figure import Figure

    columns = min(columns, panels)
    rows = math.ceil(panels / columns)
    with matplotlib.rc_context({"svg.hashsalt": "moesaic", "font.size": 9}):
        plot = Figure(figsize=(WIDTH * columns, HEIGHT * rows + 0.6), layout="constrained")
        axes = list(plot.subplots(rows, columns, squeeze=False).flat)
        for axis in axes[panels:]:
            axis.set_axis_off()
        if not draw(axes[:panels]):
            return ""
        handles = {
            label: handle
            for axis in axes
            for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
        }
        if handles:
            plot.legend(
                handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False
            )
        plot.suptitle(title)
        out = StringIO()
        plot.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def colour_of(variant: Variant) -> str:
    """A colour for each executor, the same in every figure; modes differ by the line."""
    names = [name for name in registry() if name != OURS]
    return f"C{names.index(variant[0]) % 10}" if variant[0] in names else "black"


def mark_tokens(axis: Any, tokens: Sequence[int]) -> None:
    """A logarithmic axis of tokens with plain numbers."""
    axis.set_xscale("log")
    ticks = [t for t in TICKS if min(tokens, default=1) <= t <= max(tokens, default=1)]
    axis.set_xticks(ticks, [str(t) for t in ticks], fontsize=8)
    axis.minorticks_off()


def throughput(lines: Sequence[Line]) -> str:
    """Tokens per second over batch, a panel a layer; the paper's own numbers as crosses."""
    some = [x for x in pick(lines, "experts") if value_of(x, "ms")]

    def draw(axes: Sequence[Any]) -> bool:
        for axis, layer in zip(axes, layers().values(), strict=True):
            mine = [x for x in some if x["model"] == layer.model.name]
            for variant in variants(mine):
                points = sorted(
                    (x["tokens"], 1e3 * x["tokens"] / x["ms"])
                    for x in mine
                    if (x["impl"], x["mode"]) == variant
                )
                strong = variant == (OURS, "graph")
                axis.plot(
                    *zip(*points, strict=True), marker="o", markersize=3, color=colour_of(variant),
                    label=head_of(variant), linewidth=2.2 if strong else 1.1,
                    linestyle="-" if variant[1] == "graph" else "--",
                )  # fmt: skip
            said = claims()["throughput"]
            for who, mark in (("loop", "x"), ("ours", "+")):
                rates = [v[who] for v in said.values()]
                axis.plot(
                    list(said),
                    rates,
                    mark,
                    color="dimgrey",
                    label=f"claimed on an A100: {SAID[who]}",
                )
            axis.set(yscale="log", xlabel="tokens", ylabel="tokens/s")
            mark_tokens(axis, [x["tokens"] for x in mine])
            axis.set_title(layer.title)
            axis.grid(True, which="major", alpha=0.3)
        return bool(some)

    return canvas(len(layers()), "Throughput (line: graph, dashes: eager)", draw)


def activity_over_time(lines: Sequence[Line]) -> str:
    """SM activity of each executor over its window, at the batch of the ablation."""
    tokens = grid()["energy"]["every_executor_at"]
    some = [x for x in pick(lines, "energy", tokens=tokens) if x.get("series")]

    def draw(axes: Sequence[Any]) -> bool:
        for axis, layer in zip(axes, layers().values(), strict=True):
            for x in (x for x in some if x["model"] == layer.model.name):
                variant = (x["impl"], x["mode"])
                axis.plot(
                    [point[0] for point in x["series"]],
                    [100 * point[1] for point in x["series"]],
                    color=colour_of(variant), label=head_of(variant),
                    linestyle="-" if variant[1] == "graph" else "--",
                )  # fmt: skip
            for who, share in claims()["sm_activity"].items():
                if who in ("loop", "ours"):
                    axis.axhline(100 * share, color="black", linestyle=":", linewidth=0.8)
                    axis.annotate(f"claimed: {SAID[who]}", (0, 100 * share + 1), fontsize=7)
            axis.set(xlabel="seconds", ylabel="SMs active, %", ylim=(0, 105))
            axis.set_title(f"{layer.title}, {tokens} tokens")
            axis.grid(True, alpha=0.3)
        return bool(some)

    return canvas(len(layers()), "SM activity over time (GPM)", draw)


def energy(lines: Sequence[Line]) -> str:
    """Joules per 1000 tokens over batch, loop and static batch; the paper's as dotted lines."""
    some = [x for x in pick(lines, "energy") if x.get("j_per_1000_tokens")]

    def draw(axes: Sequence[Any]) -> bool:
        for axis, layer in zip(axes, layers().values(), strict=True):
            for variant in ((LOOP, "eager"), (OURS, "graph")):
                points = sorted(
                    (x["tokens"], x["j_per_1000_tokens"])
                    for x in some
                    if x["model"] == layer.model.name and (x["impl"], x["mode"]) == variant
                )
                if points:
                    axis.plot(
                        *zip(*points, strict=True), marker="o", color=colour_of(variant),
                        label=head_of(variant),
                    )  # fmt: skip
            for who, joules in claims()["energy"][layer.model.name].items():
                axis.axhline(joules, color="black", linestyle=":", linewidth=0.8)
                axis.annotate(f"claimed: {SAID[who]}", (32, joules), fontsize=7)
            axis.set(yscale="log", xlabel="tokens", ylabel="J per 1000 tokens, gross")
            mark_tokens(axis, [x["tokens"] for x in some if x["model"] == layer.model.name])
            axis.set_title(layer.title)
            axis.grid(True, alpha=0.3)
        return bool(some)

    return canvas(len(layers()), "Energy", draw)


def ablation(lines: Sequence[Line]) -> str:
    """Speed over the loop rung by rung: launched by the host, in one graph, and claimed."""
    tokens, said = grid()["energy"]["every_executor_at"], claims()["ablation"]

    def time(model: str, name: str, mode: str) -> float | None:
        return value_of(one(lines, "experts", (name, mode), model=model, tokens=tokens), "ms")

    def draw(axes: Sequence[Any]) -> bool:
        drawn = False
        for axis, layer in zip(axes, layers().values(), strict=True):
            model = layer.model.name
            base = time(model, LOOP, "eager")
            for place, (name, _) in enumerate(RUNGS):
                host, graph = time(model, name, "eager"), time(model, name, "graph")
                bars = [
                    (base / host if base and host else None, "C0", "launched by the host"),
                    (base / graph if base and graph else None, "C2", "one graph of the layer"),
                    (said[name] / said[LOOP] if name in said else None, "C7", "claimed"),
                ]
                for step, (height, colour, label) in enumerate(bars):
                    if height:
                        axis.barh(
                            place + 0.27 * (step - 1), height, 0.27, color=colour, label=label
                        )
                drawn = drawn or host is not None
                if host is None:
                    axis.annotate("not measured", (0.1, place - 0.2), fontsize=7)
            axis.set_yticks(range(len(RUNGS)), [title.split(":")[0] for _, title in RUNGS])
            axis.set(xscale="symlog", xlabel="times the loop")
            axis.set_title(f"{layer.title}, {tokens} tokens")
            axis.invert_yaxis()
            axis.grid(True, axis="x", alpha=0.3)
        return drawn

    return canvas(len(layers()), "Ablation", draw)


def break_even(lines: Sequence[Line]) -> str:
    """A panel a component: its gain over E and K; red is a loss, white is break-even."""
    b = grid()["break_even"]
    maps = [(c, found) for c in COMPONENTS if len(on_map(found := gains(lines, c))) > 1]

    def draw(axes: Sequence[Any]) -> bool:
        for axis, (component, found) in zip(axes, maps, strict=True):
            by_place = {(c.model, c.tokens, c.routing): gain for c, gain in found.items()}
            table = [
                [by_place.get((break_even_name(e, k), b["batch"], "uniform")) for k in b["top_k"]]
                for e in b["num_experts"]
            ]
            logs = [[math.log2(g) if g else math.nan for g in row] for row in table]
            axis.imshow(logs, cmap="RdBu", vmin=-3, vmax=3, aspect="auto", origin="lower")
            for y, row in enumerate(table):
                for x, gain in enumerate(row):
                    if gain:
                        ink = "white" if abs(logs[y][x]) > 2 else "black"
                        text = f"{gain:.2g}" if gain < 10 else f"{gain:.0f}"
                        axis.text(x, y, text, ha="center", va="center", fontsize=8, color=ink)
            axis.set_xticks(range(len(b["top_k"])), b["top_k"])
            axis.set_yticks(range(len(b["num_experts"])), b["num_experts"])
            axis.set(xlabel="K", ylabel="E")
            axis.set_title(component.name)
        return True

    if not maps:
        return ""
    return canvas(len(maps), f"Gain at {b['batch']} tokens, uniform routing", draw, columns=4)


def figures(lines: Sequence[Line], stem: str) -> dict[str, str]:
    """Every figure that has lines: SVG text by file name, `<stem>-<figure>.svg`."""
    made = {
        "throughput": throughput(lines),
        "activity": activity_over_time(lines),
        "energy": energy(lines),
        "ablation": ablation(lines),
        "break-even": break_even(lines),
    }
    return {f"{stem}-{name}.svg": svg for name, svg in made.items() if svg}
