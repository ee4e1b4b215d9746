"""The Hopper kernels: right, one answer over every tile and against the Triton path, no leftovers.

The host side (descriptors, heuristics, refusals) is tested anywhere; the kernels need an H100/H200.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from moesaic.kernels.batching import batch_rows, batch_rows_ref
from moesaic.kernels.gather import gather_rows, gather_rows_ref
from moesaic.kernels.hopper import experts as layer
from moesaic.kernels.hopper.experts import LayerConfig, choose, experts_hopper, refusal
from moesaic.kernels.hopper.fit import SHARED_LIMIT, shared_bytes, tile_problem
from moesaic.kernels.hopper.launch import (
    HopperConfig,
    grouped_mm_hopper,
    grouped_mm_hopper_ref,
    ragged_descriptor,
    weight_descriptor,
)

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
needs_hopper = pytest.mark.skipif(not HOPPER, reason="needs an sm_90 GPU")
PREFILL = HopperConfig("prefill", 128, 256, 4)
TILES = [
    PREFILL,
    PREFILL._replace(group_m=1),
    HopperConfig("tall", 256, 128, 4),
    HopperConfig("tall", 320, 128, 3),
    HopperConfig("tall", 384, 128, 3),
    HopperConfig("trim", 160, 256, 4),
    HopperConfig("decode", 16, 64, 8, ctas_per_sm=2),
    HopperConfig("decode", 16, 128, 10),
    HopperConfig("decode", 32, 128, 9),
    HopperConfig("decode", 64, 128, 8),
    HopperConfig("decode", 128, 128, 6),
]


def draw(tokens: int, top_k: int, experts: int, hidden: int, inter: int, seed: int = 0) -> dict:
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=generator).bfloat16()

    scores = torch.rand(tokens, experts, device="cuda", generator=generator)
    return {
        "hidden": normal(tokens, hidden),
        "topk_ids": scores.topk(top_k, dim=1).indices.int(),
        "topk_weights": torch.rand(tokens, top_k, device="cuda", generator=generator),
        "up": normal(experts, 2 * inter, hidden) * hidden**-0.5,
        "down": normal(experts, hidden, inter) * inter**-0.5,
    }


@pytest.mark.parametrize("tokens", [2, 16, 128, 1024, 8192])
def test_every_chosen_tile_fits_shared_memory(tokens: int) -> None:
    for experts, top_k, inter in ((128, 8, 768), (8, 2, 14336), (256, 8, 2048)):
        tile = choose(tokens, top_k, experts, 2 * inter, 132).up
        used = shared_bytes(tile.kernel, tile.bm, tile.bn, tile.stages)
        assert tile.ctas_per_sm * used <= SHARED_LIMIT


def test_refusals_name_the_reason() -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 64}
    assert "8.0" in str(refusal((8, 0), torch.bfloat16, **sizes, plain=True))
    assert "float32" in str(refusal((9, 0), torch.float32, **sizes, plain=True))
    assert "biased" in str(refusal((9, 0), torch.bfloat16, **sizes, plain=False))
    odd = {"hidden_size": 72, "intermediate_size": 64}
    assert "72" in str(refusal((9, 0), torch.bfloat16, **odd, plain=True))
    assert refusal((9, 0), torch.bfloat16, **sizes, plain=True) is None


@pytest.mark.parametrize("tokens", [1, 6])
def test_kernels_are_given_rows_one_after_the_other(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[torch.Tensor] = []

    def launches(*args: torch.Tensor) -> torch.Tensor:
        given.extend(args[:3])
        return args[0]

    monkeypatch.setattr(layer, "_launches", launches)
    monkeypatch.setattr(layer, "planned", lambda key, inputs, constants, call: call())
    wide = torch.randn(tokens, 3, 64), torch.randint(8, (tokens, 4)), torch.rand(4, tokens)
    tensors = wide[0][:, 1], wide[1][:, ::2], wide[2][:2].T
    weights = {"up": torch.zeros(8, 128, 64), "down": torch.zeros(8, 64, 64)}
    experts_hopper(*tensors, **weights)
    for got, wanted in zip(given, tensors, strict=True):
        assert got.is_contiguous() and torch.equal(got, wanted)


@pytest.mark.parametrize("top_k", [8, 200])
def test_a_token_too_wide_for_one_launch_reads_no_row_past_its_end(
    top_k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stages of 128 would also bring the 64 numbers that follow a row of 64 * odd."""
    seen: list[LayerConfig] = []

    def products(hidden: torch.Tensor, *_: object, config: LayerConfig, **__: object) -> None:
        seen.append(config)

    monkeypatch.setattr(layer, "products", products)
    monkeypatch.setattr(layer, "combine", lambda *_, **__: None)
    monkeypatch.setattr(layer, "sm_count", lambda device: 132)
    width = 64 if top_k > 128 else 64 * 385
    case = torch.zeros(1, width), torch.zeros(1, top_k, dtype=torch.int32), torch.ones(1, top_k)
    weights = (
        torch.empty(256, 128, width, device="meta"),
        torch.empty(256, width, 64, device="meta"),
    )
    arithmetic = ("silu", True, None, 1.0, 0.0, None, None, None)
    layer._launches(*case, *weights, *arithmetic)
    assert [tile.kernel for tile in seen[0][:2]] == ["decode", "decode"]
    assert all(tile_problem(tile._asdict()) is None for tile in seen[0][:2])


