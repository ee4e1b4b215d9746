"""Published figures of serving engines, each beside what the simulated engine says of it.

    C requests at once · T tokens of a step

Conditions are those of the source; what it does not give is the same for all rows: the engine's
defaults (`scheduler.ENGINES`), routing ``lognormal:0.4``, ten times as many requests as are at
once.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import files
from pathlib import Path

from .batching import serve
from .cluster import Cluster, load_cluster
from .documents import Block
from .model import Model, load_model
from .own import Row
from .requests import REPEATS, Load
from .scheduler import ENGINES
from .serving import Deployment

# A number in fp8 with its share of the scales and of a row's header: 7408 bytes for 7168 numbers.
FP8_WIRE = 7408 / 7168
# Rounds of figures that were predicted blind and from which `scheduler.Engine` was fitted after.
FITTED = (2, 3, 4, 5)
FIGURES = (
    "output_tokens_per_s", "input_tokens_per_s", "total_tokens_per_s", "requests_per_s", "ttft_ms",
    "ttft_median_ms", "tpot_ms", "tpot_median_ms", "itl_ms", "latency_ms",
)  # fmt: skip


def known_model(name: str) -> Model:
    """A model of this package, from its dimensions."""
    return load_model(Path(str(files("moesaic.planner").joinpath(f"models/{name}.json"))))


def part_of(preset: str, gpus: int) -> Cluster:
    """So many GPUs of a preset: whole nodes, or a part of one."""
    cluster = load_cluster(f"{preset}x{-(-gpus // 8)}")
    if gpus < cluster.gpus_per_node:
        return replace(cluster, gpus_per_node=gpus, network=None)
    return cluster


def deployment(block: Block) -> Deployment:
    """What a row serves, and on what."""
    name, dtype = block.text("model"), block.text("dtype")
    card, gpus = block.text("preset"), block.integer("gpus")
    block.integer("tp", 1)  # as the source puts it; `gpus` over `dp` is what attention is cut over
    engine = ENGINES[block.text("engine", among=tuple(ENGINES))].on(card)
    if "budget" in block:
        engine = replace(engine, budget=block.integer("budget"))
    if "most" in block:
        engine = replace(engine, most=block.integer("most"))
    if "memory" in block:
        engine = replace(engine, memory=block.number("memory", above=True))
    return Deployment(
        model=replace(known_model(name), dtype=dtype), cluster=part_of(card, gpus), card=card,
        engine=engine, gpus=gpus, dp=block.integer("dp", 1), ep=block.integer("ep", 1),
        cache=block.integer("cache", 2),
    )  # fmt: skip


def load_of(block: Block) -> Load:
    """The requests of a row: all in a burst, or so many at once."""
    requests, burst = block.integer("requests"), block.boolean("burst", False)
    return Load(
        total=block.integer("total", requests if burst else REPEATS * requests),
        prompt=block.integer("input"), output=block.integer("output"),
        at_once=None if burst or "rate" in block else requests,
        spread=block.boolean("spread", False),
        rate=block.number("rate", None, above=True),
    )  # fmt: skip


def served(block: Block) -> Row:
    """One figure of a whole deployment."""
    source, what = block.text("source"), block.text("figure", among=FIGURES)
    published, number = block.number("value", above=True), block.integer("round")
    shown = block.text("shown", "")
    d, load = deployment(block), load_of(block)
    block.done()
    found = serve(d, load).figures()[what]
    shape = f"TP{d.cut}" + (f" DP{d.dp}" if d.dp > 1 else "") + (f" EP{d.ep}" if d.ep > 1 else "")
    many = f"{load.at_once} requests at once" if load.at_once else f"{load.total} in a burst"
    where = (
        f"{d.model.name.split('-')[0]} {d.model.dtype}, {what}, {d.gpus} {d.card}, {shape}, "
        f"{d.engine.name}, {many} of {load.prompt} + {load.output}"
    )
    kind = "all requests in a burst" if load.at_once is None else "requests at once given"
    if number in FITTED:
        group = f"end to end, round {number}, blind then: {kind}"
        return Row(group, where, source, published, found, "shown" if shown else "fitted")
    status = "shown" if shown else "counted"
    group = f"end to end, blind, round {number}: {source.split()[0]}"
    return Row(group, where, source, published, found, status)
