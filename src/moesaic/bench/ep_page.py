"""The generated parts of docs/expert-parallel.md: exchanges, layers and their scaling, from lines.

Scaling compares lines of one model: strong over the same total of tokens, weak over the same
tokens a rank; one GPU is the layer there with all its experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .ep_plot import scaling_figure
from .report import Sheet, markdown, provenance, short, targets_sheet
from .results import Line, Target

IMPLS = ("moesaic", "moesaic-32sm", "nccl", "nccl-counts")
CPU_IMPLS = ("moesaic", "gloo", "gloo-counts")


def _text(line: Line | None, key: str, scale: float = 1.0) -> str:
    if line is None or line.get(key) is None:
        return "-"
    return "wrong" if line.get("wrong") else short(line[key] * scale)


def exchange_sheet(lines: Sequence[Line]) -> Sheet:
    """Microseconds of every implementation, GB/s of ours, by way, width, routing and rows."""
    found: dict[tuple[str, str, str, int], dict[str, Line]] = {}
    for x in lines:
        if x["clock"] in ("dispatch", "combine"):
            key = (x["clock"], x["model"], x["routing"], x["tokens"])
            found.setdefault(key, {})[x["impl"]] = x
    impls = CPU_IMPLS if any(x["impl"] == "gloo" for x in lines) else IMPLS
    heads = ["stage", "model", "routing", "rows a rank", *(f"{i} µs" for i in impls)]
    heads += [f"{i} GB/s" for i in impls[:3]]
    rows = [
        [clock, model, routing, f"{tokens:,}"]
        + [_text(of.get(impl), "ms", 1e3) for impl in impls]
        + [_text(of.get(impl), "gbps") for impl in impls[:3]]
        for (clock, model, routing, tokens), of in sorted(
            found.items(), key=lambda item: (item[0][0] != "dispatch", *item[0][1:])
        )
    ]
    return Sheet(heads, rows)


def layer_times(lines: Sequence[Line]) -> dict[tuple[str, int, int], float]:
    """Milliseconds of every right line of a layer by moesaic, by model, ranks and tokens."""
    return {
        (x["model"], x["ranks"], x["tokens"]): x["ms"]
        for x in lines
        if x["clock"].startswith("layer-ep")
        and x["impl"] == "moesaic" and x["ms"] and not x.get("wrong")
    }  # fmt: skip


def layer_sheet(lines: Sequence[Line]) -> Sheet:
    """Milliseconds of every layer and its gain over fewer ranks."""
    layers = [x for x in lines if x["clock"].startswith("layer-ep")]
    right = layer_times(lines)
    beside = {(x["model"], x["ranks"], x["tokens"]): x for x in layers if x["impl"] != "moesaic"}
    heads = ["model", "ranks", "tokens", "moesaic ms", "moesaic-nccl ms", "strong", "weak"]
    rows = []
    for (model, ranks, tokens), ms in sorted(right.items()):
        alone, each = right.get((model, 1, tokens)), right.get((model, 1, tokens // ranks))
        rows.append([
            model, str(ranks), f"{tokens:,}", short(ms),
            _text(beside.get((model, ranks, tokens)), "ms"),
            "-" if ranks == 1 or alone is None else f"{alone / ms:.2f}x",
            "-" if ranks == 1 or each is None else f"{each / ms:.2f}",
        ])  # fmt: skip
    return Sheet(heads, rows)


def ep_section(
    lines: Sequence[Line], targets: Sequence[Target], root: Path, device: str, folder: str
) -> tuple[str, dict[str, str]]:
    """The tables of suite `ep` on one device, and on GPUs the figure of its scaling."""
    parts = [provenance(lines), markdown(targets_sheet(targets))]
    drawn: dict[str, str] = {}
    if not device.startswith("cpu") and (
        svg := scaling_figure(layer_times(lines), f"ep on {device}")
    ):
        name = f"ep-{device}-scaling.svg"
        drawn[name] = svg
        parts.append(f"![Scaling on {device}]({folder}/{name})")
    for title, table in (
        ("Exchange alone", exchange_sheet(lines)),
        ("Whole layers", layer_sheet(lines)),
    ):
        if table.rows:
            parts += [f"#### {title}", markdown(table)]
    return "\n\n".join(parts) + "\n", drawn