@needs_hopper
@pytest.mark.parametrize("tokens", [1, 6, 300])
def test_rows_may_lie_apart(tokens: int) -> None:
    case = draw(tokens, 4, 16, 256, 128)
    apart = {
        "hidden": torch.stack([case["hidden"]] * 3, 1)[:, 1],
        "topk_ids": torch.stack([case["topk_ids"]] * 2, 2)[..., 0],
        "topk_weights": case["topk_weights"].T.contiguous().T,
    }
    assert torch.equal(experts_hopper(**case), experts_hopper(**case | apart))


def test_descriptors_pair_gate_and_up_rows() -> None:
    weight = torch.empty(4, 2 * 96, 128, dtype=torch.bfloat16)
    gated = weight_descriptor(weight, True, PREFILL)
    assert gated.shape == [4, 12, 2, 8, 128]
    assert gated.strides == [192 * 128, 8 * 128, 96 * 128, 128, 1]
    ragged = ragged_descriptor(torch.empty(40, 256, dtype=torch.bfloat16), 64, 64)
    origin, start, rows, row = 1 << 30, 7, 5, 3
    index = [origin, start + rows, origin - rows + row, 0]
    offset = sum(i * s for i, s in zip(index, ragged.strides, strict=True))
    assert offset % 2**64 == (start + row) * 256


@needs_hopper
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_products_match_their_twin(tile: HopperConfig, poisoned_empty: None) -> None:
    case = draw(300, 4, 24, 512, 320)
    sort, tasks = batch_rows(case["topk_ids"], 24, heights=(tile.bm,), order="large_first")
    act_SI = case["hidden"].new_empty((1200, 320))
    gathered = {"order_S": sort.order_S, "top_k": 4, "gated": True, "activation": "silu"}
    rows, how = case["hidden"], gathered
    if tile.kernel == "tall":
        rows, how = gather_rows(rows, sort.order_S, 4), gathered | {"order_S": None}
        assert torch.equal(rows, gather_rows_ref(case["hidden"], sort.order_S, 4))
    grouped_mm_hopper(rows, case["up"], tasks, act_SI, config=tile, num_sms=132, ticket=0, **how)
    exact = grouped_mm_hopper_ref(case["hidden"], case["up"], tasks, **gathered)
    torch.testing.assert_close(act_SI, exact, rtol=1.6e-2, atol=1e-3)
    assert tasks.tickets_2.tolist() == [0, 0]
    wrong = grouped_mm_hopper_ref(case["hidden"], case["up"].roll(1, 1), tasks, **gathered)
    assert not torch.allclose(act_SI, wrong, rtol=1.6e-2, atol=1e-3)


