"""The profiler on a GPU: true counts in eager and captured steps, no waiting, the same bits."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import moesaic
from moesaic import ExpertSpec, MoE, RouterSpec
from moesaic.bench.timing import refuse_sync
from moesaic.integrations.perfetto import PerfettoTrace, merge
from moesaic.runtime.counters import ROUTED, ROWS, TILES
from moesaic.runtime.profiler import Profiler
from moesaic.runtime.ranges import ranges

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")


def model(impl: Any = "auto", layers: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    spec = ExpertSpec(num_experts=32, hidden_size=256, intermediate_size=128)
    router = RouterSpec(num_experts=32, top_k=4)
    how: dict[str, Any] = {"impl": impl, "device": CUDA, "dtype": torch.bfloat16}
    return nn.Sequential(*(MoE(router, spec, **how) for _ in range(layers))).eval()


def counts_of(net: nn.Sequential, x: torch.Tensor) -> list[torch.Tensor]:
    found = []
    for part in net:
        found.append(part.route(x).counts_E.long().cpu())
        x = part(x)
    return found


def inputs(tokens: int, seed: int = 0) -> torch.Tensor:
    gen = torch.Generator(CUDA).manual_seed(seed)
    return torch.randn(tokens, 256, device=CUDA, generator=gen).bfloat16()


@pytest.mark.parametrize("tokens", [1, 2, 37, 1500])
@pytest.mark.parametrize("impl", ["auto", "triton", "reference"])
@torch.no_grad()
def test_eager_steps_count_truly_and_keep_their_bits(impl: str, tokens: int) -> None:
    net, x = model(impl), inputs(tokens)
    want, plain = counts_of(net, x), net(x)
    with moesaic.profile(net) as profiler:
        for _ in range(3):
            assert torch.equal(net(x), plain)
            profiler.step()
        torch.cuda.synchronize()
        profile = profiler.poll()
    assert profile is not None and (profile.steps, profile.tokens) == (3, 3 * tokens)
    assert 0 < profile.seconds < 60 or profile.steps == 3
    for layer, total, counts in zip(profile.layers, profiler.totals, want, strict=True):
        assert total[ROUTED].tolist() == total[ROWS].tolist() == (3 * counts).tolist()
        if impl != "reference":
            assert ((total[TILES] > 0) == (total[ROWS] > 0)).all()
            assert (total[TILES] <= total[ROWS]).all()
        assert layer.counts_E == tuple((3 * counts).tolist())


@pytest.mark.parametrize("tokens", [1, 64])
@torch.no_grad()
def test_captured_steps_count_at_every_replay_with_new_inputs(tokens: int) -> None:
    net, x = model(), inputs(tokens)
    with moesaic.profile(net, slots=16) as profiler:

        def step() -> torch.Tensor:
            out = net(x)
            profiler.step()
            return out

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
            refuse_sync(step)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step()
        torch.cuda.synchronize()
        profiler.poll()
        total = [torch.zeros(32, dtype=torch.long) for _ in net]
        first = [torch.from_numpy(t.copy()) for t in profiler.totals]
        for seed in range(50):
            fresh = inputs(tokens, seed)
            x.copy_(fresh)
            graph.replay()
            for have, counts in zip(total, counts_of_unwatched(net, fresh, profiler), strict=True):
                have += counts
            assert torch.equal(out, unwatched(net, fresh, profiler))
            if seed % 20 == 19:
                torch.cuda.synchronize()
                profiler.poll()
        torch.cuda.synchronize()
        profiler.poll()
    assert profiler.observed.steps == 52 and profiler.failures == {}
    assert profiler.ring.merged > 0, "polling every 20 steps laps a ring of 16"
    for seen, start, want in zip(profiler.totals, first, total, strict=True):
        assert torch.equal(torch.from_numpy(seen[ROWS]) - start[ROWS], want)
        assert torch.equal(torch.from_numpy(seen[ROUTED]) - start[ROUTED], want)


def unwatched(net: nn.Sequential, x: torch.Tensor, profiler: Profiler) -> torch.Tensor:
    """The model's output without counting."""
    held = [part.experts.counters for part in net]
    for part in net:
        part.experts.counters = None
    out = net(x)
    for part, counters in zip(net, held, strict=True):
        part.experts.counters = counters
    return out


def counts_of_unwatched(
    net: nn.Sequential, x: torch.Tensor, profiler: Profiler
) -> list[torch.Tensor]:
    held = [part.experts.counters for part in net]
    for part in net:
        part.experts.counters = None
    found = counts_of(net, x)
    for part, counters in zip(net, held, strict=True):
        part.experts.counters = counters
    return found


