"""`moesaic slices`: how this GPU can be shared, what that costs, and what the policies would do.

Tables go to stdout, progress to stderr; the last line of stdout is one compact JSON document.
Curves come from `--curves`, else from the last `--measure` on this machine, else from results of
this device in the working directory; without any, the command says how to get them.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..hardware.green import Cut, GreenDevice, GreenError, GreenUnavailable
from ..hardware.mig import MigInventory, read_mig
from ..hardware.nvml import NotAvailable, load_nvml, open_gpu
from ..runtime.plan import Curve, MachineSlices, Plan
from ..runtime.tenants import MARGIN
from .colocate import (
    machine_of,
    make_pair,
    measure_curves,
    prepare_split,
    prepare_whole,
    split_sizes,
)
from .colocation_settings import LENDING, MEASURED_MARGIN, SETTINGS, plans_of
from .colocation_targets import LOOPS
from .command import last_line, show
from .report import Sheet, short
from .results import device_name, device_slug, make_line, read_lines, stamp, write_atomic
from .suites.colocation import SUITE, curve_lines, curves_from

GIB = 2**30


@dataclass(frozen=True)
class Found:
    """What was found of one GPU; a reason in words where something cannot be had."""

    device: str
    total_sms: int | None
    memory_bytes: int | None
    cuts: dict[str, Cut]
    green: str
    mig: MigInventory | None
    mig_missing: str


def examine(device: torch.device) -> Found:
    """SMs, memory, green-context granularity and MIG of a device; never raises."""
    name, sms, memory = device_name(device), None, None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        sms, memory = properties.multi_processor_count, properties.total_memory
    cuts, green = _cuts(device)
    mig, why = None, ""
    try:
        mig = read_mig(open_gpu(device), load_nvml())
        why = mig.missing
    except NotAvailable as error:
        why = str(error)
    return Found(name, sms, memory, cuts, green, mig, why)


def _cuts(device: torch.device) -> tuple[dict[str, Cut], str]:
    """How the driver splits the SMs, with and without room for clusters, or why it cannot."""
    if device.type != "cuda":
        return {}, "green contexts need an NVIDIA GPU that torch can use"
    cuts, why = {}, ""
    for label, clusters, atom in (("for any kernel", True, 8), ("without clusters", False, 2)):
        try:
            with GreenDevice(device.index or 0, atom_sms=atom, clusters=clusters) as gpu:
                cuts[label] = gpu.cut
        except (GreenUnavailable, GreenError) as error:
            why = str(error)
    return cuts, why


def cache_path(slug: str) -> Path:
    """Where `--measure` keeps the curves of a device."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "moesaic" / f"slices-{slug}.jsonl"


def find_curves(slug: str, given: Path | None) -> tuple[dict[str, Curve], str]:
    """Curves and where they come from; nothing and the remedy where there are none.

    Raises:
        ResultsError: the file given cannot be read.
    """
    results = Path("benchmarks/results") / slug / f"{SUITE.name}.jsonl"
    for path in [given] if given else [cache_path(slug), results]:
        if given or path.exists():
            lines = read_lines(path)
            found = [(x["model"], x["tokens"]) for x in lines if x["clock"] == "curve"]
            for key in (*SETTINGS, *found[:1]):  # the suite's first setting that was measured
                if key in found:
                    curves = curves_from([x for x in lines if (x["model"], x["tokens"]) == key])
                    return curves, f"{path} ({key[0]}, {key[1]} tokens)"
    return {}, "not measured on this device: moesaic slices --measure"


def measure(device: torch.device, seed: int = 0) -> tuple[dict[str, Curve], str]:
    """Curves of the first setting of suite `colocation`, measured now and kept.

    Raises:
        RuntimeError: there is no GPU, or it cannot be split.
    """
    if device.type != "cuda":
        raise RuntimeError("--measure needs an NVIDIA GPU that torch can use")
    setting = next(iter(SETTINGS.values()))
    name = setting.name
    print(f"measuring {name} on {device_name(device)} ...", file=sys.stderr, flush=True)
    with torch.no_grad():
        pair = make_pair(setting.decode, setting.prefill, device, torch.bfloat16, seed)
        prepare_whole(pair)
        for size in split_sizes(pair):
            prepare_split(pair, size)
        curves = measure_curves(pair)
        pair.gpu.close()
    fixed = stamp(device) | {
        "suite": SUITE.name, "model": name, "tokens": setting.decode.tokens,
        "routing": "uniform", "dtype": "bfloat16",
    }  # fmt: skip
    path = cache_path(device_slug(device))
    lines = [json.dumps(make_line(line), allow_nan=False) for line in curve_lines(fixed, curves)]
    write_atomic(path, "\n".join(lines) + "\n")
    return curves, str(path)


