"""What binds a cell of suite `layer`: its time over the floor as a product of counted factors.

The hardware counters of suite `launches` split the time of a cell, and that of its dense twin, into
numbers that multiply to it. Where the floor is the twin's time (`products`), with the products'
flops at the tensor pipes' peak as the first number of both:

- `rows`: flops that the tensor pipes did over flops that were wanted; tiles that are not full.
- `tail`: one over the share of the launch in which the average SM held a block; the last tiles.
- `waits`: SMs busy over tensor pipes busy; what a block waits for while it is there.
- `clock`: one over the SMs' clock in the products; the GPU lowers it near its power limit.
- `others`: all launches over those that hold the products; sorting, the map, the sum.
- `busy`: the time in the suite over the launches' sum here; the clock of a GPU that is kept busy,
  less what launches overlap.

Each is moesaic's over the twin's. Where reading is the floor (`memory`): `bytes` (DRAM bytes over
those that must move), `tail`, `rate` (4.5 TB/s over the rate while blocks are there), `others`,
`busy`. The factors multiply to time over floor, exactly, by their definitions. Many rows an expert
keep the tensor pipes busy where reading is the floor too, so their share is told beside them.

>>> binding_factors(Factors("memory", {"bytes": 1.0, "tail": 1.3, "rate": 1.1}))
('tail',)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log, prod

from ..cost import H200_READ_BYTES_PER_S
from .results import Line

TENSOR_FLOPS_PER_CYCLE = 4096
"""Dense bf16 flops of one Hopper SM in one cycle: 989 TFLOP/s over 132 SMs at 1.83 GHz."""
SMS = 132
PRODUCT_SHARE = 0.25
"""A launch of at least this share of the heaviest one's work holds one of the products."""
NAMES: Mapping[str, str] = {
    "rows": "tiles that are not full",
    "tail": "SMs without a block",
    "waits": "tensor pipes idle in a block",
    "clock": "a lower clock than the twin's",
    "bytes": "bytes read again",
    "rate": "DRAM slower than 4.5 TB/s while blocks are there",
    "others": "launches around the products",
    "busy": "slower in the suite than launch by launch",
}
NEAR = 0.6
"""A factor whose logarithm is at least this share of the largest one's binds beside it."""


@dataclass(frozen=True)
class Factors:
    """The numbers that multiply to a cell's time over its floor; what the floor is of; the share of
    the tensor pipes' peak in the products."""

    floor: str
    values: dict[str, float]
    tensor: float = 0.0

    @property
    def product(self) -> float:
        """Time over floor."""
        return prod(self.values.values())


@dataclass(frozen=True)
class Counted:
    """Sums over the launches of one call: of its products, and of all of them."""

    all_s: float
    products_s: float
    moved_bytes: float
    tensor_flops: float
    clock_hz: float
    sms_active: float
    tensor: float


def moved(line: Line) -> float:
    """DRAM bytes of a launch."""
    return float(line["dram_read_bytes"] + line["dram_written_bytes"])


def counted(launches: Sequence[Line], floor: str) -> Counted:
    """The sums of one cell's launches of one implementation.

    Its products are the launches with at least `PRODUCT_SHARE` of the heaviest one's tensor work,
    or, where reading is the floor, of its bytes: no tile needs tensor pipes for one token.

    Raises:
        ValueError: no launch did any such work.
    """
    work = [moved(x) if floor == "memory" else x["tensor"] * x["ms"] for x in launches]
    if max(work, default=0.0) <= 0:
        raise ValueError("no launch moved bytes" if floor == "memory" else "no tensor work")
    products = [x for x, w in zip(launches, work, strict=True) if w >= PRODUCT_SHARE * max(work)]
    seconds = sum(x["ms"] for x in products) / 1e3
    cycles = sum(x["ms"] * x["clock_ghz"] for x in products) * 1e6
    busy = sum(x["ms"] * x["clock_ghz"] * x["tensor"] for x in products) * 1e6
    return Counted(
        all_s=sum(x["ms"] for x in launches) / 1e3,
        products_s=seconds,
        moved_bytes=sum(map(moved, products)),
        tensor_flops=busy * SMS * TENSOR_FLOPS_PER_CYCLE,
        clock_hz=cycles / seconds,
        sms_active=sum(x["ms"] * x["sms_active"] for x in products) / 1e3 / seconds,
        tensor=busy / cycles,
    )


def work_factors(got: Counted, flops: float, seconds: float) -> dict[str, float]:
    """The factors of one implementation over its flops at the pipes' peak and one clock."""
    return {
        "rows": got.tensor_flops / flops,
        "tail": 1 / got.sms_active,
        "waits": got.sms_active / got.tensor,
        "clock": 1 / got.clock_hz,
        "others": got.all_s / got.products_s,
        "busy": seconds / got.all_s,
    }


def product_factors(cell: Line, ours: Counted, twin: Counted) -> Factors:
    """Where the twin is the floor: each factor of ours over the twin's."""
    flops = cell["tflops"] * cell["ms"] * 1e9
    mine = work_factors(ours, flops, cell["ms"] / 1e3)
    theirs = work_factors(twin, flops, cell["floor_ms"] / 1e3)
    return Factors("products", {name: mine[name] / theirs[name] for name in mine}, ours.tensor)


def memory_factors(cell: Line, ours: Counted) -> Factors:
    """Where reading is the floor: bytes, idle SMs, rate, launches beside, and the busy GPU."""
    least = cell["floor_ms"] / 1e3 * H200_READ_BYTES_PER_S
    rate = ours.moved_bytes / (ours.products_s * ours.sms_active)
    return Factors(
        "memory",
        {
            "bytes": ours.moved_bytes / least,
            "tail": 1 / ours.sms_active,
            "rate": H200_READ_BYTES_PER_S / rate,
            "others": ours.all_s / ours.products_s,
            "busy": cell["ms"] / 1e3 / ours.all_s,
        },
        ours.tensor,
    )


def binding_factors(factors: Factors) -> tuple[str, ...]:
    """The factors above one that matter most: the largest, and those near it."""
    logs = {name: log(value) for name, value in factors.values.items() if value > 1}
    top = max(logs.values(), default=0.0)
    near = [name for name, value in logs.items() if value >= NEAR * top]
    return tuple(sorted(near, key=lambda name: -logs[name]))


def told(factors: Factors) -> str:
    """The factors as text, the largest first: ``tail 1.30 × rate 1.10 × ..., tensor 12 %``."""
    order = sorted(factors.values.items(), key=lambda item: -item[1])
    text = " × ".join(f"{name} {value:.2f}" for name, value in order)
    return f"{text}; tensor {100 * factors.tensor:.0f} %"
