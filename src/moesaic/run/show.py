"""The tables of a run on a terminal, from its document; 80 columns are enough."""

from __future__ import annotations

from typing import Any, NamedTuple

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

Document = dict[str, Any]


GOOD, SLOW, BAD = "green", "yellow", "bold red"


def amount(value: float) -> str:
    """Three significant digits with k or M.

    >>> amount(14690.3), amount(950.0)
    ('14.7k', '950')
    """
    for scale, unit in ((1e6, "M"), (1e3, "k")):
        if value >= scale:
            digits = 2 if value < 10 * scale else 1 if value < 100 * scale else 0
            return f"{value / scale:.{digits}f}{unit}"
    return f"{value:.0f}"


def speed(value: dict[str, float]) -> str:
    """Median (p20-p80) of tokens a second."""
    return f"{amount(value['median'])} ({amount(value['p20'])}-{amount(value['p80'])})"


def times(value: dict[str, float]) -> str:
    """Median (p20-p80) of a ratio."""
    return f"{value['median']:.2f}x ({value['p20']:.2f}-{value['p80']:.2f})"


def number(value: float | None, form: str) -> str:
    """A number, or a word for what JSON holds as null."""
    return "not a number" if value is None else format(value, form)


class Line(NamedTuple):
    """One line of the comparison; `style` is GOOD, SLOW or BAD."""

    what: str
    ours: str
    theirs: str
    verdict: str
    style: str


def comparison(document: Document) -> list[Line]:
    """Every line of the comparison, losses as plainly as wins."""
    ours, theirs = document["moesaic"], document["baseline"]
    lines = []
    for what, clock, ratio in (
        ("model tokens/s", "tokens_per_s", document["speedup"]),
        ("experts tokens/s", "experts_tokens_per_s", document["experts_speedup"]),
    ):
        style = GOOD if ratio["median"] >= 1 else SLOW
        lines.append(Line(what, speed(ours[clock]), speed(theirs[clock]), times(ratio), style))
    bits = [number(side["bits_per_byte"], ".4f") for side in (ours, theirs)]
    agree = ("agree", GOOD) if document["bits_agree"] else ("DISAGREE", BAD)
    exact = ("each once", GOOD) if document["rows_agree"] else ("NOT EQUAL", BAD)
    lines.append(Line("bits per byte", bits[0], bits[1], *agree))
    for what, key, verdict in (
        ("rows routed", "rows_routed", ("", GOOD)),
        ("rows computed", "rows_computed", exact),
    ):
        lines.append(Line(what, f"{ours[key]:,}", f"{theirs[key]:,}", *verdict))
    return lines


def difference_line(document: Document) -> str:
    """The differences of the two outputs in one sentence."""
    moved = document["slots_routed_differently"]
    text = (
        f"largest logit difference {number(document['max_logit_difference_same_experts'], '.2g')}"
        " where both took the same experts"
    )
    if moved:
        text += (
            f", {number(document['max_logit_difference'], '.2g')} after near ties: {moved:,} of "
            f"{document['moesaic']['rows_routed']:,} slots went to another expert"
        )
    flipped = f"{document['top_byte_differs']:,} of {document['bytes']:,}"
    unit = document.get("unit", "bytes").removesuffix("s")
    return f"{text}; likeliest {unit} differs at {flipped} positions"


def headline(document: Document) -> str:
    """What ran, on what, and whether to its end."""
    part = "" if document["status"] == "complete" else f" of {document['planned_bytes']:,}"
    state = "" if document["status"] == "complete" else ", INTERRUPTED"
    unit = document.get("unit", "bytes")
    return (
        f"{document['text']}: {document['bytes']:,}{part} {unit} through {document['model']} "
        f"on {document['device_name']}, {document['dtype']}{state}"
    )


def experts_of(layer: Document, ids: list[int]) -> str:
    """Expert ids with their load relative to the mean."""
    return ", ".join(f"{e} {layer['load_E'][e]:.2f}x" for e in ids)


def _compact(*names: str, title: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in names:
        table.add_column(name, justify="left", no_wrap=True)
    return table


def tables(document: Document) -> Group:
    """Everything that the terminal shows of a run."""
    title = "moesaic and the sequential PyTorch baseline: median (p20-p80)"
    compare = _compact("", "moesaic", "baseline", "", title=title)
    for column in compare.columns[1:]:
        column.justify = "right"
    for line in comparison(document):
        compare.add_row(line.what, line.ours, line.theirs, Text(line.verdict, style=line.style))
    names = ("layer", "balancedness", "hottest experts", "coldest experts")
    layers = _compact(*names, title="load of the experts: 1x is an even share")
    for layer in document["layers"]:
        layers.add_row(
            str(layer["layer"]),
            f"{layer['balancedness']:.2f}",
            Text(experts_of(layer, layer["hot"]), style="red"),
            Text(experts_of(layer, layer["cold"]), style="blue"),
        )
    lines = (headline(document), difference_line(document))
    first, second = (Text(line) for line in lines)
    return Group(first, "", compare, "", second, "", layers, "")


def print_tables(document: Document, console: Console) -> None:
    """Print them."""
    console.print(tables(document))