def seen_by_planners(found: Found, curves: Mapping[str, Curve]) -> MachineSlices:
    """The GPU as planners see it; without one, as many SMs as the curves were measured on."""
    cut = next(iter(reversed(found.cuts.values())), None)
    if cut is None:
        most = max((curve.sms[-1] for curve in curves.values()), default=132)
        return MachineSlices(total_sms=most)
    return machine_of(cut)


def facts_sheet(found: Found) -> Sheet:
    """What the GPU is and how it can be cut."""
    memory = "-" if found.memory_bytes is None else f"{found.memory_bytes / GIB:.0f} GiB"
    rows = [["device", found.device], ["SMs", str(found.total_sms or "-")], ["memory", memory]]
    for label, cut in found.cuts.items():
        told = f"{cut.atoms} parts of {cut.atom_sms} SMs, {cut.rest_sms} SMs remain"
        rows.append([f"green contexts, {label}", told])
    if not found.cuts:
        rows.append(["green contexts", found.green])
    if found.mig is not None:
        rows.append(["MIG", f"{found.mig.mode}, {len(found.mig.instances)} instances"])
        rows += [
            [f"MIG {p.name}", f"{p.sms} SMs, {p.memory_bytes / GIB:.0f} GiB, {p.most} at once"]
            for p in found.mig.profiles
        ]
    if found.mig_missing:
        rows.append(["MIG", found.mig_missing])
    return Sheet(["what", "found"], rows)


def curves_sheet(curves: Mapping[str, Curve]) -> Sheet:
    """Slowdown over the whole GPU by SMs, a column for each kind of work."""
    sizes = sorted({sms for curve in curves.values() for sms in curve.sms})
    rows = [
        [str(n), *(short(c.slowdown(n)) if n in c.sms else "" for c in curves.values())]
        for n in sizes
    ]
    rows.append(["ms, whole GPU", *(short(c.ms[-1]) for c in curves.values())])
    return Sheet(["SMs", *curves], rows)


def plans_sheet(plans: Mapping[str, Plan]) -> Sheet:
    """What every policy would do, and why."""
    rows = []
    for name, plan in plans.items():
        sizes = ", ".join(f"{group} {sms}" for group, sms in plan.sizes.items())
        rows.append([name, sizes or "whole GPU", plan.reason])
    return Sheet(["policy", "SMs", "why"], rows)


def explain(curves: Mapping[str, Curve], machine: MachineSlices) -> dict[str, dict[str, Plan]]:
    """The plans of every policy for decode beside prefill, by loop; from curves of both at work
    where they were measured, else from curves measured alone."""
    plans = {}
    for loop in LOOPS:
        known = {
            f"{work}-{loop}": curves.get(f"{work}-{loop}") or curves[work]
            for work in ("decode", "prefill")
        }
        lending = {name: curve for name, curve in curves.items() if name.endswith(LENDING)}
        margin = MEASURED_MARGIN if f"decode-{loop}" in curves else MARGIN
        plans[loop] = plans_of(loop, known | lending, machine, margin=margin)
    return plans


def main(
    *,
    explain_plans: bool = False,
    measure_now: bool = False,
    given: Path | None = None,
    device: str | None = None,
) -> int:
    """The command; gives the exit code.

    Raises:
        RuntimeError: `measure_now` without a GPU that can be split.
        ResultsError: the curves given cannot be read.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    found = examine(place)
    show(facts_sheet(found), "Slices of this GPU")
    curves, source = measure(place) if measure_now else find_curves(device_slug(place), given)
    if curves:
        show(curves_sheet(curves), f"Slowdown by SMs, curves of {source}")
    else:
        print(f"Time over SMs: {source}")
    plans: dict[str, dict[str, Plan]] = {}
    if explain_plans and {"decode", "prefill"} <= set(curves):
        plans = explain(curves, seen_by_planners(found, curves))
        for loop, some in plans.items():
            slo = LOOPS[loop][0]
            show(plans_sheet(some), f"Decode beside prefill, {loop} loop, promise {slo} x alone")
    elif explain_plans:
        print(f"no plans without curves of decode and prefill; {source}")
    last_line(_document(found, curves, source, plans))
    return 0


def _document(
    found: Found,
    curves: Mapping[str, Curve],
    source: str,
    plans: Mapping[str, Mapping[str, Plan]],
) -> dict[str, Any]:
    told: dict[str, Sequence[Any]] = {
        loop: [
            {"policy": name, "sms": plan.sizes, "why": plan.reason} for name, plan in some.items()
        ]
        for loop, some in plans.items()
    }
    return {
        **asdict(found),
        "curves": {work: asdict(curve) for work, curve in curves.items()},
        "curves_from": source,
        "plans": told,
    }
