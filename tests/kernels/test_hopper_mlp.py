"""Ungated, biased experts on Hopper: the bits of the Triton path over tiles, budgets and graphs."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from moesaic import ExpertSpec, moe
from moesaic.dispatch import hopper_problem
from moesaic.kernels.batching import batch_rows_ref
from moesaic.kernels.hopper import chain, mlp
from moesaic.kernels.hopper.fit import chain_problem, layer_problem, tile_problem
from moesaic.kernels.hopper.launch import (
    HopperConfig,
    aot_cases,
    grouped_mm_hopper,
    grouped_mm_hopper_ref,
)
from moesaic.kernels.hopper.mlp import (
    TILES,
    MlpConfig,
    choose_mlp,
    config_of,
    experts_mlp,
    row_of,
    rows_mlp,
)
from moesaic.types import ExpertWeights

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
needs_hopper = pytest.mark.skipif(not HOPPER, reason="needs an sm_90 GPU")
CHAINS = (
    chain.ChainTiles(160, 256, 32, 4), chain.ChainTiles(144, 128, 16, 6),
    chain.ChainTiles(96, 128, 16, 6), chain.ChainTiles(128, 256, 32, 4),
    chain.ChainTiles(48, 256, 32, 4), chain.ChainTiles(160, 128, 32, 5, 2),
)  # fmt: skip
SHAPES = ((8, 2, 1024), (16, 2, 2048), (32, 4, 4096), (64, 16, 1024))


def draw(
    tokens: int, *, layers: int = 3, bias: bool = True, top_k: int = 4, seed: int = 0
) -> dict[str, Any]:
    experts, hidden, inter = 24, 512, 448
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=generator).bfloat16()

    scores = torch.rand(tokens, experts, device="cuda", generator=generator)
    case: dict[str, Any] = {
        "hidden": normal(tokens, hidden),
        "topk_ids": scores.topk(top_k, dim=1).indices.int(),
        "topk_weights": torch.rand(tokens, top_k, device="cuda", generator=generator),
        "up": normal(experts, inter, hidden) * hidden**-0.5,
        "down": normal(experts, hidden, inter) * inter**-0.5,
        "activation": "relu",
    }
    if layers == 3:
        case["mid"] = normal(experts, inter, inter) * inter**-0.5
    if bias:
        names = {"up_bias": inter, "down_bias": hidden}
        names |= {"mid_bias": inter} if layers == 3 else {}
        case |= {name: normal(experts, width) for name, width in names.items()}
    return case


def triton(case: dict[str, Any], **more: Any) -> torch.Tensor:
    from moesaic.kernels.experts import experts_triton

    return experts_triton(**case, gated=False, **more)


def test_chosen_tiles_fit_share_a_height_and_follow_the_rows() -> None:
    assert all(tile_problem(tile._asdict()) is None for tile in TILES)
    for (experts, top_k, inter), layers in product(SHAPES, (2, 3)):
        heights = []
        for tokens in (1, 8, 64, 512, 4096, 32768):
            config = choose_mlp(tokens * top_k, experts, inter, layers, 132)
            assert len(config.tiles) == layers
            assert {tile.bm for tile in config.tiles} == {config.height}
            assert config_of(row_of(config)) == config
            assert layer_problem(row_of(config)) is None
            heights.append(config.height)
        assert heights[0] == 16 and heights[-1] >= 128


def test_the_choices_are_those_that_were_measured_best() -> None:
    small, medium, large = SHAPES[:3]
    best = {
        (small, 1024): "tall192", (small, 4096): "prefill128", (small, 8192): "prefill128",
        (medium, 1024): "tall256", (medium, 4096): "tall256", (medium, 8192): "prefill128",
        (large, 32): "decode16", (large, 64): "decode16", (large, 128): "decode32",
        (large, 256): "decode64", (large, 512): "tall192", (large, 4096): "tall256",
        (large, 8192): "tall256", (small, 512): "decode64",
        (small, 256): "decode64",
    }  # fmt: skip
    for ((experts, top_k, inter), tokens), name in best.items():
        tile = choose_mlp(tokens * top_k, experts, inter, 3, 132).tiles[0]
        assert f"{tile.kernel}{tile.bm}" == name, (experts, tokens)
        assert tile.bn == (256 if tile.kernel == "prefill" else 128)
    assert choose_mlp(2, 8, 1024, 3, 132).tiles[0].bn == 64, "a lone token's tiles are narrow"
    together = {
        (small, 1024): (128, 128), (small, 4096): (128, 128), (medium, 512): (96, 128),
        (medium, 1024): (144, 128), (medium, 4096): (128, 256), (large, 512): (96, 128),
        (large, 1024): (144, 128),
    }  # fmt: skip
    for (experts, top_k, inter), tokens in product(SHAPES[:3], (32, 256, 512, 1024, 4096, 8192)):
        chosen = choose_mlp(tokens * top_k, experts, inter, 3, 132).chain
        want = together.get(((experts, top_k, inter), tokens))
        assert (chosen and (chosen.bm, chosen.bn)) == want, (experts, tokens)
        assert chosen is None or chain_problem(chosen._asdict()) is None
        assert choose_mlp(tokens * top_k, experts, inter, 2, 132).chain is None


def test_tiles_of_one_launch_for_three_layers() -> None:
    assert all(chain_problem(tile._asdict()) is None for tile in CHAINS)
    assert "stages" in str(chain_problem({"bm": 16}))
    tile = CHAINS[0]._asdict()
    assert "shared memory" in str(chain_problem(tile | {"stages": 5}))
    assert "rest 16 or 32" in str(chain_problem(tile | {"rest": 64}))
    config = choose_mlp(256, 8, 1024, 3, 132)._replace(chain=CHAINS[0])
    assert config_of(row_of(config)) == config and layer_problem(row_of(config)) is None
    assert "chain" in str(layer_problem(row_of(config._replace(chain=CHAINS[0]._replace(bm=200)))))


def test_the_twin_of_one_launch_is_three_products() -> None:
    _, tasks = batch_rows_ref(torch.tensor([[0], [1]]), 2, heights=(16,))
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    weights = (torch.ones(2, 1, 2), -torch.ones(2, 1, 1), torch.ones(2, 2, 1))
    biases = (torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [9.0]]), torch.zeros(2, 2))
    got = chain.chain_mm_hopper_ref(
        x, chain.Experts(weights, biases), tasks, order_S=torch.tensor([0, 1]), top_k=1
    )
    assert got.tolist() == [[0.0, 0.0], [1.0, 1.0]]


def test_every_tile_is_compiled_ahead_of_time() -> None:
    names = {case.name for case in aot_cases()}
    assert {f"hopper/{t.kernel}-{t.bm}x{t.bn}-relu-bf16" for t in TILES} <= names


@pytest.mark.parametrize("kernel, bm", [("trim", 160), ("pair", 16), ("flex", 128), ("tall", 256)])
def test_a_row_of_layers_without_biases_is_for_these_alone(
    kernel: Any, bm: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tables name shapes, not biases, and only some tiles have any."""
    tile = HopperConfig(kernel, bm, 128 if kernel == "tall" else 256, 4)
    measured = MlpConfig((tile, tile))
    monkeypatch.setattr(mlp, "hopper_row", lambda problem: row_of(measured))
    case = (512, 2, (8, 512, 1024), 2, torch.bfloat16, torch.device("cpu"), 132)
    got = mlp.choose_measured.__wrapped__(*case)
    assert got == (measured if kernel == "tall" else choose_mlp(512, 8, 1024, 2, 132))


