"""Record the routing traces under benchmarks/traces/: the embedded model over different real texts.

    python benchmarks/record_traces.py --out benchmarks/traces

Two kinds of step. `prefill`: one step is a chunk of consecutive bytes of one text, in windows
of the model's context. `decode`: one step is one byte of each of 128 streams that stand at even
distances in the text and move on together; the bytes are the text's own (teacher forcing), so the
routing of a position is that of decoding it. `mixed` joins pieces of the texts end to end: its
phase changes are made, one every `PHASE_STEPS` steps, in the order of `PHASES`.

Texts come from the Python installation and this repository; each trace holds its text's SHA-256.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable
from pathlib import Path
from sysconfig import get_paths

import torch

from moesaic.models import ByteMoELM, heldout_path, load_model, model_path
from moesaic.trace import TraceInfo, TraceWriter
from moesaic.types import Routing

STREAMS = 128
DECODE_STEPS = 512
PREFILL_TOKENS = 1024
PREFILL_STEPS = 400
PHASE_STEPS = 80
PHASES = ("heldout", "licences", "docs", "json", "heldout")
STDLIB = Path(get_paths()["stdlib"])
SITE = Path(get_paths()["purelib"])


def heldout() -> bytes:
    """Python modules on which the model was not trained."""
    return heldout_path().read_bytes()


def stdlib() -> bytes:
    """Python modules on which the model was trained, most of them."""
    return b"".join(path.read_bytes() for path in sorted(STDLIB.glob("*.py")))


def docs() -> bytes:
    """The language reference as `help()` shows it: prose."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics)).encode()


def licences() -> bytes:
    """Licence texts of the installed packages, each once."""
    files = sorted(
        path
        for folder in SITE.glob("*.dist-info")
        for path in folder.rglob("*")
        if path.is_file() and path.name.upper().startswith(("LICENSE", "COPYING"))
    )
    return b"\n".join(dict.fromkeys(path.read_bytes() for path in files))


def json_lines() -> bytes:
    """This repository's results, JSON line by line, as they are when this runs."""
    root = Path(__file__).resolve().parent / "results"
    return b"".join((root / name).read_bytes() for name in ("cpu/cpu.jsonl", "h200/triton.jsonl"))


def changelog() -> bytes:
    """IDLE's list of changes."""
    return (STDLIB / "idlelib" / "NEWS.txt").read_bytes()


TEXTS: dict[str, Callable[[], bytes]] = {
    "heldout": heldout,
    "stdlib": stdlib,
    "docs": docs,
    "licences": licences,
    "json": json_lines,
    "changelog": changelog,
}


def mixed() -> bytes:
    """The phases end to end, each the next piece of its text."""
    size = PHASE_STEPS * PREFILL_TOKENS
    parts, used = [], dict.fromkeys(TEXTS, 0)
    for name in PHASES:
        parts.append(TEXTS[name]()[used[name] : used[name] + size])
        used[name] += size
    return b"".join(parts)


def counts_of(model: ByteMoELM, ids_BN: torch.Tensor, by_position: bool) -> torch.Tensor:
    """Counts (steps, L, E) of one forward: per position over the batch, or all as one step."""
    experts, layers = model.config.num_experts, []

    def observe(layer: int, routing: Routing) -> None:
        hot_TKE = torch.nn.functional.one_hot(routing.topk_ids_TK.long(), experts)
        hot_BNE = hot_TKE.sum(1).view(*ids_BN.shape, experts)
        layers.append(hot_BNE.sum(0) if by_position else hot_BNE.sum((0, 1))[None])

    with torch.no_grad():
        model(ids_BN, observe=observe)
    return torch.stack(layers, dim=1)


def prefill(model: ByteMoELM, data: bytes, tokens: int) -> torch.Tensor:
    """Counts (steps, L, E) of consecutive chunks of `tokens` bytes."""
    stream = torch.frombuffer(bytearray(data), dtype=torch.uint8).long()
    steps = min(PREFILL_STEPS if tokens == PREFILL_TOKENS else 10**9, len(stream) // tokens)
    window = min(tokens, model.config.context)
    chunks = stream[: steps * tokens].view(steps, tokens // window, window)
    return torch.cat([counts_of(model, chunk_BN, False) for chunk_BN in chunks])


def decode(model: ByteMoELM, data: bytes) -> torch.Tensor:
    """Counts (steps, L, E) of streams that move on byte by byte together."""
    stream = torch.frombuffer(bytearray(data), dtype=torch.uint8).long()
    stride = (len(stream) - DECODE_STEPS) // STREAMS
    starts = torch.arange(STREAMS) * stride
    ids_BN = stream[starts[:, None] + torch.arange(DECODE_STEPS)]
    total = torch.zeros(())
    for some_BN in ids_BN.split(16):
        total = total + counts_of(model, some_BN, True)
    return total.long()


def write(path: Path, counts_NLE: torch.Tensor, data: bytes, top_k: int) -> None:
    """One trace file."""
    info = TraceInfo(
        model="the embedded model",
        num_experts=counts_NLE.shape[2],
        top_k=top_k,
        layers=counts_NLE.shape[1],
        text_sha256=hashlib.sha256(data).hexdigest(),
    )
    with TraceWriter(path, info) as trace:
        for step, counts_LE in enumerate(counts_NLE.tolist()):
            for layer, counts_E in enumerate(counts_LE):
                trace.add(step, layer, counts_E)
    print(f"{path.name}: {len(counts_NLE)} steps, {path.stat().st_size} bytes", flush=True)


def main() -> None:
    """Record every trace, or those named."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "traces")
    parser.add_argument("names", nargs="*", help="of traces; default: all")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    model = load_model(model_path(), dtype=torch.float32, device=torch.device("cpu"))
    for name, text in {**TEXTS, "mixed": mixed}.items():
        data = text()
        for kind in ("prefill", "decode"):
            if (given.names and f"{kind}-{name}" not in given.names) or (
                kind == "decode" and name == "mixed"
            ):
                continue
            tokens = PREFILL_TOKENS if len(data) >= 200 * PREFILL_TOKENS else 128
            counts_NLE = prefill(model, data, tokens) if kind == "prefill" else decode(model, data)
            write(given.out / f"{kind}-{name}.parquet", counts_NLE, data, model.config.top_k)


if __name__ == "__main__":
    main()
