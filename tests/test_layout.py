"""The rooms keep their order, kernels stay a leaf, and the project speaks of itself alone."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "moesaic"
ROOMS = (
    {"kernels"},
    {"types", "cost", "trace"},
    {"dispatch", "ops", "functional", "packing", "validate", "reference"},
    {"hardware"},
    {"runtime"},
    {"parallel"},
    {"nn"},
    {"planner"},
    {"integrations"},
    {"models"},
    {"run"},
    {"bench"},
    {"cli"},
)
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
# What `from moesaic import moe` reaches: the package's own file, which stands just below nn.
LEVEL["__init__"] = LEVEL["nn"]
LEVEL["__main__"] = LEVEL["cli"]
SPEAKS_TRANSFORMERS = {"integrations", "models", "run", "bench"}
MAX_LINES = 450
FORBIDDEN = ("/" + "work/", "/" + "tmp/", "shared/" + "DESIGN", "issue " + "#", "../" + "shared")


def at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """The statements that run when the module is imported."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from at_import(node)


def targets(node: ast.AST, module: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Dotted paths that an import statement of `module` names; none for another statement."""
    if isinstance(node, ast.Import):
        return [tuple(alias.name.split(".")) for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = module[: len(module) - node.level] if node.level else ()
    path = base + tuple(node.module.split(".") if node.module else ())
    return [(*path, alias.name) for alias in node.names]


def room_of(path: tuple[str, ...]) -> str:
    """The room of a dotted path that begins with the package's name."""
    return path[1] if len(path) > 1 and path[1] in LEVEL else "__init__"


def problems(sources: dict[str, str]) -> list[str]:
    """What breaks the layout in these files, given as path below the package: text."""
    found: list[str] = []
    for name, text in sources.items():
        module = ("moesaic", *Path(name).with_suffix("").parts)
        tree = ast.parse(text)
        eager = {id(node) for node in at_import(tree)}
        if text.count("\n") > MAX_LINES:
            found.append(f"{name}: {text.count(chr(10))} lines, at most {MAX_LINES}")
        if module[1] not in LEVEL:
            found.append(f"{name}: {module[1]} is not a room")
            continue
        for node in ast.walk(tree):
            where = f"{name}:{getattr(node, 'lineno', 0)}"
            level = node.level if isinstance(node, ast.ImportFrom) else 0
            for target in targets(node, module):
                found += import_problems(where, module[1], target, level, id(node) in eager)
    return found


def import_problems(
    where: str, room: str, target: tuple[str, ...], level: int, eager: bool
) -> list[str]:
    """What is wrong with one import of `target` from `room`."""
    top = target[0]
    if top != "moesaic":
        if room == "kernels" and top not in {"torch", "triton", *sys.stdlib_module_names}:
            return [f"{where}: kernels import torch and triton only, not {top}"]
        if top == "triton" and eager and room != "kernels":
            return [f"{where}: triton is imported lazily outside kernels"]
        if top == "transformers" and (eager or room not in SPEAKS_TRANSFORMERS):
            return [f"{where}: transformers is imported lazily and at the edges only"]
        return []
    other = room_of(target)
    if room == "kernels" and (level == 0 or other != "kernels"):
        return [f"{where}: kernels use relative imports within kernels only"]
    if target[-1] == "__version__" or room == "__init__":
        return []
    same_room_or_line = LEVEL[other] == LEVEL[room]
    if LEVEL[other] > LEVEL[room] or (same_room_or_line and {room, other} == {"nn", "__init__"}):
        return [f"{where}: {room} must not import {other}"]
    return []


def test_every_import_points_up_the_list() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 10
    sources = {f.relative_to(PACKAGE).as_posix(): f.read_text("utf-8") for f in files}
    assert problems(sources) == []


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("types.py", "from .ops import route_op", "types must not import ops"),
        ("types.py", "from . import nn", "types must not import nn"),
        ("types.py", "def f():\n    import moesaic.bench.timing", "types must not import bench"),
        ("hardware/facts.py", "from ..runtime import slices", "hardware must not import runtime"),
        ("nn.py", "from moesaic import moe", "nn must not import __init__"),
        ("models/lm.py", "from ..run.command import main", "models must not import run"),
        ("kernels/a.py", "from ..types import Routing", "kernels use relative imports"),
        ("kernels/a.py", "from moesaic.kernels import b", "kernels use relative imports"),
        ("kernels/deep/a.py", "from ...types import Routing", "kernels use relative imports"),
        ("kernels/a.py", "import numpy", "kernels import torch and triton only"),
        ("ops.py", "import triton.language as tl", "triton is imported lazily"),
        ("ops.py", "try:\n    import triton\nexcept ImportError:\n    pass", "triton is imported"),
        ("bench/a.py", "import transformers", "transformers is imported lazily"),
        ("ops.py", "def f():\n    import transformers", "transformers is imported lazily"),
        ("misc.py", "", "misc is not a room"),
        ("ops.py", "x = 1\n" * (MAX_LINES + 1), "lines, at most"),
    ],
)
def test_a_broken_layout_is_reported(name: str, text: str, complaint: str) -> None:
    (problem,) = problems({name: text})
    assert complaint in problem


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("ops.py", "from .kernels.routing import route\ndef f():\n    import triton"),
        ("functional.py", "from .ops import route_op\nfrom .types import Routing"),
        ("kernels/a.py", "import math, torch\nimport triton\nfrom .b import c"),
        ("kernels/deep/a.py", "from ..b import c\nfrom . import d"),
        ("runtime/a.py", "if TYPE_CHECKING:\n    import triton\nfrom .. import __version__"),
        ("bench/a.py", "from .. import moe\ndef f():\n    import transformers"),
        ("cli.py", "from .run.command import main"),
    ],
)
def test_a_sound_layout_is_not_reported(name: str, text: str) -> None:
    assert problems({name: text}) == []


def tracked_files() -> list[Path]:
    """The files of the repository; without git, every file outside ignored folders."""
    try:
        command = ["git", "ls-files", "-z"]
        out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        return [ROOT / name for name in out.split("\0") if name and (ROOT / name).is_file()]
    except (OSError, subprocess.CalledProcessError):
        skipped = {"build", "dist", "site", "runs", "__pycache__"}
        files = (f for f in ROOT.rglob("*") if f.is_file())
        return [
            f
            for f in files
            if not any(p in skipped or p.startswith(".") for p in f.relative_to(ROOT).parts[:-1])
        ]


def foreign_words(text: str) -> list[str]:
    """Mentions of machines and plans that are no part of the project."""
    return re.findall("|".join(map(re.escape, FORBIDDEN)), text, re.IGNORECASE)


def test_the_project_speaks_of_itself_alone() -> None:
    # Text that a model was trained or is judged on is data: it may say anything.
    data = PACKAGE / "assets"
    files = [f for f in tracked_files() if data not in f.parents]
    assert ROOT / "README.md" in files
    found: dict[str, list[str]] = {}
    for file in files:
        try:
            words = foreign_words(file.read_text("utf-8"))
        except UnicodeDecodeError:
            continue
        if words:
            found[str(file.relative_to(ROOT))] = words
    assert found == {}


@pytest.mark.parametrize("word", FORBIDDEN)
def test_a_foreign_word_is_reported(word: str) -> None:
    assert foreign_words(f"see {word}1 for more") == [word]
    assert foreign_words("the work of one task, shared by all; this issue") == []
