"""The task map: every row in exactly one tile, whatever the sizes; kernels equal their twins."""

from __future__ import annotations

import doctest
import itertools

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ragged_cases import SIZES, offsets_of, violations

from moesaic.kernels import batching, taskmap
from moesaic.kernels.batching import (
    HEIGHTS,
    TaskMap,
    batch_rows,
    batch_rows_ref,
    build_task_map,
    build_task_map_ref,
    find_task,
    find_task_ref,
    tile_capacity,
    tile_height,
)

ORDERS = ("index", "large_first", "mixed")
POLICIES = list(itertools.product(((16, 32, 64, 128), (8,), (1, 3, 20)), ORDERS))
sizes_of_tasks = st.lists(
    st.one_of(st.just(0), st.integers(0, 40), st.integers(0, 700)), min_size=1
)


def assert_same(got: TaskMap, wanted: TaskMap) -> None:
    for name, mine, theirs in zip(TaskMap._fields, got, wanted, strict=True):
        assert mine.dtype == torch.int32 and mine.tolist() == theirs.tolist(), name


@pytest.mark.parametrize("module", [taskmap, batching])
def test_docstring_examples(module: object) -> None:
    result = doctest.testmod(module, extraglobs={"torch": torch})
    assert result.attempted and not result.failed


@given(sizes=sizes_of_tasks, policy=st.sampled_from(POLICIES))
def test_every_row_lies_in_exactly_one_tile(sizes: list[int], policy: tuple) -> None:
    heights, order = policy
    task_map = build_task_map_ref(offsets_of(sizes), heights=heights, order=order)
    assert violations(task_map, sizes, heights) == []


@pytest.mark.parametrize("column", TaskMap._fields)
@pytest.mark.parametrize("change", [-1, 1])
def test_the_checker_finds_a_corrupted_map(column: str, change: int) -> None:
    sizes = [3, 0, 200, 17]
    good = build_task_map_ref(offsets_of(sizes))
    assert violations(good, sizes, HEIGHTS) == []
    for place in range(2 if column.endswith("_2") else int(good.total_2[0])):
        bad = good._replace(**{column: getattr(good, column).clone()})
        getattr(bad, column)[place] += change
        assert violations(bad, sizes, HEIGHTS), f"{column}[{place}] {change:+d} was not noticed"


