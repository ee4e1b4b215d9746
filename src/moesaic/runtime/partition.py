"""From slices in the books to slices of the GPU: seats made of green contexts, prepared beforehand.

`open_partition` splits the GPU once, or says once why it cannot; `prepare` captures every group's
work for the whole GPU and for each split that plans may choose. After that `Control` moves work
among the graphs, and nothing is split, created or captured any more. Without green contexts only
the whole GPU is prepared: plans that slice are then refused by `Control`, counted, and the layer
goes on unsliced with the same bits.

    gpu = open_partition(0)
    machine = machine_of(gpu, torch.device("cuda"))
    prepare(works, gpu, machine, [{"hot": 8 * n, "cold": 120 - 8 * n} for n in range(1, 15)])
    control = Control(policy, curves, machine, works)
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

import torch

from ..hardware.green import GreenDevice, GreenError, GreenUnavailable, probe_launch
from .control import label_of
from .plan import MachineSlices
from .seats import Seat, SeatedWork

log = logging.getLogger("moesaic")
SLICE_SMS = 8


@cache
def _say_once(reason: str) -> None:
    log.warning("the GPU is not sliced: %s", reason)


def open_partition(
    device: int = 0,
    *,
    clusters: bool = True,
    driver: Any = None,
    sms_used: Callable[[Any], set[int]] | None = None,
) -> GreenDevice | None:
    """The GPU in slices of `SLICE_SMS` SMs, a Triton launch on one of them tried; None, and the
    reason once in the log, if it cannot.

    Args:
        clusters: as in `GreenDevice`; an H200 gives 15 slices with them and 16 without.
        driver: as in `GreenDevice`.
        sms_used: as in `probe_launch`; Moesaic's own kernel on a real driver.
    """
    gpu = None
    try:
        gpu = GreenDevice(device, atom_sms=SLICE_SMS, clusters=clusters, driver=driver)
        if sms_used is None and driver is None:
            from ..kernels.smid import sms_used
        if sms_used is not None:
            probe_launch(gpu.slice([0]), sms_used)
        return gpu
    except (GreenUnavailable, GreenError) as error:
        if gpu is not None:
            gpu.close()
        _say_once(str(error))
        return None


def machine_of(
    gpu: GreenDevice | None, device: torch.device, *, memory_bytes: int = 0, streams: int = 4
) -> MachineSlices:
    """What planners may know of the GPU: the slices that the driver really gives."""
    if gpu is None:
        total = (
            torch.cuda.get_device_properties(device).multi_processor_count
            if device.type == "cuda"
            else SLICE_SMS
        )
        return MachineSlices(total_sms=total, memory_bytes=memory_bytes, streams=streams)
    return MachineSlices(
        total_sms=gpu.cut.total_sms,
        granularity=gpu.cut.atom_sms,
        min_sms=gpu.cut.atom_sms,
        slices=gpu.cut.atoms,
        memory_bytes=memory_bytes,
        streams=streams,
    )


def prepare(
    works: Mapping[str, SeatedWork[Any]],
    gpu: GreenDevice | None,
    machine: MachineSlices,
    splits: Iterable[Mapping[str, int]],
) -> int:
    """Capture every work for the whole GPU and for every split; gives the number of captures.

    Args:
        splits: SMs by group, in the order in which plans give their shares; the groups lie side by
            side from the first slice on, as `SliceManager.apply` lays them.

    Raises:
        ValueError: a split names an unknown group, or does not fit.
        GreenError: the driver refuses a part.
    """
    made = sum(work.prepare(Seat(machine.total_sms)) for work in works.values())
    if gpu is None:
        return made
    for split in splits:
        if unknown := sorted(set(split) - set(works)):
            raise ValueError(f"splits must name {sorted(works)}, got {unknown}")
        for (name, sms), part in zip(split.items(), gpu.carve([*split.values()]), strict=True):
            made += works[name].prepare(Seat(sms, part.stream, label_of(part.atoms)))
    return made
