"""The two studies of one expert per GPU: inputs beside this file, reports into docs/studies.md.

    python examples/plan/studies.py            # about two minutes on two cores
    python examples/plan/studies.py --only a   # printed

Every figure comes from the planner with the roofline as kernel times: the studies name their GPUs
by flops and bandwidth alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from moesaic.planner.cluster import Cluster, load_cluster
from moesaic.planner.model import Model, load_model
from moesaic.planner.predict import Prediction
from moesaic.planner.search import Question, predict_all
from moesaic.planner.strategies import Strategy
from moesaic.planner.workload import Workload, load_workload

HERE = Path(__file__).parent
ROUTINGS = ("uniform", "lognormal:0.4", "lognormal:0.8")


def load(name: str) -> tuple[Model, Cluster, Workload]:
    """The three inputs of a study."""
    model = load_model(HERE / f"{name}_model.yaml")
    cluster = load_cluster(HERE / f"{name}_cluster.yaml")
    workload = load_workload(
        HERE / f"{name}_workload.yaml",
        num_experts=model.experts.num_experts, layers=model.moe_layers,
    )  # fmt: skip
    return model, cluster, workload


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows), ""]


def best(found: Sequence[Prediction]) -> Prediction | None:
    """The most throughput per GPU of those that fit."""
    return max((p for p in found if p.fits), key=lambda p: p.per_gpu, default=None)


def study_a() -> list[str]:
    """16 GPUs: one expert a GPU against TP=8, PP=2."""
    model, cluster, workload = load("study_a")
    ours = [
        Strategy(family="one-per-gpu", ranks=16, micro_batches=m, overlap=o)
        for m in (16, 32, 64)
        for o in (False, True)
    ]
    theirs = [
        Strategy(family="tp-pp", ranks=8, tp=8, stages=2, micro_batches=m, overlap=o)
        for m in (32, 64, 128)
        for o in (False, True)
    ]
    rows = []
    for top_k in (1, 2, 4):
        for routing in ROUTINGS:
            q = Question(
                model=replace(model, top_k=top_k), cluster=cluster,
                workload=replace(workload, routing=routing), sampled_layers=4,
            )  # fmt: skip
            mine, other = (best(predict_all(q, some, workers=1)) for some in (ours, theirs))
            assert mine is not None and other is not None
            rows.append((
                str(top_k), routing, f"{mine.step_s:.1f}", f"{100 * mine.bubble:.0f} %",
                f"{mine.balancedness:.2f}", f"{100 * mine.hidden:.0f} %", f"{other.step_s:.1f}",
                f"{100 * other.bubble:.0f} %", f"{other.step_s / mine.step_s:.2f}",
            ))  # fmt: skip
    heads = ("K", "routing", "1 expert/GPU, s", "idle", "balance", "exchange hidden", "TP8 PP2, s",
             "idle", "speed-up")  # fmt: skip
    return [
        "## Four layers, 16 experts, 16 H100",
        "",
        "1024 sequences of 10,000 tokens through the model once: one expert of every layer on each "
        "of 16 GPUs, attention data-parallel, against tensor parallel 8 with two pipeline stages.",
        "",
        'The baseline is described with "8 experts per layer per GPU". That cannot hold: with 16 '
        "experts cut over 8 GPUs every GPU has an eighth of all 16, the weight of two whole "
        "experts a layer. It is read so. K is left open, so three values are shown; the best "
        "number of micro-batches is taken for each side. Seconds are for the whole batch.",
        "",
        *table(heads, rows),
        *_summary_a(rows),
        "The step is bound by compute. Tensor parallel experts do not feel skew: every GPU has a "
        "slice of every expert. With one expert per GPU the fullest expert's GPU sets the pace; "
        "`idle` is what the others lose.",
        "",
    ]


def _summary_a(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Who is faster, by routing, from the figures."""
    lines = []
    for routing in ROUTINGS:
        ratios = [float(r[-1]) for r in rows if r[1] == routing]
        lines.append(
            f"- {routing}: one expert per GPU takes {1 / max(ratios):.2f} to {1 / min(ratios):.2f} "
            "times the seconds of tensor parallelism."
        )
    return [*lines, ""]


