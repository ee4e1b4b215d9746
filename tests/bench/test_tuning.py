"""`moesaic tune` without a GPU: grids, ranks, tables, and a whole run with invented times."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from moesaic.bench.timing import DeviceLost
from moesaic.bench.tuning import clock, compiling, grid, labs, routing, store
from moesaic.bench.tuning.cell import Lab, Unfit, rank_of, tune_cell
from moesaic.bench.tuning.command import Tools, main
from moesaic.bench.tuning.compiling import Request, space_of
from moesaic.bench.tuning.labs import HopperLab, TritonLab
from moesaic.bench.tuning.routing import row_blocks
from moesaic.bench.tuning.shapes import find_model, model_from, token_counts
from moesaic.bench.workloads import MODELS, Model, make_weights
from moesaic.kernels import tune
from moesaic.kernels.hopper import experts
from moesaic.kernels.hopper.fit import ONE_LAUNCH, tile_problem
from moesaic.kernels.tune import GemmConfig, shape_key, shared_bytes, shared_limit

FACTS = ("NVIDIA H200", 90, 132)
QWEN = MODELS["Qwen3-30B-A3B"]
TOKENS = (1, 4, 16, 64, 128, 512, 1024, 4096, 8192)


def request(model: Model = QWEN, tokens: tuple[int, ...] = TOKENS, impls=("triton", "hopper")):
    return Request(model, "bfloat16", tokens, impls, 90, "h200", 132)


def names_of(model: Model) -> tuple[str, ...]:
    plain = model.kind == "swiglu"
    return ("triton", "hopper") if plain else ("triton",)


@pytest.mark.parametrize("model", MODELS.values(), ids=lambda m: m.name)
def test_grids_have_no_double_all_fit_and_hold_the_papers_sizes(model: Model) -> None:
    for impl in names_of(model):
        for tokens in TOKENS:
            space = space_of(request(model), impl, tokens)
            every = list(space)
            assert len(every) == len(set(every)) == len(space) > 8
            for group, part, cut in every:
                if impl == "hopper":
                    assert tile_problem(vars(cut)) is None and group == (cut.bm,), cut
                else:
                    gated = part == "up" and model.spec().gated
                    used = shared_bytes(cut, group[-1], gated=gated, itemsize=2)
                    assert used <= shared_limit(90), cut
            for name, part, is_paper in space.paper:
                assert any(is_paper(g, c) for g, p, c in every if p == part), (name, tokens)
            for group, parts in space.cuts.items():
                assert all(parts.values()), group


@pytest.mark.parametrize("tokens", TOKENS)
def test_what_hopper_runs_untuned_is_among_the_candidates(tokens: int) -> None:
    for model in (m for m in MODELS.values() if m.kind == "swiglu"):
        problem = grid.problem_for(model, tokens, "bfloat16", 90, "h200")
        chosen = labs.hopper_heuristic(problem, 132)
        space = space_of(request(model), "hopper", tokens)
        for part in ("up", "down"):
            tile = grid.Tile(*getattr(chosen, part))
            cuts = space.both if tile.kernel in ONE_LAUNCH else space.cuts[(chosen.up.bm,)][part]
            assert tile in cuts


class InventedLab:
    """Times that a rule invents; the real labs' way from cuts to configurations and rows."""

    def __init__(self, wanted: Request, impl: str, tokens: int, whole: Callable[[Any], float]):
        kind: Any = TritonLab if impl == "triton" else HopperLab
        problem = grid.problem_for(wanted.model, tokens, "bfloat16", 90, "h200")
        self.real = kind(wanted.model, problem, None, 132)
        self.impl, self.whole = impl, whole
        self.combined, self.row = self.real.combined, self.real.row
        self.launches = self.real.launches
        self.heuristic, self.more = self.real.heuristic, self.real.more

    def part_s(self, part: str, group: Any, cut: Any, best: Any) -> dict[str, float]:
        if self.impl == "triton" and cut.block_k == 256:
            raise Unfit("too deep")
        columns = cut.bn if self.impl == "hopper" else cut.block_n
        seconds = 1e-5 * (1 + abs(columns - 64) / 64 + group[-1] / 128)
        return {"uniform": seconds, "worst": 2 * seconds}

    def layer_s(self, config: Any) -> dict[str, float]:
        found = self.whole(config)
        return found if isinstance(found, dict) else {"uniform": found / 2, "worst": found * 2}

    def routing_s(self) -> dict[int, float]:
        return {1: 2e-6, 2: 1e-6, 4: 3e-6}


