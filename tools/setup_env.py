"""Prepare `.venv` for this checkout: `make` calls it before everything else; a second call is free.

Two ways, chosen by `decide` from what the interpreter already has:

* torch is there (2.11 or newer): a virtual environment that sees the interpreter's packages and
  the sources through a `.pth` file. Only distributions that are absent are asked of pip, and when
  pip cannot reach an index, what stays missing is named and the rest works.
* torch is not there: an ordinary virtual environment with everything that constraints.txt pins.

Only the standard library is used. The stamp in `.venv` holds a hash of pyproject.toml,
constraints.txt, this file and the interpreter: while it matches there is nothing to do.

    python3 tools/setup_env.py [--retry]      --retry asks pip again for what was missing
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "moesaic-setup.json"
EXTRAS = ("test", "dev", "docs")
MIN_TORCH = (2, 11)
BIN = "Scripts" if os.name == "nt" else "bin"
VENV_PYTHON = VENV / BIN / "python"


class SetupError(Exception):
    """The environment cannot be prepared; the message says what to do."""


@dataclass(frozen=True)
class Requirement:
    """One requirement line of pyproject.toml, as far as this project uses the grammar."""

    name: str
    minimum: tuple[int, ...]
    platform: str | None
    text: str


@dataclass(frozen=True)
class Plan:
    """What to do: `reuse` the interpreter's packages or not, and which to ask of pip."""

    reuse: bool
    install: tuple[str, ...]
    why: str


