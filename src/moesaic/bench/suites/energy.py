"""Suite `energy`: joules per token of a layer, gross and above idle, and how well they repeat.

    T tokens

Every cell is a window of calls without a gap, from one step of the energy counter to another, taken
`REPEATS` times; rounds go over all cells in random order, so that heat and clocks fall on all of
them alike. The spread is (largest - smallest) / median. Idle windows come between the rounds.

- `energy`: the layer under a CUDA graph, uniform routing, fresh inputs in rotation.
- `idle`: nothing runs. `ceiling`: a large product and a large copy, from which the model of
  attribution has its joules per flop and per byte.
- `model`: what that model says of the layer's cells beside what was measured above idle.
- `meters`: one window by zeus and by NVML's counter, and the power that NVML shows beside both.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ...cost import expert_flops
from ...functional import moe
from ...hardware.energy import Energy, EnergyModel, Reading, Repeats, Unavailable, attribute
from ...hardware.meter import EnergyMeter, Sustained, open_meter
from ...hardware.nvml import Gpu, NotAvailable, Utilisation, UtilisationTrace, open_gpu
from ..results import Line, Target, at_least, at_most, make_line, stamp
from ..runtime_pages import energy_section
from ..suite import Cell, Context, Suite
from ..timing import capture, reason
from ..workloads import MODELS, Inputs, Model, make_inputs, make_weights

NAME = "energy"
MODEL = "Qwen3-30B-A3B"
TOKENS = (1, 128, 8192)
REPEATS = 5
WINDOW_S = 1.2
SPREAD = 0.05
COPY_BYTES, GEMM = 2**32, 8192
SHARES = ("sm", "occupancy", "tensor", "dram")
WORKS = {"idle": "idle", "copy": "ceiling", "gemm": "ceiling"}


def cells() -> list[Cell]:
    """Idle, the two ceilings, and the layer at three sizes."""
    return [
        Cell("-", 0, "-", clock="idle"),
        Cell("copy", 0, "-", clock="ceiling"),
        Cell("gemm", 0, "-", clock="ceiling"),
        *(Cell(MODEL, tokens, clock="energy") for tokens in TOKENS),
    ]


@dataclass
class Work:
    """What a window repeats, and what one call of it is: tokens, flops, bytes, calls of a layer."""

    call: Callable[[], Any] | None
    tokens: int = 0
    layers: int = 1
    flops: float = 0.0
    bytes: float = 0.0
    inputs: list[Inputs] = field(default_factory=list)


def layer_work(model: Model, cell: Cell, device: torch.device, seed: int) -> Work:
    """A graph of eight calls of the layer on inputs of their own (the calls alone on a CPU)."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype: torch.dtype = getattr(torch, cell.dtype)
    spec = model.spec()
    weights = make_weights(spec, dtype=dtype, generator=generator)
    inputs = [
        make_inputs(model, cell.tokens, cell.routing, dtype=dtype, generator=generator)
        for _ in range(8)
    ]
    calls = [partial(moe, *one, weights=weights, spec=spec) for one in inputs]

    def all_calls() -> None:
        for call in calls:
            call()

    with torch.no_grad():
        run = capture(calls).graph.replay if device.type == "cuda" else all_calls
    flops = sum(expert_flops(spec, one.topk_ids_TK.numel()) for one in inputs)
    return Work(run, cell.tokens * len(inputs), len(inputs), flops=flops, inputs=inputs)


def make_work(cell: Cell, device: torch.device, seed: int, models: dict[str, Model]) -> Work:
    """The work of a cell, on fresh random data."""
    if cell.clock == "idle":
        return Work(None)
    if cell.clock == "energy":
        return layer_work(models[cell.model], cell, device, seed)
    small = device.type != "cuda"
    if cell.model == "copy":
        source = torch.randn((2**20 if small else COPY_BYTES) // 4, device=device)
        target = torch.empty_like(source)
        return Work(lambda: target.copy_(source), bytes=2.0 * source.nbytes)
    size = 128 if small else GEMM
    dtype = torch.float32 if small else torch.bfloat16
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)
    return Work(lambda: torch.mm(left, right, out=out), flops=2.0 * size**3)


