"""`moesaic run` and `moesaic profile` on a local transformers directory."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hf_checks import token_ids
from hf_families import model_class, tiny_config, tiny_model
from typer.testing import CliRunner

from moesaic.cli import app
from moesaic.models.pretrained import load_pretrained
from moesaic.planner.cluster import load_cluster
from moesaic.planner.model import load_model
from moesaic.planner.sampling import Sampler
from moesaic.planner.workload import load_workload
from moesaic.run import pretrained
from moesaic.run.generate import Decoder, Stream
from moesaic.run.witness import unit_weights
from moesaic.runtime.capture import CaptureFailed
from moesaic.trace import read_trace
from moesaic.types import ExpertSpec

TEXT = "Mosaics are made of small tiles; every tile keeps its colour. \N{BLACK HEART SUIT}\n" * 24


def save_tokenizer(folder: Path) -> int:
    """A tokenizer of bytes, without merges; its size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1} | {c: i + 2 for i, c in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    return len(vocabulary)


def save_model(family: str, folder: Path) -> Path:
    size = save_tokenizer(folder)
    config = tiny_config(family)
    config.vocab_size, config.bos_token_id, config.eos_token_id = size, 0, 1
    torch.manual_seed(0)
    model_class(family)(config).eval().save_pretrained(folder)  # type: ignore[operator]
    return folder


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("qwen3_moe", tmp_path_factory.mktemp("tiny-qwen"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def invoke(*arguments: Any) -> tuple[int, dict[str, Any], str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    last = (result.stdout.strip().splitlines() or ["{}"])[-1]
    return result.exit_code, json.loads(last) if last.startswith("{") else {}, result.output


def test_a_directory_is_scored_by_both_to_the_same_bits(
    directory: Path, text: Path, tmp_path: Path
) -> None:
    code, found, output = invoke("run", directory, "--text", text, "--out", tmp_path, "--trace-ids")
    assert code == 0, output
    assert found["ok"] and found["unit"] == "tokens" and found["bytes"] == len(TEXT.encode())
    ours, theirs = found["moesaic"], found["baseline"]
    assert ours["bits_per_byte"] == pytest.approx(theirs["bits_per_byte"], rel=1e-5)
    # Every byte is a token of this tokenizer, and a random model knows nothing.
    assert ours["bits_per_byte"] == pytest.approx(np.log2(258), abs=0.3)
    assert ours["rows_routed"] == ours["rows_computed"] == found["bytes"] * 2 * 2
    assert ours["rows_wrong"] == theirs["rows_wrong"] == 0
    folder = Path(found["report"])
    assert {p.name for p in folder.iterdir()} >= {"report.html", "heatmap.png", "run.jsonl"}
    trace = read_trace(folder / "trace.parquet", num_experts=8)
    assert trace.info.tokens == found["bytes"] and trace.info.layers == 2


def test_an_executor_that_drops_rows_is_found_out(
    directory: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = pretrained.moesaic_experts

    def forgets(module: Any, hidden: Any, ids: Any, weights: Any) -> Any:
        weights = weights.clone()
        weights[-1, -1] = 0
        return honest(module, hidden, ids, weights)

    monkeypatch.setattr(pretrained, "moesaic_experts", forgets)
    code, found, _ = invoke(
        "run", directory, "--text", text, "--out", tmp_path, "--bytes", 200
    )  # fmt: skip
    assert code == 1 and not found["rows_agree"] and found["moesaic"]["rows_wrong"] > 0


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"interleaved": True, "transposed": True, "bias": True, "limit": 7.0, "alpha": 1.702,
         "up_offset": 1.0},
        {"gated": False, "activation": "relu2"},
        {"activation": "gelu_tanh"},
    ],
)  # fmt: skip
def test_the_witness_counts_for_every_layout(changes: dict[str, Any]) -> None:
    from moesaic import moe

    spec = ExpertSpec(num_experts=4, hidden_size=16, intermediate_size=8, **changes)
    for dtype in (torch.float32, torch.bfloat16):
        weights = unit_weights(spec, dtype, torch.device("cpu"))
        hidden_TH = torch.zeros(2, 16, dtype=dtype)
        hidden_TH[:, 0] = 1
        ids_TK = torch.tensor([[0, 2], [2, 1]])
        out_TH = moe(hidden_TH, ids_TK, torch.ones(2, 2), weights, spec)
        want_TH = torch.zeros(2, 16)
        want_TH[0, [0, 2]] = want_TH[1, [1, 2]] = 1
        torch.testing.assert_close(out_TH.float(), want_TH, rtol=0, atol=0.05)


def test_generation_streams_the_tokens_that_transformers_generates(directory: Path) -> None:
    prompt = "Mosaics are"
    code, found, output = invoke("run", directory, "--generate", 12, "--prompt", prompt)
    assert code == 0, output
    loaded = load_pretrained(directory, dtype=torch.float32, device=torch.device("cpu"))
    ids = torch.tensor([[loaded.start, *loaded.encode(prompt)]])
    want = loaded.model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert found["text"] == loaded.decode(want.tolist())
    assert found["tokens"] <= 12 and found["tokens_per_s"] > 0
    assert found["joules_per_token"] is None and "not available" in found["energy"]
    # Every token but the last went through K experts of every layer, the prompt with them.
    rows = [sum(layer) for layer in found["rows_per_expert"].values()]
    assert rows == [(ids.shape[1] + found["tokens"]) * 2] * 2
    assert output.count(found["text"][:5]) >= 1


class Recorder:
    """Records without a GPU: a replay calls again; `fails` refuses as a capture would."""

    def __init__(self, fails: bool) -> None:
        self.fails, self.replays = fails, 0

    def warm(self, call: Any, sms: Any) -> Any:
        return call()

    def record(self, call: Any, sms: Any) -> Any:
        if self.fails:
            raise CaptureFailed("waits for the device")

        def replay() -> None:
            self.replays += 1
            call()

        return SimpleNamespace(replay=replay)


@pytest.mark.parametrize("recorder", [None, Recorder(False), Recorder(True)])
def test_a_static_cache_and_recorded_steps_give_the_same_tokens(
    directory: Path, recorder: Recorder | None
) -> None:
    loaded = load_pretrained(directory, dtype=torch.float32, device=torch.device("cpu"))
    ids, tokens = [loaded.start, *loaded.encode("Mosaics are")], {}
    for static in (False, True):
        ends: list[int] = []
        counter = torch.zeros(1)
        decoder = Decoder(
            loaded.model, torch.device("cpu"), 40, lambda ends=ends: ends.append(1), static=static
        )
        with torch.no_grad():
            decoder.prefill(ids)
            if static and recorder is not None:
                decoder.capture(recorder, [counter])  # type: ignore[arg-type]
                assert decoder.graph == (
                    "none: waits for the device" if recorder.fails else "captured"
                )
            tokens[static] = [decoder.step() for _ in range(12)]
        assert len(ends) == 13 and decoder.cache.get_seq_length() == len(ids) + 12
    assert tokens[True] == tokens[False]
    assert recorder is None or recorder.replays == (0 if recorder.fails else 12)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_sliding_window_is_left_by_the_mask_not_by_the_cache(family: str) -> None:
    model = tiny_model(family)
    assert model.config.sliding_window == 16
    ids = token_ids(model, 1, 9)[0].tolist()
    tokens = {}
    for static in (False, True):
        decoder = Decoder(model, torch.device("cpu"), 40, lambda: None, static=static)
        with torch.no_grad():
            decoder.prefill(ids)
            tokens[static] = [decoder.step() for _ in range(24)]
        if static:
            assert all(isinstance(x.cumulative_length, torch.Tensor) for x in decoder.cache.layers)
            assert decoder.cache.get_seq_length() == 9 + 24 > 16
    assert tokens[True] == tokens[False]


def test_a_character_waits_for_its_bytes(directory: Path) -> None:
    loaded = load_pretrained(directory, dtype=torch.float32, device=torch.device("cpu"))
    stream = Stream(loaded)
    pieces = [stream.add(token) for token in loaded.encode("a\N{BLACK HEART SUIT}b")]
    assert pieces == ["a", "", "", "\N{BLACK HEART SUIT}", "b"]


def test_profile_writes_what_planners_read(directory: Path, text: Path, tmp_path: Path) -> None:
    code, found, output = invoke("profile", directory, "--text", text, "--out", tmp_path / "runs")
    assert code == 0, output
    folder = Path(found["report"])
    assert {p.name for p in folder.iterdir()} == {
        "heatmap.png", "coactivation.png", "affinity.png", "matrices.npz", "perfetto.json",
        "profile.jsonl", "trace.parquet", "run.jsonl",
    }  # fmt: skip
    tokens = len(TEXT.encode())
    with np.load(folder / "matrices.npz") as arrays:
        counts, together = arrays["counts_LE"], arrays["coactivation_LEE"]
        affinity = arrays["affinity_LEE"]
    assert counts.sum(1).tolist() == [tokens * 2] * 2
    assert together.sum((1, 2)).tolist() == [tokens * 2] * 2  # ordered pairs of two experts
    assert affinity.sum() == tokens * 4
    trace = read_trace(folder / "trace.parquet", num_experts=8)
    assert all(row.ids is not None for row in trace.rows)
    totals = np.zeros_like(counts)
    for row in trace.rows:
        totals[row.layer] += row.counts_E
    assert totals.tolist() == counts.tolist()
    lines = (folder / "profile.jsonl").read_text("utf-8").splitlines()
    rows = sum(sum(json.loads(line)["layers"][1]["counts_E"]) for line in lines)
    assert rows == tokens * 2
    events = json.loads((folder / "perfetto.json").read_text("utf-8"))["traceEvents"]
    assert any(event["name"] == "rows" for event in events)


def test_a_profile_of_one_step_plans_a_deployment(
    directory: Path, text: Path, tmp_path: Path
) -> None:
    code, found, output = invoke("profile", directory, "--text", text, "--out", tmp_path / "runs")
    assert code == 0, output
    trace = Path(found["report"]) / "trace.parquet"
    (tmp_path / "workload.yaml").write_text(
        f"phase: decode\ntrace: {trace}\nreplan: {{every: 1}}\n"
    )
    work = load_workload(tmp_path / "workload.yaml", num_experts=8, layers=2)
    assert work.trace is not None and work.trace.shape[1:] == (2, 8)
    model = load_model(directory / "config.json")
    for steps in (1, 2, 5):  # a short text is one step: its past is itself
        kept = replace(work, trace=np.repeat(work.trace[:1], steps, axis=0))
        drawn = Sampler(model, load_cluster("H200x1"), kept).counts(1, 4096).sum(axis=(0, 1))
        assert drawn.sum() and np.all(drawn[work.trace[0].sum(axis=0) == 0] == 0)


@pytest.mark.parametrize(
    ("break_it", "problem"),
    [
        (lambda d: (d / "config.json").unlink(), "holds no config.json"),
        (lambda d: [p.unlink() for p in d.glob("*.safetensors")], r"holds no \*.safetensors"),
        (lambda d: (d / "tokenizer.json").unlink(), "holds no tokenizer.json"),
    ],
)
def test_a_directory_that_is_no_model_is_refused(
    directory: Path, tmp_path: Path, break_it: Any, problem: str
) -> None:
    import shutil

    broken = Path(shutil.copytree(directory, tmp_path / "broken"))
    break_it(broken)
    with pytest.raises(FileNotFoundError, match=problem):
        load_pretrained(broken, dtype=torch.float32, device=torch.device("cpu"))
    code, _, output = invoke("run", broken)
    assert code == 2 and output.startswith("moesaic: ")


def test_options_that_do_not_go_together_are_refused(directory: Path, text: Path) -> None:
    for arguments, problem in (
        (("run", "--generate", 3), "need MODEL"),
        (("run", directory, "--prompt", "a"), "--prompt needs --generate"),
        (("run", directory, "--generate", 0), "at least 1"),
        (("run", directory, "--generate", 1, "--prompt", "a", "--text", text), "not both"),
    ):
        code, _, output = invoke(*arguments)
        assert code == 2 and problem in output
