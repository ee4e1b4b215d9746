"""Which tiles a layer runs with: measured tables where there are some, pure heuristics elsewhere.

`choose` is a function of the shape of the problem alone (never of the routing), so a captured graph
and an eager call agree, and none of its answers can change a bit of the output. The tables are the
shipped `configs/<device family>.json` and, over it, the user's (`tables`), read once a process; a
row is found by the shape of the layer and the measured token count nearest to that of the call by
ratio, and speaks for counts within a factor of REACH of its own (HOPPER_REACH of the Hopper path).

    T tokens · H hidden width · I intermediate width · E experts · K top-k

>>> qwen = Problem(1, 8, 128, 2048, 768, gated=True, layers=2, dtype="bfloat16", arch=90)
>>> choose(qwen).heights
(16,)
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from .hopper.fit import layer_problem
from .tables import NONE, Rows, Tables, over, read_table, user_path

CONFIGS = Path(__file__).parent / "configs"
REACH = 4
HOPPER_REACH = 1.5
"""A tile of the Hopper path is as tall as an expert's rows: twice the rows want another."""
FP32_BLOCK_K = 32
"""Terms that an fp32 product sums apart: near the root of common widths, where errors are least."""


class Problem(NamedTuple):
    """The shape of one call; `arch` is the compute capability (80, 90, ...), `family` its table."""

    tokens: int
    top_k: int
    num_experts: int
    hidden: int
    intermediate: int
    gated: bool
    layers: int
    dtype: str
    arch: int
    family: str = ""
    transposed: bool = False


class GemmConfig(NamedTuple):
    """How one grouped product is cut: a choice of speed only, never of bits.

    block_n counts output columns (a gated tile multiplies twice as many weight rows); tiles of at
    most `swap_up_to` rows put the weights on the M side of the tensor core; `group_m` row tiles
    share a sweep over the columns; `ctas_per_sm` is 0 for one program per tile.
    """

    block_n: int = 64
    block_k: int = 64
    num_warps: int = 4
    num_stages: int = 4
    group_m: int = 8
    swap_up_to: int = 0
    ctas_per_sm: int = 0


class Config(NamedTuple):
    """How one call runs: tile heights, the order of experts, one cut per product, and why.

    `fused` asks for the one-launch three-layer kernel.
    """

    heights: tuple[int, ...]
    up: GemmConfig
    down: GemmConfig
    mid: GemmConfig = GemmConfig()
    order: Literal["index", "large_first", "mixed"] = "index"
    fused: bool = False
    reason: str = ""


