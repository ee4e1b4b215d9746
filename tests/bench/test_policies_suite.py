"""Suite policies: traces, walks, scenes, and targets that a bad policy or predictor misses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moesaic.bench import policy_pages, scenes
from moesaic.bench.results import Recorder, make_line, stamp
from moesaic.bench.scenes import Scene, committed_curves, context_of, counts_of, names, scene
from moesaic.bench.suite import Cell, Context
from moesaic.bench.suites import policies as suite
from moesaic.bench.suites.policies import SUITE
from moesaic.bench.walks import PHASE, WALKS, walk
from moesaic.cost import expert_flops
from moesaic.trace import read_trace

TRACES = scenes.BENCHMARKS / "traces"


def test_the_recorded_traces_are_whole_small_and_of_many_texts() -> None:
    files = sorted(TRACES.glob("*.parquet"))
    assert sum(file.stat().st_size for file in files) < 1.5e6
    infos = [read_trace(file, num_experts=16).info for file in files]
    assert len(infos) >= 10 and len({info.text_sha256 for info in infos}) >= 6
    for file in files:
        counts_nLE = counts_of(file.stem)
        assert len(counts_nLE) >= 250 and counts_nLE.shape[1:] == (6, 16)
        assert (counts_nLE.sum(axis=2) == counts_nLE[0, 0].sum()).all()


def test_walks_move_as_they_say_and_repeat_by_seed() -> None:
    assert np.array_equal(walk("bursty", seed=3), walk("bursty", seed=3))
    assert not np.array_equal(walk("bursty", seed=3), walk("bursty", seed=4))
    share = {name: walk(name, steps=256, tokens=8192)[:, 0] / 16384 for name in WALKS}
    moved = {name: np.abs(s[1:] - s[:-1]).sum(1) for name, s in share.items()}
    apart = {name: np.abs(s[-1] - s[0]).sum() for name, s in share.items()}
    assert apart["stationary"] < 0.06 < 0.3 < min(apart["drifting"], apart["phases"])
    at = [PHASE - 1, 2 * PHASE - 1, 3 * PHASE - 1]
    others = np.delete(moved["phases"], at)
    assert moved["phases"][at].min() > 4 * others.max() > 0
    assert np.quantile(moved["bursty"], 0.5) * 5 < moved["bursty"].max()
    with pytest.raises(ValueError, match="walk must be one of stationary"):
        walk("still")


def test_a_scene_is_the_trace_s_work() -> None:
    counts_nLE = counts_of("prefill-docs")
    view = scene("prefill-docs", 2, "layer", times=2)
    hot, cold, shared = view.groups
    assert sorted(hot.experts + cold.experts) == list(range(16)) and not shared.experts
    rows = 2 * counts_nLE[:, 2]
    warm = rows[:32].sum(axis=0)
    assert min(warm[list(hot.experts)]) >= max(warm[list(cold.experts)])
    row_ms = 1e3 * expert_flops(scenes.WIDTHS, 1) / 770e12
    expected = sum(max(scenes.READ_MS, row_ms * rows[50][e]) for e in hot.experts)
    assert view.steps[50].loads_N[0] == pytest.approx(expected)
    assert view.steps[50].counts_E == tuple(rows[50])
    assert (hot.curve, shared.curve) == ("gemm", "gemm")
    assert scene("decode-docs", 2, "layer").groups[0].curve == "copy"
    with pytest.raises(ValueError, match="kind must be"):
        scene("prefill-docs", 2, "nothing")


def test_context_never_looks_ahead() -> None:
    counts_nLE = counts_of("prefill-docs")
    plain = context_of(counts_nLE, 3, layers_before=False).reshape(-1, 6, 16)
    ahead = context_of(counts_nLE, 3, layers_before=True).reshape(-1, 6, 16)
    assert np.array_equal(plain[1:], counts_nLE[:-1])
    assert np.array_equal(ahead[1:, :3], counts_nLE[1:, :3])
    assert np.array_equal(ahead[1:, 3:], counts_nLE[:-1, 3:])


def test_curves_fall_and_name_their_source() -> None:
    curves, source = committed_curves()
    assert (scenes.BENCHMARKS / source).exists() and {"gemm", "copy"} <= set(curves)
    for found in curves.values():
        assert list(found.ms) == sorted(found.ms, reverse=True) and found.ms[-1] == 1.0


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(*args, **more) -> Scene:
        view = scene(*args, **more)
        return Scene(view.groups, view.steps[:56])

    monkeypatch.setattr(suite, "scene", cut)
    monkeypatch.setattr(suite, "counts_of", lambda name: counts_of(name)[:64, :2])


def test_a_run_writes_errors_work_and_replays(short: None, tmp_path) -> None:
    recorder = Recorder(tmp_path, "cpu", "policies", SUITE.summarize)
    context = Context(torch.device("cpu"), recorder, 10.0)
    cells = [
        Cell("prefill-docs", 1024, routing="counts", clock="error"),
        Cell("prefill-docs", 1024, routing="tenant", clock="replay"),
        Cell("synthetic-phases", 2048, routing="layer", clock="replay"),
    ]
    assert set(cells) <= set(SUITE.cells())
    SUITE.run(cells, context)
    lines = recorder.lines
    assert {SUITE.measured(x) for x in lines} - {None} == set(cells)
    assert len({x["clock"] for x in lines}) == 3 and not [x for x in lines if x.get("faults")]
    regret = [x["regret"] for x in lines if x["clock"] == "replay"]
    assert min(regret) >= 0 and 0 in regret
    text, drawn = policy_pages.section(lines, recorder.targets(), tmp_path, "cpu", "figures")
    assert "prefill-docs" in text and "Regret" in text and not drawn
    again = Recorder(tmp_path, "cpu", "policies", SUITE.summarize)
    assert again.lines == lines


def made(clock: str, model: str, impl: str, **values) -> dict:
    fixed = stamp(torch.device("cpu")) | {"suite": "policies", "mode": "replay"}
    return make_line(
        fixed, clock=clock, model=model, tokens=1, routing="x", impl=impl, dtype="b", **values
    )


def test_a_learned_predictor_that_errs_more_misses_its_targets() -> None:
    impl = "learned, step before"
    for wape, met in ((0.1, True), (0.3, False)):
        lines = [
            made("error", "prefill-a", "ewma0.1", wape=0.2),
            made("error", "prefill-a", "ewma0.5", wape=0.25),
            made("error", "prefill-a", impl, wape=wape),
            made("error", "synthetic-b", "ewma0.1", wape=0.01),
            made("error", "synthetic-b", impl, wape=0.5),
        ]
        targets = {t.name: t for t in SUITE.summarize(lines)}
        ratio = targets["error of learned over the best ewma in hindsight, mean of traces"]
        assert ratio.value == pytest.approx(wape / 0.2) and ratio.met is met


def test_a_policy_that_regrets_more_or_fails_misses_its_targets() -> None:
    def lines(adaptive: float, faults: int = 0) -> list[dict]:
        regret = {
            "none": 0.3, "static": 0.2, "dynamic": 0.2, "proportional": 0.2, "oracle": 0.0,
            "adaptive by ewma0.1": 0.1, "adaptive by ewma0.5": 0.05, "adaptive by learned": 0.04,
            "adaptive": adaptive,
        }  # fmt: skip
        return [
            made("replay", "decode-a", impl, ms=1.0, regret=value, faults=faults)
            for impl, value in regret.items()
        ]

    good = {t.name: t.met for t in SUITE.summarize(lines(0.03))}
    assert all(good.values())
    worse = [t for t in SUITE.summarize(lines(0.25)) if not t.met]
    assert len(worse) == 5 and all("adaptive" in t.name for t in worse)
    (failed,) = [t for t in SUITE.summarize(lines(0.03, faults=1)) if not t.met]
    assert failed.name == "lines failed or with faults"


def test_every_cell_has_a_trace_or_walk() -> None:
    assert {cell.model for cell in SUITE.cells()} == set(names())
