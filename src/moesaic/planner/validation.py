"""Predictions beside measurements: this project's own, held out, and what others published.

    python -m moesaic.planner.validation            # writes docs/validation.md
    python -m moesaic.planner.validation --check    # 1 when the page is stale

Every row is shown with its error, prediction over measurement minus one. `fitted` rows helped to
choose a parameter, `shown` ones lack a condition that the prediction needs or are other tools'
estimates: neither is counted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import numpy as np

from ..cost import expert_weight_elements
from ..parallel.links import link_times
from ..parallel.placement import contiguous
from .cluster import load_cluster
from .costs import exchange_s
from .documents import Block, parse
from .engines import FP8_WIRE, known_model, served
from .exchange import table_from
from .forecast import foretold_rows
from .kernels import ROOFLINE, KernelTable, expected_active, expert_layer_s, roofline_s
from .model import Model
from .operations import blind_rows
from .own import Row, own_rows
from .predict import predict
from .routing import sample_counts
from .strategies import Strategy
from .validation_page import page, summary
from .workload import Serving, Workload

PAGE = Path("docs/validation.md")


def deepseek() -> Model:
    """DeepSeek-V3, from its dimensions."""
    return known_model("deepseek_v3")


def low_latency(block: Block, *, normal: bool) -> list[Row]:
    """DeepEP's exchanges: uniform routing, experts in order, one row of the table each way."""
    preset, nodes, tokens = block.text("preset"), block.integer("nodes"), block.integer("tokens")
    source = block.text("source")
    dispatch, combine = block.number("dispatch_us"), block.number("combine_us")
    block.done()
    model, cluster = deepseek(), load_cluster(f"{preset}x{nodes}")
    workload = Workload(wire_bytes=FP8_WIRE, engine="node-sums" if normal else "moesaic",
                        forwarded=normal, routing="uniform")  # fmt: skip
    ranks = 8 * nodes
    topology = cluster.topology(ranks, forwarded=normal)
    counts = sample_counts("uniform", layers=1, ranks=ranks, experts=256, top_k=8, tokens=tokens)
    bare = replace(topology, gpu_latency_s=0.0, nic_latency_s=0.0)
    times = link_times(contiguous(256, ranks).destinations(0), counts[0], bare, 2.0 * model.hidden)
    if not normal:
        # These kernels send a row per (token, slot), also where two experts share a GPU.
        model = replace(model, top_k=1)
    out, back = exchange_s(times, topology, model, workload)
    kind = "DeepEP normal (us)" if normal else "DeepEP low latency (us)"
    # The network's latency was chosen knowing what two nodes take.
    status = "fitted" if nodes == 2 and not normal and preset == "H200" else "counted"
    name = f"EP{ranks}, {tokens} tokens"
    return [
        Row(kind, f"dispatch {name}", source, dispatch, out.seconds * 1e6, status),
        Row(kind, f"combine {name}", source, combine, back.seconds * 1e6, status),
    ]


def expert_modules(block: Block) -> Row:
    """Experts after dispatch, from the roofline of an H200."""
    ep, tokens, source = block.integer("ep"), block.integer("tokens"), block.text("source")
    published = block.number("us")
    block.done()
    model, gpu = deepseek(), load_cluster("H200").gpu
    rows = tokens * 8 / ep
    active = expected_active(256, 8, tokens) / ep
    found = float(expert_layer_s(gpu, model.experts, rows, active, 1))
    return Row("expert modules, H200 (us)", f"EP{ep}, {tokens} tokens in all", source, published,
               found * 1e6)  # fmt: skip


def all_to_all(blocks: Sequence[Block]) -> list[Row]:
    """Each published exchange interpolated without it, and 4 GPUs without any of 4 GPUs."""
    points = []
    for block in blocks:
        point = (block.integer("gpus"), float(block.integer("bytes")), block.number("us") / 1e6)
        points.append((point, block.text("source")))
        block.done()
    rows = []
    for held, source in points:
        gpus, num_bytes, seconds = held
        rest = [p for p, _ in points if p != held]
        one = table_from(rest, "").seconds(gpus, num_bytes)
        name = f"{gpus} GPUs, {num_bytes:.3g} bytes"
        rows.append(Row("NCCL all-to-all, interpolated (us)", name, source, seconds * 1e6,
                        one * 1e6))  # fmt: skip
        if gpus == 4:
            whole = table_from([p for p, _ in points if p[0] != 4], "").seconds(4, num_bytes)
            rows.append(Row("NCCL all-to-all, 4 GPUs held out (us)", name, source, seconds * 1e6,
                            whole * 1e6))  # fmt: skip
    return rows


def prefill_table(blocks: Sequence[Block]) -> KernelTable:
    """The published times of a prefill's experts over the roofline: inputs, not comparisons."""
    model, gpu = deepseek(), load_cluster("H200").gpu
    bins: dict[int, list[float]] = {}
    for block in blocks:
        ep, tokens, source = block.integer("ep"), block.integer("tokens"), block.text("source")
        seconds = block.number("us") / 1e6
        block.done()
        floor = float(roofline_s(gpu, model.experts, tokens * 8 / ep, 256 / ep, 1))
        at = round(float(np.log2(tokens * 8 / 256)))
        bins.setdefault(at, []).append((seconds - gpu.overhead_s) / floor)
    size = float(np.log2(expert_weight_elements(model.experts)))
    points = tuple((float(at), size, float(np.median(some))) for at, some in sorted(bins.items()))
    return KernelTable(points, source)