@dataclass(frozen=True)
class Window:
    """One window: what the meter read over how many calls, and what GPM saw."""

    sustained: Sustained
    points: tuple[Utilisation, ...] = ()
    why: str | None = None


@dataclass(frozen=True)
class Meters:
    """What the machine lets us read."""

    meter: EnergyMeter
    gpu: Gpu | None
    why: str | None = None

    def window(self, work: Work) -> Window:
        """One window of a work; of doing nothing where it has no call."""
        if self.gpu is None:
            return Window(self._sustain(work), why=self.why)
        with UtilisationTrace(self.gpu) as trace:
            sustained = self._sustain(work)
        return Window(sustained, tuple(trace.points), trace.why)

    def _sustain(self, work: Work) -> Sustained:
        if work.call is None:
            return Sustained(self.meter.idle(WINDOW_S), 0)
        return self.meter.sustain(work.call, seconds=WINDOW_S)


def open_meters(device: torch.device) -> Meters:
    """The meters of a device; never raises."""
    try:
        gpu = open_gpu(device)
        gpu.check_gpm()
    except NotAvailable as error:
        return Meters(open_meter(device), None, str(error))
    return Meters(open_meter(device), gpu)


def utilisation(windows: Sequence[Window]) -> dict[str, Any]:
    """Means over the inner GPM points of all windows, or why there are none."""
    points = [p for w in windows for p in (w.points[1:-1] if len(w.points) > 4 else w.points)]
    if not points:
        whys = [w.why for w in windows if w.why]
        return {"gpm": f"not available: {whys[0] if whys else 'no point was read'}"}
    length = sum(p.seconds for p in points)
    means = {n: sum(getattr(p, n) * p.seconds for p in points) / length for n in SHARES}
    return {f"{name}_activity": value for name, value in means.items()}


def values_of(work: Work, windows: Sequence[Window], idle_w: float | None) -> Line:
    """The line of a cell: medians over its windows and their spread; or why there is none."""
    readings = [w.sustained.reading for w in windows]
    energies = [r for r in readings if isinstance(r, Energy)]
    if len(energies) < len(readings) or not energies:
        lost = next((r for r in readings if isinstance(r, Unavailable)), None)
        return {"error": str(lost or "not available: no window was taken")}
    watts = Repeats(tuple(e.watts for e in energies))
    values: Line = {"watts": watts.median, "watts_spread": watts.spread, "idle_watts": idle_w}
    values |= {"share_of_tdp": watts.median / energies[0].tdp_w, "meter": energies[0].meter}
    values |= {"samples": len(energies), "window_s": sum(e.seconds for e in energies)}
    values |= utilisation(windows)
    if work.call is None:
        return values | {"spread": watts.spread}
    pairs = [(e, w.sustained.calls) for e, w in zip(energies, windows, strict=True)]
    seconds = Repeats(tuple(e.seconds / calls for e, calls in pairs))
    joules = Repeats(tuple(e.joules / calls for e, calls in pairs))
    values |= {"ms": seconds.median * 1e3 / work.layers, "joules_per_call": joules.median}
    values |= {"spread": joules.spread, "tflops": work.flops / seconds.median / 1e12}
    net = None if idle_w is None else joules.median - idle_w * seconds.median
    values["net_joules_per_call"] = net
    if work.tokens:
        values |= {"tokens_per_s": work.tokens / seconds.median}
        values |= {"joules_per_token": joules.median / work.tokens}
        values |= {"tokens_per_joule": work.tokens / joules.median}
        if net is not None and net > 0:
            values |= {"net_joules_per_token": net / work.tokens}
            values |= {"net_tokens_per_joule": work.tokens / net}
        values["repeats"] = [float(f"{j / work.tokens:.5g}") for j in joules.values]
    if work.bytes:
        values["gbps"] = work.bytes / seconds.median / 1e9
    return values


