"""The job as a process: pipes, Ctrl-C in the middle of 200 MB, a disk that really is full."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moesaic.trace import read_trace

ROOT = Path(__file__).resolve().parents[2]
ENV = {
    **os.environ,
    "PYTHONPATH": str(ROOT / "src"),
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
LONG = 200_000_000


def start(*arguments: object, **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "moesaic", "run", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENV,
        **options,  # type: ignore[call-overload]
    )


def peak_mib(process: subprocess.Popen[str]) -> float:
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def chunk_lines(out: Path) -> int:
    return sum(p.read_text().count('"kind":"chunk"') for p in out.glob(".*partial/run.jsonl"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_200_mb_interrupted(tiny_model: Path, text: Path, tmp_path: Path) -> None:
    long, out = tmp_path / "long.txt", tmp_path / "runs"
    block = b"The same words again and again, until two hundred megabytes are full.\n" * 10_000
    with long.open("wb") as file:
        while file.tell() < LONG:
            file.write(block)
    process = start(tiny_model, "--text", long, "--out", out)
    deadline = time.monotonic() + 120
    while chunk_lines(out) < 5 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    peak = peak_mib(process)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "finishing this chunk" in stderr
    assert "Traceback" not in stderr
    document = json.loads(stdout.splitlines()[-1])
    assert document["status"] == "interrupted"
    assert document["ok"]
    assert document["planned_bytes"] == long.stat().st_size
    assert 0 < document["bytes"] == document["chunks"] * document["tokens_per_chunk"] < LONG
    assert "INTERRUPTED" in stdout
    run = Path(document["report"])
    assert "Interrupted:" in (run / "report.html").read_text()
    assert read_trace(run / "trace.parquet").info.tokens == document["bytes"]
    assert [p.name for p in out.iterdir()] == [run.name]

    with start(tiny_model, "--text", text, "--out", out) as short:
        assert short.stdout is not None
        stdout = short.stdout.read()
        _, code, usage = os.wait4(short.pid, 0)
        short.returncode = os.waitstatus_to_exitcode(code)
    assert short.returncode == 0
    assert json.loads(stdout.splitlines()[-1])["status"] == "complete"
    # Held in memory, the long text alone would be 190 MiB.
    assert peak < usage.ru_maxrss / 1024 + 60


def test_a_disk_that_ends(tiny_model: Path, text: Path, tmp_path: Path) -> None:
    """A limit on file sizes stands for the full disk: the system refuses the write itself."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    out = tmp_path / "runs"
    process = start(tiny_model, "--text", text, "--out", out, preexec_fn=limit)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 2, stderr
    assert "the report cannot be written" in stderr
    assert "Traceback" not in stderr
    assert stdout == ""
    assert list(out.iterdir()) == []