def invented(whole: Callable[[Any], float], **more: Any) -> Tools:
    def make_lab(wanted: Request, impl: str, tokens: int) -> Lab[Any]:
        return InventedLab(wanted, impl, tokens, whole)

    def compile_all(stages: Any, advance: Any, say: Any, done: Any, stop: Any) -> None:
        for number in range(len(stages)):
            advance()
            done(number)

    return Tools(make_lab, compile_all, **more)


def by_order(config: Any) -> float:
    """Large experts first is fastest, whatever the tiles; the heuristics run in index order."""
    return 2e-5 if config.order == "large_first" else 3e-5


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path))
    caches = (tune.load_table, tune.choose, experts.choose_measured)
    for one in caches:
        one.cache_clear()
    yield tmp_path / "configs" / "h200.json"
    for one in caches:
        one.cache_clear()


def test_a_whole_run_writes_rows_that_both_paths_then_take(cache: Path, capsys) -> None:
    code = main("Qwen3-30B-A3B", tokens=[48, 2000], tools=invented(by_order), facts=FACTS)
    out = capsys.readouterr().out
    told = json.loads(out.splitlines()[-1])
    assert code == 0 and told["ended"] == "done" and told["left"] == told["failed"] == []
    assert [(c["impl"], c["tokens"]) for c in told["cells"]] == [
        ("triton", 48), ("hopper", 48), ("triton", 2000), ("hopper", 2000)
    ]  # fmt: skip
    for cell in told["cells"]:
        assert cell["best_us"] == pytest.approx(20) and cell["heuristic_us"] == pytest.approx(30)
        assert cell["ratio"] == pytest.approx(1.5) and cell["within_10_percent"] is False
        assert cell["row"]["order"] == "large_first"
        ranks = {r["name"]: r for r in cell["ranks"]}
        assert ranks["routing next_pow2(E)"]["rank"] == 2 and "expert GEMM 128/128/64" in ranks
        assert ("fused MLP 64/64/32" in ranks) == (cell["impl"] == "triton")
    assert any("too deep" in text for cell in told["cells"] for text in cell["refused"])
    assert "within 10 %" in out and "large_first" in out
    problem = grid.problem_for(QWEN, 48, "bfloat16", 90, "h200")
    row = json.loads(cache.read_text())["shapes"][shape_key(problem)]["48"]
    assert tune.config_to_json(tune.choose(problem)) | {"heights": row["heights"]} == row
    assert tune.choose(problem).order == "large_first"
    assert tune.hopper_row(problem)["order"] == "large_first"


def test_an_interrupted_run_keeps_what_it_measured(cache: Path, capsys) -> None:
    tools = invented(by_order)

    def make_lab(wanted: Request, impl: str, tokens: int) -> Lab[Any]:
        if tokens == 1024:
            raise KeyboardInterrupt
        return tools.make_lab(wanted, impl, tokens)

    tools_ = replace(tools, make_lab=make_lab)
    code = main("OLMoE", tokens=[16, 1024], impl="hopper", tools=tools_, facts=FACTS)
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert code == 130 and told["ended"] == "interrupted"
    assert [c["tokens"] for c in told["cells"]] == [16]
    assert told["left"] == [{"impl": "hopper", "tokens": 1024}]
    (rows,) = json.loads(cache.read_text())["hopper"].values()
    assert list(rows) == ["16"]


def test_a_run_out_of_time_names_what_is_left_and_a_second_run_adds(cache: Path, capsys) -> None:
    clock = Clock()

    def whole(config: Any) -> float:
        clock.now += 1.0  # the first cell has at most fourteen whole layers, over three rounds
        return by_order(config)

    tools = invented(whole, clock=clock)
    assert (
        main("OLMoE", tokens=[16, 1024], impl="hopper", tools=tools, facts=FACTS, budget_s=9) == 0
    )
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["ended"] == "out of time" and told["left"] == [{"impl": "hopper", "tokens": 1024}]
    assert told["cells"][0]["skipped"] == 0
    again = invented(by_order)
    assert main("OLMoE", tokens=[1024], impl="hopper", tools=again, facts=FACTS) == 0
    (rows,) = json.loads(cache.read_text())["hopper"].values()
    assert list(rows) == ["16", "1024"]


