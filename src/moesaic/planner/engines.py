"""Published figures of serving engines, each beside what the planner says of its conditions.

    C requests at once · T tokens of a GPU in a step

A figure's engine prefills and decodes on the same GPUs: in the time in which C requests come and go
it does `output` decode steps of C sequences and the prefill of C prompts, one after the other.
Of a `burst`, all requests that there are count as at once.
Everything that a source does not give is the same for all rows: routing ``lognormal:0.4``, chunks
of 8192 tokens, no overlap of micro-batches, 16-bit products on the roofline.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import files
from pathlib import Path

from .cluster import Cluster, load_cluster
from .documents import Block
from .kernels import ROOFLINE, KernelTable
from .model import Model, load_model
from .own import Row
from .predict import predict
from .strategies import Strategy
from .workload import Serving, Workload

# A number in fp8 with its share of the scales and of a row's header: 7408 bytes for 7168 numbers.
FP8_WIRE = 7408 / 7168
CHUNK = 8192
FIGURES = ("output_tokens_per_s", "total_tokens_per_s", "requests_per_s", "tpot_ms", "itl_ms")


def known_model(name: str) -> Model:
    """A model of this package, from its dimensions."""
    return load_model(Path(str(files("moesaic.planner").joinpath(f"models/{name}.json"))))


def part_of(preset: str, gpus: int) -> Cluster:
    """So many GPUs of a preset: whole nodes, or a part of one."""
    cluster = load_cluster(f"{preset}x{-(-gpus // 8)}")
    if gpus < cluster.gpus_per_node:
        return replace(cluster, gpus_per_node=gpus, network=None)
    return cluster


def way(tp: int, ep: int) -> Strategy:
    """Experts cut over `tp` GPUs, or spread over `ep`, with attention cut over `tp` of them."""
    if ep == 1:
        return Strategy(family="tp-pp", ranks=tp, tp=tp)
    return Strategy(family="ep" if tp == 1 else "tp-ep-dp", ranks=ep, tp=tp)


def figures(
    model: Model, cluster: Cluster, strategy: Strategy, *, requests: int, prompt: int, output: int,
    table: KernelTable = ROOFLINE,
) -> dict[str, float]:  # fmt: skip
    """What an engine with `requests` requests at once would report, by the names in `FIGURES`."""
    workload = Workload(
        sequences=requests, total=True, prompt=prompt, output=output, serving=Serving(),
        context=prompt + output // 2, wire_bytes=FP8_WIRE if model.itemsize == 1 else 2.0,
    )  # fmt: skip
    step = predict(model, cluster, workload, strategy).step_s
    copies = cluster.gpus // strategy.gpus
    chunk = min(CHUNK, max(1, requests // copies) * prompt)
    chunks = replace(workload, phase="prefill", total=False, forwarded=True,
                     prefill_tokens=max(1, round(chunk / strategy.gpus)))  # fmt: skip
    rate = predict(model, cluster, chunks, strategy, table=table).tokens_per_s
    first = requests * prompt / rate
    cycle = output * step + first
    return {
        "output_tokens_per_s": requests * output / cycle,
        "total_tokens_per_s": requests * (prompt + output) / cycle,
        "requests_per_s": requests / cycle,
        "tpot_ms": 1e3 * (step + first * (1 - 1 / requests) / output),
        "itl_ms": 1e3 * step,
    }


def served(block: Block, experts: KernelTable) -> Row:
    """One figure of a whole deployment; `experts`: measured times of DeepSeek's prefill."""
    source, name, dtype = block.text("source"), block.text("model"), block.text("dtype")
    preset, gpus = block.text("preset"), block.integer("gpus")
    tp, ep = block.integer("tp", 1), block.integer("ep", 1)
    requests, prompt = block.integer("requests"), block.integer("input")
    output = block.integer("output")
    what = block.text("figure", among=FIGURES)
    published, burst = block.number("value", above=True), block.boolean("burst", False)
    block.done()
    model = replace(known_model(name), dtype=dtype)
    table = experts if dtype == "fp8" and model.shared_experts else ROOFLINE
    found = figures(model, part_of(preset, gpus), way(tp, ep), requests=requests, prompt=prompt,
                    output=output, table=table)  # fmt: skip
    shape = f"TP{tp}" + (f" EP{ep}" if ep > 1 else "")
    load = f"{requests} requests at once of {prompt} + {output}"
    kind = "all requests in a burst" if burst else "requests at once given"
    where = f"{name} {dtype}, {what}, {gpus} {preset}, {shape}, {load}"
    return Row(f"end to end, blind, round 2: {kind}", where, source, published, found[what])