@torch.no_grad()
def test_shared_publications_on_any_stream_lose_no_step() -> None:
    """The first goes through Triton's launcher, the next through the driver, the last by flush."""
    net, x = model(layers=1), inputs(4)
    (want,) = counts_of(net, x)
    other = torch.cuda.Stream()
    with moesaic.profile(net, every=3, slots=8) as profiler:
        for number in range(11):
            with torch.cuda.stream(other if number % 4 > 1 else torch.cuda.current_stream()):
                net(x)
                profiler.step()
            torch.cuda.synchronize()
        samples = profiler.ring.read()
        assert [s.steps for s in samples] == [3, 3, 3]
        profiler.flush()
        torch.cuda.synchronize()
        samples += profiler.ring.read()
    assert [s.step for s in samples] == [2, 5, 8, 10] and profiler.failures == {}
    for sample in samples:
        (counts,) = sample.counts
        assert counts[ROWS].tolist() == counts[ROUTED].tolist() == (sample.steps * want).tolist()
    times = [s.time_ns for s in samples]
    assert times == sorted(times)


@torch.no_grad()
def test_times_of_steps_are_those_of_the_device() -> None:
    net, x = model(layers=1), inputs(4)
    with moesaic.profile(net) as profiler:
        net(x)
        profiler.step()
        torch.cuda.synchronize()
        before = time.time_ns()
        profiler.poll()
        for _ in range(5):
            torch.cuda._sleep(4_000_000)
            net(x)
            profiler.step()
        torch.cuda.synchronize()
        profile = profiler.poll()
    assert profile is not None and 5 * 1.5e-3 < profile.seconds < 1.0
    assert abs(profiler.observed.time_ns - before) < 5e9, "Unix time, by the device"


@torch.no_grad()
def test_a_poll_never_waits_for_the_device() -> None:
    net, x = model(layers=1), inputs(4)
    with moesaic.profile(net) as profiler:
        net(x)
        torch.cuda.synchronize()
        torch.cuda._sleep(400_000_000)
        begin = time.perf_counter()
        profiler.step()
        assert profiler.poll() is None
        assert time.perf_counter() - begin < 0.1
        torch.cuda.synchronize()
        assert time.perf_counter() - begin > 0.1
        assert profiler.poll() is not None


# torch's graph trees begin with an empty graph, and say so.
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@torch.no_grad()
def test_compiled_models_are_counted(mode: str) -> None:
    net, x = model(layers=2), inputs(8)
    want = counts_of(net, x)
    with moesaic.profile(net) as profiler:
        whole = torch.compile(net, fullgraph=True, mode=mode)
        for _ in range(4):
            whole(x)
        torch.cuda.synchronize()
        for counters in profiler.counters:
            counters.zero_()
        for _ in range(3):
            whole(x)
            profiler.step()
        torch.cuda.synchronize()
        for counters, counts in zip(profiler.counters, want, strict=True):
            assert counters[ROWS].cpu().tolist() == (3 * counts).tolist()


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events:UserWarning")
@torch.no_grad()
def test_steps_lie_on_the_axis_of_torchs_streams(tmp_path: Path) -> None:
    net, x = model(layers=2), inputs(64)
    ours, theirs, both = (tmp_path / f"{n}.json" for n in ("ours", "torch", "both"))
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with (
        moesaic.profile(net) as profiler,
        PerfettoTrace(ours, profiler.layers) as trace,
    ):
        profiler.sinks["perfetto"] = trace
        net(x)
        profiler.step()
        with torch.profiler.profile(activities=activities) as seen, ranges(net):
            for _ in range(5):
                net(x)
                profiler.step()
                torch.cuda.synchronize()
        profiler.poll()
    seen.export_chrome_trace(str(theirs))
    merge(ours, theirs, both)
    events = json.loads(both.read_text())["traceEvents"]
    published = sorted(
        e["ts"] for e in events if e.get("cat") == "kernel" and "publish_kernel" in e["name"]
    )
    ends = sorted(e["ts"] + e["dur"] for e in events if str(e.get("name")).startswith("step "))[-5:]
    assert len(published) == 5 and any("stream" in str(e.get("args")) for e in events)
    apart = [abs(a - b) for a, b in zip(published, ends, strict=True)]
    assert max(apart) < 1000, f"us between publications and the ends of steps: {apart}"
    assert {e["name"] for e in events} >= {"moesaic.0", "moesaic.1.experts", "rows"}