class Clock:
    """Seconds that a test moves on."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_time_that_ends_inside_a_cell_keeps_the_best_of_what_was_timed(cache: Path, capsys) -> None:
    for budget_s, skipped in ((8.0, True), (0.5, None)):
        clock = Clock()
        tools = invented(by_order, clock=clock)
        make = tools.make_lab

        def make_lab(*given: Any, make: Any = make, clock: Clock = clock) -> Any:
            lab = make(*given)
            part_s = lab.part_s

            def slow(*asked: Any) -> Any:
                clock.now += 1.0
                return part_s(*asked)

            lab.part_s = slow
            return lab

        tools = replace(tools, make_lab=make_lab)
        code = main("OLMoE", tokens=[16], impl="hopper", tools=tools, facts=FACTS,
                    budget_s=budget_s)  # fmt: skip
        told = json.loads(capsys.readouterr().out.splitlines()[-1])
        if skipped:
            assert code == 0 and told["ended"] == "done" and told["cells"][0]["skipped"] > 2
            (rows,) = json.loads(cache.read_text())["hopper"].values()
            assert rows["16"]["order"] == "large_first"
        else:
            # One product of one height is nothing to choose from.
            assert code == 1 and told["ended"] == "out of time" and told["left"]


def test_compiling_counts_in_the_budget_and_is_ended_with_it(cache: Path, capsys) -> None:
    ended: list[bool] = []

    def compile_all(stages: Any, advance: Any, say: Any, done: Any, stop: Any) -> None:
        assert [s.tokens for s in stages] == [(16,), (1024,)]
        done(0)
        ended.append(stop.wait(20))

    tools = replace(invented(by_order), compile_all=compile_all)
    assert (
        main("OLMoE", tokens=[16, 1024], impl="hopper", tools=tools, facts=FACTS, budget_s=2) == 0
    )
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert ended == [True] and told["ended"] == "out of time"
    assert [c["tokens"] for c in told["cells"]] == [16]
    assert told["left"] == [{"impl": "hopper", "tokens": 1024}]


def test_candidates_are_judged_over_routings(cache: Path) -> None:
    """Fast under uniform routing and slow in the worst case loses to what is fair in both."""

    def whole(config: Any) -> dict[str, float]:
        if config.order == "mixed":
            return {"uniform": 1.98e-5, "worst": 9e-5}
        return dict.fromkeys(("uniform", "worst"), 2e-5 if config.order == "large_first" else 3e-5)

    lab = InventedLab(request(), "hopper", 64, whole)
    result = tune_cell(space_of(request(), "hopper", 64), lab, 64, lambda: None)  # type: ignore[arg-type]
    assert result.row["order"] == "large_first" and result.best_us == pytest.approx(20)
    assert result.best == {"uniform": 2e-5, "worst": 2e-5} and result.ratio == pytest.approx(1.5)
    assert result.heuristic_row == lab.row(lab.heuristic())

    def better(config: Any) -> dict[str, float]:
        """Of the best score, and 3 % slower than another under uniform routing."""
        even = 2.06e-5 if config.order == "mixed" else 2e-5
        return {"uniform": even, "worst": 1e-5 if config.order == "mixed" else 4e-5}

    lab = InventedLab(request(), "hopper", 64, better)
    result = tune_cell(space_of(request(), "hopper", 64), lab, 64, lambda: None)  # type: ignore[arg-type]
    assert result.row["order"] == "index" and result.best["worst"] == 4e-5


def test_failures_are_told_and_a_lost_device_ends_the_run(cache: Path, capsys) -> None:
    def broken(config: Any) -> float:
        raise Unfit("no such tile")

    assert main("OLMoE", tokens=[16], impl="hopper", tools=invented(broken), facts=FACTS) == 1
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "no candidate could be timed" in told["failed"][0] and not cache.exists()

    def lost(config: Any) -> float:
        raise DeviceLost("the GPU answers no more")

    assert main("OLMoE", tokens=[16], impl="hopper", tools=invented(lost), facts=FACTS) == 1
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["ended"] == "the GPU answers no more" and told["left"]


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1}', '{"device": "A100", "hopper": {}}'])
def test_a_file_that_is_no_table_is_not_overwritten(tmp_path: Path, text: str) -> None:
    file = tmp_path / "table.json"
    file.write_text(text)
    with pytest.raises(ValueError, match="another --out"):
        main("OLMoE", tokens=[16], tools=invented(by_order), facts=FACTS, out=file)
    assert file.read_text() == text


def test_the_shipped_table_can_be_added_to() -> None:
    assert store.open_table(tune.CONFIGS / "h200.json", "NVIDIA H200")["shapes"]


def test_a_layer_slower_than_the_heuristic_is_not_chosen() -> None:
    heuristic = labs.hopper_heuristic(grid.problem_for(QWEN, 64, "bfloat16", 90, "h200"), 132)
    lab = InventedLab(request(), "hopper", 64, lambda c: 1e-5 if c == heuristic else 2e-5)
    result = tune_cell(space_of(request(), "hopper", 64), lab, 64, lambda: None)  # type: ignore[arg-type]
    assert result.row == lab.row(heuristic) and result.ratio == 1.0 and result.kept
    # Nor is one that gains no more than noise.
    lab = InventedLab(request(), "hopper", 64, lambda c: 2.01e-5 if c == heuristic else 2e-5)
    result = tune_cell(space_of(request(), "hopper", 64), lab, 64, lambda: None)  # type: ignore[arg-type]
    assert result.row == lab.row(heuristic)


def test_a_single_token_takes_a_launch_less_where_it_costs_little() -> None:
    for tokens, slower, taken in ((1, 1.02, 1), (1, 1.05, 2), (16, 1.02, 2)):
        lab = InventedLab(request(tokens=(tokens,)), "hopper", tokens, lambda c, s=slower: (
            2e-5 * s if c.up.kernel == "pair" else 2e-5))  # fmt: skip
        result = tune_cell(space_of(request(), "hopper", tokens), lab, tokens, lambda: None)  # type: ignore[arg-type]
        assert (1 if result.row["up"]["kernel"] == "pair" else 2) == taken, (tokens, slower)


def test_ranks() -> None:
    inf = float("inf")
    assert rank_of("x", [3.0], [1.0, 2.0, 3.0, inf]).rank == 3
    refused = rank_of("x", [inf], [1.0, inf])
    assert (refused.rank, refused.of, refused.over_best) == (None, 1, None)
    assert row_blocks(256) == (1, 2)


def test_a_transformers_configuration_is_read_as_data(tmp_path: Path) -> None:
    inner = {"num_experts": 128, "num_experts_per_tok": 8, "hidden_size": 2048,
             "intermediate_size": 6144, "moe_intermediate_size": 768}  # fmt: skip
    folder = tmp_path / "qwen"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "x", "text_config": inner}))
    found = find_model(str(folder))
    assert (found.num_experts, found.top_k, found.hidden_size, found.intermediate_size) == (
        128, 8, 2048, 768
    )  # fmt: skip
    assert model_from(inner | {"model_type": "gpt_oss"}, "c").spec().transposed
    sizes = find_model(None, experts=8, top_k=2, hidden=64, intermediate=96)
    assert (sizes.name, sizes.top_k) == ("E8-K2-H64-I96", 2)
    assert token_counts([16, 1, 16]) == (1, 16)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda p: find_model("Qwen"), "no known model"),
        (lambda p: find_model(None, experts=8), "all of --experts"),
        (lambda p: find_model("OLMoE", top_k=2), "not both"),
        (lambda p: find_model(None, experts=8, top_k=9, hidden=64, intermediate=64), "at most E"),
        (lambda p: find_model(None, experts=8, top_k=0, hidden=64, intermediate=64), "at least 1"),
        (lambda p: find_model(None, experts=8, top_k=2, hidden=60, intermediate=64), "multiples"),
        (lambda p: model_from({"hidden_size": 8}, "c.json"), "c.json: none of n_routed_experts"),
        (lambda p: find_model(str(p)), "cannot be read as JSON"),
        (lambda p: token_counts([0]), "at least 1"),
        (lambda p: main("OLMoE", impl="fast", facts=FACTS), "--impl must be one of"),
        (lambda p: main("OLMoE", dtype="float32", facts=FACTS), "--dtype must be one of"),
        (lambda p: main("paper-small", impl="hopper", facts=FACTS), "cannot run this layer"),
    ],
)
def test_input_that_does_not_fit_is_refused(tmp_path: Path, call, told: str) -> None:
    broken = tmp_path / "config.json"
    broken.write_text("{")
    with pytest.raises(ValueError, match=told):
        call(broken)


DRY_RUN = """
import collections, json
from triton.runtime.jit import JITFunction
from moesaic.bench.tuning import compiling
from moesaic.bench.workloads import Model

