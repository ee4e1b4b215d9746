"""Choices are pure, explained, within the device's memory, and read back from tables unchanged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moesaic.kernels import tune
from moesaic.kernels.hopper import fit
from moesaic.kernels.tables import cache_folder
from moesaic.kernels.tune import (
    Config,
    GemmConfig,
    Problem,
    choose,
    config_to_json,
    heuristic,
    hopper_row,
    shape_key,
    shared_bytes,
    shared_limit,
)

QWEN = Problem(64, 8, 128, 2048, 768, True, 2, "bfloat16", 90, "h200")
SHAPES = ((2, 8, 4096, 14336), (8, 128, 2048, 768), (8, 256, 7168, 2048), (2, 8, 512, 1024))


@pytest.fixture(autouse=True)
def own(tmp_path, monkeypatch):
    """The user's empty folder of tables; the caches forgotten before and after."""
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "configs"
    folder.mkdir(parents=True)
    for cached in (tune.load_table, tune.choose):
        cached.cache_clear()
    yield folder
    for cached in (tune.load_table, tune.choose):
        cached.cache_clear()


@pytest.fixture
def table(tmp_path, monkeypatch, own):
    """An empty folder of shipped tables."""
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    monkeypatch.setattr(tune, "CONFIGS", shipped)
    return shipped


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
    measured = Config((16, 128), GemmConfig(32, 128, 8, 4, 2, 64, 3), GemmConfig(), fused=True)
    row = {"64": config_to_json(measured)}
    told = {"device": "NVIDIA H200", "shapes": {shape_key(QWEN): row}}
    (table / "h200.json").write_text(json.dumps(told))
    chosen = choose(QWEN)
    assert chosen == measured._replace(reason="measured on h200 at 64 tokens")
    assert choose(QWEN._replace(tokens=100)) == chosen
    # Beyond a factor of REACH of what was measured a row says nothing.
    assert choose(QWEN._replace(tokens=64 * tune.REACH)) == chosen
    far = QWEN._replace(tokens=64 * tune.REACH + 1)
    assert choose(far) == heuristic(far)
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


KEY = shape_key(QWEN)
TRITON = json.loads(json.dumps(config_to_json(Config((16,), GemmConfig(), GemmConfig()))))
DECODE = {"kernel": "decode", "bm": 32, "bn": 128, "stages": 9}
TALL = {"kernel": "tall", "bm": 256, "bn": 128, "stages": 4}


def written(folder, **sections) -> None:
    (folder / "h200.json").write_text(json.dumps({"device": "NVIDIA H200"} | sections))


