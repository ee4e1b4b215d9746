"""The job in this process: what it writes and says, and how it ends when something is wrong."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from moesaic import ExpertSpec, ExpertWeights, moe
from moesaic.cli import app
from moesaic.models import byte_windows, eager_experts, heldout_path, load_model
from moesaic.run import command, main, report
from moesaic.run.execute import eager_route
from moesaic.run.picture import main as picture
from moesaic.trace import read_trace

FILES = ["heatmap.png", "report.html", "run.jsonl", "trace.parquet"]


def last_json(out: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(out.splitlines()[-1])
    return document


def cut_short(
    hidden: Tensor, ids: Tensor, scale: Tensor, weights: ExpertWeights, spec: ExpertSpec
) -> Tensor:
    """An executor that loses the last token's last slot."""
    scale = scale.clone()
    scale[-1, -1] = 0
    return moe(hidden, ids, scale, weights, spec)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_whole_job(
    tiny_model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: str
) -> None:
    out = tmp_path / "runs"
    code = main(tiny_model, text=text, out=out, device="cpu", dtype=dtype, trace_ids=True)
    document = last_json(capsys.readouterr().out)
    assert code == 0
    assert document["status"] == "complete"
    assert document["bytes"] == document["planned_bytes"] == 1003
    layers, routed = 2, 1003 * 2 * 2
    for side in ("moesaic", "baseline"):
        assert document[side]["rows_routed"] == document[side]["rows_computed"] == routed
        assert document[side]["rows_wrong"] == 0
    if dtype == "float32":
        assert document["max_logit_difference"] < 1e-4
        assert document["slots_routed_differently"] == 0
    run = Path(document["report"])
    assert [p.name for p in out.iterdir()] == [run.name]
    assert sorted(p.name for p in run.iterdir()) == FILES
    lines = [json.loads(line) for line in (run / "run.jsonl").read_text().splitlines()]
    kinds = [line["kind"] for line in lines]
    chunks = document["chunks"]
    assert kinds == ["run", *["chunk"] * chunks, *["layer"] * layers, "summary"]
    trace = read_trace(run / "trace.parquet", num_experts=8)
    assert trace.info.tokens == 1003
    assert len(trace.rows) == chunks * layers
    counted = [
        [sum(r.counts_E[e] for r in trace.rows if r.layer == i) for e in range(8)]
        for i in range(layers)
    ]
    assert counted == [line["counts_E"] for line in lines if line["kind"] == "layer"]


