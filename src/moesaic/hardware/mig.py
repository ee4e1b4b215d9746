"""MIG: how a GPU could be partitioned, which instances there are, and a worker on each of them.

Everything is read through NVML; nothing is ever created, destroyed or switched. Where the
administrator has enabled MIG and made instances, `run_workers` starts one process per instance that
sees this instance alone; anywhere else it says precisely what is missing.

>>> MigInventory(mode="off", pending="off", profiles=(), instances=()).missing
'MIG is off: an administrator can enable it (nvidia-smi -mig 1) and create instances'
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from tempfile import TemporaryFile
from typing import Any, Literal

from .nvml import Gpu, NotAvailable

MIB = 2**20
Mode = Literal["on", "off", "unsupported"]


class MigUnavailable(RuntimeError):
    """There is no instance to use; the message says what is missing."""


@dataclass(frozen=True)
class MigProfile:
    """One geometry that the GPU offers: "1g.18gb", its SMs and memory, how many fit at once."""

    name: str
    sms: int
    memory_bytes: int
    most: int


@dataclass(frozen=True)
class MigInstance:
    """A part that exists: the name under which CUDA sees it, its SMs and memory."""

    uuid: str
    sms: int
    memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class MigInventory:
    """What NVML says of MIG on one GPU; `pending` is the mode after the next reset."""

    mode: Mode
    pending: Mode
    profiles: tuple[MigProfile, ...]
    instances: tuple[MigInstance, ...]

    @property
    def missing(self) -> str:
        """What is missing before work can run on instances; empty when nothing is."""
        if self.mode == "unsupported":
            return "this GPU has no MIG"
        if self.mode == "off" and self.pending == "on":
            return "MIG is enabled but not in force: an administrator must reset the GPU"
        if self.mode == "off":
            return (
                "MIG is off: an administrator can enable it (nvidia-smi -mig 1) "
                "and create instances"
            )
        if not self.instances:
            return (
                "MIG is on but there is no instance: an administrator can create some "
                "(nvidia-smi mig -cgi PROFILE -C)"
            )
        return ""


def read_mig(gpu: Gpu, lib: Any) -> MigInventory:
    """Mode, geometries and instances of a GPU.

    Args:
        gpu: of `nvml.open_gpu`. lib: the `pynvml` module, or a double.

    Raises:
        NotAvailable: NVML refuses for another reason than that the GPU has no MIG.
    """
    try:
        now, after = gpu.ask("nvmlDeviceGetMigMode")
    except NotAvailable:
        return MigInventory(mode="unsupported", pending="unsupported", profiles=(), instances=())
    profiles = [_profile(gpu, n) for n in range(lib.NVML_GPU_INSTANCE_PROFILE_COUNT)]
    return MigInventory(
        mode="on" if now else "off",
        pending="on" if after else "off",
        profiles=tuple(p for p in profiles if p is not None),
        instances=_instances(gpu, lib) if now else (),
    )


def _profile(gpu: Gpu, number: int) -> MigProfile | None:
    """One geometry, None where this GPU does not offer the number."""
    try:
        found = gpu.ask("nvmlDeviceGetGpuInstanceProfileInfo", number)
    except NotAvailable:
        return None
    name = getattr(found, "name", "") or f"{found.sliceCount}g"
    name = name.decode() if isinstance(name, bytes) else str(name)
    return MigProfile(
        name.removeprefix("MIG ").strip("\0 "),
        int(found.multiprocessorCount),
        int(found.memorySizeMB) * MIB,
        int(found.instanceCount),
    )


def _instances(gpu: Gpu, lib: Any) -> tuple[MigInstance, ...]:
    found = []
    for index in range(gpu.ask("nvmlDeviceGetMaxMigDeviceCount")):
        try:
            part = Gpu(lib, gpu.ask("nvmlDeviceGetMigDeviceHandleByIndex", index))
        except NotAvailable:  # numbers may have gaps
            continue
        attributes = part.ask("nvmlDeviceGetAttributes_v2")
        found.append(
            MigInstance(
                str(part.ask("nvmlDeviceGetUUID")),
                int(attributes.multiprocessorCount),
                int(attributes.memorySizeMB) * MIB,
            )
        )
    return tuple(found)


@dataclass(frozen=True)
class Worker:
    """How a worker ended: its instance, exit code (None: stopped at the limit), output."""

    uuid: str
    code: int | None
    output: str


def run_workers(
    inventory: MigInventory,
    command: Sequence[str],
    *,
    limit_s: float = 600.0,
    environment: Mapping[str, str] | None = None,
) -> tuple[Worker, ...]:
    """Run a command once per instance, all at the same time, each seeing its instance alone.

    A worker that fails or is stopped at `limit_s` does not end the others.

    Raises:
        MigUnavailable: there is no instance, and what is missing.
    """
    if inventory.missing:
        raise MigUnavailable(inventory.missing)
    base = dict(os.environ if environment is None else environment)
    with ExitStack() as files:
        running = []
        for instance in inventory.instances:
            # A file, not a pipe: one that nobody reads from would stop its worker when full.
            output = files.enter_context(TemporaryFile())
            process = subprocess.Popen(
                list(command),
                env=base | {"CUDA_VISIBLE_DEVICES": instance.uuid},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            running.append((instance.uuid, process, output))
        end = time.monotonic() + limit_s
        ended = []
        for uuid, process, output in running:
            code = _code_at(process, end)
            output.seek(0)
            ended.append(Worker(uuid, code, output.read().decode("utf-8", "replace")))
        return tuple(ended)


def _code_at(process: subprocess.Popen[bytes], end: float) -> int | None:
    """The exit code of a process, waited for until `end`; None where it had to be stopped."""
    try:
        return process.wait(timeout=max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return None
