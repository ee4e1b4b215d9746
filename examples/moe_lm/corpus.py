"""Real text to train on: the sources of Python's standard library, minus everything held out.

A corpus is three byte strings: `train`, `validation` (whole files, chosen by a hash of their
name) and `heldout` (the committed `heldout.txt`, which never trains anything). A file is kept out
of training when it bears the path of a held-out one, and when it shares more than a few 64-byte
windows with the held-out text, wherever it lies and whatever it is called.
"""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

WINDOW = 64
MAX_SHARED_WINDOWS = 4
MIN_DISTINCT_BYTES = 12
MAX_FILE_BYTES = 1 << 20
SUFFIXES = (".py", ".rst", ".txt", ".pyi")
SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "encodings", "lib-dynload", "ensurepip"}
)


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The three texts and what was left out on the way."""

    train: bytes
    validation: bytes
    heldout: bytes
    files: int
    excluded: tuple[str, ...]
    shared_windows: int

    def sha256(self) -> str:
        """Hash of the three texts."""
        digest = hashlib.sha256()
        for part in (self.train, self.validation, self.heldout):
            digest.update(hashlib.sha256(part).digest())
        return digest.hexdigest()


def stdlib_root() -> Path:
    """The standard library of the running interpreter."""
    return Path(sysconfig.get_path("stdlib"))


def text_files(root: Path) -> Iterator[tuple[str, bytes]]:
    """(path relative to `root`, content) of its UTF-8 text files, ordered by path.

    Skipped: third-party packages, the codec tables, empty files, files over 1 MiB, files that are
    not UTF-8.
    """
    paths: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        paths += [Path(folder, name) for name in names if name.endswith(SUFFIXES)]
    for path in sorted(paths, key=lambda p: p.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        if not path.is_file() or not 0 < path.stat().st_size <= MAX_FILE_BYTES:
            continue
        content = path.read_bytes()
        try:
            content.decode("utf-8")
        except UnicodeDecodeError:
            continue
        yield relative.as_posix(), content


def name_hash(name: str) -> int:
    """A number that depends on nothing but the name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def all_windows(text: bytes) -> frozenset[bytes]:
    """Every 64-byte window of `text`, without those of few distinct bytes (rulers, indents)."""
    cuts = (text[i : i + WINDOW] for i in range(len(text) - WINDOW + 1))
    return frozenset(cut for cut in cuts if len(set(cut)) >= MIN_DISTINCT_BYTES)


def shared_windows(text: bytes, windows: frozenset[bytes]) -> int:
    """How many of the adjacent 64-byte pieces of `text` occur in `windows` at any offset."""
    return sum(text[i : i + WINDOW] in windows for i in range(0, len(text), WINDOW))


def split(
    files: Iterable[tuple[str, bytes]],
    heldout: bytes,
    heldout_names: frozenset[str],
    *,
    validation_part: int = 50,
    validation_bytes: int = 300_000,
) -> Corpus:
    """Files divided into training and validation, held-out text and its relatives left out.

    One file in `validation_part`, by the hash of its name, is validation (of which the first
    `validation_bytes` are used); a file seen before under any name is not repeated.
    `shared_windows` counts the held-out pieces that the files kept for training still hold.
    """
    windows = all_windows(heldout)
    train: list[bytes] = []
    validation: list[bytes] = []
    excluded: list[str] = []
    seen: set[bytes] = set()
    kept_windows = 0
    for name, content in files:
        digest = hashlib.sha256(content).digest()
        if digest in seen:
            continue
        seen.add(digest)
        shared = shared_windows(content, windows)
        if name in heldout_names or shared > MAX_SHARED_WINDOWS:
            excluded.append(name)
        elif name_hash(name) % validation_part == 0:
            validation.append(content)
        else:
            train.append(content)
            kept_windows += shared
    return Corpus(
        train=b"\n".join(train),
        validation=b"\n".join(validation)[:validation_bytes],
        heldout=heldout,
        files=len(train),
        excluded=tuple(excluded),
        shared_windows=kept_windows,
    )


def load_corpus(assets: Path, roots: Iterable[Path]) -> Corpus:
    """The corpus of the text files under `roots`, without what `assets` holds out.

    Raises:
        ValueError: the held-out text is not the one its list describes, or text is too little.
    """
    listing = json.loads((assets / "heldout.json").read_text(encoding="utf-8"))
    heldout = (assets / "heldout.txt").read_bytes()
    if hashlib.sha256(heldout).hexdigest() != listing["sha256"]:
        raise ValueError(
            f"{assets / 'heldout.txt'} is not the text that heldout.json describes; "
            "restore both from the repository"
        )
    names = frozenset(entry["path"] for entry in listing["files"])
    corpus = split((pair for root in roots for pair in text_files(root)), heldout, names)
    if len(corpus.train) < 100_000 or len(corpus.validation) < 1_000:
        raise ValueError(
            f"too little text to train on: {len(corpus.train)} bytes under {[*map(str, roots)]}; "
            "name a folder of sources with --text-root"
        )
    return corpus


def choose_heldout(root: Path, assets: Path, size: int = 280_000) -> None:
    """Write heldout.txt and heldout.json: whole library modules, in the order of names' hashes."""
    skipped = {"test", "tests", "idlelib", "lib2to3", "distutils", "pydoc_data", "config"}
    files = [
        (name, content)
        for name, content in text_files(root)
        if name.endswith(".py")
        and not skipped & set(Path(name).parts)
        and 4_000 <= len(content) <= 60_000
    ]
    chosen: list[tuple[str, bytes]] = []
    for name, content in sorted(files, key=lambda pair: name_hash(pair[0])):
        if sum(len(c) for _, c in chosen) >= size:
            break
        chosen.append((name, content))
    text = b"\n".join(content for _, content in chosen)
    listing = {
        "python": sysconfig.get_python_version(),
        "sha256": hashlib.sha256(text).hexdigest(),
        "files": [
            {"path": n, "bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in chosen
        ],
    }
    (assets / "heldout.txt").write_bytes(text)
    (assets / "heldout.json").write_text(json.dumps(listing, indent=1) + "\n", encoding="utf-8")