def test_a_row_whose_products_differ_in_height_is_refused() -> None:
    row = row_of(choose_mlp(256, 8, 1024, 3, 132))
    row["mid"] = HopperConfig("decode", 128, 128, 6)._asdict()
    assert row["up"]["bm"] != 128
    assert "share one map" in str(layer_problem(row))


def test_the_twin_adds_the_bias_before_the_activation() -> None:
    _, tasks = batch_rows_ref(torch.tensor([[0], [1]]), 2, heights=(16,))
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    weight, bias = torch.ones(2, 1, 2), torch.tensor([[-4.0], [0.5]])
    given = {"order_S": torch.tensor([0, 1]), "bias": bias, "activation": "relu"}
    assert grouped_mm_hopper_ref(x, weight, tasks, **given).tolist() == [[0.0], [7.5]]


def test_which_layers_have_hopper_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    sizes = {"num_experts": 8, "hidden_size": 512, "intermediate_size": 1024}
    device = torch.device("cuda")

    def problem(**more: Any) -> str | None:
        return hopper_problem(device, torch.bfloat16, ExpertSpec(**sizes, **more))

    assert problem(layers=3, gated=False, bias=True, activation="relu") is None
    assert problem(layers=2, gated=False, bias=True) is None
    assert "biased" in str(problem(bias=True))


