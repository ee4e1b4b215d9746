"""The generated part of docs/transformers.md: what a layer's time goes to, and what a goal asks.

    T tokens · E experts · K top-k

Of every step, per decoder layer: the rest (attention, norms, embedding and head, spread over the
layers), our MoE block, the block of transformers' fastest (its step less the rest compiled in the
same way), and how fast our block would have to be for the goal of the step with that rest. Beside
rest and block stands what they cannot go under: weights, cache and rows over the memory's read
bandwidth, or products over the tensor cores' sustained rate, both as in docs/design.md. The most
that any MoE block could gain is the step of transformers' fastest over the measured rest and a
block at its floor; beside it, over the rest alone, as if the block were free.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..cost import H200_READ_BYTES_PER_S, expert_flops, layer_bytes
from .report import Sheet, markdown, section, short
from .results import Line, Target
from .suites.launches import counters_sheet
from .suites.transformers import GOAL, GOALS, MOE, OURS, REST, TUNED, WITHOUT, best_ways, cells
from .whole_models import CONFIGS, CONTEXT
from .workloads import MODELS

RATE = 770e12


def floor_us(model: str, tokens: int) -> float:
    """Microseconds under which no MoE layer of this size goes, at random routing."""
    spec, top_k = MODELS[model].spec(), MODELS[model].top_k
    experts = spec.num_experts
    active = experts * (1 - (1 - top_k / experts) ** tokens)
    read = layer_bytes(spec, tokens, round(active), 2) / H200_READ_BYTES_PER_S
    return max(read, expert_flops(spec, tokens * top_k) / RATE) * 1e6


def rest_floor_us(model: str, routing: str, tokens: int) -> float:
    """Microseconds a layer under which no step without its MoE blocks goes, head included."""
    sizes = CONFIGS[model][2]
    layers: int = sizes["num_hidden_layers"]
    hidden: int = sizes["hidden_size"]
    heads, kept = (sizes[f"num_{kind}_heads"] * sizes["head_dim"]
                   for kind in ("attention", "key_value"))  # fmt: skip
    products, head = 2 * hidden * (heads + kept), hidden * sizes["vocab_size"]
    decode = routing == "decode"
    cache = 2 * kept * CONTEXT * tokens if decode else 0
    pairs = CONTEXT * tokens if decode else tokens * tokens / 2
    read = 2 * (layers * (products + cache) + head)
    flops = 2 * (
        layers * (tokens * products + 2 * pairs * heads) + head * (tokens if decode else 1)
    )
    seconds: float = max(read / H200_READ_BYTES_PER_S, flops / RATE)
    return seconds / layers * 1e6


def budget_sheet(lines: Sequence[Line]) -> Sheet:
    """Microseconds of one decoder layer of every measured step, and what its goal asks."""
    times = {
        (x["model"], x["routing"], x["tokens"], x["clock"], x["impl"]): x["ms"]
        for x in lines
        if x["ms"] and not x.get("wrong")
    }
    layers = {x["model"]: x["layers"] for x in lines}
    heads = ["model", "tokens", "routing", "rest µs", "its floor µs", "our block µs", "theirs µs"]
    heads += ["block floor µs", "speed-up", "most possible", "block free", "goal"]
    heads += ["block for the goal µs"]
    rows = []
    for cell in cells():
        at = (cell.model, cell.routing, cell.tokens)
        ours, theirs = best_ways(times, at)
        block, rest = times.get((*at, MOE, OURS)), times.get((*at, REST, WITHOUT + (ours or "")))
        if ours is None or theirs is None or block is None or rest is None:
            continue
        mine, best = times[(*at, "model", OURS + ours)], times[(*at, "model", theirs)]
        # What is compiled in the same way has the same rest; a way without its own has the default.
        tuned = theirs.endswith(TUNED)
        their_rest = times.get((*at, REST, WITHOUT + TUNED)) if tuned else None
        their_rest = their_rest or times.get((*at, REST, WITHOUT)) or rest
        goal, each = GOALS.get(at, GOAL), 1e3 / layers[cell.model]
        asked = (best / goal - rest) * each
        needed = short(asked) if asked > 0 else "the rest alone is more"
        floor = floor_us(cell.model, cell.tokens)
        rows.append([
            cell.model, str(cell.tokens), cell.routing, short(rest * each),
            short(rest_floor_us(cell.model, cell.routing, cell.tokens)), short(block * each),
            short((best - their_rest) * each), short(floor), short(best / mine),
            short(best * each / (rest * each + floor)), short(best / rest), short(goal), needed,
        ])  # fmt: skip
    return Sheet(heads, rows)


def transformers_section(
    lines: Sequence[Line], targets: Sequence[Target], root: Path, device: str, folder: str
) -> tuple[str, dict[str, str]]:
    """The usual tables, after them the budget of a layer, and the counters of its launches."""
    counters = [x for x in lines if x["clock"] == "counters"]
    lines = [x for x in lines if x["clock"] != "counters"]
    parts = [section(lines, targets, [])]
    table = budget_sheet(lines)
    if table.rows:
        parts += ["#### A layer's time", markdown(table)]
    if counters:
        parts += ["#### Every launch of a layer by hardware counters"]
        parts += [markdown(counters_sheet(counters))]
    return "\n\n".join(parts) + "\n", {}
