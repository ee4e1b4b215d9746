"""The planner asks the runtime's parts: policies, predictors, the loader of placements; copies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moesaic.planner.cluster import load_cluster
from moesaic.planner.command import main as plan_command
from moesaic.planner.costs import copy_s
from moesaic.planner.documents import parse
from moesaic.planner.model import Attention, Model
from moesaic.planner.predict import Prediction, predict
from moesaic.planner.sampling import WAYS, Sampler, foresee
from moesaic.planner.simulate import Task, run
from moesaic.planner.slicing import NAMES, shares
from moesaic.planner.strategies import Strategy
from moesaic.planner.workload import POLICIES, PREDICTORS, Replan, Workload, workload_from
from moesaic.runtime.predictors import NO_CONTEXT, ewma
from moesaic.types import ExpertSpec

MODEL = Model(
    name="small", layers=4, dense_layers=0, hidden=2048, dense_intermediate=4096, vocab=1024,
    attention=Attention(heads=16, kv_heads=4, head_dim=128, value_dim=128),
    experts=ExpertSpec(num_experts=16, hidden_size=2048, intermediate_size=2048), top_k=2,
)  # fmt: skip
EP8 = Strategy(family="ep", ranks=8)
OVERLAP = replace(EP8, micro_batches=2, overlap=True)


def at(work: Workload, strategy: Strategy = EP8, nodes: int = 1) -> Prediction:
    return predict(MODEL, load_cluster(f"H200x{nodes}"), work, strategy)


def test_a_task_holds_every_link_it_uses() -> None:
    both = Task("x", "nic", 3.0, joint=True, also=(("nvlink", 1.0),))
    near = Task("y", "nvlink", 1.0, joint=True)
    # NVLink is free again after a second, so the second exchange ends first; the NIC is not.
    assert run([[both], [near]], overlap=True).seconds == 3.0
    assert run([[both], [both]], overlap=True).seconds == 6.0
    assert run([[near], [near, near]], overlap=True).seconds == 3.0
    assert run([[both], [near]], overlap=False).seconds == 4.0
    line = run([[both], [near]], overlap=True)
    assert line.busy == {"nic": 3.0, "nvlink": 2.0}


def test_an_exchange_over_nodes_uses_both_links() -> None:
    line = at(Workload(sequences=64, context=512), replace(EP8, ranks=16), nodes=2).line
    assert line.busy["nic"] > line.busy["nvlink"] > 0
    assert "nic" not in at(Workload(sequences=64, context=512)).line.busy


# --- policies --------------------------------------------------------------------------------


def test_every_policy_of_the_runtime_is_offered() -> None:
    assert POLICIES == NAMES and set(PREDICTORS) == set(WAYS)


@pytest.mark.parametrize("policy", [name for name in NAMES if name != "none"])
def test_a_policy_divides_the_sms(policy: str) -> None:
    found = shares(policy, compute_s=4e-3, exchange_s=1e-3, reads=False)
    if found.together:
        assert sum(found.sizes.values()) <= 132 and set(found.sizes) == {"compute", "exchange"}
        assert found.compute > 1 and found.exchange > 1
    # More work gets no fewer SMs.
    more = shares(policy, compute_s=1e-3, exchange_s=4e-3, reads=False)
    if found.together and more.together:
        assert more.sizes["exchange"] >= found.sizes["exchange"]


def test_a_policy_reaches_the_step() -> None:
    work = Workload(phase="prefill", prefill_tokens=16384, prompt=2048)
    sliced = at(replace(work, policy="static"), OVERLAP)
    assert sliced.slices["compute"] > sliced.slices["exchange"] > 0
    free, turns = at(work, OVERLAP), at(replace(work, policy="none"), OVERLAP)
    assert turns.hidden == 0 and not turns.slices and not free.slices
    assert free.step_s < sliced.step_s
    # Without an exchange to overlap there is nothing to divide.
    assert at(replace(work, policy="static")).step_s == at(work).step_s


# --- placements made anew --------------------------------------------------------------------


def walk(steps: int = 40, turn: bool = True) -> np.ndarray:
    """(steps, 4 layers, 16 experts): half of them take most, another half every ten steps."""
    trace = np.full((steps, 4, 16), 20)
    for step in range(steps):
        bit = step // 10 if turn else 0
        trace[step, :, [e for e in range(16) if e >> bit & 1]] = 200
    return trace


def test_foresight_is_the_runtimes() -> None:
    rows, state = walk()[:, 0], ewma(0.3).start(16, 0)
    for row in rows:
        state = ewma(0.3).update(state, row.astype(float), NO_CONTEXT)
    assert foresee(rows, "ewma0.3").tolist() == ewma(0.3).predict(state, NO_CONTEXT).tolist()


def test_placing_anew_balances_what_changes_and_costs_copies() -> None:
    work = Workload(sequences=256, context=512, trace=walk(), routing="trace")
    often = replace(work, replan=Replan(every=5, foresee="last"))
    once, anew = at(work), at(often)
    assert once.utilisation["copy"] == 0 and "move experts" not in once.breakdown
    assert anew.balancedness > once.balancedness
    assert anew.breakdown["move experts"] > 0 and 0 < anew.utilisation["copy"] <= 1
    still = at(replace(often, trace=walk(turn=False)))
    assert still.breakdown.get("move experts", 0.0) == 0
    # With overlap the copies lie beside the micro-batches, without they add up.
    beside = at(often, OVERLAP)
    assert beside.line.busy["copy"] == pytest.approx(anew.line.busy["copy"], rel=0.5)
    assert beside.step_s < sum(beside.breakdown.values())


def test_copies_take_the_bytes_over_the_link() -> None:
    one, two = load_cluster("H200"), load_cluster("H200x2")
    assert copy_s(one, one.topology(8), 355.5e9) == pytest.approx(1.0)
    assert copy_s(two, two.topology(16), 48e9) == pytest.approx(1.0)


def test_a_placement_meets_counts_it_was_not_made_for() -> None:
    sampler = Sampler(MODEL, load_cluster("H200"), Workload(sequences=64))
    now = sampler.counts(8, 64)
    past = sampler._draw(8, 64, past=True)
    assert past.sum() == 16 * now.sum()
    assert np.corrcoef(past.sum(axis=(0, 1)), now.sum(axis=(0, 1)))[0, 1] > 0.8


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("policy: fair\n", r"w\.yaml:1: policy must be one of none, static"),
        ("exchange_sms: 8\npolicy: static\n", r"w\.yaml:2: policy must be left out where"),
        ("seed: 0\nreplan: {every: 5}\n", r"w\.yaml:2: replan needs a trace"),
    ],
)
def test_wrong_parts_are_refused_with_their_line(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        workload_from(parse(text, "w.yaml"), Path(), num_experts=16, layers=3)


# --- the placement's way into the runtime ----------------------------------------------------

MODEL_FILE = """\
moesaic: 1
name: tiny
layers: 3
dense_layers: 1
hidden: 64
attention: {heads: 4, head_dim: 16}
experts: {count: 6, top_k: 2, intermediate: 64}
"""
WORK_FILE = """\
sequences: 64
context: 128
routing: lognormal:1.0
strategies: {families: [ep], ep: [2], tp: [1], pp: [1], replicas: [2], micro_batches: [1]}
"""
RANK = """\
import sys, torch, torch.distributed as dist
from moesaic import moe
from moesaic.parallel.expert_parallel import ExpertParallel, take_experts
from moesaic.parallel.placement import Placement
from moesaic.types import ExpertSpec, ExpertWeights
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
spec = ExpertSpec(num_experts=6, hidden_size=64, intermediate_size=64)
placement = Placement.load(f"{folder}/out/placement.json", ranks=2, num_experts=6)
draw = torch.Generator().manual_seed(0)
weights = ExpertWeights(up=torch.randn(6, 128, 64, generator=draw),
                        down=torch.randn(6, 64, 64, generator=draw))
