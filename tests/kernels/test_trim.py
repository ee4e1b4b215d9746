"""Tiles trimmed to their rows: the bits of others, gathered or sorted, and the PTX they rest on."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from moesaic.kernels.batching import batch_rows
from moesaic.kernels.gather import gather_rows
from moesaic.kernels.hopper import trim, wgmma
from moesaic.kernels.hopper.experts import LayerConfig, experts_hopper
from moesaic.kernels.hopper.fit import tile_problem
from moesaic.kernels.hopper.launch import HopperConfig, grouped_mm_hopper

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
needs_hopper = pytest.mark.skipif(not HOPPER, reason="needs an sm_90 GPU")
TILES = [
    HopperConfig("trim", 128, 256, 4),
    HopperConfig("trim", 160, 256, 4),
    HopperConfig("trim", 144, 256, 4),
    HopperConfig("trim", 160, 256, 2, group_m=1),
]
OTHER = HopperConfig("tall", 256, 128, 4)


def draw(
    tokens: int, rows: str = "even", *, gated: bool = True, dtype: torch.dtype = torch.bfloat16
) -> dict[str, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(tokens)
    experts, top_k, hidden, inner = 24, 4, 448, 320

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=generator).to(dtype)

    scores = torch.rand(tokens, experts, device="cuda", generator=generator)
    if rows == "skewed":
        scores += torch.arange(experts, device="cuda") * 0.04
    ids_TK = scores.topk(top_k, dim=1).indices.int()
    if rows == "worst":
        ids_TK[:] = torch.tensor([3, 23, 0, 9], device="cuda")
    elif rows == "nobody":
        ids_TK[::3, 1] = experts
    return {
        "hidden": normal(tokens, hidden),
        "topk_ids": ids_TK,
        "topk_weights": torch.rand(tokens, top_k, device="cuda", generator=generator),
        "up": normal(experts, 2 * inner if gated else inner, hidden) * hidden**-0.5,
        "down": normal(experts, hidden, inner) * inner**-0.5,
    }


def up_of(case: dict[str, torch.Tensor], tile: HopperConfig, *, gather: bool, **how: Any) -> Any:
    sort, tasks = batch_rows(case["topk_ids"], 24, heights=(tile.bm,))
    rows = case["hidden"] if gather else gather_rows(case["hidden"], sort.order_S, 4)
    act_SI = torch.full((sort.order_S.numel(), 320), torch.nan, device="cuda").to(rows)
    order = sort.order_S if gather else None
    how = {"num_sms": 132, "ticket": 0, "gated": True, "activation": "silu"} | how
    grouped_mm_hopper(
        rows, case["up"], tasks, act_SI, config=tile, order_S=order, top_k=4, **how
    )  # fmt: skip
    assert tasks.tickets_2.tolist() == [0, 0]
    return act_SI[: int((case["topk_ids"] < 24).sum())]


@pytest.mark.parametrize("rows", [16, 136, 192])
def test_a_product_names_the_registers_of_its_rows(rows: int) -> None:
    text = wgmma.product_text(rows, 3, "bf16")
    found = re.findall(rf"m64n{rows}k16\.f32\.bf16\.bf16\n\{{([^}}]*)\}}, a, b", text)
    low = [f"${i}" for i in range(rows // 2)]
    high = [f"${96 + i}" for i in range(rows // 2)]
    assert [part.split(", ") for part in found] == [low, high] * 4
    # Steps of 32 bytes through 64 numbers; the upper weight rows lie 8 KiB further: in sixteens.
    assert [int(n) for n in re.findall(r"add\.u32 u, \$416, (\d+);", text)] == [0, 2, 4, 6]
    weights = [2 * k + at for k in range(4) for at in (0, 512)]
    assert [int(n) for n in re.findall(r"add\.u32 u, \$384, (\d+);", text)] == weights
    constraints = wgmma.tied(3).split(",")
    assert constraints[:192] == ["=f"] * 192 and constraints[384:] == ["r"] * 64
    assert constraints[192:384] == [str(i) for i in range(192)]


def test_heights_and_what_fits() -> None:
    assert trim.heights(160) == tuple(range(16, 161, 16))
    assert [trim.staged(*size) for size in ((128, 4), (160, 4), (192, 3))] == [4, 2, 4]
    for tile in TILES:
        assert tile_problem(tile._asdict()) is None
    assert "bytes of shared memory" in str(tile_problem(TILES[2]._replace(stages=5)._asdict()))
    assert "bm in" in str(tile_problem(TILES[2]._replace(bm=208)._asdict()))


def test_there_is_no_bias() -> None:
    empty = torch.empty(1, 64, 64)
    with pytest.raises(ValueError, match="trim tiles have no bias"):
        grouped_mm_hopper(empty[0], empty, None, empty[0], config=TILES[0], num_sms=1, bias=empty)  # type: ignore[arg-type]


@needs_hopper
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_layers_have_the_bits_of_other_tiles(tile: HopperConfig, poisoned_empty: None) -> None:
    config = LayerConfig(tile, tile)
    for tokens in (2, 90, 700, 3000):
        for rows in ("even", "skewed", "worst", "nobody"):
            case = draw(tokens, rows)
            first = experts_hopper(**case, config=LayerConfig(OTHER, OTHER))
            assert torch.equal(first, experts_hopper(**case, config=config)), (tokens, rows)
    for budget in (1, 7, 66):
        large = config._replace(order="large_first")
        assert torch.equal(first, experts_hopper(**case, config=large, num_sms=budget)), budget
    wrong = experts_hopper(**case | {"up": case["up"].roll(1, 0)}, config=config)
    assert not torch.equal(first, wrong)


@needs_hopper
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_every_height_has_the_bits_of_other_tiles(tile: HopperConfig) -> None:
    for height in range(1, 200, 7):
        case = draw(height, "worst")
        wanted = up_of(case, HopperConfig("prefill", 128, 256, 4), gather=True)
        for gather in (True, False):
            assert torch.equal(wanted, up_of(case, tile, gather=gather)), (height, gather)


@needs_hopper
@pytest.mark.parametrize(
    "arithmetic",
    [
        {"limit": 0.4, "alpha": 1.702, "up_offset": 1.0},
        {"activation": "relu2", "gated": False},
        {"activation": "gelu"},
    ],
    ids=str,
)
def test_every_activation(arithmetic: dict[str, Any]) -> None:
    case = draw(400, gated=arithmetic.get("gated", True))
    first = experts_hopper(**case, **arithmetic, config=LayerConfig(OTHER, OTHER))
    config = LayerConfig(TILES[1], TILES[1])
    assert torch.equal(first, experts_hopper(**case, **arithmetic, config=config))


@needs_hopper
def test_half_precision_and_graphs() -> None:
    case = draw(500, dtype=torch.float16)
    first = experts_hopper(**case, config=LayerConfig(OTHER, OTHER))
    config = LayerConfig(TILES[1], TILES[1])
    assert torch.equal(first, experts_hopper(**case, config=config))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            out = experts_hopper(**case, config=config)
    for _ in range(3):
        out.zero_()
        graph.replay()
        assert torch.equal(first, out)
