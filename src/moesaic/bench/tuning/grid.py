"""The candidates of one cell: cuts of every product for every tile height worth timing.

Products of a layer share one task map, so cuts are grouped by tile heights: the best pair of cuts
is found inside a group, then groups are compared. The block sizes that the expert-slicing paper
found best are always among the candidates, and their rank is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ...kernels.hopper.fit import COLUMNS, ONE_LAUNCH, ROWS, SHARED_LIMIT
from ...kernels.hopper.fit import shared_bytes as hopper_bytes
from ...kernels.tune import GemmConfig, Problem, rows_per_expert, shared_bytes, shared_limit
from ..workloads import Model

Cut = TypeVar("Cut")
Group = tuple[int, ...]
PAPER_MLP = (64, 64, 32)
PAPER_GEMM = (128, 128, 64)


@dataclass(frozen=True)
class Tile:
    """One Hopper tile: the fields of `HopperConfig`, without importing the kernels."""

    kernel: str
    bm: int
    bn: int
    stages: int
    bk: int = 64
    group_m: int = 8
    ctas_per_sm: int = 1


@dataclass(frozen=True)
class Space(Generic[Cut]):
    """The cuts of each product (part) by tile heights (group), and the paper's among them.

    `paper`: what the paper calls it, its part, and which (group, cut) have its block sizes.
    `both`: cuts of both products in one launch, timed as whole layers only.
    """

    impl: str
    cuts: dict[Group, dict[str, tuple[Cut, ...]]]
    paper: tuple[tuple[str, str, Callable[[Group, Cut], bool]], ...]
    both: tuple[Cut, ...] = ()

    @property
    def parts(self) -> frozenset[str]:
        """The products of a layer."""
        return frozenset(part for parts in self.cuts.values() for part in parts)

    def __iter__(self) -> Iterator[tuple[Group, str, Cut]]:
        for group, parts in self.cuts.items():
            for part, cuts in parts.items():
                for cut in cuts:
                    yield group, part, cut

    def __len__(self) -> int:
        return sum(1 for _ in self)


def problem_for(model: Model, tokens: int, dtype: str, arch: int, family: str) -> Problem:
    """The problem of a model's layer on a device."""
    spec = model.spec()
    return Problem(
        tokens, model.top_k, model.num_experts, model.hidden_size, model.intermediate_size,
        spec.gated, spec.layers, dtype, arch, family, spec.transposed,
    )  # fmt: skip


def heights_of(rows: float) -> tuple[Group, ...]:
    """Tile heights of the Triton path worth timing for an expected number of rows an expert."""
    if rows <= 4:
        return ((16,),)
    if rows <= 24:
        return ((16,), (16, 64), (32,))
    if rows <= 96:
        return ((32, 64), (64,), (128,))
    return ((64,), (128,)) if rows <= 512 else ((128,),)


TALL_CUTS = ((128, 64, 4, 3), (128, 64, 8, 4), (256, 64, 8, 3), (256, 64, 8, 4), (128, 128, 8, 3))
SHORT_CUTS = ((64, 256, 4, 3), (64, 128, 4, 4), (128, 64, 4, 4), (128, 128, 4, 3), (128, 128, 4, 4),
              (256, 64, 8, 4))  # fmt: skip


def _base_cuts(tallest: int) -> list[GemmConfig]:
    if tallest >= 128:
        return [GemmConfig(n, k, w, s, 8) for n, k, w, s in TALL_CUTS]
    found = [GemmConfig(n, k, w, s, 1, 64) for n, k, w, s in SHORT_CUTS]
    if tallest <= 16:
        found += [GemmConfig(n, k, 4, 4, 1, 0) for n, k in ((64, 128), (128, 128), (32, 256))]
    return found