FAMILIES: dict[str, list[Strategy]] = {
    "one expert/GPU, EP256": [
        Strategy(family="one-per-gpu", ranks=256, tp=8, micro_batches=m, overlap=m > 1)
        for m in (1, 2)
    ],
    "one expert/GPU, EP288 (32 replicas)": [
        Strategy(family="one-per-gpu", ranks=288, tp=8, replicas=32, micro_batches=m, overlap=m > 1)
        for m in (1, 2)
    ],
    "one expert/GPU, EP512 (256 replicas)": [
        Strategy(family="one-per-gpu", ranks=512, tp=8, replicas=256, micro_batches=m,
                 overlap=m > 1)
        for m in (1, 2)
    ],
    "one expert/GPU/layer, 61 x 256": [
        Strategy(family="literal", ranks=256, tp=tp, stages=61, micro_batches=61 * m,
                 overlap=m > 1)
        for tp in (1, 8)
        for m in (1, 2)
    ],
    **{
        f"EP{ep}": [
            Strategy(family="tp-ep-dp", ranks=ep, tp=8, stages=stages, micro_batches=stages * m,
                     replicas=32 if ep == 144 else 0, overlap=m > 1)
            for stages in ((1, 2, 4, 8, 16, 31) if ep < 64 else (1, 2, 4))
            for m in (1, 2)
        ]
        for ep in (8, 32, 64, 144)
    },
    "TP8 x PP": [
        Strategy(family="tp-pp", ranks=8, tp=8, stages=stages, micro_batches=stages * m)
        for stages in (8, 16, 31, 61)
        for m in (1, 2)
    ],
}  # fmt: skip


def study_b() -> list[str]:
    """61 layers on 16,384 GPUs: decode and prefill, by batch and by skew."""
    model, cluster, workload = load("study_b")
    text = [
        "## 61 layers, 256 experts, GPUs of 400 TFLOP/s",
        "",
        "GPUs of 400 TFLOP/s x 60 %, 64 GB, 1.8 TB/s x 80 %. Two readings of one expert per GPU "
        "per layer: a group of 256 GPUs of which each holds one expert of *every* layer, and, read "
        "literally, 61 groups of 256, one per layer (15,616 GPUs, micro-batches in flight through "
        "all of them). Multi-head attention of 128 x 128 has 57 GB of projections in all, which no "
        "64 GB card holds beside experts and a cache of 4 MB per token: attention is cut over 8 "
        "GPUs everywhere but in the literal reading, where both are tried. Batches are the largest "
        "of 1, 2, 4 and 8 sequences a GPU that fit.",
        "",
    ]
    decode: dict[tuple[str, str], Prediction] = {}
    for routing in ROUTINGS:
        for sequences in (1, 2, 4, 8):
            q = Question(
                model=model, cluster=cluster, sampled_layers=2,
                workload=replace(workload, routing=routing, sequences=sequences),
            )  # fmt: skip
            for name, some in FAMILIES.items():
                found = best(predict_all(q, some, workers=1))
                key = (name, routing)
                if found and (key not in decode or found.per_gpu > decode[key].per_gpu):
                    decode[key] = found
    text += ["### Decode, 1024 tokens of context", ""]
    text += table(
        ("deployment", "best with", "ms a token", *(f"tok/s/GPU, {r}" for r in ROUTINGS), "balance",
         "waits for"),
        [_row(name, [decode.get((name, r)) for r in ROUTINGS]) for name in FAMILIES],
    )  # fmt: skip
    prefill: dict[tuple[str, str], Prediction] = {}
    for routing in ROUTINGS:
        q = Question(
            model=model, cluster=cluster, sampled_layers=2,
            workload=replace(workload, phase="prefill", prefill_tokens=4096, routing=routing,
                             forwarded=True),
        )  # fmt: skip
        for name, some in FAMILIES.items():
            found = best(predict_all(q, some, workers=1))
            if found:
                prefill[name, routing] = found
    text += ["### Prefill, 4096 tokens a GPU in prompts of 1024", ""]
    text += table(
        ("deployment", "best with", "ms a step", *(f"tok/s/GPU, {r}" for r in ROUTINGS), "balance",
         "waits for"),
        [_row(name, [prefill.get((name, r)) for r in ROUTINGS]) for name in FAMILIES],
    )  # fmt: skip
    return [*text, *_verdict(decode, "decode"), *_verdict(prefill, "prefill")]