@given(rows=st.integers(0, 10**6), tasks=st.integers(1, 1024))
def test_capacity_is_never_exceeded_and_can_be_reached(rows: int, tasks: int) -> None:
    filled = min(rows, tasks)
    worst = [1] * (filled - 1) + [rows - filled + 1] if rows else [0]
    tiles = sum(-(-size // tile_height(size)) for size in worst)
    assert tiles <= tile_capacity(rows, tasks, HEIGHTS)
    assert tile_capacity(129 + 7, 8, HEIGHTS) == 9  # 129 rows in two tiles, 7 rows in seven


@pytest.mark.parametrize(
    ("order", "tasks"),
    [("index", [0, 2, 3, 5]), ("large_first", [2, 5, 3, 0]), ("mixed", [2, 0, 5, 3])],
)
def test_orders(order: str, tasks: list[int], kernel_device: torch.device) -> None:
    offsets_N1 = offsets_of([3, 0, 200, 17, 0, 200], kernel_device)
    for build in (build_task_map, build_task_map_ref):
        task_map = build(offsets_N1, order=order)
        assert task_map.task_N[:4].tolist() == tasks
        assert task_map.total_2.tolist() == [4, 6]


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("order", ORDERS)
def test_kernel_equals_twin(sizes: list[int], order: str, kernel_device: torch.device) -> None:
    offsets_N1 = offsets_of(sizes, kernel_device)
    for heights in (HEIGHTS, (8,), (1, 3, 20)):
        got = build_task_map(offsets_N1, heights=heights, order=order)
        assert_same(got, build_task_map_ref(offsets_N1, heights=heights, order=order))


@pytest.mark.usefixtures("poisoned_empty")
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(sizes=sizes_of_tasks, policy=st.sampled_from(POLICIES))
def test_kernel_covers_every_row(
    kernel_device: torch.device, sizes: list[int], policy: tuple
) -> None:
    heights, order = policy
    task_map = build_task_map(offsets_of(sizes, kernel_device), heights=heights, order=order)
    assert violations(TaskMap(*(x.cpu() for x in task_map)), sizes, heights) == []


def test_docstring_example_of_the_kernel(kernel_device: torch.device) -> None:
    task_map = build_task_map(offsets_of([3, 0, 200, 17], kernel_device))
    assert [column.tolist() for column in task_map] == [
        [1, 3, 4, 4], [0, 2, 3, 0], [0, 3, 203, 0], [3, 200, 17, 0], [16, 128, 32, 0],
        [3, 4], [0, 0],
    ]  # fmt: skip


@triton.jit
def look_up_kernel(end_ptr, entry_ptr, tile_ptr, N: tl.constexpr, N_POW2: tl.constexpr):
    entry, tile = find_task(end_ptr, tl.program_id(0), N, N_POW2)
    tl.store(entry_ptr + tl.program_id(0), entry)
    tl.store(tile_ptr + tl.program_id(0), tile)


@pytest.mark.parametrize("name", ["skewed", "empty", "one task", "sparse"])
def test_look_up_equals_twin(name: str, kernel_device: torch.device) -> None:
    sizes = SIZES[name]
    end_N = build_task_map_ref(offsets_of(sizes, kernel_device)).tile_end_N
    tiles = tile_capacity(sum(sizes), len(sizes)) + 3
    entry_B, tile_B = (end_N.new_empty(tiles) for _ in range(2))
    width = triton.next_power_of_2(len(sizes))
    look_up_kernel[(tiles,)](end_N, entry_B, tile_B, N=len(sizes), N_POW2=width)
    wanted_entry_B, wanted_tile_B = find_task_ref(
        end_N, torch.arange(tiles, device=kernel_device, dtype=torch.int32)
    )
    assert entry_B.tolist() == wanted_entry_B.tolist()
    assert tile_B.tolist() == wanted_tile_B.tolist()
    filled = sum(size > 0 for size in sizes)
    assert all(entry >= filled for entry in entry_B.tolist()[int(end_N[-1]) :])


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("order", ORDERS)
def test_batch_rows_equals_twin(order: str, kernel_device: torch.device) -> None:
    generator = torch.Generator().manual_seed(1)
    for tokens, top_k, experts in ((0, 2, 5), (1, 1, 1), (30, 3, 40)):
        ids_TK = torch.randint(0, experts + 2, (tokens, top_k), generator=generator)
        rows, task_map = batch_rows(ids_TK.to(kernel_device), experts, order=order)
        wanted_rows, wanted_map = batch_rows_ref(ids_TK, experts, order=order)
        assert [x.tolist() for x in rows] == [x.tolist() for x in wanted_rows]
        assert_same(task_map, wanted_map)


def test_bad_input_is_refused() -> None:
    good = offsets_of([1, 2])
    with pytest.raises(ValueError, match="ascending"):
        build_task_map(good, heights=(32, 16))
    with pytest.raises(ValueError, match="order must be one of index"):
        build_task_map(good, order="random")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="int32 vector"):
        build_task_map(good.long())
    with pytest.raises(ValueError, match=r"in \[1, 4096\], got 0"):
        build_task_map(good[:1])


@pytest.mark.gpu
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("experts", [1, 8, 127, 256, 512, 1024])
@pytest.mark.parametrize("tokens", [7, 512, 32768])
def test_large_batches(order: str, experts: int, tokens: int, kernel_device: torch.device) -> None:
    if kernel_device.type != "cuda":
        pytest.skip("too large for the interpreter")
    worth = torch.rand(tokens, experts, device=kernel_device) ** 0.1
    worth += 1 / (1 + torch.arange(experts, device=kernel_device))
    ids_TK = worth.topk(min(8, experts)).indices
    rows, task_map = batch_rows(ids_TK, experts, order=order)
    wanted_rows, wanted_map = batch_rows_ref(ids_TK, experts, order=order)
    assert all(map(torch.equal, (*rows, *task_map), (*wanted_rows, *wanted_map)))
    alone = build_task_map(rows.offsets_E1, order=order)
    assert all(map(torch.equal, alone, wanted_map))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [16, 4096])
def test_a_graph_replays_with_other_routing(tokens: int, kernel_device: torch.device) -> None:
    if kernel_device.type != "cuda":
        pytest.skip("graphs need a GPU")
    ids_TK = torch.zeros(tokens, 4, dtype=torch.int32, device=kernel_device)
    batch_rows(ids_TK, 64, order="mixed")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows, task_map = batch_rows(ids_TK, 64, order="mixed")
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        ids_TK.copy_(torch.randint(0, 60 + 4 * seed, ids_TK.shape, generator=generator))
        graph.replay()
        wanted_rows, wanted_map = batch_rows_ref(ids_TK, 64, order="mixed")
        assert all(map(torch.equal, (*rows, *task_map), (*wanted_rows, *wanted_map)))