def cuts_of(group: Group, problem: Problem, *, gated: bool) -> tuple[GemmConfig, ...]:
    """Cuts worth timing under these heights, one program a tile and resident ones, all that fit.

    Columns are halved for gated products.
    """
    found: list[GemmConfig] = []
    if group in heights_of(rows_per_expert(problem)):
        found = _base_cuts(group[-1])
        found = [cut._replace(block_n=cut.block_n // 2) for cut in found] if gated else found
    for bm, bn, bk in (PAPER_MLP, PAPER_GEMM):
        if group == (bm,):
            found.append(GemmConfig(bn, bk, 8 if bm == 128 else 4, 3))
    every = [
        one for cut in found
        for one in (cut, cut._replace(ctas_per_sm=1 if cut.num_warps == 8 else 2))
    ]  # fmt: skip
    limit = shared_limit(problem.arch)
    fit = [c for c in every if shared_bytes(c, group[-1], gated=gated, itemsize=2) <= limit]
    return tuple(dict.fromkeys(fit))


def triton_space(problem: Problem) -> Space[GemmConfig]:
    """The candidates of the Triton path."""
    parts = ("up", "mid", "down") if problem.layers == 3 else ("up", "down")
    groups = dict.fromkeys((*heights_of(rows_per_expert(problem)), (64,), (128,)))
    cuts = {
        group: {p: cuts_of(group, problem, gated=problem.gated and p == "up") for p in parts}
        for group in groups
    }
    paper = (
        ("fused MLP 64/64/32", "up", lambda g, c: (*g, c.block_n, c.block_k) == PAPER_MLP),
        ("expert GEMM 128/128/64", "down", lambda g, c: (*g, c.block_n, c.block_k) == PAPER_GEMM),
    )
    return Space("triton", cuts, paper)


def rows_of_tiles(rows: float) -> tuple[int, ...]:
    """Tile heights of the Hopper path worth timing for an expected number of rows an expert."""
    for most, heights in ((2, (16,)), (12, (16, 32)), (48, (32, 64)), (128, (64, 128, 160, 256))):
        if rows <= most:
            return heights
    return (128, 160, 192, 256, 320, 384)


def taller(tokens: int, rows: float) -> tuple[int, ...]:
    """The next height over those of the mean, where skewed routing gives some expert many rows.

    >>> taller(128, 8.0), taller(16, 1.0), taller(1024, 64.0)
    ((64,), (), ())
    """
    likely = rows_of_tiles(rows)
    return (2 * likely[-1],) if rows <= 48 and tokens >= 64 else ()


def deepest(kernel: str, bm: int, bn: int, ctas: int = 1) -> int:
    """The most stages that fit with `ctas` programs on an SM, at most 12."""
    return max(
        (s for s in range(2, 13) if ctas * hopper_bytes(kernel, bm, bn, s) <= SHARED_LIMIT),
        default=0,
    )


def tiles_of(bm: int, *, few_rows: bool) -> tuple[Tile, ...]:
    """Tiles worth timing of `bm` rows; small ones with one and two programs an SM."""
    found: list[Tile] = []
    if bm in (16, 32, 64, 128) and (few_rows or bm == 128):
        for bn in COLUMNS["decode"] if few_rows else (128,):
            for ctas in (1, 2):
                found.append(
                    Tile("decode", bm, bn, deepest("decode", bm, bn, ctas), ctas_per_sm=ctas)
                )
    if bm == 128:
        stages = deepest("prefill", 128, 256)
        found.append(Tile("prefill", 128, 256, stages))
    if bm >= 128 and bm in ROWS["tall"]:
        found.append(Tile("tall", bm, 128, deepest("tall", bm, 128)))
    if bm in ROWS["trim"]:
        found.append(Tile("trim", bm, 256, deepest("trim", bm, 256)))
    return tuple(dict.fromkeys(found))


def pairs_of(bm: int) -> tuple[Tile, ...]:
    """Tiles of both products in one launch, under tiles of `bm` rows; none where rows are many.

    Of taller tiles only wide ones with an SM to themselves and narrow ones two by two.
    """
    if bm > 64:
        return ()
    return tuple(
        Tile("pair", bm, bn, deepest("pair", bm, bn, ctas), ctas_per_sm=ctas)
        for bn in COLUMNS["pair"] for ctas in (1, 2) if bm == 16 or (bn > 64) == (ctas == 1)
    )  # fmt: skip


def flexes_of(tokens: int, rows: float) -> tuple[Tile, ...]:
    """Tiles as tall as their rows, both products in one launch: where loads may be very uneven.

    >>> [(t.bm, t.bn, t.stages) for t in flexes_of(1024, 64.0)]
    [(128, 128, 6), (128, 256, 4)]
    """
    if tokens < 32 or rows > 320:
        return ()
    found = [(64, 128), (64, 256)] if rows <= 16 else []
    found += [(128, 128)] if rows <= 64 else []
    found += [(128, 256)]
    return tuple(Tile("flex", bm, bn, deepest("flex", bm, bn)) for bm, bn in found)


def hopper_space(problem: Problem, heuristic: Any) -> Space[Tile]:
    """The candidates of the Hopper path, `heuristic` (a `LayerConfig`) among them.

    Of heights unlikely for so many rows only the heuristic's own tile and the paper's are timed.
    """
    rows = rows_per_expert(problem)
    above = taller(problem.tokens, rows)
    heights = dict.fromkeys((*rows_of_tiles(rows), *above, heuristic.up.bm, 128))
    cuts: dict[Group, dict[str, tuple[Tile, ...]]] = {}
    for bm in heights:
        likely = bm in rows_of_tiles(rows)
        tiles = tiles_of(bm, few_rows=rows <= 128 and (likely or bm in above))
        if bm in above:
            tiles = tuple(t for t in tiles if t.bn > 64 and t.ctas_per_sm == 1)
        elif not likely:
            tiles = tuple(t for t in tiles if (bm, t.bn, t.bk) == PAPER_GEMM)
        cuts[(bm,)] = {}
        for part in ("up", "down"):
            own = Tile(*getattr(heuristic, part))
            more = (own,) if own.bm == bm and own.kernel not in ONE_LAUNCH else ()
            cuts[(bm,)][part] = tuple(dict.fromkeys((*more, *tiles)))
        if not cuts[(bm,)]["up"]:
            del cuts[(bm,)]
    paper = (("expert GEMM 128/128/64", "down", lambda g, t: (*g, t.bn, t.bk) == PAPER_GEMM),)
    few = (*rows_of_tiles(rows), *above) if rows <= 128 else ()
    pairs = [pair for bm in few for pair in pairs_of(bm)]
    pairs += flexes_of(problem.tokens, rows)
    pairs += [Tile(*heuristic.up)] if heuristic.up.kernel in ONE_LAUNCH else []
    return Space("hopper", cuts, paper, tuple(dict.fromkeys(pairs)))
