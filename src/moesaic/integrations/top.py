"""`moesaic top`: a live view of a watched job, from its Prometheus endpoint or its JSON lines.

Both sources become the same `View`; drawing it is a function of it. `moesaic profile` shows a
recorded routing trace in the same way.
"""

from __future__ import annotations

import contextlib
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from ..runtime.observe import replay
from ..runtime.profile import Profile
from ..trace import read_trace
from .recording import last_profile

SAMPLE = re.compile(r"^(moesaic_\w+)(?:\{(.*)\})? (\S+)$")
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
BARS = "▁▂▃▄▅▆▇█"
WIDTH = 32


@dataclass
class Row:
    """One layer of a view; `load_E` is empty where the source does not show single experts."""

    balancedness: float = 1.0
    hot: int = 0
    cold: int = 0
    tokens: float = 0.0
    drifts: int = 0
    load_E: dict[int, float] = field(default_factory=dict)


@dataclass
class View:
    """What one look at a job showed."""

    steps: int = 0
    tokens_per_s: float = 0.0
    failures: float = 0.0
    rows: dict[str, Row] = field(default_factory=dict)


def view_of_profile(profile: Profile) -> View:
    """The view of one line of JSON."""
    rows = {
        layer.name: Row(
            layer.balancedness, len(layer.hot), len(layer.cold), layer.tokens,
            int(layer.drifted), dict(enumerate(layer.ewma_E)),
        )
        for layer in profile.layers
    }  # fmt: skip
    return View(profile.step + 1, profile.tokens_per_s, 0.0, rows)


def view_of_metrics(text: str) -> View:
    """The view of what a Prometheus endpoint says.

    Raises:
        ValueError: it says nothing of moesaic.
    """
    view, found = View(), False
    names = {"moesaic_hot_experts": "hot", "moesaic_cold_experts": "cold"}
    names |= {"moesaic_balancedness": "balancedness", "moesaic_tokens_total": "tokens"}
    names |= {"moesaic_drifts_total": "drifts"}
    for line in text.splitlines():
        if not (match := SAMPLE.match(line)):
            continue
        found = True
        name, value = match.group(1), float(match.group(3))
        labels = dict(LABEL.findall(match.group(2) or ""))
        if name == "moesaic_steps_total":
            view.steps = int(value)
        elif name == "moesaic_tokens_per_second":
            view.tokens_per_s = value
        elif name == "moesaic_profiler_failures_total":
            view.failures += value
        elif name in names:
            row = view.rows.setdefault(labels["layer"], Row())
            kind = float if names[name] in ("balancedness", "tokens") else int
            setattr(row, names[name], kind(value))
        elif name == "moesaic_expert_load":
            row = view.rows.setdefault(labels["layer"], Row())
            row.load_E[int(labels["expert"])] = value
    if not found:
        raise ValueError("no metrics of moesaic there; is it the endpoint of a watched job?")
    return view


def read(source: str) -> View:
    """One look at a source: http(s)://..., or the path of a file of JSON lines.

    Raises:
        OSError, ValueError: it cannot be reached or read, or says nothing of moesaic.
    """
    if source.startswith(("http://", "https://")):
        try:
            with urlopen(source, timeout=5) as answer:
                return view_of_metrics(answer.read().decode())
        except URLError as error:
            raise OSError(f"cannot reach {source}: {error.reason}") from error
    profile = last_profile(source)
    if profile is None:
        raise ValueError(f"{source}: no profile yet; does the job write JSON lines there?")
    return view_of_profile(profile)


def strip(load_E: dict[int, float]) -> Any:
    """The experts' loads as bars, neighbours joined (their maximum) where there are too many."""
    from rich.text import Text

    loads = [load_E[expert] for expert in sorted(load_E)]
    mean = sum(loads) / len(loads) if loads else 0.0
    size = -(-len(loads) // WIDTH) or 1
    text = Text()
    for first in range(0, len(loads), size):
        relative = max(loads[first : first + size]) / mean if mean else 0.0
        style = "red" if relative >= 2 else "blue" if relative <= 0.25 else ""
        text.append(BARS[min(7, int(relative * 2 + 1e-6))], style)
    return text


def draw(view: View, source: str) -> Any:
    """The view as a rich table."""
    from rich.table import Table
    from rich.text import Text

    title = f"{source} · step {view.steps} · {view.tokens_per_s:,.0f} tokens/s"
    if view.failures:
        title += f" · {view.failures:.0f} failures of the profiler, see its log"
    table = Table(title=title, box=None, header_style="bold", title_justify="left")
    for head in ("layer", "mean/max", "hot", "cold", "drift", "tokens", "experts (load ÷ mean)"):
        side: Any = "left" if head[0] in "le" else "right"
        table.add_column(head, justify=side, no_wrap=True)
    for name, row in view.rows.items():
        cells = (f"{row.balancedness:.2f}", str(row.hot), str(row.cold), str(row.drifts))
        table.add_row(Text(name), *cells, f"{row.tokens:,.0f}", strip(row.load_E))
    return table


def show_trace(path: Path, *, every: int, out: Path | None) -> int:
    """Replay a routing trace as if it were watched, a profile every `every` steps; show the last.

    Args:
        out: where all profiles go as JSON lines, a new file.

    Raises:
        OSError: a file cannot be read or written, or `out` exists.
        ValueError: the trace is damaged or empty, or see `observe.replay`.
    """
    from rich.console import Console

    last, drifts = None, 0
    with contextlib.ExitStack() as stack:
        file = None if out is None else stack.enter_context(out.open("x", encoding="utf-8"))
        for profile in replay(read_trace(path), every=every):
            last = profile
            drifts += sum(layer.drifted for layer in profile.layers)
            if file is not None:
                file.write(profile.to_json() + "\n")
    if last is None:
        raise ValueError(f"{path}: the trace has no steps")
    console = Console()
    shown = draw(view_of_profile(last), str(path))
    Console(width=console.width if console.is_terminal else 120).print(shown)
    print(f"alarms of drift, all layers and steps: {drifts}")
    return 0


def main(source: str, *, interval_s: float = 1.0, once: bool = False) -> int:
    """Show a job until interrupted, or once; a source that goes away is said so and awaited.

    Raises:
        OSError, ValueError: the first look fails.
    """
    from rich.console import Console, Group
    from rich.live import Live

    console = Console()
    shown = draw(read(source), source)
    if once or not sys.stdout.isatty():
        Console(width=console.width if console.is_terminal else 120).print(shown)
        return 0
    with Live(shown, console=console, screen=True, auto_refresh=False) as live:
        while True:
            live.refresh()
            time.sleep(interval_s)
            try:
                shown = draw(read(source), source)
                live.update(shown)
            except (OSError, ValueError) as error:
                live.update(Group(shown, f"waiting: {error}"))
