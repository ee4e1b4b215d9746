"""Suite `transformers`: whole models end to end, against transformers' own best setting.

Qwen3-30B-A3B and Mixtral-8x7B in full size with random weights in bf16: prefill of 8192 tokens, and
decode steps of 1, 16, 64 and 128 sequences with a cache of 512 positions. Everyone gets the same:
static cache, the decoder layer compiled, the step captured into a CUDA graph, timed in turn in one
process. The rivals are transformers' `grouped_mm` and, where it copies no more weights than there
are, `batched_mm`. `...-tuned` is compiled by Inductor with `coordinate_descent_tuning`: it then
writes products of one row itself and reads chosen experts in place, which makes `batched_mm`
another implementation, and is measured of both sides wherever there is a `batched_mm`. A speed-up
is that of the faster of ours over the fastest rival.

Clocks: `model` is the step. `rest` is the step with every MoE block replaced by the identity,
`moe` our MoE blocks alone on the inputs of the model: their sum is what Amdahl's law lets ours be.
The errors of the `moe` lines compare each block with grouped_mm's on the same input. Clock `parts`
splits the replay of our fastest step, see `step_parts`, with the profiler on, which slows it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..results import Line, Target, at_least, make_line, stamp
from ..step_parts import parts_ms, replayed
from ..suite import Cell, Context, Suite
from ..timing import (
    DeviceLost,
    Sampler,
    capture,
    check_device,
    cpu_sampler,
    graph_sampler,
    interleave,
    reason,
)
from ..whole_models import (
    CONFIGS,
    CONTEXT,
    Step,
    layer_forward,
    make_step,
    moe_blocks,
    moe_inputs,
    random_model,
    tidy,
    typical_error,
    without_moe,
)

NAME, OURS = "transformers", "moesaic"
BATCHES = (1, 16, 64, 128)
PREFILL = 8192
RIVALS = ("grouped_mm", "batched_mm")
REST, MOE, PARTS, WITHOUT, TUNED = "rest", "moe", "parts", "without-moe", "-tuned"
ERROR_BOUND = 1.5e-2
CELL_S, MODEL_S, TUNING_S = 12.0, 10.0, 45.0
SAMPLING_S = 2.0
GOALS = {
    ("Qwen3-30B-A3B", "decode", 1): 1.9,
    ("Qwen3-30B-A3B", "prefill", PREFILL): 1.6,
    ("Mixtral-8x7B", "prefill", PREFILL): 1.25,
}
GOAL, AMDAHL = 1.5, 0.95
Key = tuple[str, str]
Forwards = tuple[Callable[..., Tensor], Callable[..., Tensor]]
"""The decoder layer's forward, as compiled by default and tuned."""


def cells() -> list[Cell]:
    """Every step by model: weights are made once for all of a model's."""
    return [
        Cell(model, tokens, kind, clock="model")
        for model in CONFIGS
        for kind, tokens in (*(("decode", b) for b in BATCHES), ("prefill", PREFILL))
    ]


def refusal(model: Any, name: str, tokens: int) -> str | None:
    """Why a rival is left out: batched_mm copies an expert for every row."""
    config = model.config
    experts = getattr(config, "num_local_experts", None) or config.num_experts
    rows = tokens * config.num_experts_per_tok
    if name == "batched_mm" and rows > experts:
        return f"skipped: copies the weights of {rows} experts, of which there are {experts}"
    return None


def tunes(cell: Cell) -> bool:
    """Whether a cell has tuned implementations, as `refusal` says of a model in full size."""
    sizes = CONFIGS[cell.model][2]
    experts: int = sizes.get("num_local_experts") or sizes["num_experts"]
    return cell.routing == "decode" and cell.tokens * sizes["num_experts_per_tok"] <= experts


def in_turn(wanted: Sequence[Cell]) -> list[Cell]:
    """Cells by model; those that tune more than a single token come last, for they take longest."""
    models = list(dict.fromkeys(cell.model for cell in wanted))
    return sorted(wanted, key=lambda c: (models.index(c.model), tunes(c) and c.tokens > 1))


def within(state: Callable[[], Any], sampler: Sampler) -> Sampler:
    """A sampler that enters a state of the model first."""

    def sample() -> float:
        with state():
            return sampler()

    return sample


