"""The five layouts of transformers' experts, every check; every family in the slow run."""

from __future__ import annotations

import hf_checks
import pytest
from hf_families import families

# One family a layout: plain, own gate, interleaved and biased, transposed and biased, ungated.
LAYOUTS = ("qwen3_moe", "minimax_m3_vl", "gpt_oss", "openai_privacy_filter", "nemotron_h")


@pytest.mark.parametrize("check", hf_checks.CHECKS)
@pytest.mark.parametrize("family", LAYOUTS)
def test_layout(family: str, check: str) -> None:
    hf_checks.CHECKS[check](family)


@pytest.mark.slow
@pytest.mark.parametrize("check", hf_checks.CHECKS)
@pytest.mark.parametrize("family", [f for f in families() if f not in LAYOUTS])
def test_family(family: str, check: str) -> None:
    hf_checks.CHECKS[check](family)
