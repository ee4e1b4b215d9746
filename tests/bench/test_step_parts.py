"""What a step's time goes to, from names of launches that a profiler saw."""

from __future__ import annotations

import pytest

from moesaic.bench.step_parts import PARTS, Launch, parts_ms


def steps(*launches: tuple[str, float]) -> list[Launch]:
    """Launches of these lengths, half a microsecond apart."""
    found, at = [], 0.0
    for name, length in launches:
        found.append(Launch(name, at, length))
        at += length + 0.5
    return found


LAYER = (
    ("triton_red_fused__to_copy_mean_pow_0", 1.0),
    ("triton_red_fused__to_copy_add_mean_mm_mul_pow_rsqrt_t_view_3", 6.0),
    ("triton_per_fused__to_copy_add_cat_mean_mm_mul_neg_pow_rsqrt_slice_transpose_unsqueeze_", 1.0),
    ("cudnn_generated_fort_native_sdpa_sm80_flash_fprop_wmma_f16_knob_35_kernel0_0", 8.0),
    ("triton_red_fused_mm_t_transpose_view_5", 3.0),
    ("nvjet_sm90_tst_64x8_64x16_2x1_v_bz_splitK_TNT", 7.0),
    ("void cublasLt::splitKreduce_kernel<32, 16, int, float>", 1.0),
    ("triton_red_fused__unsafe_view_add_experts_mean_mm_mul_pow_rsqrt_view_6", 2.0),
    ("nvjet_sm90_tst_8x64_64x16_1x2_h_bz_splitK_TNN", 4.0),
    ("void cublasLt::splitKreduce_kernel<32, 16, int, float>", 1.5),
    ("route_kernel", 2.0),
    ("sort_small_kernel", 2.0),
    ("pair_kernel", 26.0),
    ("triton_poi_fused__unsafe_view_add_mm_view_9", 1.0),
)


def test_every_launch_of_a_layer_has_its_part() -> None:
    found = parts_ms(steps(*LAYER, *LAYER, ("nvjet_sm90_tst_64x8_64x16_4x1_v_bz_TNT", 138.0)))
    assert tuple(found) == PARTS
    us = {part: round(ms * 1e3, 3) for part, ms in found.items()}
    assert us == {
        "attention": 17.0, "products": 38.0, "router": 18.0, "experts": 58.0, "head": 138.0,
        "other": 14.0,
    }  # fmt: skip


def test_a_launch_that_waits_for_the_one_before_counts_once() -> None:
    launches = [Launch("route_kernel", 0.0, 4.0), Launch("pair_kernel", 1.0, 30.0)]
    launches.append(Launch("nvjet", 31.5, 8.0))
    found = parts_ms(launches)
    assert found == pytest.approx(
        {"attention": 0, "products": 0, "router": 1e-3, "experts": 0.0305, "head": 8e-3, "other": 0}
    )
    assert sum(found.values()) == pytest.approx(39.5e-3)
    assert not any(parts_ms([]).values())


def test_a_router_in_one_launch_takes_no_product_with_it() -> None:
    found = parts_ms(
        steps(("nvjet_a", 7.0), ("router_kernel", 3.0), ("up", 20.0), ("nvjet_b", 9.0))
    )
    us = {part: round(ms * 1e3, 3) for part, ms in found.items() if ms}
    assert us == {"products": 7.5, "router": 3.5, "other": 20.5, "head": 9.0}
