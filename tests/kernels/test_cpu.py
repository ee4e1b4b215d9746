"""The CPU experts: bits per token, errors against fp64, every variant of experts, the torch op."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import moesaic
from moesaic.kernels import cpu, cpu_products
from moesaic.kernels.cpu_activation import flat_blocks
from moesaic.ops import WEIGHT_NAMES, experts_op, route_op
from moesaic.reference import moe_reference
from moesaic.types import ExpertSpec, ExpertWeights

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPE = {"num_experts": 12, "hidden_size": 72, "intermediate_size": 40}
GPT_OSS = {
    "bias": True, "interleaved": True, "transposed": True,
    "limit": 7.0, "alpha": 1.702, "up_offset": 1.0,
}  # fmt: skip
SPECS = {
    "silu": ExpertSpec(**SHAPE),
    "gelu": ExpertSpec(**SHAPE, activation="gelu"),
    "gelu_tanh": ExpertSpec(**SHAPE, activation="gelu_tanh"),
    "clamped": ExpertSpec(**SHAPE, limit=0.5),
    "gpt-oss": ExpertSpec(**SHAPE, **GPT_OSS),
    "relu2": ExpertSpec(**SHAPE, activation="relu2", gated=False),
    "three-layer": ExpertSpec(**SHAPE, activation="relu", gated=False, layers=3, bias=True),
}
Inputs = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(params=[1, 2], ids=["1-thread", "2-threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_weights(spec: ExpertSpec, dtype: torch.dtype, seed: int = 0) -> ExpertWeights:
    generator = torch.Generator().manual_seed(seed)
    shapes = spec.weight_shapes()
    return ExpertWeights(
        **{n: (torch.randn(s, generator=generator) * 0.15).to(dtype) for n, s in shapes.items()}
    )


def make_inputs(
    spec: ExpertSpec, tokens: int, dtype: torch.dtype, *, top_k: int = 3, seed: int = 1
) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, spec.hidden_size, generator=generator).to(dtype)
    scores = torch.rand(tokens, spec.num_experts, generator=generator)
    weights = torch.rand(tokens, top_k, generator=generator)
    return hidden, scores.topk(top_k).indices.int(), weights


def run(inputs: Inputs, weights: ExpertWeights, spec: ExpertSpec) -> Tensor:
    named = weights.named()
    return experts_op(*inputs, *[named.get(n) for n in WEIGHT_NAMES], spec.key(), "cpu")


def error(out: Tensor, want: Tensor) -> float:
    return float((out.double() - want).norm() / want.norm())


def take(inputs: Inputs, rows: slice | Tensor) -> Inputs:
    hidden, ids, weights = inputs
    return hidden[rows], ids[rows], weights[rows]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_error_against_fp64(one_thread: None, name: str, dtype: torch.dtype) -> None:
    spec = SPECS[name]
    weights, inputs = make_weights(spec, dtype), make_inputs(spec, 61, dtype)
    want = moe_reference(*inputs, weights, spec, dtype=torch.float64)
    eager = error(moe_reference(*inputs, weights, spec), want)
    bound = eager * (2.0 if dtype is torch.float32 else 1.05)
    assert error(run(inputs, weights, spec), want) <= bound
    swapped = ExpertWeights(**{**weights.named(), "up": weights.up.roll(1, 1)})
    assert error(run(inputs, swapped, spec), want) > bound


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_of_transformers(one_thread: None, implementation: str, dtype: torch.dtype) -> None:
    pytest.importorskip("transformers")
    from moesaic.bench.baselines import transformers_experts
    from moesaic.bench.workloads import Model

    model = Model("tiny", 12, 3, 72, 40, family="mixtral")
    spec = model.spec()
    weights, (hidden, ids, scales) = make_weights(spec, dtype), make_inputs(spec, 61, dtype)
    scales = scales.to(dtype)
    want = moe_reference(hidden, ids, scales, weights, spec, dtype=torch.float64)
    experts = transformers_experts(model, weights, implementation)
    theirs = error(experts(hidden, ids.long(), scales), want)
    ours = error(run((hidden, ids, scales), weights, spec), want)
    assert ours <= theirs * (2.0 if dtype is torch.float32 else 1.05)
    swapped = ExpertWeights(up=torch.cat(weights.up.chunk(2, 1)[::-1], 1), down=weights.down)
    assert error(run((hidden, ids, scales), swapped, spec), want) > 10 * ours


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_bits_of_a_row_alone_and_in_batches(threads: int, name: str, dtype: torch.dtype) -> None:
    spec, tokens = SPECS[name], 200
    weights, inputs = make_weights(spec, dtype), make_inputs(spec, tokens, dtype)
    whole = run(inputs, weights, spec)
    assert torch.equal(run(inputs, weights, spec), whole)
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(2))
    assert torch.equal(run(take(inputs, order), weights, spec), whole[order])
    for size in (1, 5, 31, 77):
        for start in (0, 13, tokens - size):
            part = slice(start, start + size)
            assert torch.equal(run(take(inputs, part), weights, spec), whole[part]), (size, start)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("hidden", "inter"), [(512, 192), (896, 256), (256, 1096), (200, 24)])
def test_bits_for_every_number_of_rows(
    threads: int, hidden: int, inter: int, dtype: torch.dtype
) -> None:
    """One row among 1 to 600 rows of its expert, at any place."""
    spec = ExpertSpec(num_experts=4, hidden_size=hidden, intermediate_size=inter)
    weights = make_weights(spec, dtype)
    rows = torch.randn(600, hidden, generator=torch.Generator().manual_seed(3)).to(dtype)
    ids, scales = torch.zeros(600, 1, dtype=torch.int32), torch.ones(600, 1)
    whole = run((rows, ids, scales), weights, spec)
    for count in (1, 2, 3, 5, 9, 12, 17, 30, 33, 50, 65, 100, 130, 200, 257, 300, 513):
        start = (600 - count) // 2
        part = slice(start, start + count)
        alone = run((rows[part], ids[part], scales[part]), weights, spec)
        assert torch.equal(alone, whole[part]), count


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 40),
    top_k=st.integers(1, 6),
    skew=st.floats(0.0, 4.0),
    nobody=st.floats(0.0, 1.0),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
def test_any_routing_equals_the_tokens_one_by_one(
    tokens: int, top_k: int, skew: float, nobody: float, dtype: torch.dtype, seed: int
) -> None:
    """Skewed, empty and foreign experts: every token has the bits it has alone."""
    torch.set_num_threads(1)
    spec = SPECS["silu"]
    generator = torch.Generator().manual_seed(seed)
    weights = make_weights(spec, dtype)
    hidden = torch.randn(tokens, spec.hidden_size, generator=generator).to(dtype)
    shares = torch.arange(1, spec.num_experts + 1, dtype=torch.float64) ** -skew
    ids = torch.multinomial(shares.expand(tokens, -1), top_k, generator=generator).int()
    ids[torch.rand(ids.shape, generator=generator) < nobody] = spec.num_experts
    inputs = (hidden, ids, torch.rand(ids.shape, generator=generator))
    out = run(inputs, weights, spec)
    alone = torch.cat([run(take(inputs, slice(t, t + 1)), weights, spec) for t in range(tokens)])
    assert torch.equal(out, alone)
    want = moe_reference(*inputs, weights, spec, dtype=torch.float64)
    assert torch.allclose(out.double(), want, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("expert", [0, 7, 11])
def test_all_tokens_to_one_expert(one_thread: None, expert: int) -> None:
    spec = SPECS["silu"]
    weights = make_weights(spec, torch.float32)
    hidden, ids, scales = make_inputs(spec, 300, torch.float32, top_k=1)
    ids.fill_(expert)
    want = moe_reference(hidden, ids, scales, weights, spec, dtype=torch.float64)
    assert error(run((hidden, ids, scales), weights, spec), want) < 1e-6


def test_foreign_ids_add_nothing_even_next_to_nan(one_thread: None) -> None:
    spec = SPECS["silu"]
    weights = make_weights(spec, torch.bfloat16)
    hidden, ids, scales = make_inputs(spec, 40, torch.bfloat16)
    whole = run((hidden, ids, scales), weights, spec)
    ids[3] = spec.num_experts
    hidden[9] = float("nan")
    out = run((hidden, ids, scales), weights, spec)
    assert out[3].count_nonzero() == 0
    assert out[9].isnan().all()
    others = torch.ones(40, dtype=torch.bool)
    others[[3, 9]] = False
    assert torch.equal(out[others], whole[others])


def test_no_tokens() -> None:
    spec = SPECS["silu"]
    out = run(make_inputs(spec, 0, torch.float32), make_weights(spec, torch.float32), spec)
    assert out.shape == (0, spec.hidden_size)


def test_nothing_unwritten_is_read(one_thread: None, poisoned_empty: None) -> None:
    for name in ("silu", "gpt-oss", "three-layer"):
        spec = SPECS[name]
        weights, inputs = make_weights(spec, torch.float32), make_inputs(spec, 19, torch.float32)
        want = moe_reference(*inputs, weights, spec, dtype=torch.float64)
        assert error(run(inputs, weights, spec), want) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["silu", "gpt-oss", "three-layer"])
def test_bits_of_packed_weights(threads: int, name: str, dtype: torch.dtype) -> None:
    """Packed weights give the bits of plain ones, for any number of rows at any place."""
    spec, tokens = SPECS[name], 130
    weights, inputs = make_weights(spec, dtype), make_inputs(spec, tokens, dtype)
    packed, whole = moesaic.pack(weights, spec), run(inputs, weights, spec)
    assert torch.equal(moesaic.moe(*inputs, packed, spec), whole)
    for size in (1, 2, 7, 33, 90):
        for start in (0, 13, tokens - size):
            part = slice(start, start + size)
            got = moesaic.moe(*take(inputs, part), packed, spec)
            assert torch.equal(got, whole[part]), (size, start)


def test_packed_products_are_used(one_thread: None) -> None:
    """Not the plain ones: zeros in their place change nothing."""
    spec, dtype = SPECS["silu"], torch.float32
    weights, inputs = make_weights(spec, dtype), make_inputs(spec, 30, dtype)
    zeros = [torch.zeros_like(w) for w in (weights.up, weights.down)]
    products = cpu.pack_experts(weights.up, weights.down, None, transposed=False)
    call = partial(cpu.experts_cpu, *inputs, activation="silu", gated=True)
    want = run(inputs, weights, spec)
    assert torch.equal(call(up=zeros[0], down=zeros[1], packed=products), want)
    assert call(up=zeros[0], down=zeros[1]).count_nonzero() == 0


def test_probe_refuses_packed_products_of_other_bits(
    one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = cpu_products.packed_product

    def off(x: Tensor, packed: Tensor) -> Tensor:
        return straight(x, packed).mul_(1 + 1e-6 * (x.shape[0] == 48))

    caches = (cpu_products.packed_stable, cpu._shapes)
    key = (80, 72, torch.float32, False, 1)
    for cache in caches:
        cache.cache_clear()
    assert cpu_products.packed_stable(key, 48)
    monkeypatch.setattr(cpu_products, "packed_product", off)
    for cache in caches:
        cache.cache_clear()
    assert not cpu_products.packed_stable(key, 48)
    assert cpu_products.packed_stable(key, 44)
    spec = SPECS["silu"]
    weights = make_weights(spec, torch.float32)
    hidden, ids, scales = make_inputs(spec, 48, torch.float32, top_k=1)
    inputs = (hidden, torch.zeros_like(ids), scales)
    packed = moesaic.pack(weights, spec)
    assert torch.equal(moesaic.moe(*inputs, packed, spec), run(inputs, weights, spec))
    monkeypatch.undo()
    for cache in caches:
        cache.cache_clear()


def test_probe_refuses_a_product_that_sums_in_another_order(
    one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shapes that change bits are found and never used; the layer then still holds the promise."""
    straight = cpu_products.one_product

    def reordered(x: Tensor, w: Tensor, *, columns: bool = False) -> Tensor:
        if x.shape[0] == 48:
            x, w = x.flip(1), w.flip(1)
        return straight(x, w, columns=columns)

    caches = (cpu_products.stable, cpu_products.anchor_height, cpu._shapes)
    for cache in caches:
        cache.cache_clear()
    key = (80, 72, torch.float32, False, 1)
    assert cpu_products.stable(key, 1, 48, False)
    monkeypatch.setattr(cpu_products, "one_product", reordered)
    for cache in caches:
        cache.cache_clear()
    for columns in (False, True):
        assert not cpu_products.stable(key, 1, 48, columns)
        assert cpu_products.stable(key, 1, 64, columns)
    spec = SPECS["silu"]
    weights, (hidden, ids, scales) = (
        make_weights(spec, torch.float32),
        make_inputs(spec, 45, torch.float32, top_k=1),
    )
    inputs = (hidden, torch.zeros_like(ids), scales)
    whole = run(inputs, weights, spec)
    assert torch.equal(run(take(inputs, slice(9, 12)), weights, spec), whole[9:12])
    monkeypatch.undo()
    for cache in caches:
        cache.cache_clear()


