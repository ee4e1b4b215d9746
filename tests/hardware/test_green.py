"""Green contexts: one split, disjoint unequal parts, counts read back; on a GPU for real."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from green_double import Code, FakeDriver

from moesaic.hardware.green import (
    MAX_PARTS,
    Cut,
    GreenDevice,
    GreenError,
    GreenUnavailable,
    load_driver,
    probe_launch,
)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_an_h200_splits_into_sixteen_atoms_and_four_sms_left() -> None:
    gpu = GreenDevice(driver=FakeDriver())
    assert gpu.cut == Cut(132, atom_sms=8, atoms=16, rest_sms=4, min_sms=8, alignment=8)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 8), min_size=1, max_size=6), st.integers(64, 148))
def test_parts_of_any_sizes_share_no_sm_and_come_from_one_split(
    atoms: list[int], total: int
) -> None:
    driver = FakeDriver(total)
    with GreenDevice(driver=driver) as gpu:
        sizes = [8 * n for n in atoms]
        if sum(sizes) > 8 * gpu.cut.atoms:
            with pytest.raises(ValueError, match="add up to at most"):
                gpu.carve(sizes)
            assert gpu.parts == 0
            return
        parts = gpu.carve(sizes)
        assert driver.splits == 1
        members = [driver.sms_of(part.handle) for part in parts]
        assert sum(map(len, members)) == len(frozenset().union(*members))
        assert [part.sms for part in parts] == [len(m) for m in members]
        spare = sum(sizes) == 8 * gpu.cut.atoms and gpu.cut.rest_sms
        assert sum(part.sms for part in parts) == sum(sizes) + (gpu.cut.rest_sms if spare else 0)
        assert gpu.carve(sizes) == parts and gpu.parts == len(parts)
    assert not driver.contexts and not driver.streams


def test_without_clusters_atoms_are_pairs_and_nothing_is_left_over() -> None:
    driver = FakeDriver()
    gpu = GreenDevice(driver=driver, atom_sms=2, clusters=False)
    assert gpu.cut == Cut(132, atom_sms=2, atoms=66, rest_sms=0, min_sms=8, alignment=8)
    small, large = gpu.carve([4, 128])
    assert (small.sms, large.sms) == (4, 128) and small.disjoint(large)


def test_two_splits_would_overlap_as_the_double_knows() -> None:
    """The negative control: the double tells overlapping parts from disjoint ones."""
    driver = FakeDriver()
    one, other = GreenDevice(driver=driver), GreenDevice(driver=driver)
    (a,), (b,) = one.carve([32]), other.carve([32])
    assert driver.sms_of(a.handle) & driver.sms_of(b.handle)
    assert not a.disjoint(b)
    first, second = one.carve([32, 64])
    assert first.disjoint(second) and not driver.sms_of(first.handle) & driver.sms_of(second.handle)


def test_sizes_that_are_no_multiples_are_refused() -> None:
    gpu = GreenDevice(driver=FakeDriver())
    for sizes in ([], [0], [12], [-8]):
        with pytest.raises(ValueError, match="positive multiples of 8"):
            gpu.carve(sizes)
    with pytest.raises(ValueError, match="some of 0 to 15"):
        gpu.slice([16])


def test_another_number_of_sms_than_asked_for_is_an_error_and_leaves_nothing() -> None:
    driver = FakeDriver()
    gpu = GreenDevice(driver=driver)
    driver.swallow = 2
    with pytest.raises(GreenError, match="asked for 32 SMs, the driver gave 30"):
        gpu.carve([32])
    assert not driver.contexts and gpu.parts == 0


@pytest.mark.parametrize("step", ["cuGreenCtxStreamCreate", "cuGreenCtxGetDevResource"])
def test_a_step_that_fails_leaves_no_context(step: str) -> None:
    driver = FakeDriver()
    gpu = GreenDevice(driver=driver)
    driver.fail[step] = Code.CUDA_ERROR_OUT_OF_MEMORY
    with pytest.raises(GreenError, match=f"{step} gave CUDA_ERROR_OUT_OF_MEMORY"):
        gpu.carve([32, 32])
    assert not driver.contexts and not driver.streams and gpu.parts == 0


def test_a_driver_without_green_contexts_says_so() -> None:
    driver = FakeDriver()
    driver.fail["cuDeviceGetDevResource"] = Code.CUDA_ERROR_NOT_SUPPORTED
    with pytest.raises(GreenUnavailable, match=r"CUDA_ERROR_NOT_SUPPORTED.*driver 550"):
        GreenDevice(driver=driver)
    with pytest.raises(GreenUnavailable, match=r"no cuDeviceGetDevResource.*moesaic\[slices\]"):
        GreenDevice(driver=object())


def test_without_the_package_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(GreenUnavailable, match=r"pip install 'moesaic\[slices\]'"):
        load_driver()


def test_parts_do_not_grow_without_end() -> None:
    driver = FakeDriver(total=8 * (MAX_PARTS + 1))
    gpu = GreenDevice(driver=driver)
    for atom in range(MAX_PARTS):
        gpu.slice([atom])
    with pytest.raises(GreenError, match="exist already"):
        gpu.slice([MAX_PARTS])
    assert gpu.slice([0]) is gpu.slice([0]) and len(driver.contexts) == MAX_PARTS


@pytest.mark.gpu
@needs_gpu
def test_triton_kernels_stay_on_the_sms_of_their_part() -> None:
    from moesaic.kernels.smid import sms_used

    everything = sms_used(torch.cuda.Stream())
    try:
        gpu = GreenDevice(0)
    except GreenUnavailable as error:
        pytest.skip(str(error))
    with gpu:
        assert len(everything) == gpu.cut.total_sms
        most = gpu.cut.atom_sms * gpu.cut.atoms
        for sizes in ([8, 8], [32, most - 32], [16, 40, 56], [64]):
            parts = gpu.carve(sizes)
            used = [probe_launch(part, sms_used) for part in parts]
            assert [len(sms) for sms in used] == [part.sms for part in parts]
            assert sum(map(len, used)) == len(set().union(*used))
        assert sms_used(torch.cuda.Stream()) == everything


@pytest.mark.gpu
@needs_gpu
def test_a_graph_keeps_the_sms_of_the_stream_that_captured_it() -> None:
    from moesaic.kernels.smid import WAIT, smid_kernel, sms_used

    try:
        gpu = GreenDevice(0)
    except GreenUnavailable as error:
        pytest.skip(str(error))
    with gpu:
        small, large = gpu.carve([16, 64])
        expected = sms_used(small.stream)
        out_P = torch.full((2048,), -1, dtype=torch.int32, device="cuda")
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=small.stream):
            smid_kernel[(2048,)](out_P, WAIT=WAIT, num_warps=4)
        for stream in (small.stream, large.stream, torch.cuda.Stream()):
            out_P.fill_(-1)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                graph.replay()
            stream.synchronize()  # of the device, it returns before the graph has ended
            assert set(out_P.tolist()) == expected
        del graph