def _row(name: str, found: list[Prediction | None]) -> list[str]:
    shown = found[1] or next((p for p in found if p), None)
    if shown is None:
        return [name, "does not fit", *["-"] * 6]
    rates = [f"{p.per_gpu:.1f}" if p else "-" for p in found]
    sequences = f"{shown.strategy.name}, {shown.sequences * shown.strategy.homes:.0f} seq. a copy"
    return [name, sequences, f"{shown.step_s * 1e3:.1f}", *rates, f"{shown.balancedness:.2f}",
            shown.binding]  # fmt: skip


def _verdict(found: dict[tuple[str, str], Prediction], phase: str) -> list[str]:
    """What wins under each routing, in sentences made from the figures."""
    lines = []
    for routing in ROUTINGS:
        rates = {name: p for (name, r), p in found.items() if r == routing}
        ours = {n: p for n, p in rates.items() if n.startswith("one expert")}
        others = {n: p for n, p in rates.items() if not n.startswith("one expert")}
        if not ours or not others:
            continue
        mine = max(ours, key=lambda n: ours[n].per_gpu)
        rival = max(others, key=lambda n: others[n].per_gpu)
        quick, slow = (min(some.values(), key=lambda p: p.step_s) for some in (ours, others))
        ratio = ours[mine].per_gpu / others[rival].per_gpu
        lines.append(
            f"- {phase}, {routing}: the best with one expert per GPU ({mine}) gives {ratio:.2f} "
            f"times the throughput per GPU of {rival}; its fastest step takes "
            f"{quick.step_s * 1e3:.1f} ms, the fastest of the others {slow.step_s * 1e3:.1f} ms."
        )
    alone, spread = "one expert/GPU, EP256", "one expert/GPU, EP512 (256 replicas)"
    for what, name in (
        ("without replicas", alone),
        ("with 256 replicas", spread),
        ("EP64", "EP64"),
    ):
        even, skewed = (found.get((name, r)) for r in (ROUTINGS[0], ROUTINGS[-1]))
        if even and skewed:
            lines.append(
                f"- {phase}, skew of {ROUTINGS[-1]} against even routing, {what}: "
                f"{skewed.per_gpu / even.per_gpu:.2f} times the throughput."
            )
    return [*lines, ""]


def main() -> None:
    """Run both studies and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE.parents[1] / "docs" / "studies.md")
    parser.add_argument("--only", choices=("a", "b"), help="print one of them, write nothing")
    options = parser.parse_args()
    if options.only:
        print("\n".join(study_a() if options.only == "a" else study_b()))
        return
    out = options.out
    head = [
        "# Two studies of one expert per GPU",
        "",
        "Written by `python examples/plan/studies.py` from the YAML files beside it; predictions, "
        "not measurements (how far to trust them: [validation](validation.md)). Routing is drawn; "
        "`balance` is mean over maximum of the rows a GPU gets.",
        "",
    ]
    out.write_text("\n".join([*head, *study_a(), *study_b()]).rstrip() + "\n", "utf-8")
    print(out)


if __name__ == "__main__":
    main()
