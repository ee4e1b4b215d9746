"""The paper's tables from lines: measured values with the paper's own claims beside them.

    T tokens · E experts · K top-k

Every function takes lines and gives a `Sheet`; what has no line says "not measured", what failed
says its error's first word, and losses stand where they fall.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..layer_targets import LAUNCHES_MS
from ..report import Sheet, short, word
from ..results import Line, geomean
from ..suite import Cell
from .configuration import PaperLayer, claims, grid, layers
from .executor import LADDER, LOOP, OURS, registry
from .stages import STAGES
from .targets import Row, over_rule, rows_of, share_of_floor

ABSENT = "not measured"
Variant = tuple[str, str]
THEIR_NAMES = {LOOP: "loop", "fastermoe-style": "fastermoe", "tutel-style": "tutel", OURS: "ours"}


def percent(share: float | None) -> str:
    """A share in per cent.

    >>> percent(0.7312), percent(0.00491), percent(None)
    ('73 %', '0.49 %', 'not measured')
    """
    if share is None:
        return ABSENT
    return f"{100 * share:.2g} %" if 0 < share < 0.1 else f"{100 * share:.0f} %"


def number(value: float | None) -> str:
    """A number in four figures, or that there is none."""
    return ABSENT if value is None else short(value)


def whole(value: float | None) -> str:
    """A large number with separators.

    >>> whole(245670.4)
    '245,670'
    """
    return ABSENT if value is None else f"{value:,.0f}"


def variants(lines: Sequence[Line]) -> list[Variant]:
    """The executors and modes that have a line, in the order of the registry."""
    seen = {(x["impl"], x["mode"]) for x in lines if x["ms"]}
    known = [(name, mode) for name in registry() for mode in ("eager", "graph")]
    return [variant for variant in known if variant in seen]


def head_of(variant: Variant) -> str:
    """How tables call an executor in a mode."""
    name, mode = variant
    label = registry()[name].label if name in registry() else name
    return label if mode == "eager" else f"{label}, graph"


def pick(lines: Sequence[Line], clock: str, **wanted: Any) -> list[Line]:
    """The lines of a clock with these values."""
    return [
        x for x in lines if x["clock"] == clock and all(x.get(k) == v for k, v in wanted.items())
    ]


def one(lines: Sequence[Line], clock: str, variant: Variant, **wanted: Any) -> Line | None:
    """The line of an executor in a mode, or None."""
    found = pick(lines, clock, impl=variant[0], mode=variant[1], **wanted)
    return found[0] if found else None


def value_of(line: Line | None, key: str) -> float | None:
    """A number of a line that is right, or None."""
    if line is None or line.get("wrong") or line.get(key) is None:
        return None
    return float(line[key])


def parameters(every: Sequence[PaperLayer]) -> Sheet:
    """The configurations: parameters counted from their shapes beside those claimed."""
    heads = ["layer", "E", "K", "input", "hidden", "claimed", "counted", "counted ÷ claimed",
             "met by a token"]  # fmt: skip
    rows = []
    for x in every:
        m, millions = x.model, 1e6
        shape = [m.num_experts, m.top_k, m.hidden_size, m.intermediate_size]
        ratio = x.counted_parameters / x.claimed_parameters
        sizes = [x.claimed_parameters, x.counted_parameters]
        counts = [f"{size / millions:.4g} M" for size in sizes]
        active = f"{x.active_parameters / millions:.4g} M"
        rows.append([x.title, *map(str, shape), *counts, f"{ratio:.2f}", active])
    return Sheet(heads, rows)


def by_batch(lines: Sequence[Line], model: str, cell: Callable[[Line | None], str]) -> Sheet:
    """One layer: a row per batch, a column per executor and mode, the gain over the loop, and what
    the paper claims for it."""
    some = [x for x in pick(lines, "experts", model=model) if x["tokens"]]
    columns = variants(some)
    rows = []
    for tokens in sorted({x["tokens"] for x in some}):
        at = {(x["impl"], x["mode"]): x for x in some if x["tokens"] == tokens}
        mine = at.get((OURS, "graph")) or at.get((OURS, "eager"))
        loop, ours = value_of(at.get((LOOP, "eager")), "ms"), value_of(mine, "ms")
        gain = f"{loop / ours:.1f}×" if loop and ours else "-"
        claim = claims()["throughput"].get(tokens)
        said = f"{claim['ours'] / claim['loop']:.2f}×" if claim else "-"
        rows.append([str(tokens), *(cell(at.get(v)) for v in columns), gain, said])
    heads = ["tokens", *map(head_of, columns), "loop ÷ moesaic", "claimed for theirs"]
    return Sheet(heads, rows)


def tokens_per_s(line: Line | None) -> str:
    """The throughput that a line of time means."""
    ms = value_of(line, "ms")
    return whole(1e3 * line["tokens"] / ms) if line and ms else word(line)


def latency(line: Line | None) -> str:
    """Milliseconds with their spread."""
    if value_of(line, "ms") is None or line is None:
        return word(line)
    return f"{short(line['ms'])} ({short(line['ms_p20'])}–{short(line['ms_p80'])})"


def claimed_throughput() -> Sheet:
    """The paper's own table."""
    heads = ["tokens", "PyTorch", "FasterMoE", "Tutel", "theirs", "speed-up"]
    rows = [
        [str(t), *(whole(v[k]) for k in ("loop", "fastermoe", "tutel", "ours")),
         f"{v['ours'] / v['loop']:.2f}×"]
        for t, v in claims()["throughput"].items()
    ]  # fmt: skip
    return Sheet(heads, rows)


