"""Suite `launches`: what every launch of a layer does, by hardware counters, one cell at a time.

For cells of suites `layer` and `paper`, and with `--misses` for every one over its limit: time,
clock, and the shares of time or peak that tensor pipes, SMs, L2 and DRAM were busy, of each launch
of moesaic's layer and of the dense twin's products. `benchmarks/ncu_counters.py --suite launches`
runs them under ncu and records. Each launch runs alone there, several times over, with its memory
put back in between: what overlaps in use does not here, and the clock is not that of a GPU kept
busy. So the times of suite `layer` are the times; this says what a launch waits for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..ncu import BYTES, RATE, SHARE, TIME, Units
from ..report import Sheet, markdown, provenance, targets_sheet
from ..results import Line, Target, at_least, at_most, geomean
from ..suite import Cell, Context, Suite

CYCLES: Units = {"cycle": 1.0}
METRICS: Mapping[str, Units] = {
    "gpu__time_duration.sum": TIME,
    "sm__cycles_elapsed.avg.per_second": RATE,
    "sm__cycles_elapsed.avg": CYCLES,
    "sm__cycles_active.avg": CYCLES,
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed": SHARE,
    "lts__t_sectors.avg.pct_of_peak_sustained_elapsed": SHARE,
    "l1tex__m_xbar2l1tex_read_bytes.sum": BYTES,
    "dram__bytes_read.sum": BYTES,
    "dram__bytes_write.sum": BYTES,
}
OURS, TWIN, COPY = "moesaic", "dense-twin", "copy"
COMBINE = "combine_kernel"
SHORT_MS = 0.005
COPIED_TOKENS = 4096
"""From so many tokens on, a copy of as many bytes as the combine moves is counted too."""
GPTOSS = "gpt-oss-120b-swiglu"
MODELS = ("Qwen3-30B-A3B", "DeepSeek-V3", GPTOSS, "Qwen3-235B-A22B", "OLMoE", "Mixtral-8x7B")
PAPER = ("paper-small", "paper-medium", "paper-large")


def cells() -> list[Cell]:
    """One token, a worst case, a thousand tokens, prefill even and skewed; the paper's sizes."""
    kinds = ((1, "uniform"), (128, "worst"), (1024, "uniform"), (4096, "uniform"), (4096, "zipf1"))
    return [Cell(model, tokens, routing) for tokens, routing in kinds for model in MODELS] + [
        Cell(model, tokens) for tokens in (1024, 4096) for model in PAPER
    ]


def run(wanted: Sequence[Cell], context: Context) -> None:
    """Counters need the profiler around the process, so this only says what to start.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(
        "suite launches runs under ncu; start: python benchmarks/ncu_counters.py --suite launches"
    )


def line_values(values: Mapping[str, float]) -> dict[str, float]:
    """The keys of a line from the metrics of one launch; shares are of one, rates in TB/s."""
    seconds = values["gpu__time_duration.sum"]
    moved = values["dram__bytes_read.sum"] + values["dram__bytes_write.sum"]
    return {
        "ms": 1e3 * seconds,
        "gbps": moved / seconds / 1e9,
        "clock_ghz": values["sm__cycles_elapsed.avg.per_second"] / 1e9,
        "tensor": values["sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed"],
        "sms_active": values["sm__cycles_active.avg"] / values["sm__cycles_elapsed.avg"],
        "l2": values["lts__t_sectors.avg.pct_of_peak_sustained_elapsed"],
        "l2_to_sm_tbps": values["l1tex__m_xbar2l1tex_read_bytes.sum"] / seconds / 1e12,
        "dram_read_bytes": values["dram__bytes_read.sum"],
        "dram_written_bytes": values["dram__bytes_write.sum"],
    }


def kernel_name(name: str) -> str:
    """A kernel's name without namespaces, template and arguments.

    >>> kernel_name("void at::native::spin_kernel<long>(long)")
    'spin_kernel'
    """
    return name.split("(")[0].split("<")[0].split("::")[-1].split()[-1]


def combine_rates(lines: Sequence[Line]) -> list[float]:
    """Time of a copy over that of the combine that moves as many bytes, a number per cell."""
    copies: dict[Cell, float] = {}
    sums: dict[Cell, float] = {}
    for x in lines:
        cell = Cell(x["model"], x["tokens"], x["routing"])
        if x["ms"] and x["impl"].startswith(f"{COPY} "):
            copies[cell] = x["ms"]
        elif x["ms"] and x["impl"].endswith(f": {COMBINE}"):
            sums[cell] = x["ms"]
    return [copies[cell] / sums[cell] for cell in copies if cell in sums]


def summarize(lines: Sequence[Line]) -> list[Target]:
    """Cells of the list with moesaic and the twin counted; the combine's rate; bad lines."""
    have = {
        who: {Cell(x["model"], x["tokens"], x["routing"]) for x in lines
              if x["impl"].startswith(who) and x["ms"]}
        for who in (OURS, TWIN)
    }  # fmt: skip
    counted = have[OURS] & have[TWIN] & set(cells())
    bad = [x for x in lines if x.get("wrong") or x.get("error")]
    rates = combine_rates(lines)
    return [
        at_least("cells counted", float(len(counted)), float(len(cells()))),
        at_least(f"rate of the combine ÷ a copy's, from {COPIED_TOKENS} tokens on, geomean",
                 geomean(rates) if rates else None, 0.95),
        at_most("lines wrong or failed", float(len(bad)), 0.0),
    ]  # fmt: skip


def counters_sheet(lines: Sequence[Line]) -> Sheet:
    """A row per launch: µs, clock, then shares in per cent and rates in TB/s."""
    heads = ["model", "tokens", "routing", "launch", "µs", "GHz", "tensor %", "SMs active %",
             "L2 %", "L2 to SMs TB/s", "DRAM TB/s"]  # fmt: skip
    rows = []
    for x in lines:
        first = [x["model"], str(x["tokens"]), x["routing"], x["impl"]]
        if x["ms"] is None:
            rows.append([*first, str(x.get("error", "failed")), *[""] * 6])
            continue
        shares = [f"{100 * x[key]:.0f}" for key in ("tensor", "sms_active", "l2")]
        rates = [f"{x['l2_to_sm_tbps']:.1f}", f"{x['gbps'] / 1e3:.2f}"]
        rows.append([*first, f"{1e3 * x['ms']:.1f}", f"{x['clock_ghz']:.2f}", *shares, *rates])
    return Sheet(heads, rows)


def section(
    lines: Sequence[Line], targets: Sequence[Target], root: Path, device: str, folder: str
) -> tuple[str, dict[str, str]]:
    """Targets and one table of the launches over `SHORT_MS`, and of failures."""
    shown = [x for x in lines if x["ms"] is None or x["ms"] >= SHORT_MS]
    left = (
        f"Launches under {SHORT_MS * 1e3:.0f} µs, {len(lines) - len(shown)} of them, are left out."
    )
    parts = [provenance(lines), markdown(targets_sheet(targets)), left]
    return "\n\n".join([*parts, markdown(counters_sheet(shown))]) + "\n", {}


SUITE = Suite(
    name="launches",
    about="what bounds each launch of a layer and of its dense twin, by ncu",
    cells=cells,
    run=run,
    summarize=summarize,
    section=section,
)