@needs_hopper
def test_a_gated_bias_is_refused() -> None:
    case = draw(4)
    with pytest.raises(ValueError, match="only ungated"):
        grouped_mm_hopper(
            case["hidden"], case["up"], None, case["hidden"], config=TILES[0],  # type: ignore[arg-type]
            num_sms=1, gated=True, bias=case["up_bias"],
        )  # fmt: skip


@needs_hopper
@pytest.mark.parametrize("tokens", [1, 3, 40, 700])
def test_bits_do_not_depend_on_tiles_budget_or_path(tokens: int, poisoned_empty: None) -> None:
    for layers, bias in product((2, 3), (True, False)):
        case = draw(tokens, layers=layers, bias=bias)
        want = triton(case)
        assert torch.equal(experts_mlp(**case), want), (layers, bias)
        for tile in TILES:
            config = MlpConfig((tile,) * layers)
            assert torch.equal(experts_mlp(**case, config=config), want), (tile, layers, bias)
        for budget in (1, 8, 66, 131):
            assert torch.equal(experts_mlp(**case, num_sms=budget), want), budget
    moved = case | {"up": case["up"].roll(1, 1)}
    assert not torch.equal(experts_mlp(**moved), want)


@needs_hopper
@pytest.mark.parametrize("tokens", [2, 3, 40, 700, 3000])
def test_one_launch_for_three_layers_has_the_bits_of_three(tokens: int) -> None:
    """Also where SMs are few, rows of nobody, in graphs, and twice on two streams at once."""
    case = draw(tokens)
    case["topk_ids"][::5, 1] = -1
    want = triton(case)
    for tile in CHAINS:
        config = MlpConfig(TILES[:1] * 3, chain=tile)
        for budget in (None, 1, 7, 66):
            got = experts_mlp(**case, config=config, num_sms=budget)
            assert torch.equal(got, want), (tile, budget)
        counted = [torch.zeros(3, 24, dtype=torch.int32, device="cuda") for _ in range(2)]
        again = [experts_mlp(**case, config=config, counters=each) for each in counted]
        assert all(torch.equal(got, want) for got in again) and torch.equal(*counted)
        streams = [torch.cuda.Stream() for _ in range(2)]
        torch.cuda.synchronize()
        found = []
        for _ in range(20):
            for stream in streams:
                with torch.cuda.stream(stream):
                    found.append(experts_mlp(**case, config=config))
        torch.cuda.synchronize()
        assert all(torch.equal(got, want) for got in found)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = experts_mlp(**case, config=config)
        got.zero_()
        graph.replay()
        assert torch.equal(got, want)
    case["topk_ids"][:] = -1
    assert torch.equal(experts_mlp(**case, config=config), triton(case))