def activity(lines: Sequence[Line], model: str) -> Sheet:
    """Activity by GPM, power and energy of every executor at the batch of the ablation."""
    tokens = grid()["energy"]["every_executor_at"]
    some = pick(lines, "energy", model=model, tokens=tokens)
    heads = ["executor", "SM", "claimed SM", "occupancy", "tensor", "DRAM", "watts", "of TDP",
             "J / 1000 tokens", "above idle", "window s"]  # fmt: skip
    rows = []
    for variant in variants(some):
        x = one(some, "energy", variant) or {}
        said = claims()["sm_activity"].get(THEIR_NAMES.get(variant[0], ""))
        said = said if variant[0] != OURS or variant[1] == "graph" else None
        shares = [x.get(f"{k}_activity") for k in ("sm", "occupancy", "tensor", "dram")]
        first, *others = map(percent, shares)
        rows.append(
            [head_of(variant), first, "-" if said is None else percent(said), *others,
             number(x.get("watts")), percent(x.get("share_of_tdp")),
             number(x.get("j_per_1000_tokens")), number(x.get("net_j_per_1000_tokens")),
             number(x.get("window_s"))]
        )  # fmt: skip
    return Sheet(heads, rows)


def joules_word(line: Line | None) -> str:
    """Joules per 1000 tokens, or in a word why there are none."""
    joules = value_of(line, "j_per_1000_tokens")
    return number(joules) if joules is not None or line is None else word(line)


def energy(lines: Sequence[Line]) -> Sheet:
    """Joules per 1000 tokens, gross, loop and static batch, beside the paper's."""
    heads = ["layer", "tokens", "loop J / 1000", "moesaic J / 1000", "share",
             "loop W", "moesaic W", "claimed: loop", "claimed: theirs",
             "claimed share"]  # fmt: skip
    rows = []
    for layer in layers().values():
        name = layer.model.name
        for tokens in sorted({x["tokens"] for x in pick(lines, "energy", model=name)}):
            pair = [
                one(lines, "energy", v, model=name, tokens=tokens)
                for v in ((LOOP, "eager"), (OURS, "graph"))
            ]
            joules = [value_of(x, "j_per_1000_tokens") for x in pair]
            share = joules[1] / joules[0] if joules[0] and joules[1] else None
            said = claims()["energy"][name]
            rows.append(
                [layer.title, str(tokens), *map(joules_word, pair), percent(share),
                 *(number(value_of(x, "watts")) for x in pair), number(said["loop"]),
                 number(said["ours"]), percent(said["ours"] / said["loop"])]
            )  # fmt: skip
    return Sheet(heads, rows)


