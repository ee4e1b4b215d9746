"""Suite `transformers` on tiny models: every clock is filled, and summaries follow from lines."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from moesaic.bench import step_counters
from moesaic.bench.results import Line, Recorder
from moesaic.bench.suite import Cell, Context
from moesaic.bench.suites import transformers as suite
from moesaic.bench.transformers_page import (
    budget_sheet,
    floor_us,
    rest_floor_us,
    transformers_section,
)
from moesaic.bench.whole_models import (
    layer_forward,
    make_step,
    random_model,
    typical_error,
    without_moe,
)
from moesaic.integrations.attach import selected

TINY = {
    "vocab_size": 64, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 16, "num_experts_per_tok": 2, "max_position_embeddings": 64,
}  # fmt: skip
SIZES = {
    "Mixtral-8x7B": TINY | {"num_local_experts": 4, "intermediate_size": 48},
    "Qwen3-30B-A3B": TINY | {"num_experts": 8, "moe_intermediate_size": 16},
}
CPU = torch.device("cpu")


# Of torch, when it traces transformers' own implementations.
@pytest.mark.filterwarnings("ignore:Dynamo detected:UserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", SIZES)
def test_one_compiled_layer_serves_all_and_every_implementation(name: str) -> None:
    model = random_model(name, CPU, 3, **SIZES[name])
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    forward = torch.compile(type(model.model.layers[0]).forward, fullgraph=True, backend=counter)
    outputs = {}
    with torch.no_grad():
        for implementation in ("moesaic", "grouped_mm"):
            for batch in (1, 3, 5):
                step = make_step(model, batch, 1, 16, forward, seed=batch)
                plain = make_step(model, batch, 1, 16, layer_forward(model, None), seed=batch)
                with selected(model, implementation, fuse="always"):
                    outputs[implementation, batch] = step()
                    assert typical_error([step()], [plain()]) < 2e-2
        with without_moe(model):
            rest = make_step(model, 3, 1, 16, forward, seed=3)()
    # One graph for a single sequence and one for more, each for two implementations, and the rest.
    assert counter.frame_count <= 5
    for batch in (1, 3, 5):
        assert typical_error([outputs["moesaic", batch]], [outputs["grouped_mm", batch]]) < 2e-2
    assert typical_error([rest], [outputs["grouped_mm", 3]]) > 5e-2


def test_a_run_fills_every_clock(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, "cpu", suite.NAME, suite.summarize)
    wanted = [Cell("Mixtral-8x7B", 1, "decode", clock="model")]
    wanted.append(Cell("Mixtral-8x7B", 4, "decode", clock="model"))
    wanted.append(Cell("Mixtral-8x7B", 24, "prefill", clock="model"))
    context = Context(CPU, recorder, budget_s=1e6)
    suite.run(wanted, context, layers=2, backend=None, sizes=SIZES["Mixtral-8x7B"])
    found = {(x["routing"], x["clock"], x["impl"]): x for x in recorder.lines if x["tokens"] > 1}
    single = {(x["clock"], x["impl"]): x["ms"] for x in recorder.lines if x["tokens"] == 1}
    tuned = {key for key, ms in single.items() if key[1].endswith("-tuned") and ms > 0}
    assert tuned == {
        ("model", "moesaic-tuned"), ("model", "transformers-batched_mm-tuned"),
        ("rest", "without-moe-tuned"),
    }  # fmt: skip
    for kind, key in itertools.product(
        ("decode", "prefill"),
        (("model", "moesaic"), ("model", "transformers-grouped_mm"), ("moe", "moesaic"),
         ("rest", "without-moe")),
    ):  # fmt: skip
        assert found[(kind, *key)]["ms"] > 0
    assert not found["decode", "moe", "moesaic"]["wrong"]
    assert "skipped" in found["decode", "model", "transformers-batched_mm"]["error"]
    assert suite.measured(found["prefill", "model", "moesaic"]) == wanted[2]
    # In full size four sequences are tuned, which the tiny model is not.
    assert suite.measured(found["decode", "model", "moesaic"]) is None
    assert wanted[0] in map(suite.measured, recorder.lines)


def test_cells_that_tune_for_long_come_last() -> None:
    names = [(c.model[:5], c.tokens, suite.tunes(c)) for c in suite.in_turn(suite.cells())]
    assert names == [
        ("Qwen3", 1, True), ("Qwen3", 64, False), ("Qwen3", 128, False), ("Qwen3", 8192, False),
        ("Qwen3", 16, True), ("Mixtr", 1, True), ("Mixtr", 16, False), ("Mixtr", 64, False),
        ("Mixtr", 128, False), ("Mixtr", 8192, False),
    ]  # fmt: skip


def line(clock: str, impl: str, ms: float, tokens: int = 1) -> dict[str, object]:
    return {
        "model": "Qwen3-30B-A3B", "routing": "decode", "tokens": tokens, "clock": clock,
        "impl": impl, "ms": ms,
    }  # fmt: skip


def test_targets_follow_from_the_lines() -> None:
    lines = [
        line("model", "moesaic", 2.0),
        line("model", "transformers-grouped_mm", 6.0),
        line("model", "transformers-batched_mm", 4.0),
        line("moe", "moesaic", 0.9),
        line("rest", "without-moe", 1.05),
    ]
    # Of a step that is tuned, nothing counts before a rival was.
    speed, share, *others = suite.summarize(lines)
    assert (speed.value, speed.met, share.value, share.met) == (None, False, 0.975, True)
    many = [x | {"tokens": 64} for x in lines]
    assert [(t.value, t.met) for t in suite.summarize(many)[4:6]] == [(2.0, True), (0.975, True)]
    assert len(others) == 18 and not any(t.met for t in others)
    # A rival tuned better than we are is the one that counts; our own tuning brings its own rest.
    lines += [line("model", "transformers-batched_mm-tuned", 2.1)]
    assert suite.summarize(lines)[0].value == pytest.approx(1.05)
    lines += [line("model", "moesaic-tuned", 1.5), line("rest", "without-moe-tuned", 0.585)]
    speed, share, *_ = suite.summarize(lines)
    assert speed.value == pytest.approx(1.4) and share.value == pytest.approx(0.99)
    lines[3]["wrong"] = True
    assert not any(t.met for t in suite.summarize(lines))


def test_a_layers_budget_follows_from_the_lines() -> None:
    lines = [
        line("model", "moesaic", 4.8),
        line("model", "transformers-grouped_mm", 9.6),
        line("moe", "moesaic", 1.92),
        line("rest", "without-moe", 2.88),
    ]
    lines = [x | {"layers": 48} for x in lines]
    (row,) = budget_sheet(lines).rows
    # 60 of rest; ours 40, theirs 140; 75.5 MB of weights take 16.8 us; 1.9 allows 105 - 60. The
    # rest reads 37.7 MB of products, 1 of cache and 13 of the head a layer; 200 over 76.8 and 60.
    assert row[3:] == ["60", "11.5", "40", "140", "16.8", "2", "2.6", "3.33", "1.9", "45.3"]
    lines += [line("model", "transformers-batched_mm-tuned", 4.8) | {"layers": 48}]
    (row,) = budget_sheet(lines).rows
    assert row[6] == "40" and row[-1] == "the rest alone is more"
    assert floor_us("Mixtral-8x7B", 8192) == pytest.approx(7500, rel=1e-3)
    # Products of 41.9 million weights and half of 8192 x 8192 pairs of 4096: 0.69 + 0.55 TFLOP.
    assert rest_floor_us("Mixtral-8x7B", "prefill", 8192) == pytest.approx(1606, rel=1e-2)


@pytest.mark.parametrize(("routing", "tokens"), [("decode", 1), ("prefill", 40)])
def test_a_step_whose_launches_are_counted_is_checked(routing: str, tokens: int) -> None:
    cell = Cell("Qwen3-30B-A3B", tokens, routing)
    with torch.no_grad():
        (case,) = step_counters.step_cases(cell, CPU, 0, None, **SIZES["Qwen3-30B-A3B"])
    assert 0 < case.err < 1.5e-2 and case.impl == "moesaic"


def test_every_launch_has_a_line_and_counts_for_no_target() -> None:
    stamp: Line = dict.fromkeys(("device", "torch", "triton", "commit", "date"), "x")
    known = {"model": "Qwen3-30B-A3B", "tokens": 1, "routing": "decode", "dtype": "bfloat16"}
    label = known | {"impl": "moesaic", "err": 0.0, "wrong": False}
    failed = known | {"tokens": 16, "impl": "moesaic", "error": "X", "marked": False}
    values = ["ns,2000", "hz,1.5e9", "cycle,3000", "cycle,2700", "%,75", "%,50"]
    values += ["byte,8e6", "byte,5e6", "byte,0"]
    rows = ['"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"']
    for number, kernel in enumerate(("spin_kernel(long)", "triton_red_mm", "void a::pair<c>(d)")):
        for metric, value in zip(step_counters.METRICS, values, strict=True):
            unit, amount = value.split(",")
            rows.append(f'"{number}","{kernel}","{metric}","{unit}","{amount}"')
    lines = step_counters.lines_from("\n".join(rows), [label, failed], stamp)
    assert [x["impl"] for x in lines] == [
        "moesaic 01: triton_red_mm",
        "moesaic 02: pair",
        "moesaic",
    ]
    assert {x["clock"] for x in lines} == {"counters"} and lines[0]["gbps"] == 2500.0
    assert {t.value for t in suite.summarize(lines)} == {None}
    page, _ = transformers_section(lines, [], Path(), "h200", "")
    assert "| moesaic 02: pair | 2.0 |" in page and "clock `counters`" not in page