def fit_model(works: dict[Cell, Work], lines: dict[Cell, Line]) -> EnergyModel | None:
    """Joules per flop from the product and per byte from the copy, both above idle."""
    net: dict[str, float] = {}
    for cell, values in lines.items():
        joules, work = values.get("net_joules_per_call"), works[cell]
        if cell.clock == "ceiling" and joules and joules > 0:
            net[cell.model] = joules / (work.flops or work.bytes)
    if len(net) < 2:
        return None
    return EnergyModel(joules_per_flop=net["gemm"], joules_per_byte=net["copy"])


def modelled(
    work: Work, cell: Cell, values: Line, energy_model: EnergyModel, model: Model
) -> Line | None:
    """What the model says of a layer's call beside the measured joules, which it shares out."""
    measured = values.get("net_joules_per_call")
    if not measured:
        return None
    spec, itemsize = model.spec(), getattr(torch, cell.dtype).itemsize
    rows = [
        one.topk_ids_TK.flatten().long().bincount(minlength=spec.num_experts).tolist()
        for one in work.inputs
    ]
    said = sum(sum(energy_model.joules(spec, one, itemsize)) for one in rows)
    energy = Energy(joules=measured, seconds=1.0, tdp_w=1.0, meter="-")
    shared = attribute(
        energy, energy_model, spec, [sum(e) for e in zip(*rows, strict=True)], itemsize
    )
    ordered = sorted(shared.joules_E)
    return {
        "joules_per_flop": energy_model.joules_per_flop,
        "joules_per_byte": energy_model.joules_per_byte,
        "net_joules_per_call": measured,
        "modelled_joules_per_call": said,
        "modelled_over_measured": said / measured,
        "label": shared.label,
        "attributed_sum": sum(ordered),
        "attributed_most": ordered[-1],
        "attributed_least": ordered[0],
    }


def compare_meters(meters: Meters, device: torch.device, work: Work) -> Line:
    """One window by every meter there is, and the power that NVML shows at its end."""
    values: Line = {}
    readings: dict[str, Reading] = {}

    def run() -> None:
        sustained = inner.sustain(work.call or (lambda: None), seconds=2 * WINDOW_S)
        readings["nvml steps"] = sustained.reading
        values["shown_watts"] = meters.gpu.watts() if meters.gpu else None

    inner = open_meter(device, sources=("nvml",))
    outer = {name: open_meter(device, sources=(name,)) for name in ("zeus", "nvml")}
    readings["zeus"] = outer["zeus"].measure(
        lambda: readings.__setitem__("nvml", outer["nvml"].measure(run))
    )
    for name, reading in readings.items():
        key = name.replace(" ", "_")
        values[f"{key}_watts"] = reading.watts if isinstance(reading, Energy) else str(reading)
    return values


def record(context: Context, stamped: Line, cell: Cell, impl: str, values: Line) -> None:
    """Keep one line and tell it."""
    fixed = stamped | {"suite": NAME, "clock": cell.clock, "model": cell.model}
    fixed |= {"tokens": cell.tokens, "routing": cell.routing, "dtype": cell.dtype}
    mode = "graph" if cell.clock == "energy" else "eager"
    context.record([make_line(fixed, impl=impl, mode=mode, **values)])
    shown: tuple[str, ...] = (
        "watts",
        "joules_per_token",
        "net_joules_per_token",
        "spread",
        "error",
        "zeus_watts",
    )
    shown += ("nvml_watts", "modelled_over_measured", "sm_activity", "dram_activity")
    text = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
                     for k in shown if (v := values.get(k)) is not None)  # fmt: skip
    context.say(f"{cell.clock} {cell.model} T={cell.tokens}: {text}")


