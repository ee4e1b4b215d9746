"""Suite `layer`: the bf16 layer as `impl="auto"` runs it, against its floor and the field, one GPU.

    T tokens · H hidden width · I intermediate width · E experts · K top-k · S = T*K routed rows

Six models, 1 to 32768 tokens, four routings: uniform, Zipf(1), `worst` (every token to the same K
experts) and `curve`, the embedded model's loads on held-out text resampled to E. Two clocks:
`experts` from ids and weights to the output, `layer` from router logits (softmax, top-k, divided by
the sum, for every model). Two more are windows of some cells (`layer_windows`): `energy`, joules a
token, and `host`, what an eager call of one token costs the host. gpt-oss-120b stands here for its
sizes only, with plain SwiGLU; the name says so. transformers' eager loop, slow everywhere, is
measured on the main cells, and on those of two models Liger Kernel, where it is installed: it
waits for the device, so no graph holds it, and tunes itself for long.

Cells come in the order of their importance over all models, and one whose estimate does not fit
into the time left is left out, so that a run can be made in pieces with ``--missing``.
"""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from ...cost import H200_READ_BYTES_PER_S, expert_flops, layer_bytes
from ...dispatch import choose_impl
from ...functional import route
from ...hardware.energy import Unavailable
from ...hardware.meter import EnergyMeter, open_meter
from ...types import RouterSpec
from ..baselines import BASELINES, LIGER, Forward
from ..layer_page import layer_section
from ..layer_targets import layer_targets
from ..layer_windows import HOST_MODEL, OTHER, WINDOW_S, has_other, measure_windows
from ..layers import Candidate, Loaded, Machine, candidates_of, load, measure_cell
from ..results import Line, Target, at_least, at_most, stamp
from ..suite import Cell, Context, Suite
from ..timing import DeviceLost, eager_sampler, reason
from ..workloads import MODELS, Inputs, Model, weight_bytes
from .triton import failed_line, machine_of, told

NAME = "layer"
SHAPES = {
    name: MODELS[name]
    for name in ("Qwen3-30B-A3B", "Mixtral-8x7B", "DeepSeek-V3", "Qwen3-235B-A22B", "OLMoE")
} | {"gpt-oss-120b-swiglu": Model("gpt-oss-120b-swiglu", 128, 4, 2880, 2880)}
TOKENS = (1, 4, 16, 64, 128, 512, 1024, 4096, 8192, 32768)
MEASURED = SHAPES | {HOST_MODEL.name: HOST_MODEL}
MAIN_TOKENS = (1, 16, 128, 1024, 8192)
ROUTINGS = ("uniform", "zipf1", "curve", "worst")
ENERGY_TOKENS = (1, 128, 8192)
CLOCKS = ("experts", "host", "energy", "layer")
LOOP = "transformers-eager"
PEER_MODELS = ("Qwen3-30B-A3B", "Mixtral-8x7B")
GATHER_LIMIT_BYTES = 8 * 2**30
RECORD_EVERY_S = 5.0
GEMM_FLOPS_PER_S = 6e14


def rank(cell: Cell) -> tuple[int, bool, bool]:
    """What is measured first: clock `experts`, then uniform routing, then the main token counts."""
    return (
        CLOCKS.index(cell.clock), cell.routing != "uniform", cell.tokens not in MAIN_TOKENS
    )  # fmt: skip


def cells() -> list[Cell]:
    """Every cell, the most important first; within a rank by model."""
    grid = [
        Cell(model, tokens, routing, clock=clock)
        for clock in ("experts", "layer")
        for model in SHAPES
        for routing in ROUTINGS
        for tokens in TOKENS
    ]
    grid += [Cell(model, 1, clock="host") for model in (HOST_MODEL.name, *SHAPES)]
    grid += [Cell(model, t, clock="energy") for model in SHAPES for t in ENERGY_TOKENS]
    return sorted(grid, key=rank)


