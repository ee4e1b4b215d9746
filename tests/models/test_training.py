"""The training example: text split, baseline, fast experts, and a run from end to end."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moesaic import ExpertSpec, ExpertWeights, RouterSpec, route
from moesaic.models import load_model
from moesaic.reference import moe_reference

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

corpus = importlib.import_module("moe_lm.corpus")
grouped = importlib.import_module("moe_lm.grouped")
ngram = importlib.import_module("moe_lm.ngram")
report = importlib.import_module("moe_lm.report")

SPEC = ExpertSpec(num_experts=5, hidden_size=16, intermediate_size=24)


def test_grouped_experts_equal_the_reference_forward_and_backward() -> None:
    g = torch.Generator().manual_seed(2)
    ids = torch.randint(0, 4, (29, 2), generator=g)
    ids[:, 1] = (ids[:, 0] + 1) % 4  # expert 4 gets nothing
    made = [torch.randn(29, 16, generator=g), torch.rand(29, 2, generator=g),
            torch.randn(5, 48, 16, generator=g), torch.randn(5, 16, 24, generator=g)]  # fmt: skip
    grad = torch.randn(29, 16, generator=g)
    results = []
    for function in (grouped.grouped_experts, moe_reference):
        hidden, scale, up, down = (t.clone().requires_grad_() for t in made)
        out = function(hidden, ids, scale, ExpertWeights(up, down), SPEC)
        out.backward(grad)
        results.append([out, hidden.grad, scale.grad, up.grad, down.grad])
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_layout_pads_each_group_and_places_each_slot_once() -> None:
    ids = torch.randint(0, 5, (50, 2), generator=torch.Generator().manual_seed(4))
    where = grouped.layout(ids, 5)
    ends = where.ends_E.tolist()
    assert all(end % grouped.GROUP == 0 for end in ends)
    assert ends[-1] == len(where.slot_P)
    flat = where.row_TK.flatten()
    assert torch.equal(where.slot_P[flat], torch.arange(100))
    assert int((where.slot_P == 100).sum()) == len(where.slot_P) - 100
    assert torch.equal(torch.bucketize(flat, where.ends_E, right=True), ids.flatten())


def test_training_router_equals_route_and_its_loss_is_one_when_balanced() -> None:
    logits = torch.randn(40, 6, generator=torch.Generator().manual_seed(8))
    router, spec = grouped.BalancedRouter(), RouterSpec(num_experts=6, top_k=2)
    ours, theirs = router(logits, spec), route(logits, spec)
    assert torch.equal(ours.topk_ids_TK, theirs.topk_ids_TK.long())
    assert torch.allclose(ours.topk_weights_TK, theirs.topk_weights_TK)
    assert torch.equal(ours.counts_E, theirs.counts_E.long())
    router.take()
    router(20 * torch.eye(6), RouterSpec(num_experts=6, top_k=1))
    assert math.isclose(float(router.take()[0]), 1.0, abs_tol=1e-5)
    router(20 * torch.eye(6)[:1].expand(6, 6), RouterSpec(num_experts=6, top_k=1))
    assert float(router.take()[0]) > 5.9


def test_held_out_text_and_its_relatives_never_train() -> None:
    held = b"".join(b"line %d of the secret text\n" % i for i in range(99))
    files = [
        ("secret.py", b"a file of another version under the held-out name\n" * 9),
        ("copy.py", b"# moved\n" * 3 + held[500:1500]),
        *((f"plain{i}.py", b"ordinary text number %d\n" % i * 20) for i in range(300)),
        ("twin.py", b"ordinary text number 7\n" * 20),
    ]
    made = corpus.split(files, held, frozenset({"secret.py"}))
    assert made.excluded == ("secret.py", "copy.py")
    assert b"secret" not in made.train + made.validation
    assert 0 < made.validation.count(b"ordinary") < made.train.count(b"ordinary")
    assert (made.train + made.validation).count(b"number 7\n") == 20, "a twin is not repeated"
    assert not set(made.validation.split(b"\n")) & set(made.train.split(b"\n")) - {b""}


def test_ngram_probabilities_by_hand_and_sum_to_one() -> None:
    table = ngram.count(b"abababac", 2)
    every = bytes(range(256))
    given_a = b"".join(b"a%c" % byte for byte in every)
    shorter = [1 / 256] * 512
    for p in (ngram.additive(table, given_a, 0.5), ngram.discounted(table, given_a, 0.4, shorter)):
        assert math.isclose(p[1::2].sum(), 1.0)
    # after "a" came b three times and c once
    assert math.isclose(ngram.additive(table, b"ab", 0.5)[1], 3.5 / (4 + 128))
    mixed = ngram.discounted(table, b"ab", 0.4, shorter[:2])[1]
    assert math.isclose(mixed, (3 - 0.4 + 0.4 * 2 / 256) / 4)


def test_better_context_is_a_better_baseline() -> None:
    text = b"the quick brown fox jumps over the lazy dog. " * 300
    rows = ngram.baselines(text[:9000], text[9000:11000], text[11000:], orders=3)
    bpb = [row["heldout_bpb"] for row in rows]
    assert bpb[0] > 3.5 > bpb[1] > bpb[2]


def test_training_runs_and_writes_its_four_files(tmp_path: Path) -> None:
    command = [
        sys.executable, str(EXAMPLES / "train_moe_lm.py"), "train", "--device", "cpu",
        "--max-steps", "3", "--batch", "2", "--window", "64", "--validation-bytes", "2000",
        "--tiny", "--only-text-root", str(EXAMPLES.parent / "src"), "--out", str(tmp_path),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"byte_moe_lm.safetensors", "training.jsonl", "curve.png", "summary.json"}
    lines = (tmp_path / "training.jsonl").read_text().splitlines()
    kinds = [json.loads(line)["kind"] for line in lines]
    assert kinds[0] == "start"
    assert kinds[-1] == "final"
    assert {"step", "validation", "ngram"} <= set(kinds)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == 3
    assert 1 < summary["heldout_bpb"] < 8.5
    load_model(tmp_path / "byte_moe_lm.safetensors")
    card = tmp_path / "card.md"
    card.write_text("before\n<!-- numbers: begin -->\nold\n<!-- numbers: end -->\nafter\n")
    report.fill_card(card, summary, {"auto": 1.5})
    page = card.read_text()
    assert f"**{summary['heldout_bpb']:.3f}**" in page
    assert page.startswith("before\n") and page.endswith("after\n") and "old" not in page
    with pytest.raises(ValueError, match="train longer"):
        report.install(tmp_path, tmp_path, lambda *_: summary["heldout_bpb"])
