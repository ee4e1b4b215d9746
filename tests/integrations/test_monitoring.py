"""What a watched job shows others: the Prometheus endpoint, its dashboard, TensorBoard, `top`."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
import torch
from typer.testing import CliRunner

from moesaic.cli import app
from moesaic.integrations import top
from moesaic.integrations.recording import JsonLines, read_profiles
from moesaic.runtime.counters import ROUTED, ROWS, TILES
from moesaic.runtime.profile import Profile, layer_profile
from moesaic.runtime.profiler import LayerInfo, Profiler
from moesaic.runtime.rates import Settings
from moesaic.trace import TraceInfo, TraceWriter

INFOS = [LayerInfo("model.0", 4, 2), LayerInfo('odd "name"', 8, 2)]


def job() -> Profiler:
    """Two layers, the first with a hot and three cold experts, after two steps."""
    settings = Settings(cold_at=0.3)
    profiler = Profiler(INFOS, torch.device("cpu"), settings=settings)
    for _ in range(2):
        first, second = profiler.counters
        for line in (ROUTED, ROWS):
            first[line] += torch.tensor([18, 2, 1, 1], dtype=torch.int32)
            second[line] += 3
        first[TILES] += 1
        profiler.step()
        profiler.poll()
    return profiler


@pytest.fixture
def endpoint():
    prometheus = pytest.importorskip("moesaic.integrations.prometheus")
    pytest.importorskip("prometheus_client")
    servers = []

    def start(profiler: Profiler, **how: object) -> str:
        servers.append(prometheus.serve(profiler, port=0, **how))
        return servers[-1].url

    yield start
    for server in servers:
        server.close()


def fetch(url: str) -> str:
    with urlopen(url, timeout=10) as answer:
        return answer.read().decode()


def test_the_endpoint_says_what_was_counted(endpoint) -> None:
    profiler = job()
    text = fetch(endpoint(profiler))
    for line in (
        "moesaic_steps_total 2.0",
        'moesaic_rows_total{layer="model.0"} 44.0',
        'moesaic_routed_total{layer="model.0"} 44.0',
        'moesaic_tiles_total{layer="model.0"} 8.0',
        'moesaic_tokens_total{layer="model.0"} 22.0',
        'moesaic_hot_experts{layer="model.0"} 1.0',
        'moesaic_cold_experts{layer="model.0"} 2.0',
        'moesaic_balancedness{layer="odd \\"name\\""} 1.0',
        "moesaic_merged_samples_total 0.0",
    ):
        assert line in text.splitlines(), line
    assert "moesaic_expert_" not in text, "series of experts are opt-in"
    profiler.counters[0][ROWS] += 1
    profiler.step()
    text = fetch(endpoint(profiler, per_expert=True))
    assert "moesaic_steps_total 3.0" in text, "a scrape polls"
    assert 'moesaic_expert_rows_total{expert="0",layer="model.0"} 37.0' in text


def test_failing_gauges_and_a_failing_read_are_counted(endpoint, caplog) -> None:
    profiler = job()

    def gone() -> float:
        raise RuntimeError("NVML: GPU is lost")

    gauges = {"power_watts": gone, "sm_active_ratio": lambda: 0.5}
    url = endpoint(profiler, gauges=gauges)
    text = [fetch(url) for _ in range(3)][-1]
    assert "moesaic_sm_active_ratio 0.5" in text and "moesaic_power_watts" not in text
    assert 'moesaic_profiler_failures_total{part="power_watts"} 3.0' in text
    assert [r.getMessage() for r in caplog.records].count(
        "profiler: power_watts failed and is not logged again: NVML: GPU is lost"
    ) == 1
    profiler.observed = None  # type: ignore[assignment]
    with pytest.raises(HTTPError, match="500"):
        fetch(url)
    assert profiler.failures["prometheus"] == 1
    with pytest.raises(HTTPError, match="404"):
        fetch(url.replace("metrics", "other"))


def test_the_dashboard_asks_for_names_that_exist(endpoint) -> None:
    text = fetch(endpoint(job(), per_expert=True, gauges={}))
    shown = set(re.findall(r"^(moesaic_\w+?)(?:_created)?[ {]", text, re.MULTILINE))
    shown.add("moesaic_profiler_failures_total")
    board = json.loads(files("moesaic").joinpath("assets/grafana.json").read_text("utf-8"))
    texts = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    texts += [variable.get("definition", "") for variable in board["templating"]["list"]]
    asked = {name for text in texts for name in re.findall(r"moesaic_\w+", text)}
    assert asked <= shown, asked - shown
    assert shown - asked == set(), "everything that is shown is on the dashboard"
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))
    assert all(
        t["datasource"]["uid"] == "${datasource}" for p in board["panels"] for t in p["targets"]
    )


@pytest.mark.parametrize("per_expert", [True, False])
def test_top_reads_the_endpoint(endpoint, per_expert: bool) -> None:
    view = top.read(endpoint(job(), per_expert=per_expert))
    assert view.steps == 2 and next(iter(view.rows)) == "model.0"
    row = view.rows["model.0"]
    assert (row.hot, row.cold, row.tokens) == (1, 2, 22)
    assert row.load_E == ({0: 18, 1: 2, 2: 1, 3: 1} if per_expert else {})


def test_top_shows_a_file_and_says_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "profile.jsonl"
    profiler, run = Profiler(INFOS, torch.device("cpu")), CliRunner().invoke
    profiler.sinks["jsonl"] = JsonLines(path)
    empty = run(app, ["top", str(path)])
    assert empty.exit_code == 2 and "no profile yet" in empty.stderr
    for _ in range(3):
        profiler.counters[0][ROWS] += torch.tensor([18, 2, 2, 2], dtype=torch.int32)
        profiler.step()
        profiler.poll()
    with path.open("a") as file:
        file.write('{"step": 7')
    shown = run(app, ["top", str(path), "--once"])
    assert shown.exit_code == 0 and "step 3" in shown.stdout and "model.0" in shown.stdout
    assert "▇▁▁▁" in shown.stdout
    for source, complaint in (
        (str(tmp_path / "no"), "No such file"),
        ("http://127.0.0.1:1", "reach"),
    ):
        failed = run(app, ["top", source, "--once"])
        assert failed.exit_code == 2 and complaint in failed.stderr
    with pytest.raises(ValueError, match="no metrics of moesaic"):
        top.view_of_metrics("other_metric 1\n")


def test_a_recorded_trace_is_shown_and_written_as_lines(tmp_path: Path) -> None:
    trace, lines = tmp_path / "trace.parquet", tmp_path / "out.jsonl"
    info = TraceInfo(model="t", num_experts=4, top_k=2, layers=1, text_sha256="0" * 64)
    with TraceWriter(trace, info) as writer:
        for step in range(5):
            writer.add(step, 0, [18, 2, 2, 2])
    run = CliRunner().invoke
    shown = run(app, ["profile", str(trace), "--every", "2", "--out", str(lines)])
    assert shown.exit_code == 0 and "▇▁▁▁" in shown.stdout and "step 5" in shown.stdout
    assert [profile.steps for profile in read_profiles(lines)] == [2, 2, 1]
    assert run(app, ["profile", str(trace), "--out", str(lines)]).exit_code == 2
    assert run(app, ["profile", str(lines)]).exit_code == 2


def test_long_layers_are_joined_by_their_largest() -> None:
    load = {expert: 1.0 for expert in range(128)} | {77: 10.0}
    text = top.strip(load)
    assert len(text) == 32 and str(text).count("█") == 1 and str(text)[77 // 4] == "█"


def test_tensorboard_gets_scalars_and_the_heat_map(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    import numpy as np
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from moesaic.integrations.tensorboard import CELL, NO_EXPERT, TensorBoard, heat_map

    image = heat_map(
        Profile(step=0, steps=1, seconds=0.0, layers=(
            layer_profile([16, 0, 0, 0]), layer_profile([1, 1], layer=1),
        ))
    )  # fmt: skip
    assert image.shape == (2 * CELL, 4 * CELL, 3) and image.dtype == np.uint8
    corners = image[::CELL, ::CELL].tolist()
    assert corners[0][0] == [200, 40, 30] and corners[0][1] == [20, 30, 70]
    assert corners[1][1] == [40, 120, 150] and corners[1][2] == [NO_EXPERT] * 3
    profiler = job()
    sink = profiler.sinks["tensorboard"] = TensorBoard(tmp_path, image_every=2)
    for _ in range(3):
        profiler.step()
        profiler.poll()
    sink.close()
    assert profiler.failures == {}
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert len(events.Images("experts/load")) == 2
    assert [e.value for e in events.Scalars("hot_experts/model.0")] == [1.0] * 3
    assert {"moe/tokens_per_second", "moe/balancedness"} <= set(events.Tags()["scalars"])
