"""MIG read through a double of NVML: off, pending, on without and with instances, a worker each."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moesaic.hardware.mig import MigUnavailable, read_mig, run_workers
from moesaic.hardware.nvml import Gpu, NotAvailable, load_nvml, open_gpu


class NVMLError(Exception):
    pass


# As an H200 answers: number -> slices, SMs, MiB, instances, name.
H200 = {
    0: (1, 16, 16384, 7, "MIG 1g.18gb"),
    1: (2, 32, 33280, 3, b"MIG 2g.35gb"),
    2: (3, 60, 71424, 2, "MIG 3g.71gb"),
    4: (7, 132, 143360, 1, ""),
}


def make_lib(mode: tuple[int, int] | None, parts: dict[int, tuple[str, int, int]]) -> Any:
    """A double; `parts`: uuid, SMs and MiB by index, of at most four."""

    def profile(handle: str, number: int) -> Any:
        if number not in H200:
            raise NVMLError("Not Supported")
        slices, sms, memory, most, name = H200[number]
        return SimpleNamespace(
            sliceCount=slices,
            multiprocessorCount=sms,
            memorySizeMB=memory,
            instanceCount=most,
            name=name,
        )

    def mig_mode(handle: str) -> tuple[int, int]:
        if mode is None:
            raise NVMLError("Not Supported")
        return mode

    def part(handle: str, index: int) -> int:
        if index not in parts:
            raise NVMLError("Not Found")
        return index

    def attributes(index: int) -> Any:
        return SimpleNamespace(multiprocessorCount=parts[index][1], memorySizeMB=parts[index][2])

    return SimpleNamespace(
        NVMLError=NVMLError,
        NVML_GPU_INSTANCE_PROFILE_COUNT=8,
        nvmlDeviceGetMigMode=mig_mode,
        nvmlDeviceGetGpuInstanceProfileInfo=profile,
        nvmlDeviceGetMaxMigDeviceCount=lambda handle: 4,
        nvmlDeviceGetMigDeviceHandleByIndex=part,
        nvmlDeviceGetUUID=lambda index: parts[index][0],
        nvmlDeviceGetAttributes_v2=attributes,
    )  # fmt: skip


def inventory(mode: tuple[int, int] | None, parts: dict[int, tuple[str, int, int]] | None = None):
    lib = make_lib(mode, parts or {})
    return read_mig(Gpu(lib, "gpu"), lib)


@pytest.mark.parametrize(
    ("mode", "missing"),
    [
        (None, "this GPU has no MIG"),
        ((0, 0), "MIG is off"),
        ((0, 1), "must reset the GPU"),
        ((1, 1), "there is no instance"),
    ],
)
def test_what_is_missing_is_said_precisely(mode: Any, missing: str) -> None:
    found = inventory(mode)
    assert missing in found.missing
    with pytest.raises(MigUnavailable, match=missing):
        run_workers(found, ["true"])


def test_geometries_are_read_while_mig_is_off() -> None:
    profiles = inventory((0, 0)).profiles
    assert [(p.name, p.sms, p.most) for p in profiles] == [
        ("1g.18gb", 16, 7), ("2g.35gb", 32, 3), ("3g.71gb", 60, 2), ("7g", 132, 1),
    ]  # fmt: skip
    assert profiles[0].memory_bytes == 16384 * 2**20


def test_every_instance_gets_a_worker_of_its_own_and_one_failure_stays_alone() -> None:
    found = inventory((1, 1), {0: ("MIG-a", 60, 71424), 2: ("MIG-b", 16, 16384)})
    assert [(i.uuid, i.sms) for i in found.instances] == [("MIG-a", 60), ("MIG-b", 16)]
    assert found.missing == ""
    script = (
        "import os, sys; me = os.environ['CUDA_VISIBLE_DEVICES']; print(me);"
        "sys.exit(3 if me == 'MIG-a' else 0)"
    )
    workers = run_workers(found, [sys.executable, "-c", script])
    assert [(w.uuid, w.code, w.output.strip()) for w in workers] == [
        ("MIG-a", 3, "MIG-a"), ("MIG-b", 0, "MIG-b"),
    ]  # fmt: skip


def test_a_worker_that_hangs_is_stopped() -> None:
    found = inventory((1, 1), {0: ("MIG-a", 60, 71424)})
    script = "import time; print('begun', flush=True); time.sleep(60)"
    (worker,) = run_workers(found, [sys.executable, "-c", script], limit_s=2.0)
    assert worker.code is None and worker.output == "begun\n"


def test_a_worker_that_hangs_takes_nothing_from_one_that_says_much() -> None:
    found = inventory((1, 1), {0: ("MIG-a", 60, 71424), 1: ("MIG-b", 16, 16384)})
    script = (
        "import os, time; a = os.environ['CUDA_VISIBLE_DEVICES'] == 'MIG-a';"
        "time.sleep(60) if a else print('x' * 300_000)"
    )
    first, second = run_workers(found, [sys.executable, "-c", script], limit_s=3.0)
    assert first.code is None and (second.code, len(second.output)) == (0, 300_001)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_real_read_out_is_whole() -> None:
    try:
        found = read_mig(open_gpu(torch.device("cuda", 0)), load_nvml())
    except NotAvailable as error:
        pytest.skip(str(error))
    assert found.mode in ("on", "off", "unsupported")
    if found.mode == "off" and "H200" in torch.cuda.get_device_name(0):
        assert {p.name: p.sms for p in found.profiles}["7g.141gb"] == 132
        assert "MIG is off" in found.missing