def has_loop(cell: Cell) -> bool:
    """Whether transformers' eager loop is measured: clock `experts`, uniform, main token counts."""
    return rank(cell) == (0, False, False)


def load_curve() -> list[float]:
    """Shares of the embedded model's experts on its held-out text, largest first."""
    text = files("moesaic").joinpath("assets/load_curve.json").read_text(encoding="utf-8")
    shares: list[float] = json.loads(text)["shares"]
    return shares


def as_logits(inputs: Inputs, num_experts: int) -> tuple[Tensor, Tensor]:
    """Hidden states, and fp32 logits (T, E) whose softmax top-k gives the inputs' ids and weights.

    The experts not chosen lie at random under all that are.
    """
    hidden_TH, ids_TK, weights_TK = inputs
    low_TE = -40.0 - torch.rand(ids_TK.shape[0], num_experts, device=ids_TK.device)
    return hidden_TH, low_TE.scatter(1, ids_TK.long(), weights_TK.float().log())


def routed(forward: Forward, model: Model, ours: bool) -> Forward:
    """A layer from (hidden, logits): with moesaic's `route`, or torch's softmax and top-k."""
    router = RouterSpec(num_experts=model.num_experts, top_k=model.top_k)

    def call(hidden_TH: Tensor, logits_TE: Tensor) -> Tensor:
        if ours:
            routing = route(logits_TE, router)
            return forward(hidden_TH, routing.topk_ids_TK, routing.topk_weights_TK)
        weights_TK, ids_TK = logits_TE.softmax(-1).topk(model.top_k, dim=-1)
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return forward(hidden_TH, ids_TK, weights_TK.to(hidden_TH.dtype))

    return call  # type: ignore[return-value]


@dataclass(frozen=True)
class Entry:
    """A model ready on the device: what each clock times."""

    candidates: dict[str, list[Candidate]]
    loaded: dict[str, Loaded]

    def of(self, cell: Cell) -> tuple[Loaded, list[Candidate]]:
        """The forwards and candidates of one cell."""
        clock = "layer" if cell.clock == "layer" else "experts"
        some = self.candidates[clock]
        rare = {LOOP: has_loop(cell), LIGER: has_loop(cell)}
        return self.loaded[clock], [c for c in some if rare.get(c.name, True)]


def make_entry(
    model: Model, dtype: torch.dtype, machine: Machine, *, impl: str, seed: int
) -> Entry:
    """Weights made once, every candidate built on them, and the same from logits."""
    given = candidates_of(model, impl)
    if model.name in PEER_MODELS and find_spec("liger_kernel") is not None:
        peer = BASELINES[LIGER]
        given.append(Candidate(peer.name, peer.build, lambda inputs: inputs, peer.refuses))
    experts = load(model, dtype, given, machine, seed)
    prepare = partial(as_logits, num_experts=model.num_experts)
    from_logits = {
        name: [routed(forward, model, name == "moesaic") for forward in forwards]
        for name, forwards in experts.forwards.items()
    }
    layer = Loaded(model, dtype, experts.sets, from_logits, experts.errors)
    later = [replace(c, prepare=prepare) for c in given]
    return Entry({"experts": given, "layer": later}, {"experts": experts, "layer": layer})


def scratch_bytes(model: Model, tokens: int, itemsize: int = 2) -> int:
    """Memory that a cell may need beside weights: the rows of six candidates and graph pools."""
    row = 3 * model.hidden_size + 3 * model.intermediate_size
    return 6 * tokens * model.top_k * row * itemsize