def cdiv(a: int, b: int) -> int:
    """The quotient rounded up; plain, because it is called at every launch.

    >>> cdiv(9, 4)
    3
    """
    return -(-a // b)


def rows_per_expert(problem: Problem) -> float:
    """Routed rows of an expert that got any, if the routing were uniform.

    >>> rows_per_expert(Problem(64, 8, 128, 8, 8, True, 2, "bfloat16", 90))
    4.0
    """
    slots = problem.tokens * problem.top_k
    return slots / max(1, min(slots, problem.num_experts))


def nearest_bucket(tokens: int, buckets: tuple[int, ...]) -> int:
    """The measured token count nearest to `tokens` by ratio, the larger at a tie.

    >>> [nearest_bucket(t, (1, 8, 128)) for t in (1, 2, 3, 40, 9000)]
    [1, 1, 8, 128, 128]
    """
    return min(buckets, key=lambda b: (max(b, tokens) / min(b, max(1, tokens)), -b))


def device_family(name: str) -> str:
    """The table that measurements of a device name go to: "NVIDIA H200 NVL" has "h200".

    >>> device_family("NVIDIA H200 NVL"), device_family("NVIDIA A100-SXM4-80GB"), device_family("")
    ('h200', 'a100', '')
    """
    words = name.lower().replace("-", " ").split()
    return next((w for w in words if w[0] in "abhglr" and w[1:].isdigit()), "")


def shape_key(problem: Problem) -> str:
    """The name of a layer's shape in a table.

    >>> shape_key(Problem(1, 8, 128, 2048, 768, True, 2, "bfloat16", 90))
    'E128_H2048_I768_K8_L2_gated_bfloat16'
    """
    p = problem
    kind = ("gated" if p.gated else "plain") + ("_transposed" if p.transposed else "")
    return f"E{p.num_experts}_H{p.hidden}_I{p.intermediate}_K{p.top_k}_L{p.layers}_{kind}_{p.dtype}"


def _config_from_json(row: dict[str, Any], reason: str) -> Config:
    gemms = {name: GemmConfig(**row[name]) for name in ("up", "mid", "down") if name in row}
    return Config(
        heights=tuple(row["heights"]),
        order=row.get("order", "index"),
        fused=row.get("fused", False),
        reason=reason,
        **gemms,
    )


def config_to_json(config: Config) -> dict[str, Any]:
    """The row of a table that reads back as `config` (its reason left out)."""
    row = config._asdict()
    del row["reason"]
    return row | {name: row[name]._asdict() for name in ("up", "mid", "down")}


@lru_cache(maxsize=8)
def load_table(family: str) -> Tables:
    """The measured rows of a device family: the user's over the shipped; none where there are none.

    Read once a process, so that one shape always gets one choice.
    """
    if not family:
        return NONE
    checks = {"shapes": _row_problem, "hopper": lambda _, row: layer_problem(row)}
    shipped, own = (
        NONE if path is None else read_table(path, family, device_family, checks)
        for path in (CONFIGS / f"{family}.json", user_path(family))
    )
    return Tables(over(shipped.shapes, own.shapes), over(shipped.hopper, own.hopper))


def _row_problem(shape: str, row: Any) -> str | None:
    """Why a row of the Triton path cannot run, or None; shared memory as of the largest device."""
    try:
        config = _config_from_json(row, "")
        cuts = {"up": config.up, "mid": config.mid, "down": config.down}
        numbers = {*config.heights, *(number for cut in cuts.values() for number in cut)}
    except (TypeError, KeyError, AttributeError) as error:
        return f"it is not a configuration ({error!r})"
    if not all(type(n) is int and 0 <= n <= 4096 for n in numbers):
        return f"sizes must be whole numbers in [0, 4096], got {row}"
    heights = list(config.heights)
    if not heights or heights != sorted({*heights} & {16, 32, 64, 128}):
        return f"heights must ascend in (16, 32, 64, 128), got {heights}"
    if config.order not in ("index", "large_first", "mixed") or type(config.fused) is not bool:
        return f"order must be index, large_first or mixed and fused a truth value, got {row}"
    itemsize = 4 if shape.endswith("float32") else 2
    for name, cut in cuts.items():
        gated = name == "up" and "_gated" in shape
        if problem := _cut_problem(cut, heights[-1], gated=gated, itemsize=itemsize):
            return f"{name}: {problem}"
    return None


def _cut_problem(cut: GemmConfig, height: int, *, gated: bool, itemsize: int) -> str | None:
    """Why a product cannot be cut so under tiles of `height` rows, or None."""
    blocks = (cut.block_n, cut.block_k)
    if any(n & (n - 1) for n in blocks) or min(blocks) < 16 or cut.num_warps not in (1, 2, 4, 8):
        return f"blocks must be powers of two from 16 on and warps 1, 2, 4 or 8, got {cut}"
    if cut.num_stages < 1 or cut.group_m < 1:
        return f"num_stages and group_m must be at least 1, got {cut}"
    used, limit = shared_bytes(cut, height, gated=gated, itemsize=itemsize), shared_limit(90)
    return f"{used} bytes of shared memory are needed, there are {limit}" if used > limit else None


def _row_for(rows: Rows, problem: Problem, reach: float) -> tuple[int, Any] | None:
    """The row that speaks for a call and the token count it was measured at."""
    found = rows.get(shape_key(problem))
    if not found:
        return None
    bucket = nearest_bucket(problem.tokens, tuple(sorted(map(int, found))))
    low, high = sorted((bucket, max(1, problem.tokens)))
    return (bucket, found[str(bucket)]) if high <= reach * low else None


def hopper_row(problem: Problem) -> dict[str, Any] | None:
    """The measured row of the Hopper path for a call, as in the table; None: nothing measured."""
    found = _row_for(load_table(problem.family).hopper, problem, HOPPER_REACH)
    return None if found is None else found[1]


@lru_cache(maxsize=4096)
def choose(problem: Problem) -> Config:
    """The configuration of a call: measured for its shape and bucket, or the heuristic's."""
    found = _row_for(load_table(problem.family).shapes, problem, REACH)
    if found is None:
        return heuristic(problem)
    return _config_from_json(found[1], f"measured on {problem.family} at {found[0]} tokens")


SHARED_KIB = {80: 163, 87: 163, 90: 227, 100: 227, 103: 227}


def shared_limit(arch: int) -> int:
    """Bytes of shared memory that one program may use on compute capability `arch`.

    >>> shared_limit(90), shared_limit(89)
    (232448, 101376)
    """
    return SHARED_KIB.get(arch, 99) * 1024


def shared_bytes(config: GemmConfig, height: int, *, gated: bool, itemsize: int) -> int:
    """Shared memory that the stages of a product's tiles take (the accumulator's not counted).

    >>> shared_bytes(GemmConfig(128, 64, 8, 3), 128, gated=True, itemsize=2)
    147456
    """
    columns = config.block_n * (2 if gated else 1)
    return config.num_stages * (height + columns) * config.block_k * itemsize


def _fit(config: GemmConfig, height: int, problem: Problem, *, gated: bool) -> GemmConfig:
    """`config` with as many stages, and at worst as short a block_k, as the device can hold."""
    itemsize = 4 if problem.dtype == "float32" else 2
    while shared_bytes(config, height, gated=gated, itemsize=itemsize) > shared_limit(problem.arch):
        if config.num_stages > 2:
            config = config._replace(num_stages=config.num_stages - 1)
        else:
            config = config._replace(block_k=config.block_k // 2)
    return config


def heuristic(problem: Problem) -> Config:
    """A configuration from the expected rows of an expert, with its reason."""
    config = _by_rows(problem, rows_per_expert(problem))
    height = config.heights[-1]
    return config._replace(
        up=_fit(config.up, height, problem, gated=problem.gated),
        mid=_fit(config.mid, height, problem, gated=False),
        down=_fit(config.down, height, problem, gated=False),
    )


def _by_rows(problem: Problem, rows: float) -> Config:
    if problem.dtype == "float32":
        return _float32(rows, problem.transposed)
    swap = 64 if problem.arch == 90 else 0
    if rows <= 24:
        # One token's few experts must still give every SM a column block.
        narrow = problem.tokens * problem.top_k * problem.intermediate < 132 * 64 * 2
        up = GemmConfig(32 if narrow else 64, 128, 4, 4, group_m=1, swap_up_to=swap)
        down = GemmConfig(64, 128, 4, 4, group_m=1, swap_up_to=swap)
        why = f"{rows:.0f} rows an expert: weights are streamed once, short tiles"
        return Config((16,) if rows <= 4 else (16, 64), up, down, down, reason=why)
    if rows <= 96:
        up = GemmConfig(64, 64, 4, 4, swap_up_to=swap)
        # On sm_100 the wider tile spills with Triton 3.8.
        down = GemmConfig(64 if problem.arch >= 100 else 128, 64, 4, 4, swap_up_to=swap)
        why = f"{rows:.0f} rows an expert: weights still dominate, tiles of 32 and 64 rows"
        return Config((32, 64), up, down, down, reason=why)
    if problem.arch == 90 and problem.transposed:
        # Ragged edges of transposed weights cost registers: the widest tile would spill.
        up, down = GemmConfig(64, 64, 8, 4), GemmConfig(128, 64, 8, 4)
    elif problem.arch == 90:
        up, down = GemmConfig(128, 64, 8, 3), GemmConfig(256, 64, 8, 3)
    else:
        up, down = GemmConfig(64, 32, 8, 4), GemmConfig(128, 32, 8, 4)
    why = f"{rows:.0f} rows an expert: tall tiles"
    return Config((128,), up if problem.gated else down, down, down, reason=why)


def _float32(rows: float, transposed: bool) -> Config:
    """fp32 has no tensor core without TF32: products are FMA and tiles stay small.

    Ragged edges of transposed weights cost registers: the wider tiles would spill.
    """
    height, warps = (16, 4) if rows <= 24 else (64, 8)
    columns = 32 if transposed else 64
    up = GemmConfig(columns // 2, FP32_BLOCK_K, warps, 3)
    down = GemmConfig(columns, FP32_BLOCK_K, warps, 3)
    return Config((height,), up, down, down, reason="fp32 without TF32: FMA tiles")


FUSED_ROWS = 16
FUSED_CHUNK = FP32_BLOCK_K


def pow2_width(width: int) -> int:
    """The power of two at or above `width`, at least 16: the least that a dot takes."""
    return max(16, 1 << (width - 1).bit_length())


def fused_stages(hidden: int, intermediate: int, itemsize: int, arch: int) -> int:
    """Pipeline stages of the fused three-layer expert; 0 where its tile does not fit on chip.

    It fits when H <= 512 and I <= 1024 in bf16 and fp16, H <= 256 and I <= 256 in fp32, rounded up
    to powers of two: beyond that the fp32 accumulators, 16 x I and 16 x H, and the operands beside
    them spill from 255 registers a thread. Shared memory must hold one chunk of both layers'
    weights and of the rows.

    >>> [fused_stages(512, i, 2, 90) for i in (512, 1024, 2048)], fused_stages(512, 1024, 2, 80)
    ([3, 3, 0], 2)
    >>> fused_stages(256, 256, 4, 90), fused_stages(512, 256, 4, 90), fused_stages(256, 512, 4, 90)
    (3, 0, 0)
    """
    h, i = pow2_width(hidden), pow2_width(intermediate)
    if h > (256 if itemsize == 4 else 512) or i > (256 if itemsize == 4 else 1024):
        return 0
    stage = (FUSED_CHUNK * (h + i) + FUSED_ROWS * h) * itemsize
    buffers = (shared_limit(arch) - 1152) // stage
    return min(buffers, 2) + 1 if buffers else 0
