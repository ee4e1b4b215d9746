"""Routing traces: which experts got how many tokens, step by step, in a Parquet file.

    T tokens of a step · E experts · K top-k

One row is one layer of one step: ``step``, ``layer``, ``counts`` (E numbers) and, where asked for,
``ids`` (T*K expert ids, token by token). What holds for the whole file (version, model, E, K,
tokens, the text's hash) stands in the file's metadata. Nothing in a trace is ever executed: it is
read as numbers, and every number is checked before it is handed on. docs/formats.md is the
specification.

>>> import tempfile
>>> path = Path(tempfile.mkdtemp()) / "trace.parquet"
>>> info = TraceInfo(model="tiny", num_experts=4, top_k=2, layers=1, text_sha256="0" * 64)
>>> with TraceWriter(path, info) as trace:
...     trace.add(0, 0, [3, 1, 0, 2])
>>> [row.counts_E for row in read_trace(path, num_experts=4).rows]
[(3, 1, 0, 2)]
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any

VERSION = "moesaic-routing-trace-1"
ROWS_PER_GROUP = 1024
IDS_PER_GROUP = 1 << 22


@dataclass(frozen=True, kw_only=True)
class TraceInfo:
    """What holds for a whole trace; `tokens` is counted by the writer.

    Raises:
        ValueError: a count is out of range.
    """

    model: str
    num_experts: int
    top_k: int
    layers: int
    text_sha256: str
    tokens: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.num_experts <= 1024:
            raise ValueError(f"num_experts must be in [1, 1024], got {self.num_experts}")
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k must be in [1, {self.num_experts}], got {self.top_k}")
        if self.layers < 1 or self.tokens < 0:
            raise ValueError(f"layers must be positive, tokens not negative, got {self}")


@dataclass(frozen=True)
class TraceRow:
    """One layer of one step: tokens per expert, and the ids (T*K, token by token) if recorded."""

    step: int
    layer: int
    counts_E: tuple[int, ...]
    ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Trace:
    """A whole trace in memory."""

    info: TraceInfo
    rows: tuple[TraceRow, ...]


def _schema(with_ids: bool) -> Any:
    import pyarrow as pa

    numbers = pa.list_(pa.field("element", pa.int32(), nullable=False))
    columns = [("step", pa.int64()), ("layer", pa.int32()), ("counts", numbers)]
    if with_ids:
        columns.append(("ids", numbers))
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns])


def _check_row(row: TraceRow, info: TraceInfo) -> None:
    """Raise ValueError, without naming the file, when a row cannot have happened."""
    where = f"step {row.step} layer {row.layer}"
    if row.step < 0 or not 0 <= row.layer < info.layers:
        raise ValueError(f"{where}: layer must be in [0, {info.layers}), step not negative")
    if len(row.counts_E) != info.num_experts:
        raise ValueError(
            f"{where}: counts must hold {info.num_experts} numbers, got {len(row.counts_E)}"
        )
    if min(row.counts_E) < 0 or sum(row.counts_E) % info.top_k:
        raise ValueError(
            f"{where}: counts must be 0 or more and sum to a multiple of top_k={info.top_k}, "
            f"got a sum of {sum(row.counts_E)} and a minimum of {min(row.counts_E)}"
        )
    if row.ids is None:
        return
    seen = [0] * info.num_experts
    for expert in row.ids:
        if not 0 <= expert < info.num_experts:
            raise ValueError(f"{where}: ids must be in [0, {info.num_experts}), got {expert}")
        seen[expert] += 1
    if tuple(seen) != row.counts_E:
        raise ValueError(f"{where}: ids and counts disagree on the tokens per expert")


class TraceWriter:
    """Writes a trace row by row in bounded memory; the file gets its name when it is complete.

    Use it as a context manager: an exception inside removes what was written.

    Args:
        path: the file, ending in .parquet by custom.
        info: what holds for the whole trace.
        with_ids: whether every row carries its ids.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(
        self, path: str | os.PathLike[str], info: TraceInfo, *, with_ids: bool = False
    ) -> None:
        import pyarrow.parquet as pq

        self.path, self.info, self.with_ids = Path(path), info, with_ids
        self._partial = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        self._rows: list[TraceRow] = []
        self._tokens = self._held_ids = 0
        self._writer = pq.ParquetWriter(
            self._partial, _schema(with_ids), compression="zstd", write_page_checksum=True
        )

    def add(
        self,
        step: int,
        layer: int,
        counts_E: Sequence[int],
        ids: Sequence[int] | None = None,
    ) -> None:
        """Append one layer of one step; layer 0 counts the step's tokens.

        Raises:
            ValueError: the row contradicts the trace's info, or `ids` are missing or not wanted.
            OSError: the file cannot be written.
        """
        if (ids is not None) != self.with_ids:
            raise ValueError(f"ids must be given exactly when with_ids, got {ids is not None}")
        row = TraceRow(step, layer, tuple(counts_E), None if ids is None else tuple(ids))
        _check_row(row, self.info)
        self._rows.append(row)
        if layer == 0:
            self._tokens += sum(row.counts_E) // self.info.top_k
        self._held_ids += len(ids or ())
        if len(self._rows) >= ROWS_PER_GROUP or self._held_ids >= IDS_PER_GROUP:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        if not self._rows:
            return
        columns: dict[str, list[Any]] = {
            "step": [row.step for row in self._rows],
            "layer": [row.layer for row in self._rows],
            "counts": [row.counts_E for row in self._rows],
        }
        if self.with_ids:
            columns["ids"] = [row.ids for row in self._rows]
        self._writer.write_table(pa.table(columns, schema=_schema(self.with_ids)))
        self._rows.clear()
        self._held_ids = 0

    def close(self) -> None:
        """Write what is held and the metadata, then give the file its name."""
        self._flush()
        values = {f.name: str(getattr(self.info, f.name)) for f in fields(TraceInfo)}
        values |= {"format": VERSION, "tokens": str(self._tokens)}
        self._writer.add_key_value_metadata({f"moesaic.{k}": v for k, v in values.items()})
        self._writer.close()
        with self._partial.open("rb") as file:
            os.fsync(file.fileno())
        self._partial.replace(self.path)

    def abandon(self) -> None:
        """Remove what was written."""
        try:
            self._writer.close()
        except OSError:
            pass
        finally:
            self._partial.unlink(missing_ok=True)

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            try:
                self.close()
            except BaseException:
                self.abandon()
                raise
        else:
            self.abandon()


