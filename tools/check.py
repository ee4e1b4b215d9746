"""Run the project's checks one after the other: lint, types, test, test-all, docs, ...

    .venv/bin/python tools/check.py lint types test

A tool that is not installed fails its check, except in an environment that reuses the
interpreter's packages and could not reach a package index (see setup_env.py): there the check is
named as left out, because a machine without network must still be able to run the tests.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable

import setup_env

ROOT = setup_env.ROOT
NEWEST = ROOT / ".cache" / "transformers-newest"
WORKERS = "2"
# Not --quiet: it hides the warnings that --strict counts, and the build passes.
DOCS = ("mkdocs", "build", "--strict")
TRANSFORMERS_STACK = ("transformers", "huggingface-hub", "tokenizers", "safetensors")


def available(*modules: str) -> bool:
    """Whether these modules are installed; if not, say what is left out, or fail."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if not missing:
        return True
    names = ", ".join(missing)
    if not setup_env.read_stamp().get("reuse"):
        sys.exit(f"check: {names} is not installed; run: make setup")
    print(f"check: LEFT OUT, {names} is not installed and was not downloadable")
    return False


def run(*args: str, env: dict[str, str] | None = None) -> None:
    """Run a module of this interpreter; end with its exit code if that is not zero."""
    print("+ python -m", " ".join(args), flush=True)
    code = subprocess.run([sys.executable, "-m", *args], cwd=ROOT, env=env).returncode
    if code:
        sys.exit(code)


def lint() -> None:
    """Ruff's rules and its formatting."""
    if available("ruff"):
        run("ruff", "check", ".")
        run("ruff", "format", "--check", ".")


def types() -> None:
    """mypy --strict over the sources, with the torch that the annotations were checked against."""
    if not available("mypy"):
        return
    pinned = re.search(r"^torch==(\S+)", (ROOT / "constraints.txt").read_text(), re.M)
    torch = importlib.metadata.version("torch")
    if pinned and setup_env.release(torch) != setup_env.release(pinned.group(1)):
        print(f"check: LEFT OUT, types are checked with torch {pinned.group(1)}, found {torch}")
        return
    run("mypy")


def pytest(*args: str, timeout: int, env: dict[str, str] | None = None) -> None:
    """pytest on two workers with a limit for each test, one computing thread a worker."""
    options = ["-n", WORKERS] if available("xdist") else []
    options += [f"--timeout={timeout}"] if available("pytest_timeout") else []
    run("pytest", "-q", *options, *args, env={"OMP_NUM_THREADS": "1", **os.environ, **(env or {})})


def test() -> None:
    """Every test that is quick enough for every change."""
    pytest("-m", "not slow", timeout=300)


def test_all() -> None:
    """Every test."""
    pytest(timeout=900)


def transformers_tests() -> list[str]:
    """The test files of rooms, and of whole layers, that speak of transformers."""
    files = sorted((ROOT / "tests").glob("*/**/test_*.py"))
    return [str(f) for f in files if re.search(r"\btransformers\b", f.read_text("utf-8"))]


def newest_transformers() -> None:
    """The transformers-facing tests once more, with the newest transformers beside the pinned."""
    files = transformers_tests()
    if not files:
        print("check: no test imports transformers yet")
        return
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    kept = [p for p in pins if setup_env.normal(p.split("==")[0]) not in TRANSFORMERS_STACK]
    NEWEST.mkdir(parents=True, exist_ok=True)
    constraints = NEWEST.with_suffix(".txt")
    constraints.write_text("\n".join(kept) + "\n")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--upgrade", "--retries", "1"]
    target = ["--target", str(NEWEST), "-c", str(constraints), "transformers"]
    if subprocess.run([*pip, *target], cwd=ROOT).returncode:
        if not setup_env.read_stamp().get("reuse"):
            sys.exit("check: could not download the newest transformers; check the network")
        print("check: LEFT OUT, the newest transformers is not downloadable")
        return
    path = os.pathsep.join([str(NEWEST), str(ROOT / "src")])
    pytest(*files, timeout=900, env={"PYTHONPATH": path})


def docs() -> None:
    """The documentation, built strictly into site/."""
    if available("mkdocs", "material", "mkdocstrings"):
        run(*DOCS, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})


STEPS: dict[str, Callable[[], None]] = {
    "lint": lint,
    "types": types,
    "test": test,
    "test-all": test_all,
    "newest-transformers": newest_transformers,
    "docs": docs,
}


def main(names: list[str]) -> int:
    """Run the named steps in order; the first that fails ends the run with its exit code."""
    unknown = [name for name in names if name not in STEPS]
    if unknown or not names:
        print(f"check: expected some of {', '.join(STEPS)}, got {names}", file=sys.stderr)
        return 2
    for name in names:
        STEPS[name]()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
