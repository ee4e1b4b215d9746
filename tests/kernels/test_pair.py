"""Both products in one launch: the bits of two, whatever the tile, budget, stream or graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from moesaic.kernels.batching import batch_rows, batch_rows_ref
from moesaic.kernels.combine import combine_ref
from moesaic.kernels.hopper import pair, plans, zeros
from moesaic.kernels.hopper.experts import LayerConfig, choose_layer, experts_hopper
from moesaic.kernels.hopper.fit import tile_problem
from moesaic.kernels.hopper.launch import HopperConfig, weight_descriptor

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
needs_hopper = pytest.mark.skipif(not HOPPER, reason="needs an sm_90 GPU")
APART = HopperConfig("decode", 16, 64, 8, ctas_per_sm=2)
TILES = [
    HopperConfig("pair", 16, 64, 6, ctas_per_sm=2),
    HopperConfig("pair", 16, 64, 10, ctas_per_sm=2),
    HopperConfig("pair", 16, 128, 10),
    HopperConfig("pair", 16, 64, 10, bk=128),
    HopperConfig("pair", 16, 128, 6, bk=128),
    HopperConfig("pair", 32, 128, 8),
    HopperConfig("pair", 64, 128, 7),
]
ARITHMETIC: dict[str, dict[str, Any]] = {
    "silu": {},
    "gpt-oss": {"limit": 0.4, "alpha": 1.702, "up_offset": 1},
    "relu2": {"gated": False, "activation": "relu2"},
}


def alike(tile: HopperConfig) -> LayerConfig:
    return LayerConfig(tile, tile)


def draw(
    tokens: int, gated: bool = True, seed: int = 0, device: str = "cuda", dtype: Any = None
) -> dict[str, torch.Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    experts, top_k, hidden, inner = 24, 4, 448, 320
    dtype = dtype or torch.bfloat16

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, generator=generator).to(dtype)

    scores = torch.rand(tokens, experts, device=device, generator=generator)
    return {
        "hidden": normal(tokens, hidden),
        "topk_ids": scores.topk(top_k, dim=1).indices.int(),
        "topk_weights": torch.rand(tokens, top_k, device=device, generator=generator),
        "up": normal(experts, 2 * inner if gated else inner, hidden) * hidden**-0.5,
        "down": normal(experts, hidden, inner) * inner**-0.5,
    }


def test_both_views_of_a_weight_have_one_box() -> None:
    weight = torch.empty(4, 2 * 96, 128, dtype=torch.bfloat16)
    tile = HopperConfig("pair", 16, 128, 8)
    rows, pairs = pair.rows_descriptor(weight, tile), weight_descriptor(weight, True, tile)
    assert rows.block_shape == pairs.block_shape and rows.layout == pairs.layout
    assert rows.shape == [4, 12, 2, 8, 128] and rows.strides[1:4] == [16 * 128, 8 * 128, 128]
    assert pairs.strides[1:4] == [8 * 128, 96 * 128, 128]


def test_few_rows_take_one_launch() -> None:
    for top_k, up_rows, kernel, stages in (
        (8, 1536, "pair", 10), (8, 4096, "pair", 10), (2, 28672, "decode", 12),
    ):  # fmt: skip
        one = choose_layer(1, top_k, 128, up_rows, 132)
        assert (one.up.kernel, one.up.stages) == (kernel, stages) and one.up == one.down
        assert tile_problem(one.up._asdict()) is None
    for tokens, experts, up_rows, kernel in (
        (4, 64, 2048, "pair"), (128, 64, 2048, "pair"), (256, 64, 2048, "flex"),
        (64, 256, 4096, "pair"), (64, 128, 28672, "decode"), (8192, 64, 2048, "trim"),
        (2, 128, 28672, "decode"), (64, 64, 2048, "pair"),
    ):  # fmt: skip
        tile = choose_layer(tokens, 8, experts, up_rows, 132).up
        assert tile.kernel == kernel and tile_problem(tile._asdict()) is None


def by_twin(seen: list[dict[str, Any]]) -> Any:
    def pair_mm(x: Any, up: Any, down: Any, tasks: Any, act: Any, out: Any, **how: Any) -> Any:
        seen.append(how)
        arithmetic = {k: how[k] for k in ("gated", "activation", "limit", "alpha", "up_offset")}
        given = {"order_S": how.get("order_S"), "top_k": how["top_k"], **arithmetic}
        rows = pair.pair_mm_hopper_ref(x, up, down, tasks, **given)
        out.copy_(rows)
        if how.get("weighted"):
            weights, total = how["weighted"]
            ids = tasks if isinstance(tasks, torch.Tensor) else tasks.task_N.view(1, -1)
            slots = torch.arange(ids.numel()).view(ids.shape)
            owned = (ids >= 0) & (ids < up.shape[0])
            total.copy_(combine_ref(rows, torch.where(owned, slots, -1), weights))
            if how.get("counted") is not None:
                how["counted"][1] += ids[owned].long().bincount(minlength=up.shape[0]).int()
        return out

    return pair_mm


@pytest.mark.skipif(torch.cuda.is_available(), reason="its other kernels are interpreted")
@pytest.mark.parametrize("tokens", [1, 3, 17])
@pytest.mark.parametrize("counted", [False, True])
def test_a_layer_is_put_together(
    monkeypatch: pytest.MonkeyPatch, tokens: int, counted: bool
) -> None:
    from moesaic.kernels import combine, sorting

    def alone(fn: Any, grid: int, *args: Any, launch_pdl: bool = False, **options: Any) -> None:
        fn[(grid,)](*args, **options | {"PDL": False} if "PDL" in options else options)

    monkeypatch.setattr(combine, "launch", alone)
    monkeypatch.setattr(sorting, "launch", alone)
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(pair, "pair_mm_hopper", by_twin(seen))
    case = draw(tokens, device="cpu", dtype=torch.float32)
    arithmetic = {
        "gated": True, "activation": "silu", "limit": None, "alpha": 1.0, "up_offset": 0.0,
    }  # fmt: skip
    counters = torch.zeros(3, 24, dtype=torch.int32) if counted else None

    def layer() -> torch.Tensor | None:
        return pair.layer_pair(
            *case.values(), config=TILES[0], order="index", num_sms=1, epilogue=arithmetic,
            counters=counters,
        )  # fmt: skip

    monkeypatch.setattr(pair, "WORDS", pair.FIRST_COLUMN + 6)
    assert tokens > 1 or layer() is None
    if counters is not None:
        counters.zero_()
    monkeypatch.setattr(pair, "WORDS", zeros.WORDS)
    monkeypatch.setattr(pair, "zeroed", lambda device, address: torch.zeros(zeros.WORDS).int())
    sort, tasks = batch_rows_ref(case["topk_ids"], 24, heights=(16,))
    rows = pair.pair_mm_hopper_ref(
        case["hidden"], case["up"], case["down"], tasks, order_S=sort.order_S, top_k=4, **arithmetic
    )
    exact = combine_ref(rows, sort.position_S.view(tokens, 4), case["topk_weights"])
    torch.testing.assert_close(layer(), exact, rtol=1e-6, atol=1e-6)
    assert ("weighted" in seen[-1]) == (tokens < 17)
    if counters is not None:
        assert int(counters[1].sum()) == tokens * 4 and not counters[0].any()


def test_counters_belong_to_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_free", "_given"):
        monkeypatch.setattr(zeros, name, {})
    monkeypatch.setattr(zeros, "SETS", 2)
    monkeypatch.setattr(zeros, "MOST_SETS", 6)
    capturing = [True]
    stream = type("Stream", (), {"synchronize": lambda self: None})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream())
    device = torch.device("cpu")
    for _ in range(2):
        own = zeros.zeroed(device, 512)
        assert not own.any() and zeros.given(device, 512) is None
        own.fill_(1)
    capturing[0] = False
    zeros.prepare(device)
    first, second = zeros.zeroed(device, 512), zeros.zeroed(device, 1024)
    assert first.numel() == zeros.WORDS and not first.any() and not second.any()
    assert zeros.zeroed(device, 512) is first and zeros.given(device, 1024) is second
    capturing[0] = True
    assert zeros.zeroed(device, 2048).numel() == zeros.WORDS
    assert zeros.given(device, 2048) is None
    capturing[0] = False
    sets = [zeros.zeroed(device, 512 * n) for n in range(1, 9)]
    assert len({one.data_ptr() for one in sets}) == 8
    assert [n for n in range(1, 9) if zeros.given(device, 512 * n) is None] == [7, 8]
    assert zeros.zeroed(device, 512) is first and sum(map(len, zeros._free.values())) == 0


@needs_hopper
@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("tokens", [1, 3, 200])
def test_bits_are_those_of_two_launches(tokens: int, arithmetic: str) -> None:
    how = ARITHMETIC[arithmetic]
    case = draw(tokens, how.get("gated", True))
    wanted = experts_hopper(**case, **how, config=alike(APART))
    tiles = [*TILES[:2], *TILES[3:5]] if tokens == 1 else TILES[2:]
    for tile in tiles if arithmetic == "silu" else tiles[:1]:
        for _ in range(3):
            assert torch.equal(wanted, experts_hopper(**case, **how, config=alike(tile))), tile
        for budget in (1, 66):
            got = experts_hopper(**case, **how, config=alike(tile), num_sms=budget)
            assert torch.equal(wanted, got), (tile, budget)
    other = draw(tokens, how.get("gated", True), seed=1)
    assert not torch.equal(wanted, experts_hopper(**other, **how, config=alike(tiles[0])))


@needs_hopper
@pytest.mark.parametrize("tokens", [1, 40])
def test_any_ids_weights_and_counters(tokens: int) -> None:
    case = draw(tokens)
    wanted = experts_hopper(**case, config=alike(APART))
    longer = case | {"topk_ids": case["topk_ids"].long()}
    half = case | {"topk_weights": case["topk_weights"].bfloat16()}
    rounded = experts_hopper(**half, config=alike(APART))
    counted = [torch.zeros(3, 24, dtype=torch.int32, device="cuda") for _ in range(2)]
    for _ in range(2):
        assert torch.equal(wanted, experts_hopper(**longer, config=alike(TILES[0])))
        assert torch.equal(wanted, experts_hopper(**longer, config=alike(APART)))
        assert torch.equal(rounded, experts_hopper(**half, config=alike(TILES[0])))
        for tile, counters in zip((APART, TILES[0]), counted, strict=True):
            got = experts_hopper(**case, config=alike(tile), counters=counters)
            assert torch.equal(wanted, got)
    assert torch.equal(*counted) and int(counted[0].sum()) > 0


@needs_hopper
@pytest.mark.parametrize("tokens", [1, 4, 40])
def test_a_long_id_of_nobody_is_not_cut_to_an_expert(tokens: int) -> None:
    case = draw(tokens)
    nobody, beyond = case["topk_ids"].clone(), case["topk_ids"].long()
    nobody[:, 1] = -1
    beyond[:, 1] += 2**32
    wanted = experts_hopper(**case | {"topk_ids": nobody}, config=alike(APART))
    assert not torch.equal(wanted, experts_hopper(**case, config=alike(APART)))
    for tile in (APART, *TILES[:5]):
        got = experts_hopper(**case | {"topk_ids": beyond}, config=alike(tile))
        assert torch.equal(wanted, got), tile


@needs_hopper
@pytest.mark.parametrize("tokens", [2, 3, 16])
def test_few_tokens_find_their_tasks(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    getattr(plans._threads, "plans", {}).clear()
    monkeypatch.setattr(pair, "batch_rows", None)
    case = draw(tokens)
    shape, like = (tokens, 4), {"dtype": torch.int32, "device": "cuda"}
    choices = {
        "same": case["topk_ids"][:1].expand(shape).contiguous(),
        "twice": torch.randint(0, 2, shape, **like),
        "nobody's too": torch.randint(-3, 27, shape, **like),
        "nobody's": torch.full(shape, -1, **like),
        "long": case["topk_ids"].long(),
    }
    for name, ids in choices.items():
        wanted = experts_hopper(**case | {"topk_ids": ids}, config=alike(APART))
        for tile in (*TILES[1:5], HopperConfig("pair", 16, 128, 12)):
            for budget in (None, 1):
                got = experts_hopper(**case | {"topk_ids": ids}, config=alike(tile), num_sms=budget)
                assert torch.equal(wanted, got), (name, tile, budget)
    getattr(plans._threads, "plans", {}).clear()


@needs_hopper
def test_rows_of_nobody_and_no_rows(poisoned_empty: None) -> None:
    case = draw(40)
    case["topk_ids"][::2, 1] = 24
    case["topk_ids"][5] = -1
    wanted = experts_hopper(**case, config=alike(APART))
    assert torch.equal(wanted, experts_hopper(**case, config=alike(TILES[1])))
    case["topk_ids"][:] = 24
    assert not experts_hopper(**case, config=alike(TILES[1])).any()


@needs_hopper
def test_counters_are_put_back() -> None:
    case = draw(40)
    sort, tasks = batch_rows(case["topk_ids"], 24, heights=(16,))
    act, out = (case["hidden"].new_empty((160, width)) for width in (320, 448))
    given = {"num_sms": 66, "order_S": sort.order_S, "top_k": 4, "gated": True}
    pair.pair_mm_hopper(
        case["hidden"], case["up"], case["down"], tasks, act, out, config=TILES[0],
        activation="silu", **given,
    )  # fmt: skip
    tiles_N = -(-tasks.rows_N // 16)
    assert torch.equal(tasks.height_N[tiles_N > 0], (16 + tiles_N * 10)[tiles_N > 0].int())
    assert tasks.tickets_2.tolist() == [0, 0]
    one = {name: value[:1].contiguous() for name, value in case.items() if value.shape[0] == 40}
    for _ in range(3):
        experts_hopper(**case | one, config=alike(TILES[0]))
    torch.cuda.synchronize()
    assert zeros._given and not any(counters.any() for counters in zeros._given.values())
