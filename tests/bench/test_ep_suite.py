"""Suite `ep`: what it measures is checked, what it claims comes from its lines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moesaic.bench import ranks
from moesaic.bench.ep_page import ep_section, exchange_sheet, layer_sheet
from moesaic.bench.placement_page import link_sheet
from moesaic.bench.results import REQUIRED, Recorder, make_line
from moesaic.bench.suites import ep
from moesaic.bench.timing import percentile

WORKER = Path(__file__).parent / "ep_bench_worker.py"
SOURCE = Path(__file__).resolve().parents[2] / "src"


def run_ranks(ranks: int, folder: Path, **environment: str) -> list[dict]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, f"--nproc-per-node={ranks}", str(WORKER), str(folder)],
        env=os.environ | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_two_processes_measure_and_one_writes(tmp_path) -> None:
    lines = run_ranks(2, tmp_path)
    found = {(x["clock"], x["impl"], x["mode"]) for x in lines}
    assert {("dispatch", i, "graph") for i in ("moesaic", "moesaic-32sm", "nccl")} <= found
    assert {("combine", "nccl-counts", "eager"), ("layer-ep1", "moesaic", "graph")} <= found
    assert {("layer-ep2", "moesaic", "graph"), ("layer-ep2", "moesaic-nccl", "eager")} <= found
    assert all(x["ms"] > 0 and not x.get("wrong") and x["ranks"] for x in lines)
    assert not any(x["clock"] == "layer-ep4" for x in lines), "there are two ranks"
    assert Recorder(tmp_path, "cpu-x2", "ep", ep.summarize).lines == lines


@pytest.mark.slow
def test_four_processes_measure_groups_of_every_size(tmp_path) -> None:
    lines = run_ranks(4, tmp_path)
    assert not any(x.get("wrong") or x.get("error") for x in lines)
    layers = {(x["clock"], x["ranks"]) for x in lines if x["clock"].startswith("layer")}
    assert layers == {("layer-ep1", 1), ("layer-ep2", 2), ("layer-ep4", 4)}


@pytest.mark.slow
def test_rows_that_come_back_changed_are_wrong(tmp_path) -> None:
    lines = run_ranks(2, tmp_path, SABOTAGE="1")
    exchanged = [x for x in lines if x["clock"] in ("dispatch", "combine")]
    assert {x["wrong"] for x in exchanged if x["impl"].startswith("moesaic")} == {True}
    assert ep.summarize(lines)[0].met is False


@pytest.mark.slow
def test_the_command_runs_on_processes_of_a_cpu(tmp_path) -> None:
    command = [sys.executable, "-m", "moesaic", "bench", "--suite", "ep", "--gpus", "4"]
    some = ["--only", "deepseek-v3-8-k2/16", "--only", "rows-448", "--device", "cpu"]
    done = subprocess.run(
        [*command, *some, "--out", str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    lines = Recorder(tmp_path, "cpu-x4", "ep", ep.summarize).lines
    cells = {ep.measured(x) for x in lines if x["impl"] == "moesaic"}
    assert cells == {
        c for c in ep.runnable(4, cpu=True) if c.model in ("rows-448", "deepseek-v3-8-k2/16")
    }
    assert {x["mode"] for x in lines} == {"eager"} and not any(x.get("wrong") for x in lines)


def test_cells_of_gpus_and_of_a_cpu_are_apart() -> None:
    gpu, cpu = ep.gpu_cells(), ep.cpu_cells()
    assert not {c.model for c in gpu} & {c.model for c in cpu}
    counts = [len(ep.runnable(ranks)) for ranks in (1, 2, 4, 8)]
    assert counts == sorted(counts) and counts[-1] == len(gpu)
    assert {c.clock for c in ep.runnable(4)} == {"exchange", "layer-ep1", "layer-ep2", "layer-ep4"}


def test_weak_scaling_on_eight_is_that_of_the_worst_layer() -> None:
    def layer(model: str, ranks: int, ms: float) -> dict:
        made = line(f"layer-ep{ranks}", ranks * ep.PER_RANK, "moesaic", ms, routing="uniform")
        return made | {"ranks": ranks, "model": model}

    lines = [layer("mixtral-8", 1, 9.0), layer("mixtral-8", 8, 9.5)]
    lines += [layer("wide-16-k1", 1, 8.0), layer("wide-16-k1", 8, 10.0)]
    told = {t.name: t for t in ep.summarize(lines)}
    name = "weak-scaling efficiency at 8, lowest of the layers"
    assert told[name].value == 0.8 and not told[name].met
    assert {t.name: t for t in ep.summarize(lines[:2])}[name].met


def line(clock: str, tokens: int, impl: str, ms: float, gbps: float = 350.0, **more):
    fixed = dict.fromkeys(REQUIRED) | {"suite": "ep", "model": "rows-7168", "routing": "even"}
    fixed |= {"dtype": "bfloat16", "mode": "graph"}
    return make_line(
        fixed, clock=clock, tokens=tokens, impl=impl, ms=ms, gbps=gbps, ranks=4, **more
    )


def test_targets_come_from_the_lines() -> None:
    lines = [line("dispatch", 8192, "moesaic", 1.0), line("dispatch", 8192, "nccl", 3.0)]
    lines += [line("combine", 65536, "moesaic", 9.0, gbps=345.0)]
    lines += [line("dispatch", 4, "moesaic", 0.0055), line("dispatch", 128, "moesaic", 0.011)]
    lines += [line("combine", 8192, "moesaic-32sm", 1.0, gbps=299.0)]
    told = {t.name: t for t in ep.summarize(lines)}
    assert told["slowest GB/s of moesaic, 50 MB and more"].value == 345.0
    assert told["slowest GB/s of moesaic, 50 MB and more"].met
    assert not told["slowest GB/s of moesaic-32sm, 50 MB and more"].met
    other = [line("dispatch", t, "moesaic", 0.2, gbps=339.0) for t in (2048, 8192)]
    other = [other[0] | {"ms": 0.1}, other[1] | {"routing": "zipf1", "model": "rows-2048"}]
    for added, value in zip(other, (345.0, 339.0), strict=True):
        told_more = {t.name: t for t in ep.summarize([*lines, added])}
        assert told_more["slowest GB/s of moesaic, 50 MB and more"].value == value
    assert told["us of dispatch, 1 rows a peer"].met
    assert not told["us of dispatch, 32 rows a peer"].met
    assert told["us of combine, 1 rows a peer"].value is None
    assert told["geomean speed-up over nccl"].value == 3.0
    wrong = line("dispatch", 8192, "moesaic", 0.1, gbps=9999.0, wrong=True)
    told = {t.name: t for t in ep.summarize([*lines[1:], wrong])}
    assert told["slowest GB/s of moesaic, 50 MB and more"].value == 345.0
    assert not told["moesaic lines wrong or failed"].met
    alone = line("layer-ep1", 8192, "moesaic", 1.0) | {"ranks": 1, "model": "wide-16-k1"}
    told = {t.name: t for t in ep.summarize([alone | {"routing": "uniform"}])}
    assert len(told) == 2 and told["cells with a right time"].value == 1.0


def test_the_page_shows_losses_and_scaling() -> None:
    def layer(ranks: int, tokens: int, impl: str, ms: float, **more) -> dict:
        made = line(f"layer-ep{ranks}", tokens, impl, ms, **more)
        return made | {"ranks": ranks, "model": "m"}

    lines = [
        line("combine", 8192, "moesaic", 1.0), line("combine", 8192, "nccl", 0.5),
        line("dispatch", 8192, "moesaic", 1.0, wrong=True),
        layer(1, 8192, "moesaic", 9.0), layer(2, 8192, "moesaic", 5.0),
        layer(2, 16384, "moesaic", 10.0), layer(2, 8192, "moesaic-nccl", 6.0),
        layer(4, 8192, "moesaic", 1.0, wrong=True),
    ]  # fmt: skip
    rows = {tuple(row[:4]): row[4:] for row in exchange_sheet(lines).rows}
    assert rows["combine", "rows-7168", "even", "8,192"][:3] == ["1000", "-", "500"]
    assert rows["dispatch", "rows-7168", "even", "8,192"][0] == "wrong"
    layers = layer_sheet(lines).rows
    assert layers[0] == ["m", "1", "8,192", "9", "-", "-", "-"]
    assert layers[1] == ["m", "2", "8,192", "5", "6", "1.80x", "-"]
    assert layers[2] == ["m", "2", "16,384", "10", "-", "-", "0.90"]
    assert len(layers) == 3, "a wrong line has no scaling"
    text, drawn = ep_section(lines, ep.summarize(lines), Path(), "h200-x4", "figures")
    assert "figures/ep-h200-x4-scaling.svg" in text and "svg" in drawn["ep-h200-x4-scaling.svg"]
    assert ep_section(lines[:2], [], Path(), "h200-x4", "figures")[1] == {}, "nothing scales"


def test_placements_stand_beside_their_rivals() -> None:
    def placed(impl: str, **more) -> dict:
        fixed = dict.fromkeys(REQUIRED) | {"suite": "placement", "model": "m", "clock": "flat"}
        return make_line(fixed, routing="uniform", impl=impl, **more)

    lines = [placed("moesaic", link_us=10.0, cpu_ms=3.0), placed("eplb", link_us=15.0)]
    lines += [placed("milp", link_us=9.9, bound_us=9.8)]
    assert link_sheet(lines).rows == [
        ["m", "flat", "uniform", "10", "-", "15", "9.9", "9.8", "3"]
    ]  # fmt: skip


def test_a_line_names_its_cell() -> None:
    every = ep.cells()
    assert len(set(every)) == len(every)
    cell = ep.measured(line("combine", 8192, "moesaic", 1.0))
    assert cell in every
    assert ep.measured(line("combine", 8192, "moesaic", 1.0, wrong=True)) is None
    assert ep.measured(line("combine", 8192, "nccl", 1.0)) is None


def test_samples_are_taken_in_the_same_order_everywhere() -> None:
    def order(seed: int) -> list[str]:
        seen: list[str] = []
        samplers = {n: (lambda n=n: float(seen.append(n) or len(seen))) for n in "abc"}
        ranks.take_turns(samplers, rounds=4, seed=seed)
        return seen

    assert order(1) == order(1) != order(2)
    timed = ranks.take_turns({"a": lambda: 2.0}, rounds=3, seed=0)
    assert timed["a"].samples == 3 and timed["a"].median == percentile([2.0], 0.5)


def test_gpus_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        ranks.relaunch(0, [])


def test_a_capture_that_fails_on_one_rank_is_given_up_by_all(monkeypatch) -> None:
    """Else the others would wait in the next collective for one that never comes."""
    from moesaic.bench import ranks
    from moesaic.bench.timing import Captured, GraphError

    class Two:
        def __init__(self, other: float) -> None:
            self.other, self.votes, self.captured = other, [], []

        def largest(self, value: float) -> float:
            self.votes.append(value)
            return max(value, self.other)

    held = Captured(None, 1, None, ())
    monkeypatch.setattr(ranks, "capture", lambda calls: held)
    assert ranks.capture_together(Two(0.0), []) is held
    with pytest.raises(GraphError, match="another rank"):
        ranks.capture_together(Two(1.0), [])

    def broken(calls):
        raise GraphError("why")

    monkeypatch.setattr(ranks, "capture", broken)
    team = Two(0.0)
    with pytest.raises(GraphError, match="why"):
        ranks.capture_together(team, [])
    assert team.votes == [1.0]