def run(
    wanted: Sequence[Cell], context: Context, *, models: dict[str, Model] | None = None
) -> None:
    """Take every cell's windows in rounds and record them; what cannot be measured says why."""
    known = MODELS if models is None else models
    stamped, meters = stamp(context.device), open_meters(context.device)
    for text in meters.meter.passed_over:
        context.say(f"not taken: {text}")
    works, failed = {}, {}
    for number, cell in enumerate(wanted):
        try:
            works[cell] = make_work(cell, context.device, context.seed + number, known)
        except Exception as error:
            failed[cell] = reason(error)
    windows: dict[Cell, list[Window]] = {cell: [] for cell in works}
    order = random.Random(context.seed)
    for _ in range(REPEATS):
        if context.elapsed_s() > context.budget_s:
            context.say("out of time, fewer repeats")
            break
        turn = list(works)
        order.shuffle(turn)
        for cell in turn:
            windows[cell].append(meters.window(works[cell]))
    idle = [w.sustained.reading for c, some in windows.items() if c.clock == "idle" for w in some]
    powers = tuple(r.watts for r in idle if isinstance(r, Energy))
    idle_w = Repeats(powers).median if powers else None
    lines = {cell: values_of(works[cell], windows[cell], idle_w) for cell in works}
    impls = {"idle": "idle", "ceiling": "torch", "energy": "moesaic"}
    for cell in wanted:
        values = lines.get(cell) or {"error": failed.get(cell, "not measured")}
        record(context, stamped, cell, impls[cell.clock], values)
    fitted = fit_model(works, lines)
    for cell in works:
        if fitted and cell.clock == "energy":
            said = modelled(works[cell], cell, lines[cell], fitted, known[cell.model])
            if said:
                place = Cell(cell.model, cell.tokens, cell.routing, cell.dtype, "model")
                record(context, stamped, place, "moesaic", said)
    gemm = next((w for c, w in works.items() if c.model == "gemm"), None)
    if gemm is not None and meters.meter.why is None:
        values = compare_meters(meters, context.device, gemm)
        record(context, stamped, Cell("gemm", 0, "-", clock="meters"), "torch", values)
    del works
    gc.collect()


def summarize(lines: Sequence[Line]) -> list[Target]:
    """Repeatability of every cell, the model's distance from what was measured, failures."""
    kept = [x for x in lines if x["clock"] in ("idle", "ceiling", "energy")]
    spreads = [x["spread"] for x in kept if x.get("spread") is not None]
    layer = [x["spread"] for x in kept if x["clock"] == "energy" and x.get("spread") is not None]
    said = [x["modelled_over_measured"] for x in lines if x.get("modelled_over_measured")]
    off = [max(x, 1 / x) for x in said]
    meters = [x for x in lines if x["clock"] == "meters"]
    ratios = [
        abs(x["zeus_watts"] / x["nvml_watts"] - 1)
        for x in meters
        if isinstance(x.get("zeus_watts"), float) and isinstance(x.get("nvml_watts"), float)
    ]
    windows = [x["samples"] for x in kept if x["samples"]]
    failed = [x for x in kept if x.get("error")]
    return [
        at_most("spread of joules per token, worst size", max(layer, default=None), SPREAD),
        at_most("spread of any cell over the repeats", max(spreads, default=None), 2 * SPREAD),
        at_least("repeats of each cell", float(min(windows, default=0)), float(REPEATS)),
        at_most("zeus against NVML's counter, one window", max(ratios, default=None), 0.02),
        at_most("model of attribution against measured, worst factor", max(off, default=None), 1.5),
        at_least("cells measured", float(len(kept) - len(failed)), float(len(cells()))),
    ]  # fmt: skip


def measured(line: Line) -> Cell | None:
    """The cell that a line shows to be measured."""
    if line.get("error") or line["clock"] not in ("idle", "ceiling", "energy"):
        return None
    return Cell(line["model"], line["tokens"], line["routing"], line["dtype"], line["clock"])


SUITE = Suite(
    name=NAME,
    about="joules per token gross and above idle, activity, repeatability, attribution",
    cells=cells,
    run=run,
    summarize=summarize,
    budget_s=60.0,
    measured=measured,
    section=energy_section,
)
