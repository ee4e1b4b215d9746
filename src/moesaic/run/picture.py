"""The pictures of a run: heat map, curves along the text, and the one picture of a README.

    E experts · L layers

``python -m moesaic.run.picture RUN_DIR OUT.png`` draws the last from the lines of a finished run.
"""

from __future__ import annotations

import argparse
import io
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from .show import BAD, GOOD, SLOW, Document, comparison, difference_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

INK, SOFT, OURS, THEIRS = "#1c2430", "#5b6675", "#0b6e99", "#9aa3ae"
COLOURS = {GOOD: "#1a7f4b", SLOW: "#9a6700", BAD: "#c0262d"}
MOST_LABELS = 32
NOTE_WIDTH = 130


def _figure(width: float, height: float, pad: float = 0.04) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=pad, h_pad=pad)
    return Figure(figsize=(width, height), dpi=150, layout=layout, facecolor="white")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _bare(axes: Axes) -> None:
    axes.tick_params(length=0, labelsize=8, colors=SOFT)
    for spine in axes.spines.values():
        spine.set_visible(False)


def draw_heatmap(axes: Axes, layers: Sequence[Document]) -> Any:
    """Load of every expert (columns) in every layer (rows), 1 white, hot red, cold blue."""
    from matplotlib.colors import TwoSlopeNorm

    load_LE = [layer["load_E"] for layer in layers]
    experts = len(load_LE[0])
    peak = max(2.0, max(max(row) for row in load_LE))
    image = axes.imshow(load_LE, cmap="RdBu_r", norm=TwoSlopeNorm(1.0, 0.0, peak), aspect="auto")
    axes.set_xlabel("expert", fontsize=9, color=INK)
    axes.set_ylabel("layer", fontsize=9, color=INK)
    axes.set_yticks(range(len(load_LE)), [str(layer["layer"]) for layer in layers])
    axes.set_xticks(range(0, experts, 1 if experts <= MOST_LABELS else experts // 16))
    if experts <= MOST_LABELS:
        for y, row in enumerate(load_LE):
            for x, value in enumerate(row):
                red, green, blue, _ = image.cmap(image.norm(value))
                dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
                ink = "white" if dark else INK
                axes.text(x, y, f"{value:.1f}", ha="center", va="center", fontsize=7, color=ink)
    _bare(axes)
    return image


def draw_balancedness(axes: Axes, layers: Sequence[Document]) -> None:
    """A bar a layer, in line with the rows of the heat map."""
    places = range(len(layers))
    axes.barh(places, [layer["balancedness"] for layer in layers], color=OURS, height=0.6)
    for place, layer in zip(places, layers, strict=True):
        value = layer["balancedness"]
        inside = value > 0.6
        axes.text(
            value + (-0.04 if inside else 0.04),
            place,
            f"{value:.2f}",
            ha="right" if inside else "left",
            va="center",
            fontsize=8,
            color="white" if inside else INK,
        )
    axes.set(xlim=(0, 1), ylim=(len(layers) - 0.5, -0.5), yticks=[])
    axes.set_xlabel("balancedness", fontsize=9, color=INK)
    axes.set_xticks([0, 1])
    _bare(axes)


def heatmap_png(layers: Sequence[Document]) -> bytes:
    """The heat map with balancedness beside it."""
    figure = _figure(9.5, 1.3 + 0.33 * len(layers))
    left, right = figure.subplots(1, 2, width_ratios=[6, 1])
    bar = figure.colorbar(draw_heatmap(left, layers), ax=left, pad=0.01, fraction=0.03)
    bar.ax.tick_params(labelsize=7, colors=SOFT, length=0)
    bar.outline.set_visible(False)
    draw_balancedness(right, layers)
    left.set_title("load of each expert, 1 = an even share", fontsize=10, loc="left", color=INK)
    return _png(figure)


def series_png(
    offsets: Sequence[int],
    speeds: tuple[Sequence[float], Sequence[float]],
    bits: tuple[Sequence[float], Sequence[float]],
) -> bytes:
    """Tokens a second and bits per byte along the text, (moesaic, baseline) each."""
    figure = _figure(9.5, 3.2)
    places = [offset / 1e3 for offset in offsets]
    for axes, pair, name in zip(
        figure.subplots(1, 2), (speeds, bits), ("tokens/s", "bits per byte"), strict=True
    ):
        axes.plot(places, pair[1], color=THEIRS, lw=3, label="baseline")
        axes.plot(places, pair[0], color=OURS, lw=1.3, label="moesaic")
        axes.set_xlabel("kilobytes into the text", fontsize=9, color=INK)
        axes.set_title(name, fontsize=10, loc="left", color=INK)
        axes.set_ylim(0, 1.2 * max((v for side in pair for v in side if v == v), default=1.0))
        axes.legend(frameon=False, fontsize=8)
        _bare(axes)
        axes.grid(axis="y", color="#e7eaee", lw=0.8)
        axes.set_axisbelow(True)
    return _png(figure)


def _draw_table(axes: Axes, document: Document) -> None:
    axes.set(xlim=(0, 1), ylim=(0, 6))
    axes.axis("off")
    places = ((0.0, "left"), (0.47, "right"), (0.74, "right"), (1.0, "right"))

    def write(row: int, cells: Sequence[str], colours: Sequence[str]) -> None:
        for (x, side), cell, colour in zip(places, cells, colours, strict=True):
            weight = "bold" if row and x == 1.0 else "normal"
            axes.text(
                x, 5.5 - row, cell, ha=side, va="center", fontsize=10, color=colour, weight=weight
            )
        axes.plot([0, 1], [5 - row, 5 - row], color="#d9dee5", lw=0.8)

    write(0, ("median (p20-p80)", "moesaic", "PyTorch, expert by expert", ""), [SOFT] * 4)
    for row, line in enumerate(comparison(document), start=1):
        write(row, line[:4], [INK, INK, INK, COLOURS[line.style]])


def readme_png(document: Document) -> bytes:
    """One picture of a run: the comparison above, the experts' load below."""
    layers = document["layers"]
    below_height = 1.1 + 0.3 * len(layers)
    figure = _figure(9.5, 2.9 + below_height, pad=0.12)
    above, below = cast(
        "list[SubFigure]", figure.subfigures(2, 1, height_ratios=[2.9, below_height])
    )
    axes = above.subplots()
    _draw_table(axes, document)
    title = f"moesaic run · {document['model']} · {document['text']}, {document['bytes']:,} bytes"
    axes.set_title(title, fontsize=12, loc="left", color=INK, weight="bold", pad=8)
    where = f"{document['device_name']}, {document['dtype']}, PyTorch {document['torch']}"
    note = f"{where}\n{textwrap.fill(difference_line(document), NOTE_WIDTH)}"
    axes.text(0, -0.15, note, fontsize=8, color=SOFT, va="top", linespacing=1.5)
    left, right = below.subplots(1, 2, width_ratios=[6, 1])
    draw_heatmap(left, layers)
    draw_balancedness(right, layers)
    left.set_title("tokens of each expert, 1 = an even share", fontsize=10, loc="left", color=INK)
    return _png(figure)


def read_summary(run: Path) -> Document:
    """The summary line of a finished run.

    Raises:
        OSError: there is no run.jsonl.
        ValueError: it holds no summary.
    """
    path = run / "run.jsonl"
    for line in reversed(path.read_text(encoding="utf-8").splitlines()):
        document: Document = json.loads(line)
        if document.get("kind") == "summary":
            return document
    raise ValueError(f"{path}: holds no summary line; give the directory of a finished run")


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the README's picture of a finished run."""
    parser = argparse.ArgumentParser(prog="python -m moesaic.run.picture", description=main.__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    chosen = parser.parse_args(arguments)
    chosen.out.write_bytes(readme_png(read_summary(chosen.run)))


if __name__ == "__main__":
    main()