def peak_gbps(lines: Sequence[Line]) -> float | None:
    """The read rate that the same process measured."""
    found = [x for x in lines if x["clock"] == "ceiling" and x["impl"] == "read"]
    return value_of(found[0], "gbps") if found else None


def bandwidth(lines: Sequence[Line]) -> Sheet:
    """Stages: time, the rate of the bytes they must move, its share of the measured read rate."""
    peak = peak_gbps(lines)
    heads = ["layer", "tokens", "stage", "PyTorch µs", "moesaic µs", "PyTorch GB/s", "moesaic GB/s",
             "PyTorch of peak", "moesaic of peak", "claimed: baseline",
             "claimed: theirs"]  # fmt: skip
    rows = []
    for layer in layers().values():
        some = pick(lines, "stage", model=layer.model.name)
        for tokens in sorted({x["tokens"] for x in some}):
            at = [x for x in some if x["tokens"] == tokens]
            for stage in (*STAGES, "overall"):
                sums = [stage_sum(at, impl, stage) for impl in ("torch", OURS)]
                times = [1e3 * found[0] if found else None for found in sums]
                rates = [found[1] / found[0] / 1e6 if found else None for found in sums]
                shares = [rate / peak if rate and peak else None for rate in rates]
                said = claims()["bandwidth"][stage]
                rows.append(
                    [layer.title, str(tokens), stage, *map(number, times), *map(number, rates),
                     *map(percent, shares), percent(said["loop"]), percent(said["ours"])]
                )  # fmt: skip
    return Sheet(heads, rows)


def stage_sum(lines: Sequence[Line], impl: str, stage: str) -> tuple[float, float] | None:
    """Milliseconds and bytes of a stage in its better mode, or of all stages together."""
    stages = STAGES if stage == "overall" else (stage,)
    found = [fastest(lines, f"{impl}-{one}") for one in stages]
    if any(x is None for x in found):
        return None
    present = [x for x in found if x is not None]
    return sum(x["ms"] for x in present), sum(x["bytes"] for x in present)


def fastest(lines: Sequence[Line], impl: str) -> Line | None:
    """The line of an implementation in its better mode."""
    found = [x for x in lines if x["impl"] == impl and value_of(x, "ms")]
    return min(found, key=lambda x: float(x["ms"]), default=None)


RUNGS = (*LADDER, (OURS, "moesaic: all experts in one launch a layer"))


def ablation(lines: Sequence[Line], model: str) -> Sheet:
    """The paper's ladder and the static batch: launched by the host, and in one graph of the layer
    where a graph can hold it; `this rung` is the host's time of the rung above over its own."""
    tokens = grid()["energy"]["every_executor_at"]
    said_base = claims()["ablation"][LOOP]
    before: float | None = None
    said_before: float | None = None
    base: float | None = None
    rows = []
    for name, title in RUNGS:
        host, graph = (
            value_of(one(lines, "experts", (name, mode), model=model, tokens=tokens), "ms")
            for mode in ("eager", "graph")
        )
        base = base if name != LOOP else host
        said = claims()["ablation"].get(name)
        row = [title]
        for ms in (host, graph):
            row.append(whole(1e3 * tokens / ms) if ms else (ABSENT if ms is host else "-"))
            row.append(ratio(base, ms))
        row.append(ratio(before, host))
        row += [whole(said) if said else "-", ratio(said, said_base), ratio(said, said_before)]
        rows.append(row)
        before, said_before = host or before, said or said_before
    heads = ["rung", "tokens/s, host", "over the loop", "tokens/s, one graph", "over the loop ",
             "this rung, host", "claimed tokens/s", "claimed, over the loop",
             "claimed, this rung"]  # fmt: skip
    return Sheet(heads, rows)


def ratio(above: float | None, below: float | None) -> str:
    """A quotient as times, or that there is none."""
    return f"{above / below:.2f}×" if above and below else "-"


