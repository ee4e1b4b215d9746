"""Every kernel compiles ahead of time for sm_80, sm_90 and sm_100 with no spill, on each Triton."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moesaic.kernels.aot import AotCase, all_cases, gluon_works, problems, typed_signature

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
TRITON_VERSIONS = ("3.6.0", "3.7.1", "3.8.0", "3.9.0")
CLEAN = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"


def _run(tmp_path: Path, *args: str, path: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The JSON that the compiler program wrote, from its own process with the interpreter off."""
    out = tmp_path / "reports.json"
    paths = [*path, ROOT / "src", ROOT / "tests" / "kernels"]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
        "TRITON_INTERPRET": "0",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "moesaic.kernels.aot", "--json", str(out), *args]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert out.exists(), done.stdout + done.stderr
    told: dict[str, Any] = json.loads(out.read_text())
    bad = bool(told["unlisted"]) or any(r["problems"] for r in told["reports"])
    assert done.returncode == int(bad), done.stdout + done.stderr
    return told


def _assert_clean(told: dict[str, Any], version: str | None = None) -> None:
    reports = [r for r in told["reports"] if not r["skipped"]]
    assert told["unlisted"] == []
    assert {r["arch"] for r in reports} == {80, 90, 100}
    assert all(r["registers"] > 0 for r in reports if not r["problems"])
    assert version is None or {r["triton"] for r in reports} == {version}
    assert {f"{r['name']} sm_{r['arch']}": r["problems"] for r in reports if r["problems"]} == {}


def test_every_kernel_compiles_without_spills(tmp_path: Path) -> None:
    _assert_clean(_run(tmp_path, "--quick"))


def test_faults_are_reported(tmp_path: Path) -> None:
    told = _run(tmp_path, "--module", "aot_samples", "--arch", "90")
    found = {r["name"]: " ".join(r["problems"]) for r in told["reports"]}
    assert found["good"] == found["good-wgmma"] == ""
    assert "bytes spilled" in found["spills"]
    assert "shared memory, limit 232448" in found["too-much-shared"]
    assert "no wgmma" in found["no-wgmma"]
    assert "'tcgen05' not in the PTX" in found["no-such-ptx"]
    assert "does not compile" in found["does-not-compile"]
    forgotten = [f"forgotten_kernel for sm_{arch}" for arch in (80, 90, 100)]
    unlisted = [*forgotten, "product_kernel for sm_80", "product_kernel for sm_100"]
    assert told["unlisted"] == [f"aot_samples.{kernel}" for kernel in unlisted]


def test_log_of_ptxas_is_read() -> None:
    case = AotCase(name="x", fn=None, signature={}, wgmma=True)
    serial = "warning : (C7515) Potential Performance Loss: wgmma.mma_async are serialized"
    assert problems(case, 90, CLEAN, "wgmma.mma_async", 0) == []
    assert problems(case, 80, f"{CLEAN}\n{serial}", "", 0) == []
    assert "serialised: C7515" in problems(case, 90, f"{CLEAN}\n{serial}", "wgmma.mma_async", 0)[0]
    assert problems(case, 80, "", "", 0) == ["ptxas left no log"]
    two = f"{CLEAN}\n8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads"
    assert problems(case, 80, two, "", 0) == ["16 bytes spilled"]
    stack = CLEAN.replace("0 bytes stack", "24 bytes stack")
    assert problems(case, 80, stack, "", 166913) == [
        "24 bytes of stack",
        "166913 bytes of shared memory, limit 166912",
    ]


def test_signature_names_every_parameter_once() -> None:
    class Fn:
        arg_names = ("x_ptr", "n", "BLOCK")

    good = {"signature": {"x_ptr": "*fp32", "n": "i32"}, "constexprs": {"BLOCK": 128}}
    assert typed_signature(AotCase(name="x", fn=Fn, **good)) == {
        "x_ptr": "*fp32",
        "n": "i32",
        "BLOCK": "constexpr",
    }
    for wrong in ({"BLOCK": 1, "n": 2}, {}, {"BLOCK": 1, "typo": 2}):
        with pytest.raises(ValueError, match="once; unknown"):
            typed_signature(AotCase(name="x", fn=Fn, **(good | {"constexprs": wrong})))


def _may_turn_constant(cases: list[AotCase]) -> set[str]:
    """Integers of Gluon kernels that Triton makes a constant where they are 1.

    Such a constant has no place in what partitions share. Multiples of 16 are never 1.
    """
    return {
        f"{case.fn.__name__}: {parameter.name}"
        for case in cases
        if case.gluon
        for parameter in case.fn.params
        if case.signature.get(parameter.name) in ("i32", "i64")
        if parameter.name not in case.aligned and not parameter.do_not_specialize
    }


@pytest.mark.skipif(not gluon_works(), reason="no Gluon kernels for this Triton")
def test_no_integer_of_a_gluon_kernel_turns_constant_where_it_is_one() -> None:
    cases = [case for case in all_cases().values() if case.gluon]
    assert len({case.fn.__name__ for case in cases}) >= 4
    assert _may_turn_constant(cases) == set()
    unaware = dataclasses.replace(cases[0], aligned=())
    assert _may_turn_constant([unaware]) != set()


@pytest.mark.slow
@pytest.mark.parametrize("version", TRITON_VERSIONS)
def test_every_kernel_compiles_on_each_triton(tmp_path: Path, version: str) -> None:
    _assert_clean(_run(tmp_path, path=(_installed(version),)), version)


def _installed(version: str) -> Path:
    """A folder with this Triton alone, downloaded once."""
    folder = Path.home() / ".cache" / "moesaic-triton" / version
    if not (folder / "triton" / "__init__.py").exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--target", str(folder), f"triton=={version}"], check=True)
    return folder