class Timer:
    """The calls of one cell as samplers: captured where there is a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.mode = "graph" if self.cuda else "eager"
        self.samplers: dict[Key, Sampler] = {}
        self.errors: dict[Key, str] = {}
        self.replays: dict[Key, Callable[[], Any]] = {}

    def add(self, key: Key, call: Callable[[], Any], state: Callable[[], Any]) -> None:
        """Warm a call up in a state of the model, capture it there, and make its sampler.

        What it raises is its error. Without a graph every sample enters the state again.
        """
        try:
            with state():
                call()
                if self.cuda:
                    captured = capture([call])
                    self.samplers[key] = graph_sampler(captured)
                    self.replays[key] = captured.graph.replay
                else:
                    self.samplers[key] = within(state, cpu_sampler([call], min_ms=1.0))
        except Exception as error:
            self.errors[key] = reason(error)
            check_device(f"{key}: {self.errors[key]}")


def prepare(
    timer: Timer, model: Any, cell: Cell, forwards: Forwards, seed: int
) -> dict[Key, float]:
    """Every call of a cell in the timer; the errors of our blocks."""
    from ...integrations.attach import selected

    decode = cell.routing == "decode"
    batch, length = (cell.tokens, 1) if decode else (1, cell.tokens)
    sizes = (batch, length, CONTEXT if decode else length)
    step = make_step(model, *sizes, forwards[0], seed)
    with selected(model, "grouped_mm"):
        plain = Step(model, step.ids_BN, step.positions_1N, step.caches, layer_forward(model, None))
        inputs = moe_inputs(plain)
        theirs = moe_blocks(model, inputs)()
    ours = partial(selected, model, OURS)
    blocks = moe_blocks(model, inputs)
    with ours():
        error = typical_error(blocks(), theirs)
    del theirs
    timer.add((MOE, OURS), blocks, ours)
    timer.add(("model", OURS), step, ours)
    for name in RIVALS:
        key = ("model", f"transformers-{name}")
        if refused := refusal(model, name, cell.tokens):
            timer.errors[key] = refused
            continue
        timer.add(key, step, partial(selected, model, name))
    timer.add((REST, WITHOUT), step, partial(without_moe, model))
    if decode and refusal(model, "batched_mm", cell.tokens) is None:
        tuned = make_step(model, *sizes, forwards[1], seed, any_batch=False)
        timer.add(
            ("model", f"transformers-batched_mm{TUNED}"),
            tuned,
            partial(selected, model, "batched_mm"),
        )
        timer.add(("model", f"{OURS}{TUNED}"), tuned, ours)
        timer.add((REST, f"{WITHOUT}{TUNED}"), tuned, partial(without_moe, model))
    return {(MOE, OURS): error}


def measure(
    model: Any, cell: Cell, forwards: Forwards, stamped: Line, seed: int,
    sampling_s: float = SAMPLING_S,
) -> list[Line]:  # fmt: skip
    """The lines of one cell."""
    device = model.lm_head.weight.device
    tidy(device)
    timer = Timer(device)
    with torch.no_grad():
        accuracy = prepare(timer, model, cell, forwards, seed)
        timed = interleave(timer.samplers, budget_s=sampling_s, min_samples=7, seed=seed)
    errors = timer.errors | timed.errors
    mine = {key: m.median for key, m in timed.measured.items() if key in timer.replays}
    mine = {
        key: ms for key, ms in mine.items() if key in {("model", OURS), ("model", OURS + TUNED)}
    }
    lines = []
    for key in sorted(dict.fromkeys([*timed.measured, *errors])):
        values: Line = {
            "suite": NAME, "clock": key[0], "model": cell.model, "tokens": cell.tokens,
            "routing": cell.routing, "impl": key[1], "mode": timer.mode, "dtype": cell.dtype,
            "layers": len(model.model.layers),
        }  # fmt: skip
        if found := timed.measured.get(key):
            values |= {"ms": found.median, "ms_p20": found.p20, "ms_p80": found.p80}
            values |= {"samples": found.samples, "tokens_per_s": cell.tokens / found.median * 1e3}
        if key in errors:
            values["error"] = errors[key]
        if key in accuracy:
            values |= {"err": accuracy[key], "wrong": not accuracy[key] <= ERROR_BOUND}
        lines.append(make_line(stamped, **values))
    if mine:
        lines += part_lines(timer.replays[min(mine, key=mine.__getitem__)], lines[0])
    return lines


def part_lines(replay: Callable[[], Any], like: Line) -> list[Line]:
    """What a step's time goes to, a line a part, of the cell of another line."""
    keys = ("suite", "model", "tokens", "routing", "mode", "dtype", "layers")
    cell = {key: like[key] for key in keys}
    stamped = {key: like[key] for key in ("device", "torch", "triton", "commit", "date")}
    try:
        parts = parts_ms(replayed(replay))
    except Exception as error:
        check_device(reason(error))
        return [make_line(stamped, **cell, clock=PARTS, impl="other", error=reason(error))]
    return [make_line(stamped, **cell, clock=PARTS, impl=part, ms=ms) for part, ms in parts.items()]


def told(lines: Sequence[Line]) -> str:
    """A cell's steps in one row."""
    words = []
    for x in lines:
        text = f"{x['ms']:.3f} ms" if x["ms"] else str(x.get("error"))[:60]
        words.append(f"{x['clock']}/{x['impl']} {text}")
    return f"{lines[0]['model']} {lines[0]['routing']} {lines[0]['tokens']}: " + ", ".join(words)


