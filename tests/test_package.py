"""What a user gets: a wheel that works alone, versions that agree, documents that are true."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import check
import pytest

import moesaic

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
README = (ROOT / "README.md").read_text("utf-8")


def names_in(lines: list[str]) -> set[str]:
    """The distribution names of requirement lines."""
    return {re.split(r"[^A-Za-z0-9._-]", line, maxsplit=1)[0] for line in lines}


def first_version(text: str) -> str | None:
    """The first version heading of a changelog."""
    match = re.search(r"^## (\d+\.\d+\.\d+)", text, re.MULTILINE)
    return match.group(1) if match else None


def local_links(text: str) -> list[str]:
    """The files that a Markdown text links to or shows."""
    links = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)|<img [^>]*src=\"([^\"]+)\"", text)
    return [a or b for a, b in links if not (a or b).startswith("http")]


def test_versions_agree() -> None:
    citation = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert citation is not None and citation.group(1) == moesaic.__version__
    assert first_version((ROOT / "CHANGELOG.md").read_text()) == moesaic.__version__
    assert first_version("# Changes\n\n## 9.1.2 (soon)\n") == "9.1.2"


def test_readme_is_short_and_its_links_exist() -> None:
    assert len(README.split()) <= 700
    assert local_links('see [a](b.md#c) <img alt="" src="d.png"> [e](http://f)') == [
        "b.md",
        "d.png",
    ]
    assert [link for link in local_links(README) if not (ROOT / link).exists()] == []


def test_every_dependency_has_its_reason() -> None:
    page = (ROOT / "docs" / "dependencies.md").read_text("utf-8")
    explained = set(re.findall(r"^\| `([^`]+)`", page, re.MULTILINE))
    extras = PYPROJECT["project"]["optional-dependencies"].values()
    lines = [*PYPROJECT["project"]["dependencies"], *(line for extra in extras for line in extra)]
    assert explained == names_in(lines)
    assert names_in(["triton>=3.6; x == 'y'", "mkdocstrings[python]"]) == {"triton", "mkdocstrings"}


@pytest.mark.parametrize(("text", "passes"), [("# Fine", True), ("[gone](gone.md)", False)])
def test_the_documentation_build_fails_on_a_broken_link(
    tmp_path: Path, text: str, passes: bool
) -> None:
    pytest.importorskip("material")
    pages = tmp_path / "docs"
    pages.mkdir()
    (pages / "index.md").write_text(text)
    settings = (ROOT / "mkdocs.yml").read_text().split("plugins:")[0]
    (tmp_path / "mkdocs.yml").write_text(settings)
    command = [sys.executable, "-m", *check.DOCS]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode == 0) == passes, result.stderr


def test_ci_runs_exactly_the_tests_and_the_documentation() -> None:
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    assert [line for line in script if re.match(r"(make|python|pip)\b", line)] == [
        "make test",
        "make docs",
    ]
    assert "set -euo pipefail" in script and os.access(ROOT / ".ci" / "run", os.X_OK)


def test_without_triton_and_transformers_everything_imports_and_the_cpu_computes() -> None:
    program = """
import sys
sys.modules["triton"] = sys.modules["transformers"] = None
import pkgutil, importlib, torch, moesaic
from moesaic import ExpertSpec, ExpertWeights, RouterSpec
skip = ("moesaic.kernels.", "moesaic.__main__")
needs_extra = (
    "moesaic.integrations.", "moesaic.models.pretrained",
    "moesaic.run.pretrained", "moesaic.run.generate", "moesaic.run.profiling",
)
for module in pkgutil.walk_packages(moesaic.__path__, "moesaic."):
    if not module.name.startswith(skip):
        try:
            importlib.import_module(module.name)
        except ImportError as error:
            assert module.name.startswith(needs_extra), (module.name, error)
            assert "pip install 'moesaic[" in str(error), (module.name, error)
spec = ExpertSpec(num_experts=4, hidden_size=8, intermediate_size=16)
weights = ExpertWeights(up=torch.randn(4, 32, 8), down=torch.randn(4, 8, 16))
routing = moesaic.route(torch.randn(3, 4), RouterSpec(num_experts=4, top_k=2))
out = moesaic.moe(torch.randn(3, 8), routing.topk_ids_TK, routing.topk_weights_TK, weights, spec)
assert out.shape == (3, 8) and bool(out.isfinite().all())
assert not [name for name in sys.modules if name.split(".")[0] == "triton" and sys.modules[name]]
print("done")
"""
    env = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    env.pop("TRITON_INTERPRET", None)
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=env
    )
    assert result.stdout.strip().endswith("done"), result.stderr


def run(*command: str | Path, cwd: Path) -> str:
    """The output of a command that must succeed, with no path or environment of this process."""
    foreign = ("PYTHONPATH", "VIRTUAL_ENV", "TRITON_INTERPRET", "PYTEST_CURRENT_TEST")
    env = {name: value for name, value in os.environ.items() if name not in foreign}
    result = subprocess.run(map(str, command), cwd=cwd, env=env, capture_output=True, text=True)
    assert result.returncode == 0, f"{command}: {result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_wheel_runs_the_main_job_in_an_empty_environment(tmp_path: Path) -> None:
    stamp = ROOT / ".venv" / "moesaic-setup.json"
    if stamp.exists() and json.loads(stamp.read_text())["reuse"]:
        pytest.skip(
            "this environment reuses the interpreter's packages; an empty one needs an index"
        )
    # The wheel is built from the source distribution, so that one is tried as well.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path, ROOT, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    constraints = ROOT / "constraints.txt"
    run(python, "-m", "pip", "install", "-q", "-c", constraints, wheel, cwd=tmp_path)
    command = tmp_path / "venv" / "bin" / "moesaic"
    assert run(command, "--version", cwd=tmp_path) == f"moesaic {moesaic.__version__}\n"
    where = run(python, "-c", "import moesaic; print(moesaic.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(tmp_path / "venv")
    told = json.loads(run(command, "run", "--bytes", "20000", cwd=tmp_path).splitlines()[-1])
    assert (told["status"], told["ok"], told["bytes"]) == ("complete", True, 20000)
    assert (tmp_path / told["report"] / "report.html").is_file()
