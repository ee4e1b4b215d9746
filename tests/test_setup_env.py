"""What `make` installs: decided from facts, once."""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path

import pytest
import setup_env
from setup_env import Requirement, decide, parse_requirement, requirements_of

ROOT = Path(__file__).resolve().parent.parent

LINES = [
    "torch>=2.11",
    "triton>=3.6; sys_platform == 'linux'",
    "numpy<2.4",
    "transformers==5.17.0",
    "nvidia-ml-py>=12.560",
]
REQUIREMENTS = [parse_requirement(line) for line in LINES]
IMAGE = {
    "torch": "2.11.0+cu130",
    "triton": "3.6.0",
    "numpy": "2.5.1",
    "transformers": "5.20.0",
    "nvidia-ml-py": "13.580.65",
}


def test_a_requirement_is_read() -> None:
    assert REQUIREMENTS[1] == Requirement("triton", (3, 6), "linux", "triton>=3.6")
    assert parse_requirement("mkdocstrings[python]>=0.30").name == "mkdocstrings"
    assert parse_requirement("Huggingface_Hub==1.0").name == "huggingface-hub"
    assert setup_env.release("2.13.0+cpu") == (2, 13, 0) and setup_env.release("none") == ()
    with pytest.raises(setup_env.SetupError, match="cannot read"):
        parse_requirement("=1.0")


@pytest.mark.parametrize("torch", [None, "2.10.1", "1.13.1+cu117"])
def test_without_a_new_enough_torch_everything_is_pinned(torch: str | None) -> None:
    installed = {"numpy": "2.3.5"} | ({"torch": torch} if torch else {})
    plan = decide(installed, REQUIREMENTS, "linux")
    assert (plan.reuse, plan.install) == (False, ())


def test_an_image_that_has_everything_needs_no_network() -> None:
    plan = decide(IMAGE, REQUIREMENTS, "linux")
    assert (plan.reuse, plan.install) == (True, ())
    assert "2.11.0+cu130" in plan.why


def test_only_what_is_absent_or_too_old_is_asked_for() -> None:
    image = {k: v for k, v in IMAGE.items() if k != "numpy"} | {"nvidia-ml-py": "11.5"}
    assert decide(image, REQUIREMENTS, "linux").install == ("numpy<2.4", "nvidia-ml-py>=12.560")
    del image["triton"]
    assert "triton>=3.6" in decide(image, REQUIREMENTS, "linux").install
    assert "triton>=3.6" not in decide(image, REQUIREMENTS, "darwin").install


def test_every_requirement_of_the_project_is_pinned() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [parse_requirement(line) for line in lines if line[:1].isalnum()]
    wanted = {r.name for r in requirements_of(pyproject, setup_env.EXTRAS)}
    assert wanted - {pin.name for pin in pins} == set()
    assert all("==" in pin.text for pin in pins)


def test_a_matching_stamp_ends_the_setup(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(setup_env, "STAMP", tmp_path / "stamp.json")
    monkeypatch.setattr(setup_env, "VENV_PYTHON", Path(sys.executable))
    calls: list[str] = []

    def set_up() -> dict[str, object]:
        calls.append("set up")
        return {"key": setup_env.stamp_key(), "reuse": False, "missing": []}

    monkeypatch.setattr(setup_env, "set_up", set_up)
    monkeypatch.setattr(sys, "argv", ["setup_env.py"])
    assert [setup_env.main(), setup_env.main()] == [0, 0]
    assert calls == ["set up"]
    (tmp_path / "stamp.json").write_text(json.dumps({"key": "of another pyproject"}))
    assert setup_env.main() == 0 and len(calls) == 2
    (tmp_path / "stamp.json").write_text("truncated {")
    assert setup_env.main() == 0 and len(calls) == 3


def test_a_failed_setup_leaves_no_stamp(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail() -> dict[str, object]:
        raise setup_env.SetupError("no network")

    monkeypatch.setattr(setup_env, "STAMP", tmp_path / "stamp.json")
    monkeypatch.setattr(setup_env, "set_up", fail)
    monkeypatch.setattr(sys, "argv", ["setup_env.py"])
    assert setup_env.main() == 2
    assert not (tmp_path / "stamp.json").exists()