@dataclass
class Shelf:
    """Models kept on the device, the one used longest ago put away when memory is short."""

    machine: Machine
    models: dict[str, Model]
    impl: str
    seed: int
    memory_bytes: float
    meter: EnergyMeter = field(default_factory=lambda: EnergyMeter(Unavailable("not asked")))
    window_s: float = WINDOW_S
    entries: dict[tuple[str, str], Entry] = field(default_factory=dict)

    def _bytes(self, key: tuple[str, str]) -> int:
        itemsize: int = getattr(torch, key[1]).itemsize
        return weight_bytes(self.models[key[0]].spec(), itemsize)

    def take(self, cell: Cell) -> Entry:
        """The model of a cell, made if it is not here."""
        key = (cell.model, cell.dtype)
        model = self.models[cell.model]
        entry = self.entries.pop(key, None)
        room = self.memory_bytes - scratch_bytes(model, cell.tokens) - self._bytes(key)
        while self.entries and sum(map(self._bytes, self.entries)) > room:
            del self.entries[next(iter(self.entries))]
            tidy(self.machine.device)
        if entry is None:
            dtype = getattr(torch, cell.dtype)
            entry = make_entry(model, dtype, self.machine, impl=self.impl, seed=self.seed)
        self.entries[key] = entry
        return entry


def tidy(device: torch.device) -> None:
    """Give memory that nothing uses back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def crowded(device: torch.device) -> bool:
    """Whether the process holds over half of the device's memory."""
    if device.type != "cuda":
        return False
    total = torch.cuda.get_device_properties(device).total_memory
    return torch.cuda.memory_reserved(device) > total / 2


def call_s(cell: Cell, model: Model) -> float:
    """Seconds of one call at rates near the floor's."""
    spec, rows = model.spec(), cell.tokens * model.top_k
    active = min(model.num_experts, rows)
    num_bytes = layer_bytes(spec, cell.tokens, active, getattr(torch, cell.dtype).itemsize)
    return max(num_bytes / H200_READ_BYTES_PER_S, expert_flops(spec, rows) / GEMM_FLOPS_PER_S)


def sampling_s(cell: Cell, model: Model) -> float:
    """Seconds to spend on a cell's samples, over all candidates."""
    return min(1.0, 0.25 + 100 * call_s(cell, model))


def estimate_s(cell: Cell, model: Model) -> float:
    """Seconds that a cell takes: set-up, samples, some 50 calls of each of four candidates.

    Compiling kernels, which happens once per machine, is not counted.
    """
    if cell.clock == "host":
        return 4.0
    if cell.clock == "energy":
        return 1.0 + (1 + has_other(cell, OTHER)) * (WINDOW_S + 0.5)
    loop_s = 10 * model.num_experts * 1e-4 if has_loop(cell) else 0.0
    return 0.3 + sampling_s(cell, model) + 200 * call_s(cell, model) + loop_s


@dataclass
class Pile:
    """Lines on their way to disk, written every few seconds: a whole file is slow to rewrite."""

    context: Context
    lines: list[Line] = field(default_factory=list)
    written_s: float = 0.0

    def add(self, lines: Sequence[Line]) -> None:
        """Keep lines, and write when the last time is `RECORD_EVERY_S` ago."""
        self.lines += lines
        if self.context.elapsed_s() - self.written_s >= RECORD_EVERY_S:
            self.write()

    def write(self) -> None:
        """Write what has gathered."""
        if self.lines:
            self.context.record(self.lines)
        self.lines, self.written_s = [], self.context.elapsed_s()


def measure(cell: Cell, shelf: Shelf, stamped: Line, seed: int) -> list[Line]:
    """The lines of one cell; moesaic's say which implementation `auto` chose, as `path`."""
    machine = shelf.machine
    if cell.tokens >= 4096 or crowded(machine.device):
        tidy(machine.device)
    loaded, candidates = shelf.take(cell).of(cell)
    lines = measure_windows(
        loaded, cell, candidates, machine, meter=shelf.meter, seed=seed, stamped=stamped,
        suite=NAME, seconds=shelf.window_s,
    ) if cell.clock in ("host", "energy") else measure_cell(
        loaded, cell, candidates, machine, budget_s=sampling_s(cell, loaded.model), seed=seed,
        stamped=stamped, suite=NAME, curve=load_curve(),
        eager=partial(eager_sampler, target_ms=3.0, whole=False),
    )  # fmt: skip
    path = choose_impl(shelf.impl, machine.device, loaded.dtype, loaded.model.spec())
    return [x | {"path": path} if x["impl"] == "moesaic" else x for x in lines]