seen, lines = collections.Counter(), []

def noted(self, *args, grid, warmup, **options):
    assert warmup
    seen[self.fn.__name__] += 1

JITFunction.run = noted
tiny = Model("tiny", 8, 2, 128, 192)
wanted = compiling.Request(tiny, "bfloat16", (1, 16, 2048), ("triton", "hopper"), 90, "h200", 132)
for share in (0, 1):
    compiling.compile_share([wanted], share, 2, lines.append)
assert JITFunction.run is noted
first = dict(seen)

# The labs' own calls, of one token and of many, on memory that nothing writes.
import torch
from moesaic.bench.tuning import clock, labs
from moesaic.bench.tuning.grid import problem_for
from moesaic.kernels.hopper import experts, zeros

def timed(calls, best_s):
    return float(len([call() for call in calls]))

def real(self, *args, grid, warmup, **options):
    assert not warmup and all(size > 0 for size in grid)
    seen[self.fn.__name__] += 1

experts.planned = lambda key, inputs, constants, call: call()
zeros.prepare = lambda device: None
labs.seconds_of, clock.SameBits.check, JITFunction.run = timed, lambda *_: None, real
labs.time_routing = lambda *_: {1: 1.0}
sets = clock.draw_weights(tiny, torch.bfloat16, torch.device("cpu"), seed=0)[:2]
calls = []
for impl, kind in (("triton", labs.TritonLab), ("hopper", labs.HopperLab)):
    for tokens in (1, 16):
        turns = {name: clock.draw(tiny, tokens, sets, torch.device("cpu"), 1, name)
                 for name in ("uniform", "worst")}
        lab = kind(tiny, problem_for(tiny, tokens, "bfloat16", 90, "h200"), turns, 132)
        seen.clear()
        every = {"uniform": 16.0, "worst": 16.0}
        for g, p, c in compiling.space_of(wanted, impl, tokens):
            assert lab.part_s(p, g, c, {}) == every
        assert lab.layer_s(lab.heuristic()) == every
        calls.append([impl, tokens, sorted(seen)])