def run(
    wanted: Sequence[Cell],
    context: Context,
    *,
    layers: int | None = None,
    backend: str | None = "inductor",
    sizes: dict[str, Any] | None = None,
) -> None:
    """Measure cells while they fit into the budget; a model is made for its first cell.

    Args:
        layers: so many decoder layers instead of all.
        backend: of torch.compile; None: nothing is compiled.
        sizes: other values of the configurations.

    Raises:
        DeviceLost: the GPU answers no more.
    """
    stamped = stamp(context.device)
    torch._dynamo.config.recompile_limit = 64
    model, name = None, ""
    forwards: Forwards | None = None
    for number, cell in enumerate(in_turn(wanted)):
        needed = CELL_S + (MODEL_S if cell.model != name else 0.0)
        needed += TUNING_S if tunes(cell) else 0.0
        if context.elapsed_s() + needed > context.budget_s:
            context.say(f"out of time before {cell.model} {cell.routing} {cell.tokens}: --missing")
            continue
        try:
            if cell.model != name:
                model = forwards = None
                torch._dynamo.reset()
                tidy(context.device)
                model = random_model(cell.model, context.device, layers, **(sizes or {}))
                name = cell.model
                forwards = (layer_forward(model, backend), layer_forward(model, backend, True))
                context.say(f"{name} made")
            assert forwards is not None
            lines = measure(model, cell, forwards, stamped, context.seed + number)
        except DeviceLost:
            raise
        except Exception as error:
            values: Line = {"suite": NAME, "clock": "model", "model": cell.model, "impl": OURS}
            values |= {"tokens": cell.tokens, "routing": cell.routing, "dtype": cell.dtype}
            lines = [make_line(stamped, **values, mode="graph", error=reason(error))]
            check_device(reason(error))
        context.record(lines)
        context.say(told(lines))


def measured(line: Line) -> Cell | None:
    """The cell of a time of ours for the whole step, tuned where the suite tunes."""
    if line["clock"] != "model" or not line["ms"]:
        return None
    cell = Cell(line["model"], line["tokens"], line["routing"], line["dtype"], "model")
    return cell if line["impl"] == OURS + (TUNED if tunes(cell) else "") else None


Place = tuple[str, str, int]


def best_ways(times: Mapping[Any, float], at: Place) -> tuple[str | None, str | None]:
    """How ours is compiled where it is fastest ("" or "-tuned"), and the fastest rival.

    `times`: milliseconds by model, routing, tokens, clock and implementation; `at`: the first
    three of these.
    """
    mine = {way: ms for way in ("", TUNED) if (ms := times.get((*at, "model", OURS + way)))}
    rivals = {
        name: ms
        for rival in RIVALS
        for way in ("", TUNED)
        if (ms := times.get((*at, "model", name := f"transformers-{rival}{way}")))
    }
    fastest = min(rivals, key=rivals.__getitem__, default=None)
    return min(mine, key=mine.__getitem__, default=None), fastest


def summarize(lines: Sequence[Line]) -> list[Target]:
    """Speed-up over transformers' best of every step, and its share of what Amdahl's law allows.

    A speed-up over rivals none of which was tuned, where the suite tunes them, counts for nothing.
    """
    times = {
        (x["model"], x["routing"], x["tokens"], x["clock"], x["impl"]): x["ms"]
        for x in lines
        if x["ms"] and not x.get("wrong")
    }
    targets = []
    for cell in cells():
        at = (cell.model, cell.routing, cell.tokens)
        way, rival = best_ways(times, at)
        blocks = times.get((*at, MOE, OURS))
        mine, best = times.get((*at, "model", f"{OURS}{way}")), times.get((*at, "model", rival))
        rest = times.get((*at, REST, f"{WITHOUT}{way}"))
        tuned = [times.get((*at, "model", f"transformers-{name}{TUNED}")) for name in RIVALS]
        at_best = any(tuned) or not tunes(cell)
        speedup = best / mine if best and mine and blocks and at_best else None
        allowed = (rest + blocks) / mine if rest and blocks and mine else None
        what = f"{cell.model} {cell.routing} {cell.tokens}"
        targets.append(at_least(f"{what}: speed-up", speedup, GOALS.get(at, GOAL)))
        targets.append(at_least(f"{what}: share of Amdahl's prediction", allowed, AMDAHL))
    return targets


def _section(
    lines: Sequence[Line], targets: Sequence[Target], root: Path, device: str, folder: str
) -> tuple[str, dict[str, str]]:
    from ..transformers_page import transformers_section

    return transformers_section(lines, targets, root, device, folder)


SUITE = Suite(
    name=NAME,
    about="whole Qwen3-30B-A3B and Mixtral-8x7B against transformers' best setting, one GPU",
    cells=cells,
    run=run,
    summarize=summarize,
    budget_s=190.0,
    measured=measured,
    section=_section,
)