for layer in range(placement.num_layers):
    mine = take_experts(weights, placement, layer=layer, rank=rank)
    spread = ExpertParallel(spec, placement, mine, top_k=2, layer=layer, group=dist.group.WORLD)
    own = torch.Generator().manual_seed(rank)
    hidden = torch.randn(9, 64, generator=own)
    ids = torch.rand(9, 6, generator=own).argsort(1)[:, :2]
    share = torch.rand(9, 2, generator=own)
    assert torch.equal(spread(hidden, ids, share), moe(hidden, ids, share, weights, spec))
print(placement.num_layers, len(placement.hosted(0)[rank]))
"""


def test_the_runtime_runs_on_the_planners_placement_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "m.yaml").write_text(MODEL_FILE)
    (tmp_path / "w.yaml").write_text(WORK_FILE)
    (tmp_path / "c.yaml").write_text("preset: H200\nnodes: 1\nusd_per_gpu_hour: 2.5\n")
    plan_command(
        model=tmp_path / "m.yaml", cluster=str(tmp_path / "c.yaml"), workload=tmp_path / "w.yaml",
        out=tmp_path / "out", explained=False, results=tmp_path, workers=1, layers=2,
    )  # fmt: skip
    assert "USD per million tokens, at 2.5 USD per GPU" in capsys.readouterr().out
    best = json.loads((tmp_path / "out/plan.json").read_text())["predictions"][0]
    paid = 2.5 * best["gpus"] / 3600 / best["tokens_per_s"] * 1e6
    assert best["usd_per_million_tokens"] == pytest.approx(paid)
    source = Path(__file__).resolve().parents[2] / "src"
    environment = os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, "-W", "ignore", "-c", RANK, str(rank), str(tmp_path)],
                         env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]  # fmt: skip
    try:
        told = [rank.communicate(timeout=300) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, (out, errors) in zip(ranks, told, strict=True):
        assert rank.returncode == 0, errors[-2000:]
        layers, held = map(int, out.split())
        # Six experts and two replicas in four slots a rank; two layers have experts.
        assert (layers, held) == (2, 4)