print(json.dumps([first, lines, len(compiling.jobs(wanted)), calls]))
"""


def test_every_job_reaches_its_kernel_once() -> None:
    """The compiling processes' launches, with the compiler itself left out."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    run = subprocess.run([sys.executable, "-c", DRY_RUN], env=environment, capture_output=True,
                         text=True, timeout=300, check=False)  # fmt: skip
    assert run.returncode == 0, run.stderr
    seen, lines, count, calls = json.loads(run.stdout)
    assert sorted(lines) == ["compiled"] * count + ["done 0"] * 2
    kinds = {"grouped_mm_kernel", "decode_kernel", "prefill_kernel", "tall_kernel"}
    kinds |= {
        "trim_kernel",
        "gather_kernel",
        "pair_kernel",
        "route_kernel",
        "combine_kernel",
        "sort_small_kernel",
    }
    assert set(seen) == kinds and sum(seen.values()) - seen["gather_kernel"] == count
    tiles = ["decode_kernel", "gather_kernel"]
    batching, pair = ["sort_small_kernel"], ["pair_kernel"]
    assert calls == [
        ["triton", 1, ["combine_kernel", "grouped_mm_kernel", *batching]],
        ["triton", 16, ["combine_kernel", "grouped_mm_kernel", *batching]],
        # A layer of one token, or of few, is one launch, its sum included.
        ["hopper", 1, [*tiles, *pair, "tall_kernel"]],
        ["hopper", 16, [*tiles, *pair, *batching, "tall_kernel"]],
    ]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs the interpreter")
