"""Files of a watched job: JSON lines, a routing trace, a Perfetto trace beside torch's, ranges."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import moesaic
from moesaic import ExpertSpec, MoE, RouterSpec
from moesaic.integrations.perfetto import FIRST_LAYER_PID, PerfettoTrace, merge
from moesaic.integrations.recording import JsonLines, RoutingTrace, read_profiles
from moesaic.runtime.counters import ROUTED
from moesaic.runtime.profiler import LayerInfo, Profiler
from moesaic.runtime.ranges import ranges
from moesaic.runtime.rates import Settings
from moesaic.trace import TraceInfo, TraceWriter, read_trace


def stack() -> nn.Sequential:
    torch.manual_seed(0)
    spec = ExpertSpec(num_experts=4, hidden_size=8, intermediate_size=16)
    router = RouterSpec(num_experts=4, top_k=2)
    return nn.Sequential(MoE(router, spec), MoE(router, spec)).eval()


@torch.no_grad()
def test_json_lines_and_routing_trace_hold_what_was_seen(tmp_path: Path) -> None:
    net, profiles, shown = stack(), [], []
    lines = tmp_path / "profile.jsonl"
    info = TraceInfo(model="t", num_experts=4, top_k=2, layers=2, text_sha256="0" * 64)
    with (
        moesaic.profile(net) as profiler,
        TraceWriter(tmp_path / "trace.parquet", info) as writer,
    ):
        trace = RoutingTrace(writer)
        profiler.sinks |= {"jsonl": JsonLines(lines), "trace": trace, "list": shown.append}
        for tokens in (3, 1, 7, 5):
            net(torch.randn(tokens, 8))
            profiler.step()
            if tokens != 3:
                profiles.append(profiler.poll())
        for _ in range(70):  # laps the ring: those steps are merged and no rows of a trace
            profiler.step()
        profiles.append(profiler.poll())
    assert profiler.failures == {}
    assert list(read_profiles(lines)) == profiles
    rows = read_trace(tmp_path / "trace.parquet", num_experts=4).rows
    merged = [s for update in shown for s in update.samples if s.steps > 1]
    assert trace.skipped == sum(s.steps for s in merged) > 0
    assert [sum(row.counts_E) for row in rows[:8]] == [6, 6, 2, 2, 14, 14, 10, 10]
    assert (rows[0].step, rows[0].layer, rows[1].layer, rows[2].step) == (0, 0, 1, 1)
    with lines.open("a") as file:
        file.write('{"step": 1')
    assert len(list(read_profiles(lines))) == len(profiles), "a line that is being written"
    with lines.open("a") as file:
        file.write("\n")
    with pytest.raises(ValueError, match=rf"profile\.jsonl:{len(profiles) + 1}"):
        list(read_profiles(lines))


def test_a_line_that_does_not_fit_is_taken_back(tmp_path: Path) -> None:
    profiler = Profiler([LayerInfo("a", 4, 1)], torch.device("cpu"))
    sink = JsonLines("/dev/full")
    profiler.sinks["jsonl"] = sink
    profiler.step()
    assert profiler.poll() is not None and profiler.failures == {"jsonl": 1}
    sink.path = tmp_path / "later.jsonl"
    profiler.step()
    profiler.poll()
    assert len(list(read_profiles(sink.path))) == 1


def drifting(profiler: Profiler, steps: int, share: tuple[int, ...]) -> None:
    for _ in range(steps):
        profiler.counters[0][ROUTED] += torch.tensor(share, dtype=torch.int32)
        profiler.step()
        profiler.poll()


def test_a_perfetto_trace_has_counters_steps_and_hot_spans(tmp_path: Path) -> None:
    settings = Settings(half_life=2, window=0)
    profiler = Profiler([LayerInfo("first", 4, 1)], torch.device("cpu"), settings=settings)
    path = tmp_path / "trace.json"
    with PerfettoTrace(path, profiler.layers) as trace:
        profiler.sinks["perfetto"] = trace
        drifting(profiler, 10, (8, 1, 1, 1))
        drifting(profiler, 30, (2, 2, 2, 2))
        assert not path.exists(), "the file has its name when it is complete"
    assert profiler.failures == {}
    events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    names = {e["args"]["name"] for e in events if e["ph"] == "M"}
    assert names == {"moesaic steps", "first"}
    steps = [e for e in events if e["pid"] == 1 and e["ph"] == "X"]
    assert [e["name"] for e in steps] == [f"step {n}" for n in range(40)]
    gaps_us = [b["ts"] - a["ts"] - a["dur"] for a, b in pairwise(steps)]
    assert max(map(abs, gaps_us)) < 1e-3, "each step begins where the one before ended"
    rows = [e["args"] for e in events if e["name"] == "rows"]
    assert rows[0] == {"expert 0": 8, "expert 1": 1, "expert 2": 1, "expert 3": 1}
    spans = [e for e in events if e["pid"] == FIRST_LAYER_PID and e["ph"] == "X"]
    hot = [e for e in spans if e["name"] == "hot"]
    assert [e["tid"] for e in hot] == [0] and hot[0]["dur"] > 0
    assert {e["tid"] for e in spans if e["name"] == "cold"} <= {1, 2, 3}


@torch.no_grad()
def test_torch_traces_merge_on_one_axis_with_named_layers(tmp_path: Path) -> None:
    net, x = stack(), torch.randn(3, 8)
    ours, theirs, both = (tmp_path / f"{n}.json" for n in ("ours", "torch", "both"))
    with (
        moesaic.profile(net) as profiler,
        PerfettoTrace(ours, profiler.layers) as trace,
        ranges(net),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen,
    ):
        profiler.sinks["perfetto"] = trace
        for _ in range(3):
            net(x)
            profiler.step()
        profiler.poll()
    seen.export_chrome_trace(str(theirs))
    merge(ours, theirs, both)
    events = json.loads(both.read_text())["traceEvents"]
    named = {e["name"]: e for e in events if str(e.get("name")).startswith("moesaic.")}
    assert set(named) == {f"moesaic.{n}{part}" for n in "01" for part in ("", ".gate", ".experts")}
    steps = [e for e in events if str(e.get("name")).startswith("step ")]
    assert len(steps) == 3
    last = max(e["ts"] + e["dur"] for e in steps)
    begin = min(e["ts"] for e in named.values())
    assert 0 < last - begin < 5e6, "steps end after their layers began, on one clock"
    assert not net[0]._forward_hooks and not net[0]._forward_pre_hooks
    theirs.write_text("[]")
    with pytest.raises(ValueError, match="baseTimeNanoseconds"):
        merge(ours, theirs, both)


def test_ranges_leave_compiled_models_whole() -> None:
    net, x = stack(), torch.randn(3, 8)
    for layer in net:
        layer.experts.impl = "reference"
    with torch.no_grad(), ranges(net):
        whole = torch.compile(net, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(whole(x), net(x))
