"""The row sort: stable, complete, the same in one launch and in three."""

from __future__ import annotations

import doctest

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moesaic.kernels import sorting
from moesaic.kernels.sorting import RowSort, sort_rows, sort_rows_ref


def violations(rows: RowSort, ids: list[int], experts: int) -> list[str]:
    """What is wrong with a sort of slots, against a sort of (id, slot) pairs."""
    order, position, offsets = (x.tolist() for x in rows)
    pairs = sorted((e, slot) for slot, e in enumerate(ids) if 0 <= e < experts)
    found = []
    if order != [slot for _, slot in pairs] + [0] * (len(ids) - len(pairs)):
        found.append("order")
    places = {slot: place for place, (_, slot) in enumerate(pairs)}
    if position != [places.get(slot, -1) for slot in range(len(ids))]:
        found.append("position")
    if offsets != [sum(e < bound for e, _ in pairs) for bound in range(experts + 1)]:
        found.append("offsets")
    return found


def draw_ids(tokens: int, top_k: int, high: int, seed: int = 0, low: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, (tokens, top_k), generator=generator)


def small_chunks(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Make the three-launch sort run at sizes that the interpreter can do."""
    chunk = 256 if device.type == "cuda" else 16
    monkeypatch.setattr(sorting, "ONE_LAUNCH_SLOTS", 0)
    monkeypatch.setattr(sorting, "chunk_size", lambda slots: chunk)


def test_docstring_examples() -> None:
    result = doctest.testmod(sorting, extraglobs={"torch": torch})
    assert result.attempted and not result.failed


@given(
    ids=st.lists(st.lists(st.integers(-1, 9), min_size=3, max_size=3)), experts=st.integers(1, 8)
)
def test_twin_is_the_stable_sort(ids: list[list[int]], experts: int) -> None:
    ids_TK = torch.tensor(ids, dtype=torch.int64).reshape(-1, 3)
    rows = sort_rows_ref(ids_TK, experts)
    assert violations(rows, ids_TK.flatten().tolist(), experts) == []


def test_the_checker_finds_an_unstable_sort() -> None:
    ids_TK = torch.tensor([[1, 0], [1, 0]])
    good = sort_rows_ref(ids_TK, 2)
    assert violations(good, [1, 0, 1, 0], 2) == []
    assert violations(good._replace(order_S=good.order_S[[1, 0, 2, 3]]), [1, 0, 1, 0], 2)
    assert violations(good._replace(position_S=good.position_S.flip(0)), [1, 0, 1, 0], 2)
    assert violations(good._replace(offsets_E1=good.offsets_E1 + 1), [1, 0, 1, 0], 2)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("launches", [1, 3])
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "low", "high"),
    [
        (1, 1, 1, 0, 1),
        (21, 3, 5, 0, 5),
        (40, 2, 33, -3, 40),
        (2, 64, 300, 0, 300),
        (50, 1, 32, 7, 8),
        (30, 2, 4, 4, 5),
    ],
    ids=["one", "uniform", "sentinels", "wide", "all to one", "nobody"],
)
def test_kernels_sort_stably(
    tokens: int,
    top_k: int,
    experts: int,
    low: int,
    high: int,
    launches: int,
    dtype: torch.dtype,
    kernel_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if launches == 3:
        small_chunks(monkeypatch, kernel_device)
    ids_TK = draw_ids(tokens, top_k, high, low=low).to(kernel_device, dtype)
    rows = sort_rows(ids_TK, experts)
    assert {x.dtype for x in rows} == {torch.int32}
    assert violations(rows, ids_TK.flatten().tolist(), experts) == []


def test_ids_may_be_strided_and_empty(kernel_device: torch.device) -> None:
    ids_TK = draw_ids(9, 4, 5).to(kernel_device)
    assert all(map(torch.equal, sort_rows(ids_TK[:, ::2], 5), sort_rows_ref(ids_TK[:, ::2], 5)))
    rows = sort_rows(ids_TK[:0], 5)
    assert rows.order_S.numel() == 0 and rows.offsets_E1.tolist() == [0] * 6


@pytest.mark.parametrize("launches", [1, 3])
def test_docstring_examples_of_the_kernels(
    launches: int, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if launches == 3:
        small_chunks(monkeypatch, kernel_device)
    ids_TK = torch.tensor([[2, 0], [0, 3], [2, 1]], device=kernel_device)
    rows = sort_rows(ids_TK, 3)
    assert [x.tolist() for x in rows] == [[1, 2, 5, 0, 4, 0], [3, 0, 1, -1, 4, 2], [0, 2, 3, 5]]


def test_docstring_examples_of_the_chunk_tables(kernel_device: torch.device) -> None:
    if kernel_device.type == "cuda":
        pytest.skip("the example's chunks are narrower than a warp")
    ids = torch.tensor([2, 0, 0, 3, 2, 1], dtype=torch.int32)
    hist = torch.full((3, 3), -7, dtype=torch.int32)
    sorting.count_chunks_kernel[(2,)](ids, hist, 6, 3, E_POW2=4, CHUNK=4)
    assert hist.tolist() == [[2, 0, 1], [0, 1, 1], [-7, -7, -7]]
    sorting.scan_chunks_kernel[(1,)](hist, 2, 3, CHUNKS=2, EXPERTS=4)
    assert hist.tolist() == [[0, 0, 0], [2, 0, 1], [2, 1, 2]]


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"int32\|int64 of shape \(T, K\)"):
        sort_rows(torch.zeros(3, 2), 4)
    with pytest.raises(ValueError, match="got 1025"):
        sort_rows(torch.zeros(3, 2, dtype=torch.int32), 1025)
    with pytest.raises(ValueError, match="split the batch"):
        sort_rows(torch.zeros(1, 1, dtype=torch.int32).expand(2**24 + 1, 64), 4)


@pytest.mark.gpu
@pytest.mark.parametrize("slots", [2048, 4096, 4097, 65_536, 262_144, 1_000_003])
@pytest.mark.parametrize("experts", [1, 8, 200, 512, 1024])
def test_large_sorts(slots: int, experts: int, kernel_device: torch.device) -> None:
    if kernel_device.type != "cuda":
        pytest.skip("too large for the interpreter")
    ids_TK = draw_ids(slots, 1, experts + 1).to(kernel_device)
    wanted = sort_rows_ref(ids_TK, experts)
    for _ in range(3):
        assert all(map(torch.equal, sort_rows(ids_TK, experts), wanted))