def cell_by_cell(lines: Sequence[Line]) -> Sheet:
    """What the targets are made of: every cell's loop, floor, gain, energy, and the cell rule."""
    heads = ["layer", "tokens", "floor ms", "moesaic ms", "loop ÷ floor", "loop ÷ moesaic",
             "share of the loop's joules", "limit of the cell rule, ms", "within"]  # fmt: skip
    rows = []
    found = rows_of(lines)
    for layer in layers().values():
        for tokens in sorted({c.tokens for c in found if c.model == layer.model.name}):
            cell = Cell(layer.model.name, tokens)
            row = found.get(cell, Row())
            limit = None
            if row.floor_ms:
                limit = row.floor_ms / share_of_floor(tokens) + LAUNCHES_MS
            over = over_rule(cell, row)
            rows.append(
                [layer.title, str(tokens), number(row.floor_ms), number(row.ours()),
                 number(row.loop_over_floor()), number(row.over_loop()),
                 percent(row.energy_share()), number(limit),
                 "-" if over is None else ("no" if over else "yes")]
            )  # fmt: skip
    return Sheet(heads, rows)


def graph_manager(lines: Sequence[Line]) -> Sheet:
    """What became of the calls of the per-expert graph manager, and the memory it holds."""
    heads = ["layer", "tokens", "captured", "replayed", "eager", "evicted", "failed",
             "replayed ÷ calls", "graphs' memory", "of the weights"]  # fmt: skip
    rows = []
    for layer in layers().values():
        for x in pick(lines, "experts", model=layer.model.name, impl="expert-graphs", mode="eager"):
            if x.get("replayed") is None:
                continue
            calls = x["replayed"] + x["eager"]
            held = x.get("held_bytes") or 0
            share = held / x["weight_bytes"] if x.get("weight_bytes") else None
            counts = [str(x[k]) for k in ("captured", "replayed", "eager", "evicted", "failed")]
            rows.append(
                [layer.title, str(x["tokens"]), *counts,
                 percent(x["replayed"] / calls if calls else None), f"{held / 2**20:.1f} MiB",
                 percent(share)]
            )  # fmt: skip
    return Sheet(heads, rows)


def devices(by_device: dict[str, Sequence[Line]]) -> Sheet:
    """Every device with lines, and the paper's two, at the batch of the ablation."""
    tokens = grid()["energy"]["every_executor_at"]
    heads = ["device", "layer", "tokens/s", "SM activity", "mJ per token"]
    rows = []
    for device, lines in by_device.items():
        for layer in layers().values():
            place = {"model": layer.model.name, "tokens": tokens}
            ms = value_of(one(lines, "experts", (OURS, "graph"), **place), "ms")
            window = one(lines, "energy", (OURS, "graph"), **place)
            rows.append(
                [device, layer.title, whole(1e3 * tokens / ms if ms else None),
                 percent(value_of(window, "sm_activity")),
                 number(value_of(window, "j_per_1000_tokens"))]
            )  # fmt: skip
    for device, said in claims()["devices"].items():
        rows.append(
            [f"{device}, claimed", "not said", whole(said["tokens_per_s"]),
             percent(said["sm_activity"]), number(said["mj_per_token"])]
        )  # fmt: skip
    return Sheet(heads, rows)


def bits(lines: Sequence[Line]) -> Sheet:
    """Cells in which an executor's output differs in bits, under one combine for all."""
    heads = ["executor", "cells compared", "cells that differ from their own kind",
             "cells that differ from moesaic", "largest share of elements"]  # fmt: skip
    rows = []
    for name, executor in registry().items():
        some = [
            x for x in pick(lines, "experts", impl=name)
            if x.get("elements") and x["mode"] == ("eager" if executor.host_counts else "graph")
        ]  # fmt: skip
        if not some:
            continue
        own = sum(bool(x.get("bits_differ")) for x in some)
        other = sum(bool(x.get("bits_differ_ours")) for x in some)
        share = max((x.get("bits_differ_ours") or 0) / x["elements"] for x in some)
        rows.append([executor.label, str(len(some)), str(own), str(other), f"{100 * share:.2g} %"])
    return Sheet(heads, rows)


def mean_gain(values: Sequence[float]) -> str:
    """A geometric mean of gains, or that there is none."""
    found = geomean(values)
    return ABSENT if found is None else f"{found:.2f}×"