def test_the_users_rows_stand_over_the_shipped_ones(table, own) -> None:
    written(table, shapes={KEY: {"64": TRITON | {"order": "mixed"}, "1024": TRITON}})
    written(own, shapes={KEY: {"64": TRITON}}, hopper={KEY: {"64": {"up": DECODE, "down": DECODE}}})
    assert choose(QWEN).order == "index"
    assert choose(QWEN._replace(tokens=1024)).reason == "measured on h200 at 1024 tokens"
    assert hopper_row(QWEN) == {"up": DECODE, "down": DECODE}
    assert hopper_row(QWEN._replace(tokens=1024)) is None
    assert hopper_row(QWEN._replace(hidden=4096)) is None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "no table of moesaic"),
        ('{"device": "NVIDIA A100", "shapes": {}}', "'NVIDIA A100', not on a device of family"),
        ('{"shapes": {}}', "measured on None"),
        ('{"device": "NVIDIA H200", "shapes": 5}', "shapes is not an object"),
        ("\udcff", "cannot be read"),
    ],
)
def test_a_broken_or_foreign_file_is_told_once_and_ignored(own, caplog, text, told) -> None:
    (own / "h200.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    wanted = choose(QWEN._replace(tokens=128))
    assert wanted.reason.startswith("measured on h200")  # the shipped table still speaks
    choose(QWEN._replace(tokens=512))
    assert len(caplog.records) == 1 and told in caplog.text
    assert "h200.json" in caplog.text and "tune" in caplog.text


@pytest.mark.parametrize(
    ("section", "row", "told"),
    [
        ("hopper", {"up": DECODE | {"kernel": "small"}, "down": DECODE}, "kernel must be one of"),
        ("hopper", {"up": TALL | {"stages": 5}, "down": TALL}, "bytes of shared memory"),
        ("hopper", {"up": DECODE | {"ctas_per_sm": 2}, "down": DECODE}, "bytes of shared memory"),
        ("hopper", {"up": TALL | {"bm": 200}, "down": TALL}, "tall tiles have bm in"),
        ("hopper", {"up": TALL | {"bk": 32}, "down": TALL}, "have bk in (64,)"),
        ("hopper", {"up": TALL, "down": DECODE}, "share one map"),
        ("hopper", {"up": TALL, "down": TALL, "order": "any"}, "order must be"),
        ("hopper", {"up": TALL | {"bm": "256"}, "down": TALL}, "whole numbers"),
        ("hopper", {"up": TALL | {"speed": 1}, "down": TALL}, "unknown or missing fields: speed"),
        ("hopper", {"up": TALL}, "must have up, down"),
        ("shapes", TRITON | {"heights": [24]}, "heights must ascend"),
        ("shapes", TRITON | {"up": {"block_n": 48}}, "powers of two"),
        ("shapes", TRITON | {"up": {"block_n": 256, "block_k": 256}}, "bytes of shared memory"),
        ("shapes", TRITON | {"up": {"block_m": 48}}, "not a configuration"),
        ("shapes", [], "not a configuration"),
    ],
)
def test_a_row_that_cannot_run_is_refused_and_the_others_stay(
    table, own, caplog, section, row, told
) -> None:
    good = TRITON if section == "shapes" else {"up": DECODE, "down": DECODE}
    written(own, **{section: {KEY: {"16": good, "64": row, "x": good}}})
    kept = getattr(tune.load_table("h200"), section)[KEY]
    assert kept == {"16": good} and len(caplog.records) == 1
    assert "2 rows" in caplog.text and told in caplog.text


@pytest.mark.parametrize(
    ("tile", "compiled"),
    [
        (("prefill", 128, 256, 4), 229752),
        (("tall", 384, 128, 3), 229728),
        (("tall", 128, 128, 6), 229832),
        (("trim", 160, 256, 4), 229768),
        (("decode", 16, 128, 10), 188916),
        (("decode", 128, 128, 6), 229748),
        (("pair", 16, 128, 12), 230660),
        (("pair", 16, 64, 10), 108676),
    ],
)
def test_the_shared_memory_of_a_hopper_tile_is_an_upper_bound(tile, compiled) -> None:
    """Of what Triton 3.6 says for sm_90."""
    assert compiled <= fit.shared_bytes(*tile) <= compiled + fit.BARRIER_BYTES


def test_without_a_home_there_is_no_users_table(monkeypatch) -> None:
    monkeypatch.delenv("MOESAIC_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pathlib.Path.home", lambda: Path("~a-user-nobody-has").expanduser())
    assert cache_folder() is None
    assert choose(QWEN).reason.startswith("measured on h200")


def test_the_shipped_h200_table_speaks_between_its_token_counts() -> None:
    told = [choose(QWEN._replace(tokens=t)) for t in (2, 90, 256, 700, 32768)]
    buckets = [4, 64, 512, 512, 8192]
    assert [c.reason for c in told] == [f"measured on h200 at {b} tokens" for b in buckets]
    assert told[0].heights == (16,) and told[-1].heights == (128,)
    for elsewhere in (QWEN._replace(family="h100"), QWEN._replace(dtype="float32")):
        assert choose(elsewhere) == heuristic(elsewhere)


def test_the_hopper_path_takes_the_measured_row_whatever_the_budget(own, monkeypatch) -> None:
    torch = pytest.importorskip("torch")
    from moesaic.kernels.hopper import experts

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H200")
    monkeypatch.setattr(tune, "CONFIGS", own.parent / "nothing shipped")
    written(own, hopper={KEY: {"64": {"up": DECODE, "down": DECODE, "order": "mixed"}}})
    device, up_shape = torch.device("cuda"), (128, 2 * 768, 2048)

    def chosen(tokens, sms, dtype=torch.bfloat16):
        return experts.choose_measured(tokens, 8, up_shape, True, dtype, device, sms)

    experts.choose_measured.cache_clear()
    measured = experts.layer_config({"up": DECODE, "down": DECODE, "order": "mixed"})
    assert {chosen(tokens, sms) for tokens in (43, 64, 96) for sms in (1, 66, 132)} == {measured}
    for tokens, dtype in (
        (97, torch.bfloat16),
        (42, torch.bfloat16),
        (64, torch.float16),
        (1, torch.bfloat16),
    ):
        untuned = experts.choose_layer(tokens, 8, 128, 1536, 132)
        assert chosen(tokens, 132, dtype) == untuned != measured
    experts.choose_measured.cache_clear()