def make_shelf(context: Context, stamped: Line, models: dict[str, Model], impl: str) -> Shelf:
    """An empty shelf on the context's device, its ceilings recorded."""
    machine = replace(machine_of(context, stamped, NAME), copy_limit_bytes=GATHER_LIMIT_BYTES)
    memory = math.inf
    tidy(context.device)
    if context.device.type == "cuda":
        memory = 0.9 * torch.cuda.get_device_properties(context.device).total_memory
    return Shelf(machine, models, impl, context.seed, memory, open_meter(context.device))


def run(
    wanted: Sequence[Cell],
    context: Context,
    *,
    impl: str = "auto",
    models: dict[str, Model] = MEASURED,
) -> None:
    """Measure cells in their order while their estimates fit into the budget of the context.

    A cell that fails is recorded with its error; one that does not fit is named and left out.

    Raises:
        DeviceLost: the GPU answers no more.
    """
    stamped, pile = stamp(context.device), Pile(context)
    shelf = make_shelf(context, stamped, models, impl)
    left_out = 0
    try:
        for number, cell in enumerate(wanted):
            if context.elapsed_s() + estimate_s(cell, models[cell.model]) > context.budget_s:
                left_out += 1
                continue
            try:
                lines = measure(cell, shelf, stamped, context.seed + number)
            except DeviceLost:
                raise
            except Exception as error:
                lines = [failed_line(stamped, NAME, cell, reason(error)) | {"clock": cell.clock}]
            pile.add(lines)
            context.say(f"{cell.clock} {told(lines, 'transformers-grouped_mm')}")
    finally:
        pile.write()
    if left_out:
        context.say(f"out of time: {left_out} cells left out; run again with --missing")


def measured(line: Line) -> Cell | None:
    """The cell of a right time of moesaic under a graph; eager alone leaves it missing."""
    mode = "eager" if line["clock"] == "host" else "graph"
    if line["impl"] != "moesaic" or line["mode"] != mode or not line["ms"] or line.get("wrong"):
        return None
    return Cell(line["model"], line["tokens"], line["routing"], line["dtype"], line["clock"])


def summarize(lines: Sequence[Line], grid: Sequence[Cell] | None = None) -> list[Target]:
    """The targets of clock `experts` over the grid, then of the windows."""
    every = cells() if grid is None else grid
    wanted = [c for c in every if c.clock == "experts"]
    found = layer_targets(lines, wanted, [c for c in wanted if has_loop(c)])
    return [*found, *window_targets(lines, every)]


def window_targets(lines: Sequence[Line], every: Sequence[Cell]) -> list[Target]:
    """Host time of an eager call of one token, and how many cells have their energy."""
    mine = [x for x in lines if x["impl"] == "moesaic" and x["ms"] and not x.get("wrong")]
    host = [1e3 * x["ms"] for x in mine if x["clock"] == "host"]
    energy = sum(x["clock"] == "energy" for x in mine)
    wanted = sum(c.clock == "energy" for c in every)
    return [
        at_most("highest host µs of an eager call, one token", max(host, default=None), 25.0),
        at_least("cells with joules per token", float(energy), float(wanted)),
    ]


def section(
    lines: Sequence[Line], targets: Sequence[Target], root: Path, device: str, folder: str
) -> tuple[str, dict[str, str]]:
    """The page's part."""
    name, results = f"{NAME}-{device}", root / device
    return layer_section(lines, targets, name, folder, cells(), measured, results)


SUITE = Suite(
    name=NAME,
    about="the layer as impl auto runs it, against its floor and the field, on one GPU",
    cells=cells,
    run=run,
    summarize=summarize,
    budget_s=1200.0,
    measured=measured,
    section=section,
)