@pytest.mark.parametrize("kind", ["swiglu", "gpt-oss", "relu3"])
def test_the_triton_lab_computes_the_same_bits_with_every_cut(kind: Any, monkeypatch) -> None:
    tiny = Model("tiny", 4, 2, 32, 16, kind=kind)
    device = torch.device("cpu")
    sets = [make_weights(tiny.spec(), dtype=torch.float16, generator=torch.Generator(device))]
    turn = clock.draw(tiny, 2, sets, device, seed=1)
    problem = grid.problem_for(tiny, 2, "float16", 90, "h200")
    lab = TritonLab(
        tiny, problem,
        {"uniform": replace(turn, hidden_TH=turn.hidden_TH[:1], ids_TK=turn.ids_TK[:1])}, 132,
    )  # fmt: skip
    monkeypatch.setattr(labs, "seconds_of", lambda calls, best_s: 1.0)
    for part in ("up", "mid", "down") if kind == "relu3" else ("up", "down"):
        for group, cut in (((16,), GemmConfig(32, 32)), ((64,), GemmConfig(16, 16, swap_up_to=64))):
            assert lab.part_s(part, group, cut, {}) == {"uniform": 1.0}
    base = lab.heuristic()
    for config in (base, base._replace(heights=(64,), order="mixed"), *lab.more(base)):
        assert lab.layer_s(config) == {"uniform": 1.0}
    logits_TE = torch.randn(70, 8)
    ids = [routing.route_with(logits_TE, 2, block) for block in row_blocks(8)]
    assert all(torch.equal(one, logits_TE.topk(2).indices.int()) for one in ids)
    lab.bits._answers["layer uniform"] += 1
    with pytest.raises(Unfit, match="bits"):
        lab.layer_s(base)


def test_a_request_travels_whole_and_maps_have_their_real_sizes() -> None:
    wanted = request(MODELS["gpt-oss-120b"], (1, 16), ("triton",))
    assert Request.from_json(wanted.to_json()) == wanted
    sizes = [compiling.dry_map(request(), alone)[1].task_N.numel() for alone in (True, False)]
    assert sizes == [8, 128]


def test_layers_of_as_many_experts_share_what_is_compiled() -> None:
    few = [request(MODELS[name], (1, 64), ("hopper",)) for name in
           ("Qwen3-30B-A3B", "Qwen3-235B-A22B", "DeepSeek-V3")]  # fmt: skip
    plan = compiling.plan_of([*few, replace(few[0], dtype="float16")])
    assert len(plan[0]) > 30 and len(plan[3]) == len(plan[0])
    # The same K and E: but for a heuristic's own tile all is there; a single token's tasks are K.
    alone = [job for job in plan[2] if job[0] == "hopper" and job[1]]
    apart = [job for job in plan[1] if job[0] != "combine"]  # its width is the layer's
    assert len(apart) <= 2 and not alone and len(plan[2]) > 15
    assert sum(map(len, compiling.plan_of([request(), request()]))) == len(
        compiling.jobs(request())
    )


def test_workers_are_read_to_their_end_and_a_bad_status_is_told(monkeypatch) -> None:
    lines = "print('compiled'); print('odd'); print('done 0')"
    program = f"import sys; {lines}; sys.exit(int(sys.argv[-2]) % 2)"
    start = subprocess.Popen

    def started(command: list[str], **more: Any) -> Any:
        return start([sys.executable, "-c", program, *command[-2:]], **more)

    monkeypatch.setattr(compiling.subprocess, "Popen", started)
    steps: list[int] = []
    told: list[str] = []
    through: list[int] = []
    compiling.compile_all([request()], lambda: steps.append(1), told.append, through.append, 1)
    assert (len(steps), told, through) == (2, ["odd"], [0])
    with pytest.raises(RuntimeError, match="status 1"):
        compiling.compile_all([request()], lambda: steps.append(1), told.append, processes=2)
