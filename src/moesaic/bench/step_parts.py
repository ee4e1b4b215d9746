"""What the time of a whole step goes to: the launches of one replay, sorted by what they do.

A launch is charged with the time until the next one starts, so that a launch which starts early and
waits for the one before it on the device counts nothing twice. Names of launches say what they do:
attention's kernels, ours, products of cuBLAS and of Inductor. The product right before our choice
of experts is the router's (a router of few experts is one launch), the last product of the step is
the head's, and what is left over are norms, residuals, rotary embeddings, caches and the gaps
before them.

    parts_ms([Launch("nvjet_tst", 0.0, 4.0), Launch("route_kernel", 5.0, 2.0),
              Launch("pair_kernel", 7.5, 20.0), Launch("nvjet_tst", 28.0, 9.0)])
    # router 0.0075, experts 0.0205, head 0.009, the others 0
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

PARTS = ("attention", "products", "router", "experts", "head", "other")
REPLAYS = 3
_ATTENTION = re.compile(r"sdpa_|flash_|fmha")
_ROUTE = re.compile(r"route_kernel")
_ROUTER = re.compile(r"router?_kernel")
_OURS = re.compile(r"(?!triton_)[a-z_]+_kernel")
# Inductor's products of one row reduce over a transposed weight: "t" is among what they fuse.
_PRODUCT = re.compile(r"nvjet|gemm|gemv|splitK|cutlass|triton_red_.*_mm_(.*_)?(t_|route)")
_REDUCTION = re.compile(r"splitKreduce")


class Launch(NamedTuple):
    """A kernel, a copy or a fill of a replay: its name, its start and its length in us."""

    name: str
    start: float
    length: float


def replayed(replay: Callable[[], Any]) -> list[Launch]:
    """The launches of the last of a few replays, in order, as torch's profiler saw them."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(REPLAYS):
            replay()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(path))
        events = json.loads(path.read_text("utf-8"))["traceEvents"]
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    launches = sorted(
        (Launch(x["name"], x["ts"], x["dur"]) for x in events if x.get("cat") in kinds),
        key=lambda launch: launch.start,
    )
    return launches[len(launches) - len(launches) // REPLAYS :]


def _part(name: str) -> str:
    if _ROUTER.fullmatch(name):
        return "router"
    if _OURS.fullmatch(name):
        return "experts"
    if _ATTENTION.search(name):
        return "attention"
    return "products" if _PRODUCT.search(name) else "other"


def _before(parts: list[str], names: Sequence[str], end: int, becomes: str) -> None:
    """Rename the last product before `end`, with the launch that reduces its pieces if any."""
    at = next((i for i in reversed(range(end)) if parts[i] == "products"), None)
    if at is None:
        return
    parts[at] = becomes
    if _REDUCTION.search(names[at]) and at and parts[at - 1] == "products":
        parts[at - 1] = becomes


def parts_ms(launches: Sequence[Launch]) -> dict[str, float]:
    """Milliseconds of each of `PARTS` in a step."""
    names = [launch.name for launch in launches]
    parts = [_part(name) for name in names]
    for number, name in enumerate(names):
        if _ROUTE.fullmatch(name):
            _before(parts, names, number, "router")
    _before(parts, names, len(parts), "head")
    found = dict.fromkeys(PARTS, 0.0)
    for number, (launch, part) in enumerate(zip(launches, parts, strict=True)):
        last = number + 1 == len(launches)
        ends = launch.start + launch.length if last else launches[number + 1].start
        found[part] += (ends - launch.start) / 1e3
    return found