def whole_nodes(block: Block, experts: KernelTable) -> Row:
    """Tokens per second of a node that serves DeepSeek-V3 or its kin, two overlapped micro-batches.

    Args:
        block: the published figure.
        experts: measured times of a prefill's experts; decode takes the roofline.
    """
    source, shown = block.text("source"), block.boolean("shown", False)
    model, engine = block.text("model", "deepseek_v3"), block.boolean("served", False)
    overlap = block.boolean("overlap", True)
    phase, preset = block.text("phase"), block.text("preset")
    ep, more = block.integer("ep"), block.integer("replicas", low=0)
    prefill = phase == "prefill"
    workload = Workload(
        phase=phase, routing=block.text("routing"), wire_bytes=FP8_WIRE,
        sequences=block.integer("sequences", 1), context=block.integer("context", 1),
        prompt=block.integer("prompt", 1), forwarded=prefill,
        engine="node-sums" if prefill else "moesaic", exchange_sms=24 if prefill else 0,
        prefill_tokens=block.integer("prefill_tokens", 16384),
        serving=Serving() if engine else None,
    )  # fmt: skip
    published = block.number("tokens_per_s")
    cluster = load_cluster(f"{preset}x{ep // 8}")
    tp = block.integer("tp", 1)
    strategy = Strategy(family="ep", ranks=ep, replicas=more, overlap=overlap,
                        micro_batches=2 if overlap else 1)  # fmt: skip
    if tp > 1:
        strategy = Strategy(family="tp-pp", ranks=tp, tp=tp)
    block.done()
    table = experts if prefill else ROOFLINE
    found = predict(known_model(model), cluster, workload, strategy, table=table)
    load = f"prompts of {workload.prompt}" if prefill else (
        f"{workload.sequences} sequences a GPU, {workload.context} tokens of context"
    )  # fmt: skip
    shape = f"TP{tp}" if tp > 1 else f"EP{ep}"
    name = f"{model}, {phase} {shape} on {preset}, {load}, {workload.routing}"
    # What an engine adds was chosen from the figures of engines.
    status = "shown" if shown else "fitted" if engine else "counted"
    named = source.startswith(("DeepSeek", "SGLang blog"))
    kind_ = "named sources" if named else "others known before"
    return Row(f"end to end, {kind_} (tokens/s of a node)", name, source, published,
               found.per_node, status)  # fmt: skip


def other_tools(block: Block) -> Row:
    """Another tool's estimate of a decode step of DeepSeek-V3 on H200, nothing overlapped."""
    ep, sequences = block.integer("ep"), block.integer("sequences")
    context, published = block.integer("context"), block.number("tpot_ms")
    source = block.text("source")
    block.done()
    workload = Workload(sequences=sequences, context=context, routing="lognormal:0.4",
                        wire_bytes=FP8_WIRE)  # fmt: skip
    cluster = load_cluster(f"H200x{ep // 8}")
    found = predict(deepseek(), cluster, workload, Strategy(family="ep", ranks=ep))
    return Row("other tools' estimates (ms a token)", f"EP{ep}, {sequences} sequences a GPU, "
               f"{context} tokens of context", source, published, found.step_s * 1e3,
               "shown")  # fmt: skip


PREDICTIONS = Path("benchmarks/predictions")


def all_rows(results: Path, predictions: Path = PREDICTIONS) -> list[Row]:
    """Every comparison there is."""
    text = files("moesaic.planner").joinpath("public.yaml").read_text("utf-8")
    public = parse(text, "public.yaml")
    rows = own_rows(results) + foretold_rows(results, predictions)
    for block in public.blocks("low_latency"):
        rows += low_latency(block, normal=False)
    for block in public.blocks("normal"):
        rows += low_latency(block, normal=True)
    rows += [expert_modules(block) for block in public.blocks("experts")]
    rows += all_to_all(public.blocks("all_to_all"))
    table = prefill_table(public.blocks("context_experts"))
    rows += [whole_nodes(block, table) for block in public.blocks("nodes")]
    rows += [served(block) for block in public.blocks("serving")]
    rows += blind_rows(predictions / "public")
    rows += [other_tools(block) for block in public.blocks("estimates")]
    public.done()
    return rows


def main() -> int:
    """Write the page, or check it."""
    parser = argparse.ArgumentParser(description="Compare the planner's predictions with figures.")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--predictions", type=Path, default=PREDICTIONS)
    parser.add_argument("--check", action="store_true", help="Write nothing; 1 if it is stale.")
    options = parser.parse_args()
    rows = all_rows(options.results, options.predictions)
    text = page(rows)
    print("\n".join(summary(rows)))
    if options.check:
        stale = not options.page.exists() or options.page.read_text("utf-8") != text
        print(f"{options.page} is {'stale' if stale else 'up to date'}")
        return int(stale)
    options.page.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
