"""Each finding says the truth of a machine that has it, lacks it, or has it broken."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import sys
import types
from collections.abc import Callable

import pytest
import torch

from moesaic.hardware import doctor

Versions = Callable[[dict[str, str]], None]


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> Versions:
    """Make the machine have exactly these distributions."""

    def install(found: dict[str, str]) -> None:
        monkeypatch.setattr(doctor, "_version", found.get)
        real = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *a: real(name, *a) if name in found else None
        )

    return install


@pytest.mark.parametrize(
    ("found", "status"),
    [(None, "missing"), ("3.5.1", "missing"), ("3.6.0", "ok"), ("3.8.0", "ok"), ("3.9.0", "note")],
)
def test_triton(
    versions: Versions, monkeypatch: pytest.MonkeyPatch, found: str | None, status: str
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    versions({"triton": found} if found else {})
    assert doctor.triton().status == status


def test_triton_is_not_asked_for_where_it_does_not_exist(
    versions: Versions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    versions({})
    assert doctor.triton().status == "note"


def test_interpreter_limit(versions: Versions) -> None:
    versions({"numpy": "2.3.5"})
    assert doctor.interpreter().status == "ok"
    versions({"numpy": "2.4.0"})
    assert doctor.interpreter().status == "note"


def test_transformers(versions: Versions) -> None:
    for version, status in (("5.17.0", "ok"), ("5.23.0", "ok"), ("4.57.1", "note")):
        versions({"transformers": version})
        assert doctor.transformers().status == status
    versions({})
    assert doctor.transformers().status == "missing"
    assert doctor._version("no-such-distribution") is None


@pytest.mark.parametrize(
    ("version", "status"),
    [("2.10.0", "note"), ("2.11.0+cu130", "ok"), ("2.13.0+cpu", "ok"), ("2.14.1", "note")],
)
def test_torch(monkeypatch: pytest.MonkeyPatch, version: str, status: str) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    assert doctor.torch_build().status == status


@pytest.mark.parametrize(("capability", "status"), [((7, 5), "note"), ((9, 0), "ok")])
def test_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], status: str) -> None:
    memory = types.SimpleNamespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: memory)
    finding = doctor.gpu()
    assert finding.status == status
    assert finding.found == f"2 x Some GPU, sm_{capability[0]}{capability[1]}, 80 GiB"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert doctor.gpu().status == "note"


def fake_nvml(**functions: object) -> types.ModuleType:
    """A pynvml with a driver 580 and one GPU, but for what is given."""
    module = types.ModuleType("pynvml")
    usual: dict[str, object] = {
        "NVMLError": type("NVMLError", (Exception,), {}),
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlSystemGetDriverVersion": lambda: "580.65.06",
        "nvmlSystemGetCudaDriverVersion": lambda: 13010,
        "nvmlDeviceGetCount": lambda: 1,
    }
    module.__dict__.update(usual | functions)
    return module


def test_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    finding = doctor.nvml()
    assert (finding.status, finding.found) == ("ok", "driver 580.65.06, CUDA up to 13.1, 1 GPU(s)")

    broken = fake_nvml()

    def refuse() -> None:
        raise broken.NVMLError("Driver/library version mismatch")

    broken.__dict__["nvmlInit"] = refuse
    monkeypatch.setitem(sys.modules, "pynvml", broken)
    assert (doctor.nvml().status, "mismatch" in doctor.nvml().found) == ("note", True)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert doctor.nvml().status == "missing"


def test_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/gcc" if name == "gcc" else None)
    assert doctor.compiler() == doctor.Finding("C compiler", "ok", "/usr/bin/gcc")
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert doctor.compiler().status == "missing"


def test_this_machine() -> None:
    findings = {finding.name: finding for finding in doctor.examine()}
    assert findings["torch"].found.startswith(torch.__version__)
    assert findings["GPU"].status in (("ok", "note") if torch.cuda.is_available() else ("note",))
    assert importlib.metadata.version("numpy") in findings["Triton interpreter"].found
