"""Captures, samplers and one whole cell on a real GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from moesaic.bench import timing
from moesaic.bench.layers import Machine, candidates_of, load, measure_cell
from moesaic.bench.results import Line
from moesaic.bench.suite import Cell
from moesaic.bench.workloads import Model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
STAMP: Line = dict.fromkeys(("device", "torch", "triton", "commit", "date"), "x")


@pytest.fixture
def matrix() -> Iterator[torch.Tensor]:
    yield torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()


def test_a_graph_holds_all_calls_and_rewrites_the_first_output(matrix: torch.Tensor) -> None:
    captured = timing.capture([lambda: matrix @ matrix] * 8)
    captured.first_output.fill_(float("nan"))
    captured.graph.replay()
    assert torch.equal(captured.first_output, matrix @ matrix) and captured.calls == 8


def test_a_call_that_waits_is_refused_with_the_reason_and_the_device_goes_on(
    matrix: torch.Tensor,
) -> None:
    outer = torch.cuda.current_stream()
    with pytest.raises(timing.GraphError, match="waits for the device"):
        timing.capture([lambda: matrix.nonzero()])
    assert torch.cuda.current_stream() == outer and torch.cuda.get_sync_debug_mode() == 0
    timing.capture([lambda: matrix + 1])


def test_graph_and_eager_agree_on_long_work(matrix: torch.Tensor) -> None:
    calls = [lambda: matrix @ matrix @ matrix @ matrix] * 8
    samplers = {
        "graph": timing.graph_sampler(timing.capture(calls)),
        "eager": timing.eager_sampler(calls),
    }
    measured = timing.interleave(samplers, budget_s=1.0).measured
    assert measured["graph"].median == pytest.approx(measured["eager"].median, rel=0.25)
    tflops = 3 * 2 * 2048**3 / measured["graph"].median / 1e9
    assert 10 < tflops < 2500


@pytest.mark.parametrize(
    "model",
    [
        Model("tiny", 16, 4, 256, 512, family="qwen3_moe"),
        Model("tiny-paper", 8, 2, 256, 512, kind="relu3", family="paper"),
    ],
    ids=lambda m: m.name,
)
def test_a_whole_cell_is_right_in_both_modes(model: Model) -> None:
    pytest.importorskip("transformers")
    machine = Machine(torch.device("cuda"), 4.5e12, 2**20)
    candidates = candidates_of(model)
    loaded = load(model, torch.bfloat16, candidates, machine, 0)
    lines = measure_cell(
        loaded, Cell(model.name, 64), candidates, machine,
        budget_s=1.0, seed=0, stamped=STAMP, suite="triton",
    )  # fmt: skip
    by_name = {(x["impl"], x["mode"]): x for x in lines}
    for mode in ("graph", "eager"):
        mine = by_name["moesaic", mode]
        assert mine["ms"] > 0 and not mine["wrong"], mine
    loops = {"transformers-eager", "torch-loop"}
    for (impl, mode), line in by_name.items():
        if impl in loops and mode == "graph":
            assert line["error"].startswith("no graph: waits for the device")
        else:
            assert line.get("error") is None and not line.get("wrong"), line
