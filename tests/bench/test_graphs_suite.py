"""Suite `graphs`: every variant has the bits of its arithmetic; another one is written as wrong."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_capture import FakeCapturer

from moesaic.bench import graph_cells
from moesaic.bench.graph_cells import (
    Variant,
    expert_variants,
    layer_variants,
    make_setting,
    measure_variants,
    memory_values,
    stack_variants,
    stream_variants,
)
from moesaic.bench.results import Recorder
from moesaic.bench.suite import Cell, Context
from moesaic.bench.suites import graphs
from moesaic.bench.workloads import Model
from moesaic.runtime.graphs import GraphConfig, GraphStore

CPU = torch.device("cpu")
MODELS = {"tiny": Model("tiny", 4, 2, 16, 24, kind="relu3", family="paper")}


def faked(config: GraphConfig, device: torch.device) -> GraphStore:
    return GraphStore(config, FakeCapturer())


def setting_of(cell: Cell) -> graph_cells.Setting:
    return make_setting(MODELS["tiny"], cell, CPU, 0, faked)


def cell_of(clock: str, tokens: int = 40, routing: str = "uniform") -> Cell:
    return Cell("tiny", tokens, routing, "float32", clock)


@pytest.mark.parametrize(
    ("clock", "make"),
    [
        ("layer", layer_variants),
        ("stack", partial(stack_variants, layers=2)),
        ("experts", expert_variants),
        ("streams", stream_variants),
    ],
)
def test_every_variant_has_the_bits_of_its_arithmetic(clock: str, make: Any) -> None:
    setting = setting_of(cell_of(clock))
    with torch.no_grad():
        variants = make(setting)
    found = measure_variants(variants, CPU, budget_s=0.05, seed=0).values
    assert set(found) == set(variants)
    for way, values in found.items():
        assert not values.get("error") and not values["wrong"] and values["ms"] > 0, way
        assert values["host_us"] > 0
    replayed = [v for v in found.values() if v.get("replayed")]
    assert replayed and all(v["graphs"] >= 1 and v["held_bytes"] > 0 for v in replayed)


def test_other_bits_and_errors_are_written_down() -> None:
    def broken() -> torch.Tensor:
        raise RuntimeError("no kernel")

    found = measure_variants(
        {
            ("a", "eager"): Variant([lambda: torch.ones(3)]),
            ("b", "eager"): Variant([lambda: torch.ones(3) + 1e-6], like=("a", "eager")),
            ("c", "eager"): Variant([lambda: torch.zeros(3)]),
            ("d", "eager"): Variant([broken]),
        },
        CPU,
        budget_s=0.01,
        seed=0,
    ).values
    assert [found[name, "eager"].get("wrong") for name in "abc"] == [False, True, False]
    assert found["d", "eager"]["error"] == "RuntimeError: no kernel"


def test_fixed_routing_is_the_same_in_every_call() -> None:
    inputs = setting_of(cell_of("experts", routing="fixed")).inputs
    assert all(torch.equal(one.topk_ids_TK, inputs[0].topk_ids_TK) for one in inputs)
    assert not torch.equal(inputs[0].hidden_TH, inputs[1].hidden_TH)


def test_memory_rounds_capture_and_evict_each_time() -> None:
    (values,) = memory_values(setting_of(cell_of("memory", 12)), 40).values()
    assert (values["captured"], values["evicted"], values["graphs"]) == (40, 37, 3)
    assert values["lost_bytes"] == 0 and not values["wrong"]


def test_a_run_records_lines_that_give_the_targets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "CAPTURES", 20)
    wanted = [
        cell_of("warm-up"), cell_of("layer"), cell_of("memory"), cell_of("experts"),
        cell_of("launch"),
    ]  # fmt: skip
    monkeypatch.setattr(graphs, "cells", lambda: wanted)
    recorder = Recorder(tmp_path, "cpu", "graphs", graphs.summarize)
    graphs.run(wanted, Context(CPU, recorder, budget_s=20.0), models=MODELS)
    by_clock = {x["clock"]: x for x in recorder.lines}
    assert set(by_clock) == {"warm-up", "layer", "memory", "experts", "launch"}
    assert "CUDA" in by_clock["launch"]["error"]  # there are no graphs here
    targets = {t.name: t for t in recorder.targets()}
    # The launch cell, and the layer's replay in place, which needs a graph.
    assert targets["lines with other bits, or failed"].value == 2.0, recorder.lines
    assert not targets["lines with other bits, or failed"].met
    assert targets["layer: eager over cached, geomean"].value is not None
    assert targets["paper: 1 us a kernel under a graph (host)"].value is None
    assert targets["cells measured"].value == 4.0


def line(clock: str, impl: str, mode: str, **values: Any) -> dict[str, Any]:
    fixed = {"clock": clock, "impl": impl, "mode": mode, "model": "m", "tokens": 1, "routing": "u"}
    return {**fixed, "dtype": "bfloat16", "ms": 1.0, **values}


def test_the_page_shows_every_line_with_its_numbers() -> None:
    stamped = {"device": "d", "torch": "2", "triton": "3", "commit": "c", "date": "2026-01-01T"}
    lines = [
        line("layer", "moesaic", "eager", ms=0.5, host_us=99.5) | stamped,
        line("layer", "moesaic", "cache", ms=0.25, held_bytes=2**21, wrong=True) | stamped,
        line("launch", "expert", "replay", ms=None, error="RuntimeError: no") | stamped,
    ]
    text, figures = graphs.SUITE.section(lines, [], Path(), "h200", "figures")  # type: ignore[misc]
    assert figures == {}
    assert "| m | 1 | u | moesaic | eager | 0.5 | 99.5 | - |" in text
    assert "| m | 1 | u | moesaic | cache | wrong | - | 2,097,152 |" in text
    assert text.count("####") == 2


def test_targets_come_from_the_lines_and_wrong_ones_count_for_nothing() -> None:
    lines = [
        line("layer", "moesaic", "eager", ms=4.0),
        line("layer", "moesaic", "cache", ms=2.0),
        line("streams", "moesaic+shared", "replay", ms=3.0),
        line("streams", "moesaic+shared-aside", "replay", ms=1.0, wrong=True),
        line("launch", "expert", "replay", host_us_per_kernel=0.8),
        line("memory", "moesaic", "cache", lost_bytes=2**22, samples=graphs.CAPTURES),
        line("memory", "moesaic", "cache", lost_bytes=2**30, samples=graphs.CAPTURES - 1),
        line("experts", "per-expert-graphs", "padded", held_share=0.3),
        line("warm-up", "expert", "eager", warmups=2),
    ]
    targets = {t.name: t for t in graphs.summarize(lines)}
    assert targets["layer: eager over cached, geomean"].value == 2.0
    assert targets["shared expert: in turn over aside, geomean"].value is None
    assert targets["paper: 1 us a kernel under a graph (host)"].met
    lost = targets[f"bytes lost over {graphs.CAPTURES} captures"]
    assert lost.value == pytest.approx(2**22, rel=1e-4) and not lost.met
    assert not targets["paper: 10 % of memory for graphs (of weights)"].met
    assert targets["paper: 3 to 5 warm-ups"].met
    assert targets["lines with other bits, or failed"].value == 1.0