def _info(path: Path, metadata: dict[bytes, bytes] | None) -> TraceInfo:
    pairs = (metadata or {}).items()
    texts = {k.decode(errors="replace"): v.decode(errors="replace") for k, v in pairs}
    found = texts.get("moesaic.format")
    if found != VERSION:
        raise ValueError(
            f"{path}: not a routing trace of format {VERSION!r}, got {found!r}; "
            "write one with `moesaic run`"
        )
    try:
        return TraceInfo(
            model=texts["moesaic.model"],
            text_sha256=texts["moesaic.text_sha256"],
            **{k: int(texts[f"moesaic.{k}"]) for k in ("num_experts", "top_k", "layers", "tokens")},
        )
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{path}: the trace's metadata is damaged ({error}); write it again with `moesaic run`"
        ) from error


class TraceReader:
    """An open trace: `info` at once, the rows of one row group at a time.

    Args:
        path: a file written by `TraceWriter`.
        num_experts: the experts of the model it is meant for; None accepts any.

    Raises:
        OSError: the file is missing or unreadable.
        ValueError: it is no complete trace of this version, or another model's.
    """

    def __init__(self, path: str | os.PathLike[str], *, num_experts: int | None = None) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path}: no such file; give a trace.parquet")
        try:
            self._file = pq.ParquetFile(self.path, page_checksum_verification=True)
        except (pa.ArrowException, OSError) as error:
            raise self._damaged(error) from error
        self.info = _info(self.path, self._file.metadata.metadata)
        schema = self._file.schema_arrow.remove_metadata()
        self.with_ids = "ids" in schema.names
        if not schema.equals(_schema(self.with_ids)):
            raise ValueError(
                f"{self.path}: columns must be {_schema(self.with_ids).names} of the types in "
                f"docs/formats.md, got {schema.names}; write it again with `moesaic run`"
            )
        if num_experts not in (None, self.info.num_experts):
            raise ValueError(
                f"{self.path}: the trace is of a model with {self.info.num_experts} experts, "
                f"expected {num_experts}; record one with this model"
            )

    def _damaged(self, error: BaseException) -> ValueError:
        reason = " ".join(str(error).split())[:160]
        return ValueError(
            f"{self.path}: not a complete Parquet file ({reason}); copy or record it again"
        )

    def _columns(self, group: int) -> dict[str, list[Any]]:
        import pyarrow as pa

        try:
            table = self._file.read_row_group(group)
            table.validate(full=True)
            columns: dict[str, list[Any]] = table.to_pydict()
            return columns
        except (pa.ArrowException, OSError) as error:
            raise self._damaged(error) from error

    def rows(self) -> Iterator[TraceRow]:
        """The rows in order, each checked against `info`.

        Raises:
            ValueError: the file is damaged, or a row cannot have happened.
        """
        tokens = 0
        for group in range(self._file.metadata.num_row_groups):
            columns = self._columns(group)
            every_ids = columns.get("ids", [None] * len(columns["step"]))
            for step, layer, counts, ids in zip(
                columns["step"], columns["layer"], columns["counts"], every_ids, strict=True
            ):
                row = TraceRow(step, layer, tuple(counts), None if ids is None else tuple(ids))
                try:
                    _check_row(row, self.info)
                except ValueError as error:
                    raise ValueError(f"{self.path}: {error}; record it again") from error
                tokens += sum(counts) // self.info.top_k if layer == 0 else 0
                yield row
        if tokens != self.info.tokens:
            raise ValueError(
                f"{self.path}: rows hold {tokens} tokens, the metadata says {self.info.tokens}; "
                "record it again"
            )


def read_trace(path: str | os.PathLike[str], *, num_experts: int | None = None) -> Trace:
    """A whole trace, checked; for long ones iterate over `TraceReader.rows` instead.

    Raises:
        OSError, ValueError: see `TraceReader`.
    """
    reader = TraceReader(path, num_experts=num_experts)
    return Trace(reader.info, tuple(reader.rows()))
