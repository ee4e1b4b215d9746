"""Traces come back as written, and every damaged or foreign file is refused in one line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic import trace as module
from moesaic.trace import TraceInfo, TraceReader, TraceRow, TraceWriter, read_trace

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

INFO = TraceInfo(model="tiny", num_experts=4, top_k=2, layers=2, text_sha256="ab" * 32)
IDS = ([0, 1, 2, 1], [3, 0, 3, 1])
ROWS = [(0, 0, [1, 2, 1, 0]), (0, 1, [1, 1, 0, 2])]


def written(path: Path, *, with_ids: bool = False, repeats: int = 1) -> Path:
    with TraceWriter(path, INFO, with_ids=with_ids) as trace:
        for step in range(repeats):
            for layer, (_, _, counts) in enumerate(ROWS):
                trace.add(step, layer, counts, IDS[layer] if with_ids else None)
    return path


@pytest.mark.parametrize("with_ids", [False, True])
def test_round_trip_over_row_groups(
    tmp_path: Path, with_ids: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ROWS_PER_GROUP", 3)
    trace = read_trace(written(tmp_path / "t.parquet", with_ids=with_ids, repeats=4), num_experts=4)
    assert trace.info == replace(INFO, tokens=8)
    assert trace.rows == tuple(
        TraceRow(step, layer, tuple(counts), tuple(IDS[layer]) if with_ids else None)
        for step in range(4)
        for layer, (_, _, counts) in enumerate(ROWS)
    )
    assert pq.ParquetFile(tmp_path / "t.parquet").metadata.num_row_groups == 3
    assert [p.name for p in tmp_path.iterdir()] == ["t.parquet"]


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_any_counts_round_trip(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    counts = data.draw(st.lists(st.lists(st.integers(0, 2**30), min_size=4, max_size=4)))
    path = tmp_path_factory.mktemp("any") / "t.parquet"
    with TraceWriter(path, replace(INFO, top_k=1)) as trace:
        for step, counts_E in enumerate(counts):
            trace.add(step, 0, counts_E)
    assert [list(row.counts_E) for row in read_trace(path).rows] == counts


def test_an_error_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), TraceWriter(tmp_path / "t.parquet", INFO) as trace:
        trace.add(*ROWS[0])
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ((0, 2, [1, 1, 1, 1]), "layer must be in"),
        ((-1, 0, [1, 1, 1, 1]), "step not negative"),
        ((0, 0, [1, 1, 1]), "must hold 4 numbers, got 3"),
        ((0, 0, [1, 1, 1, 0]), "multiple of top_k=2"),
        ((0, 0, [3, -1, 1, 1]), "0 or more"),
        ((0, 0, [1, 1, 1, 1], [0, 1, 2, 3]), "exactly when with_ids"),
    ],
)
def test_the_writer_refuses_what_cannot_have_happened(
    tmp_path: Path, row: tuple[Any, ...], said: str
) -> None:
    with (
        TraceWriter(tmp_path / "t.parquet", INFO) as trace,
        pytest.raises(ValueError, match=said),
    ):
        trace.add(*row)


@pytest.mark.parametrize("ids", [[0, 1, 2, 2], [0, 1, 2, 4], [0, 1, 1, -1], [0, 1]])
def test_ids_must_give_the_counts(tmp_path: Path, ids: list[int]) -> None:
    with (
        TraceWriter(tmp_path / "t.parquet", INFO, with_ids=True) as trace,
        pytest.raises(ValueError, match="ids"),
    ):
        trace.add(0, 0, [1, 2, 1, 0], ids)


def rewritten(path: Path, edit: dict[str, str | None], counts: list[int] | None = None) -> Path:
    """The file with other metadata or other counts in its first row, otherwise well formed."""
    table = pq.read_table(path)
    if counts is not None:
        columns = table.to_pydict() | {"counts": [counts, ROWS[1][2]]}
        table = pa.table(columns, schema=table.schema)
    stored = pq.read_metadata(path).metadata
    metadata = {k: v for k, v in stored.items() if k.startswith(b"moesaic.")}
    for key, value in edit.items():
        metadata.pop(f"moesaic.{key}".encode(), None)
        if value is not None:
            metadata[f"moesaic.{key}".encode()] = value.encode()
    pq.write_table(table.replace_schema_metadata(metadata), path)
    return path


def test_the_rewriting_of_these_tests_is_harmless(tmp_path: Path) -> None:
    path = written(tmp_path / "t.parquet")
    before = read_trace(path)
    assert read_trace(rewritten(path, {})) == before


@pytest.mark.parametrize(
    ("edit", "counts", "said"),
    [
        ({"format": "moesaic-routing-trace-2"}, None, "not a routing trace of format"),
        ({"format": None}, None, "not a routing trace of format"),
        ({"num_experts": None}, None, "metadata is damaged"),
        ({"num_experts": "many"}, None, "metadata is damaged"),
        ({"num_experts": "0"}, None, "metadata is damaged"),
        ({"num_experts": "5"}, None, "must hold 5 numbers, got 4"),
        ({"tokens": "7"}, None, "rows hold 2 tokens, the metadata says 7"),
        ({}, [1, 2, 2, 0], "multiple of top_k"),
        ({}, [-1, 2, 2, 1], "0 or more"),
    ],
)
def test_foreign_and_damaged_content(
    tmp_path: Path, edit: dict[str, str | None], counts: list[int] | None, said: str
) -> None:
    path = rewritten(written(tmp_path / "t.parquet"), edit, counts)
    with pytest.raises(ValueError, match=said) as caught:
        read_trace(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_wrong_files(tmp_path: Path) -> None:
    good = written(tmp_path / "t.parquet", with_ids=True, repeats=50)
    with pytest.raises(ValueError, match="4 experts, expected 8"):
        TraceReader(good, num_experts=8)
    with pytest.raises(FileNotFoundError, match="no such file"):
        TraceReader(tmp_path / "missing.parquet")
    foreign = tmp_path / "foreign.parquet"
    pq.write_table(pa.table({"step": [1]}), foreign)
    with pytest.raises(ValueError, match="not a routing trace of format"):
        TraceReader(foreign)
    columns = tmp_path / "columns.parquet"
    table = pq.read_table(good).drop_columns(["layer"])
    stored = {k: v for k, v in pq.read_metadata(good).metadata.items() if b"moesaic" in k}
    pq.write_table(table.replace_schema_metadata(stored), columns)
    with pytest.raises(ValueError, match="columns must be"):
        TraceReader(columns)


def test_no_truncation_or_flipped_byte_gets_through(tmp_path: Path) -> None:
    good = written(tmp_path / "t.parquet", with_ids=True, repeats=50)
    before, data = read_trace(good), good.read_bytes()
    bad = tmp_path / "bad.parquet"
    for cut in (0, 3, 11, len(data) // 3, len(data) - 9, len(data) - 1):
        bad.write_bytes(data[:cut])
        with pytest.raises(ValueError, match=r"bad.parquet: .*again"):
            read_trace(bad)
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    for place in range(4, footer, 7):
        bad.write_bytes(data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :])
        try:
            assert read_trace(bad) == before
        except (ValueError, OSError) as error:
            assert "\n" not in str(error)
