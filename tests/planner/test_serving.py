"""The simulated serving engine: what it schedules, what it reports, what its kernels take."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from moesaic.planner.batching import serve
from moesaic.planner.cluster import load_cluster
from moesaic.planner.command import main as plan_command
from moesaic.planner.engine_kernels import engine_experts_s, engine_reduce_s
from moesaic.planner.engines import known_model, part_of
from moesaic.planner.fleet import queued
from moesaic.planner.offers import cells, judged, offers
from moesaic.planner.requests import Asked, Load, Requests, read_requests
from moesaic.planner.scheduler import ENGINES
from moesaic.planner.search import Question
from moesaic.planner.serving import Deployment
from moesaic.planner.workload import Workload, load_workload

MODELS = Path(str(files("moesaic.planner").joinpath("models")))
MODEL = known_model("qwen3_30b")


def on(engine: str = "vllm", gpus: int = 2, **changes) -> Deployment:
    return Deployment(
        model=MODEL, cluster=part_of("H200", gpus), card="H200",
        engine=replace(ENGINES[engine], **changes), gpus=gpus,
    )  # fmt: skip


def test_figures_agree_with_one_another_and_more_requests_are_more_in_all_and_slower_each() -> None:
    some, more = (
        serve(on(), Load(total=4 * c, prompt=128, output=64, at_once=c)).figures() for c in (8, 32)
    )
    assert some["total_tokens_per_s"] == pytest.approx(3 * some["output_tokens_per_s"])
    assert some["output_tokens_per_s"] == pytest.approx(64 * some["requests_per_s"])
    assert more["output_tokens_per_s"] > some["output_tokens_per_s"]
    assert more["tpot_ms"] > some["tpot_ms"]


def test_steps_taken_at_once_are_the_steps_one_by_one() -> None:
    """One request: a prefill, then a step for every further token, each with a longer context."""
    d = on(front_s=0.0)
    found = serve(d, Load(total=1, prompt=100, output=40))
    prefill = d.step_s(0, 0.0, 100, 100 * 50.0, 1)
    steps = [d.step_s(1, 101.0 + i, 0, 0.0, 0) for i in range(39)]
    assert found.ttft_s == pytest.approx(prefill)
    assert found.seconds == pytest.approx(prefill + sum(steps), rel=1e-3)


def test_lengths_that_spread_leave_a_tail_in_which_few_requests_run() -> None:
    even, spread = (
        serve(on(), Load(total=200, prompt=100, output=100, spread=s)) for s in (False, True)
    )
    assert spread.output_tokens == pytest.approx(even.output_tokens, rel=0.02)
    assert spread.seconds > 1.5 * even.seconds


def test_prompts_are_cut_to_the_budget_and_go_first_in_sglang() -> None:
    load = Load(total=64, prompt=1000, output=50)
    small, large = (serve(on(budget=b), load) for b in (500, 64000))
    assert small.ttft_s > 1.5 * large.ttft_s  # every chunk reads the weights
    first, mixed = (serve(on(e), load) for e in ("sglang", "vllm"))
    assert first.ttft_s < mixed.ttft_s and first.tpot_s > 0
    few = serve(on(most=8), load)
    assert few.tpot_s < mixed.tpot_s and few.ttft_s > mixed.ttft_s


def test_a_cache_that_is_full_lets_nobody_in_and_one_too_small_is_refused() -> None:
    roomy, tight = on(), on(memory=0.24)
    assert 0 < tight.room() < roomy.room() / 5
    load = Load(total=300, prompt=2000, output=100)
    assert serve(tight, load).ttft_s > serve(roomy, load).ttft_s
    with pytest.raises(ValueError, match="has room for"):
        serve(tight, Load(total=1, prompt=10_000_000, output=1))


def test_slices_of_experts_are_slower_than_their_share_and_cards_without_figures_take_a_floor() -> (
    None
):
    spec, h200 = known_model("deepseek_v3").experts, part_of("H200", 8).gpu
    whole, part = (
        engine_experts_s(h200, "H200", "vllm", spec, 65536, 256, 1, cut=c) for c in (1, 8)
    )
    assert whole / 8 < part / 1.5
    # 2371 us are published for exactly this.
    assert part == pytest.approx(2371e-6, rel=0.02)
    h20 = part_of("H20", 8).gpu
    assert engine_experts_s(h20, "H20", "vllm", spec, 65536, 256, 1, cut=8) > part
    assert engine_reduce_s("H200", "vllm", 2**21, 8) == pytest.approx(18.1e-6, rel=0.6)
    assert engine_reduce_s("H800", "vllm", 2**27, 8) > 1.5 * engine_reduce_s(
        "H100", "vllm", 2**27, 8
    )
    with pytest.raises(ValueError, match="no all-reduce of 3"):
        engine_reduce_s("H200", "vllm", 1024, 3)


def test_a_cache_of_eight_bits_holds_twice_the_tokens_and_is_read_faster() -> None:
    wide, narrow = on(), replace(on(), cache=1)
    assert narrow.room() == pytest.approx(2 * wide.room())
    assert narrow.step_s(64, 8192.0, 0, 0.0, 0) < wide.step_s(64, 8192.0, 0, 0.0, 0)


def test_small_kernels_add_their_time_to_every_layer_and_drag_stretches_both() -> None:
    bare, small, slow = on(small_s=0.0), on(small_s=30e-6), on(small_s=30e-6, drag=0.6)
    added = small.step_s(8, 100.0, 0, 0.0, 0) - bare.step_s(8, 100.0, 0, 0.0, 0)
    assert added == pytest.approx(MODEL.layers * 30e-6 * (1 + bare.engine.drag))
    host = small.engine.step_s + 8 * small.engine.request_s
    ratio = (slow.step_s(8, 100.0, 0, 0.0, 0) - host) / (small.step_s(8, 100.0, 0, 0.0, 0) - host)
    assert ratio == pytest.approx(1.6 / (1 + small.engine.drag))


# --- in a plan ---------------------------------------------------------------------------------


def question(served: Asked, **changes) -> Question:
    work = Workload(prompt=200, output=50, served=served, **changes)
    return Question(model=MODEL, cluster=load_cluster("H200x2"), workload=work)


def test_a_copy_in_a_queue_is_the_engine_alone_when_requests_do_not_meet() -> None:
    """Three requests far apart: each takes what one alone takes, front end included."""
    alone = serve(on(), Load(total=1, prompt=200, output=50))
    far = Requests(np.array([0.0, 50.0, 100.0]), np.full(3, 200), np.full(3, 50))
    for copies in (1, 4):
        found = queued(on(), far, copies)
        assert found.ttft_s == pytest.approx(alone.ttft_s)
        assert found.ttft_p95_s == pytest.approx(alone.ttft_s)
        assert found.tpot_s == pytest.approx(alone.tpot_s)
        assert found.seconds == pytest.approx(100.0 + alone.seconds)


def test_a_queue_of_one_copy_is_the_step_by_step_run_of_the_same_arrivals() -> None:
    """Arrivals known beforehand and a router that learns of them give the same steps."""
    d, load = on(front_s=0.0, most=16), Load(total=120, prompt=200, output=50, rate=20.0)
    known = serve(d, load, seed=3)
    times = np.random.default_rng(3).exponential(1 / 20.0, 120).cumsum()
    found = queued(d, Requests(times, *load.lengths()), 1)
    assert found.seconds == pytest.approx(known.seconds, rel=2e-3)
    assert found.ttft_s == pytest.approx(known.ttft_s, rel=2e-2)
    assert found.tpot_s == pytest.approx(known.tpot_s, rel=1e-2)


def test_more_copies_shorten_the_wait_of_requests_that_come_too_fast() -> None:
    times = np.linspace(0.0, 2.0, 400)
    burst = Requests(times, np.full(400, 1000), np.full(400, 50))
    one, four = (queued(on(most=16), burst, copies) for copies in (1, 4))
    assert four.ttft_p95_s < one.ttft_p95_s / 2 and four.output_tokens == one.output_tokens
    assert one.ttft_p95_s > one.ttft_median_s


def test_offers_of_every_layout_are_ranked_and_judged_by_the_limits() -> None:
    asked = Asked(engines=("vllm", "sglang"), gpus=(1, 2, 8), at_once=(8,), requests=16)
    found = offers(question(asked), workers=1)
    # TP and TP EP and DP EP on 2 and 8 GPUs; TP8 cuts experts of 768 too.
    assert {o.layout for o in found} == {"1 GPU", "TP2", "TP2 EP2", "DP2 EP2", "TP8", "TP8 EP8",
                                         "DP8 EP8"}  # fmt: skip
    assert all(o.used == 16 for o in found)
    rates = [o.per_gpu for o in found]
    assert rates == sorted(rates, reverse=True) and {o.served.requests for o in found if o.served
                                                     } == {32, 128, 256}  # fmt: skip
    best = judged(found, Workload())
    assert f"{found[0].deployment.engine.name} {found[0].layout} with 8 at once" in best
    assert "No serving engine keeps" in judged(found, Workload(tpot_ms=0.01))
    assert all("published times of" in o.kernels for o in found)


def test_weights_that_leave_no_cache_are_shown_and_never_recommended() -> None:
    asked = Asked(engines=("vllm",), gpus=(1,), at_once=(8,), memory=0.3)
    found = offers(question(asked), workers=1)
    assert [o.served for o in found] == [None] and "61 GB of weights in 42 GB" in found[0].why
    assert "has room in a node" in judged(found, Workload())
    with pytest.raises(ValueError, match=r"served: no layout of vllm on 3 of the 8 GPUs"):
        offers(question(replace(asked, gpus=(3,))), workers=1)


def test_a_card_without_published_times_takes_the_roofline_and_says_so() -> None:
    asked = Asked(engines=("vllm",), gpus=(2,), at_once=(8,), requests=16)
    known = question(asked)
    bare = replace(known, cluster=replace(known.cluster, device=None))
    one, other = (offers(q, workers=1)[0] for q in (known, bare))
    assert other.kernels == "roofline" and one.kernels != "roofline"
    assert one.served is not None and other.served is not None
    assert other.served.tpot_s < one.served.tpot_s


def test_requests_of_a_file_are_served_as_they_come(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text("seconds,prompt,output\n105,300,20\n100,200,50\n")
    (tmp_path / "w.yaml").write_text("served: {engines: [vllm], requests_file: r.csv}\n")
    work = load_workload(tmp_path / "w.yaml", num_experts=128, layers=48)
    assert work.served is not None and work.served.trace is not None
    assert work.served.trace.seconds_R.tolist() == [0.0, 5.0]
    found = offers(replace(question(work.served), workload=work), workers=1)[0]
    assert found.served is not None and found.served.prompt_tokens == 500
    assert 5.0 < found.served.seconds < 8.0 and found.load == "2 in 5 s"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("served: {engines: [vlm], at_once: [4]}", r"w\.yaml:1: engines must be a list out of"),
        ("served: {engines: [vllm]}", r"w\.yaml:1: served needs one of at_once, .* got none"),
        ("arrival: {rate: 1}\nserved: {at_once: [4]}", r"w\.yaml:2: .* got at_once and arrival"),
        ("served: {at_once: [4], gpus: [6]}", r"w\.yaml:1: gpus must be out of \(1, 2, 4, 8\)"),
        ("served: {at_once: [4], batch: 3}", r"w\.yaml:1: unknown field 'batch'"),
        ("phase: prefill\nserved: {at_once: [4]}", r"w\.yaml:2: served needs phase decode"),
        ("phase: prefill\narrival: {rate: 1}", r"w\.yaml:2: arrival needs phase decode"),
        ("served: {requests_file: none.csv}", r"w\.yaml:1: cannot read none\.csv"),
        ("arrival: {rate: 1}\nserved:\n  requests: 4", r"w\.yaml:3: requests needs at_once"),
    ],
)
def test_a_wrong_question_to_engines_is_refused_with_its_line(
    text: str, words: str, tmp_path: Path
) -> None:
    (tmp_path / "w.yaml").write_text(text)
    with pytest.raises(ValueError, match=words):
        load_workload(tmp_path / "w.yaml", num_experts=128, layers=48)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seconds,prompt\n", r"r\.csv:1: the columns must be seconds,prompt,output"),
        ("seconds,prompt,output\n0,10,10\n1,0,10\n", r"r\.csv:3: a request is .* got '1,0,10'"),
        ("seconds,prompt,output\n0,10\n", r"r\.csv:2: a request is"),
        ("seconds,prompt,output\n", r"r\.csv:2: no request"),
    ],
)
def test_a_wrong_request_trace_is_refused_with_its_line(
    text: str, words: str, tmp_path: Path
) -> None:
    (tmp_path / "r.csv").write_text(text)
    with pytest.raises(ValueError, match=words):
        read_requests(tmp_path / "r.csv")


def test_a_plan_shows_engines_beside_strategies_and_says_what_they_take(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "w.yaml").write_text(
        "prompt: 100\noutput: 20\nsequences: 4\ncontext: 128\n"
        "served: {engines: [vllm, trtllm], gpus: [2], at_once: [4], requests: 8}\n"
        "strategies: {families: [ep], ep: [8], tp: [1], pp: [1], replicas: [0],\n"
        "             micro_batches: [1], overlap: [false]}\n"
    )
    code = plan_command(
        model=MODELS / "qwen3_30b.json", cluster="H200x1", workload=tmp_path / "w.yaml",
        out=tmp_path / "out", explained=False, results=tmp_path, workers=1, layers=1,
    )  # fmt: skip
    printed = capsys.readouterr().out
    told = json.loads(printed.splitlines()[-1])
    assert code == 0 and told["engine"].startswith("Of serving engines ")
    assert "trtllm: published times of vllm in bf16 on H200" in " ".join(printed.split())
    document = json.loads((tmp_path / "out/plan.json").read_text())
    assert document["served"] == told["engine"] and len(document["offers"]) == 6
    first = document["offers"][0]
    assert first["fits"] and first["served"]["tpot_ms"] > 0 and first["copies"] == 4
    report = (tmp_path / "out/report.html").read_text()
    assert "Serving engines" in report and "TP2 EP2" in report


def test_answers_of_one_token_have_no_time_of_the_next() -> None:
    asked = Asked(engines=("vllm",), gpus=(2,), at_once=(1,), requests=1)
    single = Question(model=MODEL, cluster=load_cluster("H200x1"),
                      workload=Workload(prompt=128, output=1, served=asked))  # fmt: skip
    found = offers(single, workers=1)
    assert cells(found[0])[-3:] == ("-", "-", "yes")
    assert judged(found, single.workload).endswith("the only one.")
    served = found[0].served
    # Four copies of 2 GPUs with one request each.
    assert served is not None and (served.requests, served.output_tokens) == (4, 4)


def test_a_folder_of_results_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none: no such folder"):
        plan_command(
            model=MODELS / "qwen3_30b.json", cluster="H200x1", workload=None, out=None,
            explained=False, results=tmp_path / "none", workers=1, layers=1,
        )  # fmt: skip
