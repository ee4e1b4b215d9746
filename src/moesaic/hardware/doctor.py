"""What moesaic finds on this machine, what it lacks, and the remedy for each: `moesaic doctor`.

Every fact is one function that returns a `Finding` and never raises: a broken driver or a missing
package is a finding. "ok" is usable, "missing" is absent and has a remedy, "note" works with a
limit that the remedy names.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

TORCH_TESTED = ((2, 11), (2, 13))
TRITON_TESTED = ((3, 6), (3, 8))
INTERPRETER_NUMPY = (2, 4)

Status = Literal["ok", "missing", "note"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report; `remedy` is empty when there is nothing to do."""

    name: str
    status: Status
    found: str
    remedy: str = ""


def release(version: str) -> tuple[int, int]:
    """Major and minor number of a version string; `2.13.0+cpu` is (2, 13)."""
    parts = [int(p) if p.isdigit() else 0 for p in version.split("+")[0].split(".")[:2]]
    return (parts[0], parts[1] if len(parts) > 1 else 0)


def within(version: str, tested: tuple[tuple[int, int], tuple[int, int]]) -> bool:
    """Whether `version` lies in the tested range, both ends included."""
    return tested[0] <= release(version) <= tested[1]


def span(tested: tuple[tuple[int, int], tuple[int, int]]) -> str:
    """A tested range in words: `2.11 to 2.13`."""
    return " to ".join(".".join(map(str, end)) for end in tested)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def python() -> Finding:
    """The interpreter."""
    found = f"{platform.python_version()} ({sys.executable})"
    return Finding("Python", "ok", found)


def torch_build() -> Finding:
    """torch, its version and what it was built for."""
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    found = f"{torch.__version__} ({built})"
    if not within(torch.__version__, TORCH_TESTED):
        return Finding("torch", "note", found, f"tested with {span(TORCH_TESTED)}")
    return Finding("torch", "ok", found)


def triton() -> Finding:
    """Triton, which the GPU kernels are written in."""
    version = _version("triton")
    if version is None and importlib.util.find_spec("triton") is None:
        if sys.platform != "linux":
            return Finding("Triton", "note", "none", "not needed: only the GPU path uses it")
        return Finding("Triton", "missing", "none", "pip install 'triton>=3.6' (GPU path only)")
    if version is None:
        return Finding("Triton", "note", "of unknown version", f"tested: {span(TRITON_TESTED)}")
    if release(version) < TRITON_TESTED[0]:
        return Finding("Triton", "missing", version, "pip install 'triton>=3.6'")
    if not within(version, TRITON_TESTED):
        return Finding("Triton", "note", version, f"tested with {span(TRITON_TESTED)}")
    return Finding("Triton", "ok", version)


def interpreter() -> Finding:
    """Whether Triton kernels can be interpreted on the CPU, which only tests do."""
    version = _version("numpy") or "none"
    found = f"numpy {version}"
    if release(version) >= INTERPRETER_NUMPY:
        remedy = "kernel tests skip without a GPU: pip install 'numpy<2.4' to run them"
        return Finding("Triton interpreter", "note", found, remedy)
    return Finding("Triton interpreter", "ok", found)


def transformers() -> Finding:
    """transformers, needed for the drop-in and for its baselines."""
    version = _version("transformers")
    if version is None:
        return Finding("transformers", "missing", "none", "pip install 'moesaic[transformers]'")
    if release(version) < (5, 17):
        return Finding("transformers", "note", version, "tested with 5.17.0 and the newest")
    return Finding("transformers", "ok", version)


def gpu() -> Finding:
    """The GPUs that torch can use, and which kernels they run."""
    if not torch.cuda.is_available():
        remedy = "none needed: everything runs on the CPU"
        if torch.version.cuda is None:
            remedy += "; for an NVIDIA GPU install a CUDA build of torch"
        return Finding("GPU", "note", "none usable by torch", remedy)
    count = torch.cuda.device_count()
    major, minor = torch.cuda.get_device_capability(0)
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    found = f"{count} x {torch.cuda.get_device_name(0)}, sm_{major}{minor}, {memory:.0f} GiB"
    if (major, minor) < (8, 0):
        return Finding("GPU", "note", found, "kernels need sm_80 or newer; use impl='reference'")
    return Finding("GPU", "ok", found)


def nvml() -> Finding:
    """NVML, which tells driver, power and utilisation."""
    try:
        import pynvml
    except ImportError:
        return Finding("NVML", "missing", "none", "pip install nvidia-ml-py")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return Finding("NVML", "note", f"not usable: {error}", "needs an NVIDIA driver")
    try:
        driver = pynvml.nvmlSystemGetDriverVersion()
        cuda = int(pynvml.nvmlSystemGetCudaDriverVersion())
        count = pynvml.nvmlDeviceGetCount()
    except pynvml.NVMLError as error:
        return Finding("NVML", "note", f"not usable: {error}", "update the NVIDIA driver")
    finally:
        pynvml.nvmlShutdown()
    runs = f"{cuda // 1000}.{cuda % 1000 // 10}"
    return Finding("NVML", "ok", f"driver {driver}, CUDA up to {runs}, {count} GPU(s)")


def compiler() -> Finding:
    """A C compiler, with which Triton builds its launchers."""
    names = [os.environ.get("CC", ""), "cc", "gcc", "clang"]
    path = next((p for p in map(shutil.which, filter(None, names)) if p), None)
    if path is None:
        remedy = "GPU path only: install a C compiler (Debian, Ubuntu: apt-get install gcc)"
        return Finding("C compiler", "missing", "none", remedy)
    return Finding("C compiler", "ok", path)


def cpu() -> Finding:
    """The CPU as torch sees it."""
    capability = torch.backends.cpu.get_cpu_capability()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = f"{platform.machine()}, {usable} cores, {capability}, {torch.get_num_threads()} threads"
    return Finding("CPU", "ok", found)


FACTS: tuple[Callable[[], Finding], ...] = (
    python,
    torch_build,
    cpu,
    gpu,
    nvml,
    triton,
    compiler,
    interpreter,
    transformers,
)


def examine() -> list[Finding]:
    """Every finding, in the order of the report."""
    return [fact() for fact in FACTS]
