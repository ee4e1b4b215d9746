"""Bad input is refused before anything runs: what was expected, what came, what to do."""

from __future__ import annotations

import pytest
import torch

from moesaic import ExpertSpec, ExpertWeights, RouterSpec, moe, route
from moesaic.types import Routing
from moesaic.validate import values_wanted

SPEC = ExpertSpec(num_experts=8, hidden_size=16, intermediate_size=24)
WEIGHTS = ExpertWeights(up=torch.ones(8, 48, 16), down=torch.ones(8, 16, 24))
IDS = torch.tensor([[0, 7], [3, 2], [1, 5]])


def call(**changes: object) -> torch.Tensor:
    good = {
        "hidden_TH": torch.ones(3, 16),
        "topk_ids_TK": IDS,
        "topk_weights_TK": torch.ones(3, 2),
        "weights": WEIGHTS,
        "spec": SPEC,
    }
    return moe(**good | changes)


BAD = {
    "ids too large": ({"topk_ids_TK": IDS + 2}, ValueError, r"in \[0, 8\), got max 9"),
    "ids negative": ({"topk_ids_TK": IDS - 1}, ValueError, r"in \[0, 8\), got min -1"),
    "ids are floats": ({"topk_ids_TK": IDS.float()}, TypeError, "int32|int64"),
    "ids of other tokens": ({"topk_ids_TK": IDS[:2]}, ValueError, "T = 3"),
    "K over E": (
        {
            "topk_ids_TK": torch.zeros(3, 9, dtype=torch.int64),
            "topk_weights_TK": torch.ones(3, 9),
        },
        ValueError,
        "K must be in",
    ),
    "double precision": ({"hidden_TH": torch.ones(3, 16).double()}, TypeError, "float32"),
    "width": ({"hidden_TH": torch.ones(3, 8)}, ValueError, r"\(T, 16\)"),
    "batch not flat": ({"hidden_TH": torch.ones(1, 3, 16)}, ValueError, "reshape"),
    "weights per id": ({"topk_weights_TK": torch.ones(3, 1)}, ValueError, "one weight per id"),
    "weights' dtype": (
        {"topk_weights_TK": torch.ones(3, 2, dtype=torch.float16)},
        TypeError,
        "topk_weights",
    ),
    "other dtype": (
        {"weights": ExpertWeights(WEIGHTS.up.half(), WEIGHTS.down.half())},
        TypeError,
        r"cast it with \.to",
    ),
    "down's shape": (
        {"weights": ExpertWeights(WEIGHTS.up, torch.ones(8, 24, 16))},
        ValueError,
        "weight_shapes",
    ),
    "a bias nobody asked for": (
        {"weights": ExpertWeights(WEIGHTS.up, WEIGHTS.down, up_bias=torch.ones(8, 48))},
        ValueError,
        "exactly",
    ),
    "strided": (
        {"weights": ExpertWeights(torch.ones(8, 16, 48).mT, WEIGHTS.down)},
        ValueError,
        "contiguous",
    ),
    "another device": ({"topk_ids_TK": IDS.to("meta")}, ValueError, "move it"),
    "no such implementation": ({"impl": "fastest"}, ValueError, "must be one of"),
    "no GPU": ({"impl": "triton"}, RuntimeError, "needs a CUDA device"),
}


@pytest.mark.parametrize("case", BAD)
def test_refused(case: str) -> None:
    changes, error, message = BAD[case]
    with pytest.raises(error, match=message) as caught:
        call(**changes)
    assert "\n" not in str(caught.value)


def test_an_empty_batch_is_not_an_error() -> None:
    empty = call(
        hidden_TH=torch.ones(0, 16),
        topk_ids_TK=torch.zeros(0, 2, dtype=torch.int32),
        topk_weights_TK=torch.ones(0, 2),
    )
    assert empty.shape == (0, 16)
    routing = route(torch.ones(0, 8), RouterSpec(num_experts=8, top_k=2))
    assert isinstance(routing, Routing) and routing.counts_E.tolist() == [0] * 8


@pytest.mark.parametrize(
    ("logits", "bias", "error", "message"),
    [
        (torch.ones(3, 7), None, ValueError, r"\(T, 8\)"),
        (torch.ones(3, 8).double(), None, TypeError, "float32, float16 or bfloat16"),
        (torch.full((3, 8), torch.nan), None, ValueError, "NaN in row 0"),
        (torch.ones(3, 8), torch.zeros(8), ValueError, "scoring='sigmoid'"),
    ],
)
def test_bad_logits(logits: torch.Tensor, bias: torch.Tensor, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        route(logits, RouterSpec(num_experts=8, top_k=2), bias_E=bias)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 12}, "multiple of 8"),
        ({"intermediate_size": 0}, "multiple of 8"),
        ({"num_experts": 2000}, r"in \[1, 1024\]"),
        ({"activation": "tanh"}, "one of silu"),
        ({"layers": 3}, "ungated"),
        ({"gated": False, "up_offset": 1.0}, "up_offset"),
    ],
)
def test_specs_that_cannot_be(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExpertSpec(**{"num_experts": 8, "hidden_size": 16, "intermediate_size": 24} | fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 9}, "top_k"),
        ({"n_group": 3}, "divisor"),
        ({"n_group": 4, "topk_group": 5}, "topk_group"),
        ({"n_group": 8, "topk_group": 1}, "at most the experts"),
    ],
)
def test_routers_that_cannot_be(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RouterSpec(**{"num_experts": 8, "top_k": 2} | fields)


def test_checks_of_values_follow_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOESAIC_CHECK", raising=False)
    assert not values_wanted()
    for value in ("1", "0", "1"):
        monkeypatch.setenv("MOESAIC_CHECK", value)
        assert values_wanted() == (value == "1")
