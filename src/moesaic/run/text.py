"""Real text as bytes: checked once from end to end, then read piece by piece in bounded memory.

The check reads every byte that will be scored before the first is scored, so that a broken file is
refused in its first second and not after an hour.
"""

from __future__ import annotations

import codecs
import hashlib
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

BLOCK = 1 << 20


@dataclass(frozen=True)
class TextInfo:
    """A checked text: where it is, how many of its bytes count, and their SHA-256."""

    path: Path
    size: int
    sha256: str


def _not_text(path: Path, what: str, offset: int) -> ValueError:
    return ValueError(
        f"{path}: not UTF-8 text, {what} at offset {offset}; "
        "give a text file, or convert it: iconv -f LATIN1 -t UTF-8"
    )


def _regular_size(path: Path) -> int:
    """The size of a regular file.

    Raises:
        OSError: it is missing or unreadable.
        ValueError: it is no regular file.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; give --text a UTF-8 text file") from None
    if not stat.S_ISREG(status.st_mode):
        kind = "a directory" if stat.S_ISDIR(status.st_mode) else "a pipe or device"
        raise ValueError(f"{path}: is {kind}; give --text a regular UTF-8 text file")
    return status.st_size


def inspect_text(
    path: str | os.PathLike[str],
    *,
    limit: int | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> TextInfo:
    """Check that the first `limit` bytes (default: all) of a file are text, and hash them.

    A character cut by `limit` is not an error. NUL bytes are refused: no text holds them, but
    UTF-16, archives and holes in sparse files do. `advance` is told the bytes of every block read.

    Raises:
        OSError: the file is missing or unreadable.
        ValueError: it is empty, no regular file, or not text; the message names the first offset.
    """
    where = Path(path)
    size = _regular_size(where)
    if size == 0:
        raise ValueError(f"{where}: is empty; give --text a file with at least one byte")
    wanted = size if limit is None else min(size, limit)
    decoder, digest, done = codecs.getincrementaldecoder("utf-8")(), hashlib.sha256(), 0
    with where.open("rb") as file:
        while done < wanted:
            block = file.read(min(BLOCK, wanted - done))
            if not block:
                break
            nul, held = block.find(0), len(decoder.getstate()[0])
            try:
                decoder.decode(block, final=done + len(block) == size)
            except UnicodeDecodeError as error:
                byte = error.object[error.start]
                offset = done - held + error.start
                raise _not_text(where, f"byte 0x{byte:02x}", offset) from None
            if nul >= 0:
                raise _not_text(where, "NUL byte", done + nul)
            digest.update(block)
            done += len(block)
            advance(len(block))
    return TextInfo(where, done, digest.hexdigest())


class TextReader:
    """Sequential reading of a checked text; a context manager."""

    def __init__(self, info: TextInfo) -> None:
        self.info = info
        self._file = info.path.open("rb")

    def read(self, count: int) -> bytes:
        """The next `count` bytes.

        Raises:
            ValueError: the file is shorter than when it was checked.
        """
        data = self._file.read(count)
        if len(data) != count:
            raise ValueError(
                f"{self.info.path}: changed while it was read, expected {count} more bytes, "
                f"got {len(data)}; run again on a copy"
            )
        return data

    def __enter__(self) -> TextReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