def test_bits_and_routing_are_those_of_the_model(
    tiny_model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against a loop that shares nothing with the job but the model."""
    main(tiny_model, text=text, out=tmp_path, device="cpu", trace_ids=True)
    document = last_json(capsys.readouterr().out)
    model = load_model(tiny_model, experts_impl=eager_experts)
    nats, seen = 0.0, [[], []]  # type: ignore[var-annotated]
    for inputs, targets in byte_windows(text.read_bytes(), model.config.context):
        logits = model(inputs[None], observe=lambda i, r: seen[i].append(r.topk_ids_TK))[0]
        nats -= float(logits.double().log_softmax(-1)[range(len(targets)), targets].sum())
    expected = nats / 1003 / 0.6931471805599453
    assert document["baseline"]["bits_per_byte"] == pytest.approx(expected, rel=1e-6)
    assert document["moesaic"]["bits_per_byte"] == pytest.approx(expected, rel=1e-6)
    trace = read_trace(Path(document["report"]) / "trace.parquet")
    for layer in range(2):
        ids = [e for row in trace.rows if row.layer == layer for e in row.ids or ()]
        assert ids == torch.cat(seen[layer]).flatten().tolist()


def test_a_moved_slot_excuses_only_what_follows_it() -> None:
    """One window of four tokens, K = 2; ids in another order are the same choice."""
    from moesaic.run.execute import Pass, differences
    from moesaic.run.plan import Chunk

    ids = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7]])
    other = torch.tensor([[1, 0], [2, 3], [5, 6], [6, 7]])
    difference_T = torch.tensor([1e-6, 2e-6, 5.0, 7.0])
    ours = Pass(torch.zeros(4, 3), (ids, ids), 1.0, 1.0)
    theirs = Pass(difference_T[:, None].expand(4, 3), (ids, other), 1.0, 1.0)
    found = differences(ours, theirs, Chunk(0, 0, 1, 4, True))
    assert found == (7.0, pytest.approx(2e-6), 1)
    two_windows = differences(ours, theirs, Chunk(0, 0, 2, 2, True))
    assert two_windows == (7.0, pytest.approx(2e-6), 1)
    unexcused = differences(
        ours, Pass(theirs.logits_TV, (ids, ids), 1.0, 1.0), Chunk(0, 0, 1, 4, True)
    )
    assert unexcused == (7.0, 7.0, 0)


def test_the_baseline_routes_as_moesaic(tiny_model: Path) -> None:
    spec = load_model(tiny_model).config.router_spec()
    logits_TE = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    from moesaic import route

    ours, theirs = route(logits_TE, spec), eager_route(logits_TE, spec)
    assert ours.topk_ids_TK.tolist() == theirs.topk_ids_TK.tolist()
    torch.testing.assert_close(ours.topk_weights_TK, theirs.topk_weights_TK)


def test_a_lost_row_ends_with_1_and_a_report_that_says_so(
    tiny_model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(tiny_model, text=text, out=tmp_path, device="cpu", experts=cut_short) == 1
    shown = capsys.readouterr().out
    document = last_json(shown)
    assert not document["rows_agree"]
    assert document["moesaic"]["rows_computed"] < document["moesaic"]["rows_routed"]
    assert document["baseline"]["rows_wrong"] == 0
    assert "NOT EQUAL" in shown
    assert "do not agree" in (Path(document["report"]) / "report.html").read_text()


def test_the_page_needs_nothing_else_and_escapes(
    tiny_model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = text.rename(tmp_path / "<b>&.txt")
    main(tiny_model, text=odd, out=tmp_path / "runs", limit=200, device="cpu")
    run = Path(last_json(capsys.readouterr().out)["report"])
    page = (run / "report.html").read_text()
    assert "<b>&" not in page
    assert "&lt;b&gt;&amp;.txt" in page
    assert page.count('src="data:image/png;base64,') == page.count("<img") == 2
    # Not in the pictures, whose letters come by chance.
    assert "http" not in re.sub(r"base64,[^\"]*", "", page)
    assert "<script" not in page
    picture([str(run), str(tmp_path / "run.png")])
    for png in (tmp_path / "run.png", run / "heatmap.png"):
        assert png.read_bytes().startswith(b"\x89PNG")


def test_same_second_gets_another_name(tmp_path: Path) -> None:
    now = report.datetime(2026, 1, 2, 3, 4, 5)
    names = []
    for _ in range(3):
        with report.ReportDirectory(tmp_path, now) as directory:
            directory.line("run", {})
            names.append(directory.commit().name)
    assert names == ["2026-01-02T03-04-05", "2026-01-02T03-04-05-2", "2026-01-02T03-04-05-3"]


@pytest.mark.parametrize("victim", FILES)
def test_full_disk(
    tiny_model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: str
) -> None:
    """Whichever file hits the end of the disk: one line, code 2, nothing left."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def refuse(*_: object, **__: object) -> None:
        raise full

    if victim == "trace.parquet":
        monkeypatch.setattr("moesaic.trace.TraceWriter._flush", refuse)
    elif victim == "run.jsonl":
        monkeypatch.setattr(report.os, "fsync", refuse)
    else:
        write = Path.write_bytes
        monkeypatch.setattr(
            Path,
            "write_bytes",
            lambda self, data: refuse() if self.name == victim else write(self, data),
        )
    out = tmp_path / "runs"
    arguments = ["run", str(tiny_model), "--text", str(text), "--out", str(out), "--bytes", "200"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    complaint = [line for line in result.stderr.splitlines() if line.startswith("moesaic:")]
    assert len(complaint) == 1
    assert "No space left on device; free some space" in complaint[0]
    assert list(out.iterdir()) == []


def bad_files(tmp_path: Path, model: Path) -> dict[str, Path]:
    data = model.read_bytes()
    contents = {
        "empty": b"",
        "binary": bytes(range(128, 256)),
        "truncated": data[: len(data) // 2],
        "no_header": data[:5],
        "pickle": b"\x80\x04\x95\x05\x00\x00\x00\x00\x00\x00\x00\x8c\x01a\x94.",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    return {name: tmp_path / name for name in (*contents, "missing")} | {"folder": tmp_path}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{model}", "--text", "{missing}"], "no such file; give --text"),
        (["{model}", "--text", "{empty}"], "is empty"),
        (["{model}", "--text", "{binary}"], "not UTF-8 text, byte 0x80 at offset 0"),
        (["{model}", "--text", "{folder}"], "is a directory"),
        (["{missing}"], "no such file"),
        (["{folder}"], "holds no config.json"),
        (["{truncated}"], "not a complete safetensors file"),
        (["{no_header}"], "not a complete safetensors file"),
        (["{pickle}"], "not a complete safetensors file"),
        (["{model}", "--dtype", "int8"], "--dtype must be one of"),
        (["{model}", "--device", "tpu"], "--device must be auto, cpu or cuda"),
        (["{model}", "--bytes", "0"], "--bytes must be at least 1"),
        (["{model}", "--text", "{text}", "--out", "{empty}"], "free some space there or give"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    tiny_model: Path, text: Path, tmp_path: Path, arguments: list[str], said: str
) -> None:
    places = {**bad_files(tmp_path, tiny_model), "model": tiny_model, "text": text}
    filled = [argument.format(**places) for argument in arguments]
    out = [] if "--out" in filled else ["--out", str(tmp_path / "runs")]
    result = CliRunner().invoke(app, ["run", *filled, *out])
    complaint = [line for line in result.stderr.splitlines() if line.startswith("moesaic:")]
    assert result.exit_code == 2
    assert len(complaint) == 1
    assert said in complaint[0]
    assert "Traceback" not in result.output
    assert result.stdout == ""
    assert not (tmp_path / "runs").exists()


def test_cuda_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="PyTorch sees none; use --device cpu"):
        command.choose_device("cuda")
    assert command.choose_device("auto").type == "cpu"


def test_the_default_is_the_embedded_model_on_heldout_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(out=tmp_path, limit=300, device="cpu") == 0
    document = last_json(capsys.readouterr().out)
    assert (document["model"], document["text"]) == ("the embedded model", "held-out text")
    assert document["config"]["num_layers"] >= 4
    assert document["planned_bytes"] == 300 < heldout_path().stat().st_size
