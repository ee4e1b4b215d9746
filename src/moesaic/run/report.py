"""The files of a run: written beside their final place, moved there whole, or not at all.

    runs/2026-01-31T12-00-00/
      report.html     one file, pictures inside, opens without network
      heatmap.png     load of every expert in every layer
      run.jsonl       one line for the run, each chunk, each layer, the summary
      trace.parquet   the routing trace (docs/formats.md)

Until the last byte is on disk everything stands in a hidden directory next to it; one rename makes
the report appear. A full disk or a crash leaves no report, never half of one.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from types import TracebackType
from typing import Any

from ..trace import TraceInfo, TraceWriter
from .show import Document, comparison, difference_line, experts_of, headline


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Give an OSError of the file system the form of one line with a remedy."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise OSError(
            f"the report cannot be written in {out}: {reason}; free some space there or give "
            "--out another directory"
        ) from error


class ReportDirectory:
    """A directory that appears under its name when it is complete; a context manager.

    Args:
        out: the directory of all runs, created if missing.
        now: the time in the name.

    Raises:
        OSError: it cannot be created or written, with the remedy.
    """

    def __init__(self, out: str | os.PathLike[str], now: datetime) -> None:
        self.out = Path(out)
        self.name = now.strftime("%Y-%m-%dT%H-%M-%S")
        self.partial = self.out / f".{self.name}.{os.getpid()}.partial"
        with writing(self.out):
            self.partial.mkdir(parents=True)
            self._lines = (self.partial / "run.jsonl").open("w", encoding="utf-8")

    def line(self, kind: str, value: dict[str, Any]) -> None:
        """Append one JSON line to run.jsonl, at once."""
        text = json.dumps({"kind": kind, **value}, allow_nan=False, separators=(",", ":"))
        with writing(self.out):
            self._lines.write(text + "\n")
            self._lines.flush()

    def file(self, name: str, data: bytes) -> None:
        """Write one whole file."""
        with writing(self.out):
            (self.partial / name).write_bytes(data)

    @contextmanager
    def trace(self, info: TraceInfo, *, with_ids: bool) -> Iterator[TraceWriter]:
        """A trace.parquet that is complete when the block ends."""
        with writing(self.out):
            writer = TraceWriter(self.partial / "trace.parquet", info, with_ids=with_ids)
        try:
            yield writer
            with writing(self.out):
                writer.close()
        except BaseException:
            writer.abandon()
            raise

    def commit(self) -> Path:
        """Force every file to disk, then give the directory its name, which it returns."""
        with writing(self.out):
            self._lines.close()
            for path in (*self.partial.iterdir(), self.partial):
                handle = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(handle)
                finally:
                    os.close(handle)
            final, again = self.out / self.name, 1
            while final.exists():
                again += 1
                final = self.out / f"{self.name}-{again}"
            self.partial.rename(final)
        return final

    def __enter__(self) -> ReportDirectory:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._lines.close()
        except OSError:
            pass
        finally:
            shutil.rmtree(self.partial, ignore_errors=True)


def _inline(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def html(document: Document, heatmap: bytes, series: bytes) -> str:
    """The report as one HTML page without scripts or outside resources."""
    from jinja2 import Environment, StrictUndefined

    source = files(__package__).joinpath("report.html.j2").read_text(encoding="utf-8")
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(source)
    return template.render(
        document=document,
        headline=headline(document),
        comparison=comparison(document),
        difference=difference_line(document),
        layers=[
            {
                **layer,
                "hottest": experts_of(layer, layer["hot"]),
                "coldest": experts_of(layer, layer["cold"]),
            }
            for layer in document["layers"]
        ],
        heatmap=_inline(heatmap),
        series=_inline(series),
        details=json.dumps(document, indent=2),
    )
