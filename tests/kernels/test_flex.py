"""Tiles as tall as their rows: the bits of others, whatever the rows, the tile, budget or graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from moesaic.kernels.batching import batch_rows, batch_rows_ref, build_task_map_ref
from moesaic.kernels.hopper import flex
from moesaic.kernels.hopper.experts import LayerConfig, choose_layer, experts_hopper
from moesaic.kernels.hopper.fit import layer_problem, tile_problem
from moesaic.kernels.hopper.launch import HopperConfig

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
needs_hopper = pytest.mark.skipif(not HOPPER, reason="needs an sm_90 GPU")
APART = HopperConfig("decode", 16, 64, 8, ctas_per_sm=2)
TILES = [
    HopperConfig("flex", 64, 128, 8),
    HopperConfig("flex", 64, 256, 5),
    HopperConfig("flex", 128, 128, 6),
    HopperConfig("flex", 128, 256, 4),
    HopperConfig("flex", 128, 256, 2),
]
ARITHMETIC: dict[str, dict[str, Any]] = {
    "silu": {},
    "gpt-oss": {"limit": 0.4, "alpha": 1.702, "up_offset": 1},
    "relu2": {"gated": False, "activation": "relu2"},
}


def alike(tile: HopperConfig, order: str = "index") -> LayerConfig:
    return LayerConfig(tile, tile, order)


def draw(
    tokens: int, gated: bool = True, seed: int = 0, device: str = "cuda", rows: str = "even"
) -> dict[str, torch.Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    experts, top_k, hidden, inner = 24, 4, 448, 320

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, generator=generator).bfloat16()

    scores = torch.rand(tokens, experts, device=device, generator=generator)
    if rows == "skewed":
        scores += torch.arange(experts, device=device) * 0.04
    ids_TK = scores.topk(top_k, dim=1).indices.int()
    if rows == "worst":
        ids_TK[:] = torch.tensor([3, 23, 0, 9], device=device)
    elif rows == "nobody":
        ids_TK[::3, 1] = experts
    return {
        "hidden": normal(tokens, hidden),
        "topk_ids": ids_TK,
        "topk_weights": torch.rand(tokens, top_k, device=device, generator=generator),
        "up": normal(experts, 2 * inner if gated else inner, hidden) * hidden**-0.5,
        "down": normal(experts, hidden, inner) * inner**-0.5,
    }


def test_a_row_of_a_table_says_flex_twice_or_not_at_all() -> None:
    for tile in TILES:
        assert tile_problem(tile._asdict()) is None
        assert layer_problem({"up": tile._asdict(), "down": tile._asdict()}) is None
    up, other = TILES[3]._asdict(), HopperConfig("tall", 128, 128, 6)._asdict()
    for row in ({"up": up, "down": other}, {"up": other, "down": up}):
        assert "one launch" in str(layer_problem(row))
    assert "bm in (64, 128)" in str(tile_problem(up | {"bm": 96}))
    assert "shared memory" in str(tile_problem(up | {"stages": 5}))


CHOSEN = {
    # E, K, 2I: tiles of 64, 128, 512 and 1024 tokens, measured best over three routings
    (128, 8, 1536): ("pair-64x128", "pair-64x128", "flex-128x128", "prefill-128x256"),
    (64, 8, 2048): ("pair-64x128", "pair-64x128", "flex-128x256", "flex-128x256"),
    (128, 8, 3072): ("pair-64x128", "flex-128x128", "flex-128x256", "flex-128x256"),
    (256, 8, 4096): ("pair-64x128", "flex-128x128", "flex-128x128", "flex-128x256"),
    (128, 4, 5760): ("pair-64x128", "flex-128x128", "flex-128x128", "flex-128x256"),
    (8, 2, 28672): ("decode-64x128", "flex-128x128", "tall-256x128", "tall-256x128"),
}


@pytest.mark.parametrize("shape", CHOSEN, ids=str)
def test_tiles_are_chosen_for_any_routing(shape: tuple[int, int, int]) -> None:
    experts, top_k, up_rows = shape
    for tokens, wanted in zip((64, 128, 512, 1024), CHOSEN[shape], strict=True):
        config = choose_layer(tokens, top_k, experts, up_rows, 132)
        assert config.up == config.down
        assert f"{config.up.kernel}-{config.up.bm}x{config.up.bn}" == wanted
        assert config.order == ("large_first" if experts == 8 and tokens >= 512 else "index")
    for tokens in (2, 24, 50, 97, 200, 300, 700, 1500, 3000, 9000):
        config = choose_layer(tokens, top_k, experts, up_rows, 132)
        row = {"up": config.up._asdict(), "down": config.down._asdict(), "order": config.order}
        assert layer_problem(row) is None


def test_the_kernels_example() -> None:
    offsets_N1 = torch.tensor([0, 70, 75], dtype=torch.int32)
    tasks = build_task_map_ref(offsets_N1, heights=(64,))
    assert tasks.tile_end_N.tolist() == [2, 3] and tasks.height_N.tolist() == [64, 64]
    columns = 128 // (128 // 2)
    assert tasks.total_2.tolist()[1] * columns == 6
    m_tiles = int(tasks.tile_end_N[0])
    assert int(tasks.height_N[0]) + 2 * m_tiles * columns == 64 + 2 * 2 * 2


def test_the_twin_makes_both_products() -> None:
    case = draw(5, device="cpu")
    sort, tasks = batch_rows_ref(case["topk_ids"], 24, heights=(64,))
    rows_SH = flex.flex_mm_hopper_ref(
        case["hidden"], case["up"], case["down"], tasks, order_S=sort.order_S, top_k=4,
        gated=True, activation="silu",
    )  # fmt: skip
    slot = int(sort.order_S[7])
    expert = int(case["topk_ids"].view(-1)[slot])
    gate, up = (case["up"][expert].float() @ case["hidden"][slot // 4].float()).chunk(2)
    act = (torch.nn.functional.silu(gate) * up).bfloat16()
    expected = (case["down"][expert].float() @ act.float()).bfloat16()
    torch.testing.assert_close(rows_SH[7], expected, rtol=1.6e-2, atol=1e-3)


@needs_hopper
@pytest.mark.parametrize("rows", ["even", "skewed", "worst", "nobody"])
@pytest.mark.parametrize("name", ARITHMETIC)
def test_bits_are_those_of_two_launches(name: str, rows: str, poisoned_empty: None) -> None:
    how = ARITHMETIC[name]
    for tokens in (1, 2, 17, 70, 97, 130, 150, 600):
        case = draw(tokens, how.get("gated", True), rows=rows)
        apart = experts_hopper(**case, **how, config=alike(APART))
        for tile in TILES:
            out = experts_hopper(**case, **how, config=alike(tile))
            assert torch.equal(out, apart), (tokens, tile)
        other = case | {"down": case["down"].roll(1, 0)}
        assert not torch.equal(experts_hopper(**other, **how, config=alike(TILES[3])), apart)


@needs_hopper
def test_bits_do_not_depend_on_budget_order_or_dtype() -> None:
    case = draw(250, rows="skewed")
    apart = experts_hopper(**case, config=alike(APART))
    for tile in TILES:
        for budget in (1, 7, 131):
            out = experts_hopper(**case, config=alike(tile), num_sms=budget)
            assert torch.equal(out, apart), (tile, budget)
        for order in ("large_first", "mixed"):
            assert torch.equal(experts_hopper(**case, config=alike(tile, order)), apart)
    half = {k: v.half() if v.dtype == torch.bfloat16 else v for k, v in case.items()}
    expected = experts_hopper(**half, config=alike(APART))
    assert torch.equal(experts_hopper(**half, config=alike(TILES[3])), expected)


@needs_hopper
@pytest.mark.parametrize("tile", [TILES[0], TILES[3]], ids=str)
def test_a_graph_replays_other_rows_and_leaves_its_counters_at_zero(tile: HopperConfig) -> None:
    case = draw(200)
    experts_hopper(**case, config=alike(tile))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            out = experts_hopper(**case, config=alike(tile))
    for seed, rows in ((1, "worst"), (2, "even"), (3, "skewed")):
        fresh = draw(200, seed=seed, rows=rows)
        for name in ("hidden", "topk_ids", "topk_weights"):
            case[name].copy_(fresh[name])
        graph.replay()
        assert torch.equal(out, experts_hopper(**case, config=alike(APART)))
    sort, tasks = batch_rows(case["topk_ids"], 24, heights=(tile.bm,))
    act, rows_SH = case["hidden"].new_empty(800, 320), case["hidden"].new_empty(800, 448)
    flex.flex_mm_hopper(
        case["hidden"], case["up"], case["down"], tasks, act, rows_SH, config=tile, num_sms=132,
        order_S=sort.order_S, top_k=4, gated=True, activation="silu",
    )  # fmt: skip
    assert tasks.tickets_2.tolist() == [0, 0]


@needs_hopper
def test_counters_count_rows_and_tiles() -> None:
    case = draw(150, rows="worst")
    counters = torch.zeros(3, 24, dtype=torch.int32, device="cuda")
    experts_hopper(**case, config=alike(TILES[3]), counters=counters)
    assert counters[:, 3].tolist() == [0, 150, 2] and int(counters.sum()) == 4 * 152
