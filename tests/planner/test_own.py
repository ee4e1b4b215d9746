"""Predictions of this project's own measurements: held out for real, and written beforehand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moesaic.bench.suites.ep import LAYERS
from moesaic.bench.workloads import MODELS
from moesaic.planner.cluster import load_cluster
from moesaic.planner.exchange import measured_ways
from moesaic.planner.forecast import cells, key, main, predictions, unmeasured
from moesaic.planner.kernels import expert_layer_s
from moesaic.planner.operations import FOLDER, blind_rows, file_of
from moesaic.planner.own import own_exchange, own_layers, own_rows, own_spread
from moesaic.planner.shapes import EIGHT, SHAPES, SPREAD
from moesaic.planner.spread import busiest_rows, ranks_of_token

FIXED = {"impl": "moesaic", "mode": "graph", "dtype": "bfloat16"}
TOKENS = (1, 128, 2048, 8192, 65536)


def exchange_lines(ranks: int, model: str, routing: str = "even") -> list[dict[str, Any]]:
    """Exchanges that take 4 us and bytes over 300 GB/s."""
    width = int(model.removeprefix("rows-"))
    return [
        FIXED | {"suite": "ep", "clock": clock, "model": model, "tokens": t, "routing": routing,
                 "ranks": ranks, "ms": 0.004 + busiest_rows(ranks, t, routing) * width * 2 / 3e8}
        for clock in ("dispatch", "combine") for t in TOKENS
    ]  # fmt: skip


def layer_lines(factor: float = 1.0) -> list[dict[str, Any]]:
    """Layers of two models on one GPU, exactly at the roofline times `factor`."""
    gpu = load_cluster("H200").gpu
    lines = []
    for model in ("Mixtral-8x7B", "Qwen3-30B-A3B"):
        spec, top_k = SHAPES[model]
        for tokens in (1, 64, 512, 8192):
            active = spec.num_experts * (1 - (1 - top_k / spec.num_experts) ** tokens)
            seconds = float(expert_layer_s(gpu, spec, tokens * top_k, active, 2))
            lines.append(FIXED | {"suite": "layer", "clock": "experts", "model": model,
                                  "tokens": tokens, "routing": "uniform",
                                  "ms": seconds * 1e3 * factor})  # fmt: skip
    return lines


def spread_line(gpus: int, ms: float) -> dict[str, Any]:
    return FIXED | {"suite": "ep", "clock": f"layer-ep{gpus}", "model": "deepseek-v3-64",
                    "tokens": 8192, "routing": "uniform", "ranks": gpus, "ms": ms}  # fmt: skip


def write(root: Path, **folders: list[dict[str, Any]]) -> Path:
    """Lines into benchmarks/results-like folders."""
    for name, lines in folders.items():
        folder = root / name.replace("_", "-")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "ep.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return root


def test_shapes_are_those_of_the_benchmark() -> None:
    for name, (spec, top_k) in SHAPES.items():
        assert (MODELS[name].spec(), MODELS[name].top_k) == (spec, top_k)
    for name, layer in LAYERS.items():
        assert (layer.spec, layer.top_k) == (SPREAD | EIGHT)[name]
    assert set(SPREAD) <= set(LAYERS)


def test_what_follows_the_laws_is_predicted(tmp_path: Path) -> None:
    two = exchange_lines(2, "rows-7168") + exchange_lines(2, "rows-2048", "zipf1")
    four = exchange_lines(4, "rows-7168") + exchange_lines(4, "rows-7168", "uniform")
    results = write(tmp_path, h200=layer_lines(), h200_x2=two, h200_x4=four)
    layers = own_layers(results)
    assert len(layers) == 8 and max(abs(r.error) for r in layers) < 0.01
    exchanges = own_exchange(results)
    # Between the points of a table lies a chord: up to 25 % off where 4 us and bytes are alike.
    assert len(exchanges) == 30 and max(abs(r.error) for r in exchanges) < 0.25


def test_what_is_held_out_does_not_count(tmp_path: Path) -> None:
    base = {"h200": layer_lines(), "h200_x2": exchange_lines(2, "rows-7168")}
    some = [spread_line(2, 6.0), spread_line(4, 3.0)]
    first = own_spread(write(tmp_path / "a", **base, h200_x4=some))
    changed = [x | {"ms": 9 * x["ms"]} for x in [*some, *exchange_lines(4, "rows-7168")]]
    again = own_spread(write(tmp_path / "b", **base, h200_x4=changed))
    assert [r.predicted for r in first] == [r.predicted for r in again]
    assert [r.published for r in first] == [6.0, 3.0]
    # A control: what is not held out does count.
    slower = write(tmp_path / "c", h200=layer_lines(2.0), h200_x2=base["h200_x2"], h200_x4=some)
    assert all(b.predicted > 1.5 * a.predicted
               for a, b in zip(first, own_spread(slower), strict=True))  # fmt: skip


def test_a_family_is_held_out_whole(tmp_path: Path) -> None:
    own = [spread_line(1, 5.0)]
    lines = [*layer_lines(), own[0]]
    deepseek = [r for r in own_rows(write(tmp_path / "a", h200=lines)) if "deepseek" in r.what]
    other = own[0] | {"model": "deepseek-v3-16", "ms": 0.5}
    more = own_rows(write(tmp_path / "b", h200=[*lines, other]))
    assert deepseek[0].predicted == next(r for r in more if "v3-64" in r.what).predicted


@pytest.mark.parametrize("gpus", [2, 4, 8])
def test_forecasts_use_fewer_gpus_and_leave_out_what_is_known(tmp_path: Path, gpus: int) -> None:
    two, four = exchange_lines(2, "rows-7168"), exchange_lines(4, "rows-7168")
    results = write(tmp_path / "a", h200=layer_lines(), h200_x2=two, h200_x4=four)
    found = predictions(gpus, results)
    assert len(found) == len(list(cells(gpus))) == len({key(x) for x in found})
    large = [x for x in found if x["model"] == "rows-7168" and x["tokens"] == 65536]
    even = next(x for x in large if x["routing"] == "even" and x["clock"] == "dispatch")
    moved = 65536 * 7168 * 2 * (gpus - 1) / gpus
    assert even["ms"] == pytest.approx(0.004 + moved / 3e8, rel=0.02)
    left = unmeasured(found, two if gpus == 2 else four)
    assert len(found) - len(left) == (0 if gpus == 8 else 10)
    # More GPUs than predicted for change nothing.
    slow = [
        x | {"ms": 9 * x["ms"]} for x in (four if gpus == 4 else exchange_lines(8, "rows-7168"))
    ]
    b = write(tmp_path / "b", h200=layer_lines(), h200_x2=two, h200_x4=slow if gpus == 4 else four,
              h200_x8=slow)  # fmt: skip
    assert predictions(gpus, b) == found


def test_forecasts_are_set_beside_measurements(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = write(tmp_path / "r", h200=layer_lines(), h200_x2=exchange_lines(2, "rows-7168"))
    where = ["--gpus", "8", "--results", str(results), "--predictions", str(tmp_path / "p")]
    assert main(["write", *where]) == 0
    assert main(["compare", *where]) == 1  # nothing measured yet
    write(tmp_path / "r", h200_x8=exchange_lines(8, "rows-7168"))
    assert main(["compare", *where]) == 0
    assert "10 cells, median error" in capsys.readouterr().out
    slow = [x | {"ms": 2 * x["ms"]} for x in exchange_lines(8, "rows-7168")]
    write(tmp_path / "r", h200_x8=slow)
    assert main(["compare", *where]) == 1


def test_a_token_goes_once_to_each_rank() -> None:
    spec, top_k = SPREAD["deepseek-v3-256"]
    assert ranks_of_token(spec, top_k, 2) == pytest.approx(1.0, abs=0.01)
    assert ranks_of_token(EIGHT["mixtral-8"][0], 2, 8) == pytest.approx(7 / 8 * 2)
    assert not measured_ways([], ranks=(2,))


def test_published_operations_are_compared_with_what_was_committed(tmp_path: Path) -> None:
    public = Path(__file__).resolve().parents[2] / FOLDER
    found = blind_rows(public)
    assert [sum(f"round {n}" in r.group for r in found) for n in (1, 2)] == [94, 101]
    errors = [abs(r.error) for r in found if "round 2" in r.group]
    assert sorted(errors)[50] < 0.10
    # Another prediction in the file shows; without a file there is nothing to compare.
    folder = tmp_path / "public"
    folder.mkdir()
    lines = [
        x | {"us": 2 * x["us"]}
        for x in map(json.loads, file_of(2, public).read_text().splitlines())
    ]
    file_of(2, folder).write_text("".join(json.dumps(x) + "\n" for x in lines))
    again = blind_rows(folder)
    assert len(again) == 101 and sorted(abs(r.error) for r in again)[50] > 0.5