@needs_hopper
def test_mixed_tiles_of_one_height_and_orders() -> None:
    case = draw(300)
    want = triton(case)
    sorted_, gathers = HopperConfig("tall", 128, 128, 6), HopperConfig("prefill", 128, 256, 4)
    narrow = HopperConfig("decode", 128, 64, 8)
    for tiles, order in product(
        ((gathers, sorted_, narrow), (narrow, gathers, sorted_), (sorted_, narrow, gathers)),
        ("index", "large_first", "mixed"),
    ):
        assert torch.equal(experts_mlp(**case, config=MlpConfig(tiles, order)), want), tiles


@needs_hopper
@pytest.mark.parametrize("activation", ["relu", "silu", "gelu", "relu2"])
def test_activations_and_half_precision(activation: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        case = draw(90) | {"activation": activation}
        case = {k: v.to(dtype) if hasattr(v, "dtype") and v.dtype == torch.bfloat16 else v
                for k, v in case.items()}  # fmt: skip
        assert torch.equal(experts_mlp(**case), triton(case))


@needs_hopper
@pytest.mark.parametrize("tokens", [1, 33, 600])
def test_graphs_and_streams_of_layers_keep_the_bits(tokens: int) -> None:
    """Several layers in a row share buffers and counters of tiles: none may run into another."""
    cases = [draw(tokens, seed=seed) for seed in range(4)]
    want = [triton(case) for case in cases]

    def run() -> list[torch.Tensor]:
        return [experts_mlp(**case) for case in cases]

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = run()
    for _ in range(3):
        for out in outs:
            out.zero_()
        graph.replay()
        assert all(torch.equal(out, right) for out, right in zip(outs, want, strict=True))


@needs_hopper
@pytest.mark.parametrize("tokens", [1, 50])
def test_rows_of_others_are_left_alone_and_counted(tokens: int) -> None:
    case = draw(tokens)
    ids = case["topk_ids"].clone()
    ids[:, 1] = -1
    case["topk_ids"] = ids
    counters = torch.zeros((3, 24), dtype=torch.int32, device="cuda")
    assert torch.equal(experts_mlp(**case, counters=counters), triton(case))
    rows = torch.bincount(ids[ids >= 0].flatten().long(), minlength=24)
    assert torch.equal(counters[1].long(), rows)
    given = {k: v for k, v in case.items() if k != "topk_weights"}
    out = torch.full((ids.numel(), 512), 7.0, device="cuda", dtype=torch.bfloat16)
    rows_SH, position_S = rows_mlp(**given, out=out)
    assert rows_SH is out and (position_S.view_as(ids)[:, 1] == -1).all()
    assert (out[int(rows.sum()) :] == 7.0).all()


@needs_hopper
@pytest.mark.parametrize("bias", [True, False])
def test_a_lone_tokens_slots_of_nobody_add_nothing(bias: bool) -> None:
    case = draw(1, bias=bias)
    for stranger in (-1, -7, 24, 1 << 20, 1 << 30):
        case["topk_ids"] = torch.tensor([[3, stranger, 0, 5]], device="cuda", dtype=torch.int32)
        assert torch.equal(experts_mlp(**case), triton(case)), stranger


@needs_hopper
def test_the_layer_chooses_this_path() -> None:
    case = draw(64)
    spec = ExpertSpec(
        num_experts=24, hidden_size=512, intermediate_size=448, layers=3, gated=False, bias=True,
        activation="relu",
    )  # fmt: skip
    names = ("up", "down", "up_bias", "down_bias", "mid", "mid_bias")
    weights = ExpertWeights(**{name: case[name] for name in names})
    inputs = (case["hidden"], case["topk_ids"], case["topk_weights"], weights, spec)
    want = triton(case)
    for impl in ("auto", "hopper", "triton"):
        assert torch.equal(moe(*inputs, impl=impl), want)
    assert torch.equal(moe(*inputs, num_sms=20), want)
