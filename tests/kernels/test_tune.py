"""Choices are pure, explained, within the device's memory, and read back from tables unchanged."""

from __future__ import annotations

import json

import pytest

from moesaic.kernels import tune
from moesaic.kernels.tune import (
    Config,
    GemmConfig,
    Problem,
    choose,
    config_to_json,
    heuristic,
    shape_key,
    shared_bytes,
    shared_limit,
)

QWEN = Problem(64, 8, 128, 2048, 768, True, 2, "bfloat16", 90, "h200")
SHAPES = ((2, 8, 4096, 14336), (8, 128, 2048, 768), (8, 256, 7168, 2048), (2, 8, 512, 1024))


@pytest.fixture
def table(tmp_path, monkeypatch):
    """An empty folder of tables, and the caches forgotten before and after."""
    monkeypatch.setattr(tune, "CONFIGS", tmp_path)
    for cached in (tune.load_table, tune.choose):
        cached.cache_clear()
    yield tmp_path
    for cached in (tune.load_table, tune.choose):
        cached.cache_clear()


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_heuristics_fit_every_device(arch, dtype) -> None:
    itemsize = 4 if dtype == "float32" else 2
    for top_k, experts, hidden, intermediate in SHAPES:
        for tokens in (1, 16, 128, 1024, 8192, 32768):
            problem = Problem(tokens, top_k, experts, hidden, intermediate, True, 2, dtype, arch)
            config = heuristic(problem)
            assert config.reason and list(config.heights) == sorted(config.heights)
            for cut, gated in ((config.up, True), (config.down, False), (config.mid, False)):
                used = shared_bytes(cut, config.heights[-1], gated=gated, itemsize=itemsize)
                assert 0 < used <= shared_limit(arch)
                assert cut.num_stages >= 2 and cut.block_k >= 16


def test_tall_tiles_come_with_rows() -> None:
    tallest = [heuristic(QWEN._replace(tokens=t)).heights[-1] for t in (1, 64, 512, 8192)]
    assert tallest == sorted(tallest)
    assert tallest[0] == 16 and tallest[-1] == 128


def test_a_table_is_used_where_it_speaks(table) -> None:
    measured = Config((16, 128), GemmConfig(32, 128, 8, 5, 2, 64, 3), GemmConfig(), fused=True)
    row = {"64": config_to_json(measured)}
    told = {"shapes": {shape_key(QWEN): row}}
    (table / "h200.json").write_text(json.dumps(told))
    chosen = choose(QWEN)
    assert chosen == measured._replace(reason="measured on h200 at 64 tokens")
    assert choose(QWEN._replace(tokens=100)) == chosen
    assert choose(QWEN._replace(family="a100")) == heuristic(QWEN)
    assert choose(QWEN._replace(hidden=4096)) == heuristic(QWEN._replace(hidden=4096))


def test_shipped_tables_read_and_fit() -> None:
    paths = {path.stem: path for path in tune.CONFIGS.glob("*.json")}
    assert "h200" in paths
    for family, path in paths.items():
        for shape, rows in json.loads(path.read_text())["shapes"].items():
            for tokens, row in rows.items():
                config = tune._config_from_json(row, "test")
                again = json.loads(json.dumps(config_to_json(config)))
                assert again == row, (family, shape, tokens)
                assert list(config.heights) == sorted(config.heights)
                gated = "_gated_" in shape
                for cut, pairs in ((config.up, gated), (config.down, False), (config.mid, False)):
                    used = shared_bytes(cut, config.heights[-1], gated=pairs, itemsize=2)
                    assert used <= shared_limit(90), (family, shape, tokens)


def test_the_shipped_h200_table_speaks_between_its_token_counts() -> None:
    told = [choose(QWEN._replace(tokens=t)) for t in (2, 90, 256, 700, 32768)]
    buckets = [4, 64, 512, 512, 8192]
    assert [c.reason for c in told] == [f"measured on h200 at {b} tokens" for b in buckets]
    assert told[0].heights == (16,) and told[-1].heights == (128,)
    for elsewhere in (QWEN._replace(family="h100"), QWEN._replace(dtype="float32")):
        assert choose(elsewhere) == heuristic(elsewhere)
