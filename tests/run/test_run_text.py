"""Texts are checked to the last byte, at the right offset, across block borders."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from moesaic.run import text as module
from moesaic.run.text import TextReader, inspect_text


def test_size_hash_and_pieces(text: Path) -> None:
    data, told = text.read_bytes(), []
    info = inspect_text(text, advance=told.append)
    assert (info.size, sum(told)) == (len(data), len(data))
    assert info.sha256 == hashlib.sha256(data).hexdigest()
    with TextReader(info) as reader:
        assert reader.read(100) + reader.read(len(data) - 100) == data


@pytest.mark.parametrize("block", [1, 2, 3, 7, 1 << 20])
def test_characters_cut_by_a_block_are_fine(
    text: Path, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    assert inspect_text(text).size == 1003


@pytest.mark.parametrize("block", [1, 4, 1 << 20])
@pytest.mark.parametrize(
    ("data", "offset"),
    [
        (b"good \xff", 5),
        ("ä".encode()[:1], 0),
        (b"abc" + "🧩".encode()[:3], 3),
        (b"text\x00more", 4),
        ("ab".encode("utf-16"), 0),
        ("ä".encode() * 5 + b"\xc3(", 10),
    ],
)
def test_binary_is_refused_at_its_offset(
    tmp_path: Path, data: bytes, offset: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    path = tmp_path / "binary"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"not UTF-8 text, .* at offset {offset};"):
        inspect_text(path)


def test_a_limit_may_cut_a_character(tmp_path: Path) -> None:
    path = tmp_path / "cut"
    path.write_bytes("aä".encode() + b"\xff")
    assert inspect_text(path, limit=2).size == 2
    with pytest.raises(ValueError, match="offset 3"):
        inspect_text(path)


def test_what_is_no_text_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file; give"):
        inspect_text(tmp_path / "missing")
    with pytest.raises(ValueError, match="is a directory; give"):
        inspect_text(tmp_path)
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="is empty; give"):
        inspect_text(tmp_path / "empty")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe or device; give"):
        inspect_text(tmp_path / "pipe")


def test_a_text_that_shrinks_is_noticed(text: Path) -> None:
    info = inspect_text(text)
    text.write_bytes(b"short")
    with TextReader(info) as reader, pytest.raises(ValueError, match="changed while"):
        reader.read(100)