def normal(name: str) -> str:
    """The distribution name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: `2.13.0+cpu` is (2, 13, 0)."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def parse_requirement(text: str) -> Requirement:
    """A requirement such as `triton>=3.6; sys_platform == 'linux'`."""
    spec, _, marker = text.partition(";")
    name = re.match(r"\s*([A-Za-z0-9._-]+)", spec)
    if name is None:
        raise SetupError(f"pyproject.toml: cannot read the requirement {text!r}")
    minimum = re.search(r"(?:>=|==)\s*([0-9.]+)", spec)
    platform = re.search(r"sys_platform\s*==\s*['\"](\w+)['\"]", marker)
    return Requirement(
        normal(name.group(1)),
        release(minimum.group(1)) if minimum and ">=" in minimum.group() else (),
        platform.group(1) if platform else None,
        spec.strip(),
    )


def requirements_of(pyproject: Mapping[str, object], extras: Iterable[str]) -> list[Requirement]:
    """The requirements of the project and of these extras."""
    project = pyproject["project"]
    lines = [*project["dependencies"]]
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    return [parse_requirement(line) for line in lines]


def decide(
    installed: Mapping[str, str], requirements: Iterable[Requirement], platform: str
) -> Plan:
    """Whether the interpreter's packages serve, and what pip would have to add.

    An installed distribution is kept whatever upper bound or pin the requirement has: those say
    what the tests were run with, and an offline machine must work with what it has.
    """
    torch = installed.get("torch")
    if torch is None:
        return Plan(False, (), "the interpreter has no torch: installing the pinned packages")
    if release(torch) < MIN_TORCH:
        need = ".".join(map(str, MIN_TORCH))
        return Plan(
            False, (), f"torch {torch} is older than {need}: installing the pinned packages"
        )
    wanted = [r for r in requirements if r.platform in (None, platform)]
    absent = {
        r.name: r.text
        for r in wanted
        if r.name not in installed or release(installed[r.name]) < r.minimum
    }
    return Plan(True, tuple(absent.values()), f"torch {torch} is there: using it")


def installed_distributions() -> dict[str, str]:
    """Every distribution that this interpreter sees, with its version."""
    found: dict[str, str] = {}
    for dist in importlib.metadata.distributions():
        name = dist.metadata["Name"]
        if name:
            found.setdefault(normal(name), dist.version)
    return found


def stamp_key() -> str:
    """What the environment depends on, as one hash."""
    digest = hashlib.sha256(f"{sys.executable} {sys.version}".encode())
    for path in (ROOT / "pyproject.toml", ROOT / "constraints.txt", Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def read_stamp() -> dict[str, object]:
    """The stamp of the last setup, or an empty one."""
    try:
        stamp = json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return {}
    return stamp if VENV_PYTHON.exists() and isinstance(stamp, dict) else {}


def run(*args: str | Path) -> int:
    """Run a command, its output shown; the exit code."""
    print("+", " ".join(map(str, args)), flush=True)
    return subprocess.run([str(a) for a in args], cwd=ROOT).returncode


def make_venv(reuse: bool) -> None:
    """Create `.venv`, unless one of the same kind and Python is there."""
    wanted = f"include-system-site-packages = {str(reuse).lower()}"
    config = VENV / "pyvenv.cfg"
    if config.exists() and VENV_PYTHON.exists():
        version = subprocess.run(
            [VENV_PYTHON, "-c", "import sys; print(sys.version)"], capture_output=True, text=True
        )
        if wanted in config.read_text() and version.stdout.strip() == sys.version.strip():
            return
    # The interpreter's own pip is seen through the system's packages, so none is needed inside.
    options = ("--system-site-packages", "--without-pip") if reuse else ()
    if run(sys.executable, "-m", "venv", "--clear", *options, VENV):
        raise SetupError(
            "could not create .venv; install Python's venv module "
            "(Debian, Ubuntu: apt-get install python3-venv) and run make again"
        )


def link_sources() -> None:
    """Put the sources and the folders of the interpreter's packages on `.venv`'s path.

    A virtual environment sees those of its base interpreter by itself, but not those of another
    virtual environment, which may be what calls this.
    """
    folders = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    lines = [str(ROOT / "src"), *folders]
    command = [VENV_PYTHON, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    Path(site, "moesaic-src.pth").write_text("\n".join(lines) + "\n")
    script = VENV / BIN / "moesaic"
    script.write_text(f"#!{VENV_PYTHON}\nfrom moesaic.cli import main\n\nmain()\n")
    script.chmod(0o755)


def add_absent(plan: Plan, installed: Mapping[str, str]) -> list[str]:
    """Ask pip for what is absent, leaving what is there alone; what stays missing."""
    if not plan.install:
        return []
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    names = {line: parse_requirement(line).name for line in pinned if line[:1].isalnum()}
    keep = [line for line, name in names.items() if name not in installed]
    keep += [f"{name}=={version}" for name, version in installed.items() if name in names.values()]
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder, "constraints.txt")
        constraints.write_text("\n".join(keep) + "\n")
        pip = (VENV_PYTHON, "-m", "pip", "install", "--retries", "1", "--timeout", "15")
        if run(*pip, "-c", constraints, *plan.install) == 0:
            return []
    return [parse_requirement(text).name for text in plan.install]


def set_up() -> dict[str, object]:
    """Make `.venv` ready; the stamp to write."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    installed = installed_distributions()
    plan = decide(installed, requirements_of(pyproject, EXTRAS), sys.platform)
    print(f"setup: {plan.why}", flush=True)
    STAMP.unlink(missing_ok=True)
    make_venv(plan.reuse)
    missing: list[str] = []
    if plan.reuse:
        link_sources()
        missing = add_absent(plan, installed)
        if missing:
            print(
                f"setup: pip could not add {', '.join(missing)}; what needs them is left out and "
                "says so. Once an index is reachable: make setup",
                flush=True,
            )
    else:
        target = f".[{','.join(EXTRAS)}]"
        pip = (VENV_PYTHON, "-m", "pip", "install", "--disable-pip-version-check", "-q")
        if run(*pip, "-c", "constraints.txt", "-e", target):
            raise SetupError(
                "pip could not install the packages (see above); check the network, or use an "
                "interpreter that has torch >= 2.11: make PYTHON=/path/to/python3"
            )
    return {"key": stamp_key(), "reuse": plan.reuse, "missing": missing}


def leave_own_venv() -> None:
    """Start again with the base interpreter when `.venv` itself is the one that runs this."""
    if VENV.exists() and Path(sys.prefix).resolve() == VENV.resolve():
        base = sys._base_executable
        os.execv(base, [base, __file__, *sys.argv[1:]])


def main() -> int:
    """Set up when the stamp does not match; 0, or 2 with the remedy."""
    stamp = read_stamp()
    retry = "--retry" in sys.argv[1:] and bool(stamp.get("missing"))
    if stamp.get("key") == stamp_key() and not retry:
        return 0
    try:
        stamp = set_up()
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 2
    STAMP.write_text(json.dumps(stamp) + "\n")
    return 0


if __name__ == "__main__":
    leave_own_venv()
    sys.exit(main())