def test_rows_one_by_one_where_position_changes_bits(
    one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = cpu_products.one_product

    def uneven(x: Tensor, w: Tensor, *, columns: bool = False) -> Tensor:
        y = straight(x, w, columns=columns)
        rows = y.t() if columns else y
        rows[::2] += 1e-3 * (x.shape[0] > 1)
        return y

    caches = (cpu_products.stable, cpu_products.anchor_height, cpu._shapes)
    for cache in caches:
        cache.cache_clear()
    monkeypatch.setattr(cpu_products, "one_product", uneven)
    spec = SPECS["silu"]
    weights, inputs = make_weights(spec, torch.float32), make_inputs(spec, 9, torch.float32)
    want = moe_reference(*inputs, weights, spec, dtype=torch.float64)
    whole = run(inputs, weights, spec)
    assert error(whole, want) < 1e-6
    assert torch.equal(run(take(inputs, slice(4, 6)), weights, spec), whole[4:6])
    monkeypatch.undo()
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize("threads_asked", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("n", [64, 32768, 98304, 98368, 1 << 20, (1 << 20) + 64])
def test_flat_blocks_leave_no_rest(n: int, threads_asked: int) -> None:
    """Every thread's share, as torch cuts it (32768 at least each), is a multiple of 64."""
    blocks = flat_blocks(torch.arange(n), threads_asked)
    assert torch.equal(torch.cat(blocks), torch.arange(n))
    for block in blocks:
        size = block.numel()
        used = 1 if size < 32768 else min(threads_asked, -(-size // 32768))
        share = -(-size // used)
        assert share % 64 == 0 and (size % share) % 64 == 0


def test_plan_covers_every_row_once() -> None:
    keys = ((80, 72, torch.bfloat16, False, 1), (72, 40, torch.bfloat16, False, 1))
    shapes = cpu.Shapes(keys)
    counts = [0, 3, 4, 4, 0, 0, 300, 17, 1, 1, 1, 2]
    active = [(e, count) for e, count in enumerate(counts) if count]
    runs, starts, padded = cpu.plan_runs(active, shapes)
    held = torch.zeros(padded, dtype=torch.int)
    owner = torch.full((padded,), -1)
    for run_ in runs:
        for b in range(run_.batch):
            begin = run_.row + b * run_.height
            held[begin : begin + run_.height] += 1
            owner[begin : begin + run_.height] = run_.first + b
    assert bool((held == 1).all())
    for e, count in active:
        assert bool((owner[starts[e] : starts[e] + count] == e).all())
    assert max(run_.batch for run_ in runs) > 1


@pytest.mark.parametrize("tokens", [1, 9, 64])
def test_both_layouts_agree(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "GATHERED_ELEMENTS", 0)
    shapes = cpu.Shapes(((80, 72, torch.bfloat16, False, 1), (72, 40, torch.bfloat16, False, 1)))
    ids = torch.randint(0, 13, (tokens, 4), generator=torch.Generator().manual_seed(tokens))
    few, many = cpu.lay_out_few(ids, 12, shapes), cpu.lay_out(ids, 12, shapes)
    assert few.runs == many.runs
    assert torch.equal(few.slot_rows_S, many.slot_rows_S)
    padded = few.token_P.shape[0]
    held = few.slot_rows_S[few.slot_rows_S < padded]
    assert torch.equal(few.token_P[held], many.token_P[held])
    slots = torch.arange(tokens * 4)[few.slot_rows_S < padded]
    assert torch.equal(few.token_P[held], slots // 4)


@pytest.mark.parametrize("name", ["silu", "three-layer"])
def test_few_experts_gathered_or_not(
    one_thread: None, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not cpu_products.computes(torch.bfloat16):
        pytest.skip("this CPU multiplies no bfloat16, so experts are never gathered")
    spec = SPECS[name]
    weights, inputs = make_weights(spec, torch.bfloat16), make_inputs(spec, 2, torch.bfloat16)
    layouts: list[bool] = []
    few = cpu.lay_out_few

    def noted(*args: Any) -> cpu.Layout:
        layout = few(*args)
        layouts.append(layout.gathered is not None)
        return layout

    monkeypatch.setattr(cpu, "lay_out_few", noted)
    cpu._shapes.cache_clear()
    gathered = moesaic.moe(*inputs, weights, spec)
    monkeypatch.setattr(cpu, "GATHERED_ELEMENTS", 0)
    cpu._shapes.cache_clear()
    assert torch.equal(gathered, moesaic.moe(*inputs, weights, spec))
    cpu._shapes.cache_clear()
    assert layouts == [True, False]


def test_op_checks() -> None:
    spec = SPECS["gpt-oss"]
    weights, inputs = make_weights(spec, torch.float32), make_inputs(spec, 6, torch.float32)
    named = weights.named()
    args = (*inputs, *[named.get(n) for n in WEIGHT_NAMES], spec.key(), "cpu")
    torch.library.opcheck(experts_op, args)
    key = moesaic.RouterSpec(num_experts=12, top_k=3).key()
    torch.library.opcheck(route_op, (torch.randn(5, 12), None, key))


def test_compiles_whole(one_thread: None) -> None:
    spec = SPECS["silu"]
    weights, inputs = make_weights(spec, torch.bfloat16), make_inputs(spec, 6, torch.bfloat16)
    call = partial(moesaic.moe, weights=weights, spec=spec, impl="cpu")
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), call(*inputs))


@pytest.mark.parametrize("name", ["silu", "gpt-oss", "three-layer"])
def test_gradients(one_thread: None, name: str) -> None:
    spec = SPECS[name]
    weights = make_weights(spec, torch.float32)
    hidden, ids, scales = make_inputs(spec, 23, torch.float32)
    grad = torch.randn(23, spec.hidden_size, generator=torch.Generator().manual_seed(4))

    def gradients(dtype: torch.dtype, layer: object) -> list[Tensor]:
        tensors = [hidden, scales, *weights.named().values()]
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in tensors]
        held = ExpertWeights(**dict(zip(weights.named(), leaves[2:], strict=True)))
        out = layer(leaves[0], ids, leaves[1], held, spec)  # type: ignore[operator]
        return list(torch.autograd.grad(out, leaves, grad.to(dtype)))

    for got, want in zip(
        gradients(torch.float32, moesaic.moe), gradients(torch.float64, moe_reference), strict=True
    ):
        assert error(got, want) < 1e-5