@needs_hopper
@pytest.mark.parametrize("tokens", [1, 3, 40, 700])
def test_bits_do_not_depend_on_tile_budget_or_path(tokens: int) -> None:
    from moesaic.kernels.experts import experts_triton

    case = draw(tokens, 4, 24, 1024, 448)
    first = experts_hopper(**case)
    assert torch.equal(first, experts_triton(**case))
    for tile in TILES:
        assert torch.equal(first, experts_hopper(**case, config=LayerConfig(tile, tile))), tile
    for budget in (1, 8, 66, 131):
        assert torch.equal(first, experts_hopper(**case, num_sms=budget)), budget


@needs_hopper
def test_bits_do_not_depend_on_batch_or_row() -> None:
    case = draw(500, 8, 64, 512, 256)
    whole = experts_hopper(**case)
    for rows in (slice(0, 1), slice(17, 18), slice(100, 164), slice(250, 500)):
        part = {k: case[k][rows].contiguous() for k in ("hidden", "topk_ids", "topk_weights")}
        assert torch.equal(whole[rows], experts_hopper(**case | part))
    order = torch.randperm(500, device="cuda")
    moved = {k: case[k][order].contiguous() for k in ("hidden", "topk_ids", "topk_weights")}
    assert torch.equal(whole[order], experts_hopper(**case | moved))


@needs_hopper
@pytest.mark.parametrize("tokens", [1, 33, 600])
def test_a_graph_replays_the_same_bits(tokens: int) -> None:
    case = draw(tokens, 4, 16, 512, 256)
    eager = experts_hopper(**case)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            out = experts_hopper(**case)
    for seed in (1, 2):
        fresh = draw(tokens, 4, 16, 512, 256, seed)
        for name in ("hidden", "topk_ids", "topk_weights"):
            case[name].copy_(fresh[name])
        graph.replay()
        assert torch.equal(out, experts_hopper(**case))
    assert not torch.equal(out, eager)


@needs_hopper
@pytest.mark.parametrize("share", ["all to few", "empty experts", "nobody"])
def test_skewed_routing(share: str) -> None:
    case = draw(400, 2, 16, 256, 128)
    if share == "all to few":
        case["topk_ids"][:] = torch.tensor([3, 9], device="cuda")
    elif share == "empty experts":
        case["topk_ids"] %= 2
    else:
        case["topk_ids"][::2, 1] = 16
    from moesaic.kernels.experts import experts_triton

    assert torch.equal(experts_hopper(**case), experts_triton(**case))


@needs_hopper
@pytest.mark.parametrize("tokens", [1, 30, 400])
@pytest.mark.parametrize(
    "arithmetic",
    [
        {"activation": "gelu"},
        {"activation": "gelu_tanh"},
        {"limit": 0.4, "alpha": 1.702, "up_offset": 1.0},
        {"activation": "relu2", "gated": False},
        {"activation": "silu", "gated": False, "limit": 0.3},
    ],
    ids=str,
)
def test_every_activation_has_the_bits_of_the_triton_path(arithmetic: dict, tokens: int) -> None:
    case = draw(tokens, 4, 16, 512, 256)
    if not arithmetic.get("gated", True):
        case["up"] = case["up"][:, :256].contiguous()
    from moesaic.kernels.experts import experts_triton

    assert torch.equal(experts_hopper(**case, **arithmetic), experts_triton(**case, **arithmetic))


@needs_hopper
def test_half_precision() -> None:
    case = draw(90, 4, 16, 512, 256)
    half = {k: v.half() if v.dtype == torch.bfloat16 else v for k, v in case.items()}
    from moesaic.kernels.experts import experts_triton

    assert torch.equal(experts_hopper(**half), experts_triton(**half))


def test_the_twin_of_the_sort_serves_here_too() -> None:
    ids = torch.tensor([[0, 2], [2, 1], [2, 0]], dtype=torch.int32)
    sort, tasks = batch_rows_ref(ids, 3, heights=(16,))
    x, weight = torch.eye(3, 8), torch.arange(3 * 4 * 8).view(3, 4, 8).float()
    rows = grouped_mm_hopper_ref(x, weight, tasks, order_S=sort.order_S, top_k=2)
    expected = torch.stack([x[s // 2] @ weight[ids.view(-1)[s]].T for s in sort.order_S.tolist()])
    assert torch.equal(rows, expected)
