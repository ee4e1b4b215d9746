"""The GPU part of suite policies on a made-up GPU: its flow, its routing from counts, its lines."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic import moe
from moesaic.bench import sliced_plans
from moesaic.bench.results import Recorder, make_line, stamp
from moesaic.bench.scenes import WIDTHS, scene
from moesaic.bench.suite import Cell, Context
from moesaic.bench.suites.policies import SUITE
from moesaic.runtime.plan import Curve, GroupProfile, MachineSlices, Plan, Share
from moesaic.runtime.policies.sizing import plan_ms
from moesaic.types import ExpertSpec

TINY = ExpertSpec(num_experts=17, hidden_size=16, intermediate_size=8)
MS = {(): 1.0}


class FakeGreen:
    """Carves without a GPU; remembers the sizes asked for."""

    def __init__(self, device: int) -> None:
        self.cut = SimpleNamespace(total_sms=132, atom_sms=8, atoms=15)
        self.carved: list[tuple[int, ...]] = []

    def slice(self, atoms: range) -> SimpleNamespace:
        return SimpleNamespace(sms=8 * len(atoms), stream=8 * len(atoms))

    def carve(self, sizes: tuple[int, ...]) -> list[SimpleNamespace]:
        assert sum(sizes) <= 120 and all(n % 8 == 0 and n > 0 for n in sizes)
        self.carved.append(tuple(sizes))
        return [SimpleNamespace(sms=n, stream=None) for n in sizes]

    def close(self) -> None:
        pass


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(layer, ids_TK, call, stream):
        tokens, top_k = ids_TK.shape
        out = call(layer.hidden_TH[:tokens], ids_TK, layer.share_TK[:tokens, :top_k].contiguous())
        return sliced_plans.Replayable(stream, ids_TK, out, stream)

    monkeypatch.setattr(sliced_plans, "GreenDevice", FakeGreen)
    monkeypatch.setattr(sliced_plans, "SPEC", TINY)
    monkeypatch.setattr(sliced_plans, "capture", capture)
    monkeypatch.setattr(sliced_plans, "sample", lambda made, ids_TK: 1.0)
    monkeypatch.setattr(
        sliced_plans, "run_budgeted",
        lambda h, ids, w, weights, spec, num_sms=None: moe(h, ids, w, weights, spec),
    )  # fmt: skip
    monkeypatch.setattr(
        sliced_plans, "time_ms", lambda graphs, stream, repeats: 132 / (stream or 132)
    )
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    short = scene("prefill-docs", sliced_plans.LAYER, "layer")
    short = sliced_plans.Scene(short.groups, short.steps[:64])
    monkeypatch.setattr(sliced_plans, "scene", lambda *args, **more: short)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=2, max_size=16))
def test_ids_have_the_recorded_counts_and_no_expert_twice(counts: list[int]) -> None:
    counts[0] += sum(counts) % 2
    if max(counts) * 2 > sum(counts) or not sum(counts):
        with pytest.raises(ValueError, match="at most T"):
            sliced_plans.ids_from([9, 1])
        return
    ids_TK = sliced_plans.ids_from(counts)
    assert torch.bincount(ids_TK[:, :2].flatten(), minlength=len(counts)).tolist() == counts
    assert (ids_TK[:, 0] != ids_TK[:, 1]).all() and (ids_TK[:, 2] == WIDTHS.num_experts).all()


def test_the_measured_cell_writes_curves_then_policies(gpu: None, tmp_path) -> None:
    recorder = Recorder(tmp_path, "h200", "policies", SUITE.summarize)
    context = Context(torch.device("cpu"), recorder, 10.0)
    cell = Cell("prefill-docs", 1024, routing="layer", clock="measured")
    sliced_plans.measure([cell], context, stamp(context.device), "policies")
    lines = recorder.lines
    assert not [x for x in lines if x.get("error") or x.get("wrong")]
    curve = [x for x in lines if x["clock"] == "curve"]
    assert {x["work"] for x in curve} == {"gemm", "copy", "hot", "cold", "shared"}
    assert len(curve) == 5 * 16
    done = {x["impl"]: x for x in lines if x["clock"] == "measured"}
    assert set(done) >= {"none", "static", "dynamic", "adaptive", "oracle", "streams"}
    assert done["none"]["plans"] == [[]] * sliced_plans.STEPS
    # Curves that fall as 1 / SMs leave nothing to gain by slicing.
    assert done["adaptive"]["plans"] == [[]] * sliced_plans.STEPS
    fed = done["adaptive, measured times fed back"]
    assert fed["samples"] == 64 - sliced_plans.WINDOW and fed["ms"] == fed["whole_ms"] == 1.0
    assert list(done)[-1] == "adaptive" and SUITE.measured(lines[-1]) == cell


def test_an_answer_that_differs_is_a_wrong_line(gpu: None, monkeypatch, tmp_path) -> None:
    right = sliced_plans.SlicedExperts.__call__
    monkeypatch.setattr(sliced_plans.SlicedExperts, "__call__", lambda *args: right(*args) + 1e-3)
    recorder = Recorder(tmp_path, "h200", "policies", SUITE.summarize)
    context = Context(torch.device("cpu"), recorder, 10.0)
    cell = Cell("prefill-docs", 1024, routing="layer", clock="measured")
    sliced_plans.measure([cell], context, stamp(context.device), "policies")
    lines = [x for x in recorder.lines if x["clock"] == "measured"]
    assert all("answers differ" in x["wrong"] for x in lines)
    missed = {t.name for t in recorder.targets() if not t.met}
    assert "measured: policies whose answers differ" in missed


def test_rows_of_the_curves_are_even_and_of_their_group_only() -> None:
    view = scene("prefill-docs", 4, "layer")
    rows = sliced_plans.curve_rows(view)
    for work, group in (("gemm", 0), ("copy", 1)):
        counted = np.array(rows[work])
        assert set(np.flatnonzero(counted)) == set(view.groups[group].experts)
        assert (counted % 2 == 0).all() and sum(rows[work]) // 2 >= max(rows[work])


def test_every_group_has_a_curve_of_its_own_rows() -> None:
    """Groups of one kind of work still share what bounds it."""
    view = scene("prefill-docs", 4, "layer")
    ids = sliced_plans.own_ids(view)
    steps = view.steps[: sliced_plans.WINDOW]
    for group in view.groups:
        wanted = np.mean([[step.counts_E[e] for e in group.experts] for step in steps], axis=0)
        counts = np.bincount(ids[group.name].flatten().numpy(), minlength=17)
        assert counts[list(group.experts)] == pytest.approx(wanted, abs=2)
    assert ids["shared"].unique().tolist() == [16]
    assert len(ids["shared"]) == sum(steps[0].counts_E) // 2
    own = sliced_plans.by_own_curves(view)
    assert [group.curve for group in own.groups] == ["hot", "cold", "shared"]
    flat = Curve(work="gemm", sms=(8, 132), ms=(1.0, 1.0))
    plan = Plan(policy="t", reason="", shares=tuple(Share(g.name, 40) for g in own.groups))
    curves = {group.name: flat for group in own.groups}
    profile = GroupProfile(step=0, groups=own.groups)
    assert plan_ms(profile, (1.0, 1.0, 1.0), plan, curves, MachineSlices()) == 3.0


def test_a_measured_time_makes_targets() -> None:
    base = {"suite": "policies", "clock": "measured", "model": "m", "tokens": 1, "routing": "layer"}
    fixed = make_line(stamp(torch.device("cpu")), **base, mode="graph", dtype="bfloat16")
    lines = [fixed | {"impl": "none", "ms": 2.0}, fixed | {"impl": "adaptive", "ms": 3.0}]
    targets = {t.name: t for t in SUITE.summarize(lines)}
    assert targets["measured: adaptive's time over that of not slicing"].value == 1.5
    assert not targets["measured: adaptive's time over that of not slicing"].met
