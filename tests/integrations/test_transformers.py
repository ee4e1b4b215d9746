"""The five layouts of transformers' experts, every check; every family in the slow run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hf_checks
import hf_table
import pytest
import torch
from hf_families import families

from moesaic.integrations import transformers as adapter

# One family a layout: plain, own gate, interleaved and biased, transposed and biased, ungated.
LAYOUTS = ("qwen3_moe", "minimax_m3_vl", "gpt_oss", "openai_privacy_filter", "nemotron_h")


@pytest.mark.parametrize("check", hf_checks.CHECKS)
@pytest.mark.parametrize("family", LAYOUTS)
def test_layout(family: str, check: str) -> None:
    hf_checks.CHECKS[check](family)


# The families whose tiny models the pinned version builds; a newer one may have more.
TABLE = Path(__file__).parents[2] / "benchmarks" / "transformers-families.json"
KNOWN = [f for f in json.loads(TABLE.read_text("utf-8")) if f in families() and f not in LAYOUTS]


@pytest.mark.slow
@pytest.mark.parametrize("check", hf_checks.CHECKS)
@pytest.mark.parametrize("family", KNOWN)
def test_family(family: str, check: str) -> None:
    hf_checks.CHECKS[check](family)


def test_a_worse_rounding_is_found_out() -> None:
    generator = torch.Generator().manual_seed(0)
    theirs_SN = torch.rand(32, 48, generator=generator) < 0.95
    ours_SN = theirs_SN & (torch.rand(32, 48, generator=generator) < 0.97)
    assert hf_checks.not_worse(theirs_SN, theirs_SN)
    assert hf_checks.not_worse(theirs_SN, ours_SN) and not hf_checks.not_worse(ours_SN, theirs_SN)


def test_a_wrong_implementation_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations.moe import ExpertsInterface

    def halves(module: Any, *arguments: Any) -> torch.Tensor:
        return 0.5 * adapter.moesaic_experts(module, *arguments)

    monkeypatch.setitem(ExpertsInterface._global_mapping, "moesaic", halves)
    for name in ("logits", "gradients"):
        with pytest.raises(AssertionError, match="differ by"):
            hf_checks.CHECKS[name]("qwen3_moe")


def test_the_page_holds_the_committed_tables() -> None:
    assert hf_table.main(["--check"]) == 0
