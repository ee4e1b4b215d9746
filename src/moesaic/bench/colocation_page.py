"""The generated part of docs/slices.md: the points of every loop, the front, and the curves."""

from __future__ import annotations

from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from .colocation_targets import LENT, SPLIT
from .report import Sheet, markdown, provenance, short, targets_sheet
from .results import Line, Target

LOOPS = ("closed", "open")
HEADS = [
    "way", "decode SMs", "prefill SMs", "median ms", "p99 ms", "p99 ÷ alone", "prefill's share",
    "steps",
]  # fmt: skip


def loops_of(lines: Sequence[Line]) -> dict[tuple[str, str], list[Line]]:
    """The lines of each setting and loop."""
    found: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        if line["clock"] in LOOPS and line["ms"] is not None:
            place = (f"{line['model']}, {line['tokens']} tokens a step", line["clock"])
            found.setdefault(place, []).append(line)
    return found


def points_sheet(lines: Sequence[Line]) -> Sheet:
    """Every way of one loop: sizes, latencies, the other's share of its throughput alone."""
    rows = []
    for x in lines:
        sizes = [str(x.get(key) or "-") for key in ("sms", "other_sms")]
        steps = f"{x['steps']}" + ("" if x["complete"] else ", ended early")
        numbers = [short(x[key]) for key in ("ms", "p99_ms", "slowdown_p99")]
        rows.append([x["impl"], *sizes, *numbers, short(x.get("other_share")), steps])
    return Sheet(HEADS, rows)


def reasons_sheet(lines: Sequence[Line]) -> Sheet:
    """Why each policy chose what it chose."""
    rows = [[x["impl"], str(x.get("split") or "whole GPU"), x["reason"]] for x in lines]
    return Sheet(["policy", "split", "why"], rows)


def curves_sheet(lines: Sequence[Line]) -> Sheet:
    """Slowdown over the whole GPU by SMs, alone and with both tenants at work (by loop)."""
    found: dict[tuple[int, str], dict[int, Line]] = {}
    for x in lines:
        if x["clock"] == "curve" and x["ms"]:
            found.setdefault((x["tokens"], x["work"]), {})[int(x["sms"])] = x
    sizes = sorted({n for curve in found.values() for n in curve})
    rows = [
        [str(n), *(short(c[n]["slowdown"]) if n in c else "" for c in found.values())]
        for n in sizes
    ]
    heads = [f"{work}, {tokens} tokens" for tokens, work in found]
    return Sheet(["SMs", *heads], rows)


def bounds_sheet(lines: Sequence[Line]) -> Sheet:
    """What tenants demand of memory alone, and what that leaves prefill at decode's promise."""
    rows = []
    for x in lines:
        if x["clock"] == "demand":
            bounds = [short(x.get(f"bound_{loop}")) for loop in LOOPS]
            setting = f"{x['model']}, {x['tokens']} tokens"
            rows.append([setting, x["impl"], short(x["bytes_per_s"] / 1e12), *bounds])
    heads = ["setting", "tenant", "TB/s alone"]
    return Sheet([*heads, *(f"most that is left, {loop} loop" for loop in LOOPS)], rows)


def counters_sheet(lines: Sequence[Line]) -> Sheet:
    """Clock, power and use of memory and tensor cores, by NVML."""
    keys = ("sm_mhz", "watts", "dram_share", "tensor_share")
    rows = []
    for x in lines:
        if x["clock"].startswith("counters-"):
            told = [short(x.get(key)) for key in keys]
            loop = x["clock"].removeprefix("counters-")
            rows.append([f"{x['model']}, {x['tokens']} tokens", loop, x["impl"], *told])
    heads = ["setting", "loop", "way", "SM MHz", "W", "DRAM used", "tensor cores used"]
    return Sheet(heads, rows)


def front_figure(loops: dict[tuple[str, str], list[Line]]) -> str:
    """p99 over alone and the other's share: sweeps as lines, the other ways as points; SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "moesaic", "font.size": 9}):
        down = -(-len(loops) // 2)
        plot = Figure(figsize=(9.2, 3.6 * down), layout="constrained")
        axes = plot.subplots(down, min(2, len(loops)), squeeze=False)
        for axis, ((setting, loop), lines) in zip(axes.flat, loops.items(), strict=False):
            _panel(axis, [x for x in lines if x.get("other_share") is not None])
            axis.set_title(f"{setting}\n{loop} loop", fontsize=8)
        named: dict[str, Any] = {}
        for axis in axes.flat:
            handles, labels = axis.get_legend_handles_labels()
            named |= dict(zip(labels, handles, strict=True))
        plot.legend([*named.values()], [*named], loc="outside lower center", ncols=5, frameon=False)
        out = StringIO()
        plot.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def _panel(axis: Any, lines: Sequence[Line]) -> None:
    for kind, style, name in ((SPLIT, "o-", "every split"), (LENT, "^--", "every lent split")):
        swept = [x for x in lines if x["impl"].startswith(kind)]
        axis.plot(
            [x["slowdown_p99"] for x in swept],
            [x["other_share"] for x in swept],
            style, color="0.6", markersize=3, label=name if swept else None,
        )  # fmt: skip
    others = [x for x in lines if not x["impl"].startswith((SPLIT, LENT))]
    for number, x in enumerate(others):
        axis.plot(
            x["slowdown_p99"], x["other_share"], "*" if x["impl"] == "moesaic" else "s",
            color=f"C{number}", markersize=11 if x["impl"] == "moesaic" else 5, label=x["impl"],
        )  # fmt: skip
    axis.set(xscale="log", xlabel="decode p99 ÷ alone", ylabel="prefill's share of alone")
    axis.set_ylim(0, 1.05)
    axis.grid(True, which="both", alpha=0.3)


def section(
    lines: Sequence[Line], targets: Sequence[Target], root: Path, device: str, folder: str
) -> tuple[str, dict[str, str]]:
    """The suite's part of a page."""
    parts = [provenance(lines), markdown(targets_sheet(targets))]
    loops, figures = loops_of(lines), dict[str, str]()
    if loops:
        name = f"colocation-{device}-front.svg"
        figures[name] = front_figure(loops)
        parts.append(f"![front of p99 and throughput]({folder}/{name})")
    for (setting, loop), some in loops.items():
        parts += [f"#### {setting}, {loop} loop", markdown(points_sheet(some))]
        if explained := [x for x in some if x.get("reason")]:
            parts.append(markdown(reasons_sheet(explained)))
    for title, some_sheet in (
        ("Demand on memory", bounds_sheet(lines)),
        ("Counters", counters_sheet(lines)),
    ):
        if some_sheet.rows:
            parts += [f"#### {title}", markdown(some_sheet)]
    curves = curves_sheet(lines)
    if curves.rows:
        parts += ["#### Slowdown by SMs", markdown(curves)]
    return "\n\n".join(parts) + "\n", figures
