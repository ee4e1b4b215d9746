"""The page's part of suite `gemm`: targets, rates with their share of the datasheet, bits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .report import Sheet, markdown, provenance, short, targets_sheet
from .results import Line, Target

CLAIMS = (("H800", 0.91), ("H20", 0.95))


def rates_sheet(lines: Sequence[Line]) -> Sheet:
    """A row per timed line; the dense product beside imbalance is in its column alone."""
    heads = ["shape", "routing", "clock", "impl", "ms", "TFLOP/s", "of 989", "× cuBLAS", "state"]
    rows = []
    for x in lines:
        if x["clock"] == "bits":
            continue
        state = "wrong" if x.get("wrong") else str(x.get("error", "right")).split(":")[0]
        numbers = (x["ms"], x["tflops"], x.get("of_datasheet"), x["of_floor"])
        texts = [str(x[key]) for key in ("model", "routing", "clock", "impl")]
        rows.append([*texts, *map(short, numbers), state])
    return Sheet(heads, rows)


def bits_sheet(lines: Sequence[Line]) -> Sheet:
    """For how many experts of each shape the rows are `torch.matmul`'s."""
    rows = [
        [x["model"].removeprefix("bits "), str(x["tokens"]),
         f"{x['equal_experts']} of {x['experts']}" if "equal_experts" in x else x["error"]]
        for x in lines if x["clock"] == "bits"
    ]  # fmt: skip
    return Sheet(["N x K", "rows an expert", "experts equal to torch.matmul"], rows)


def section(
    lines: Sequence[Line], targets: Sequence[Target], root: Path, device: str, folder: str
) -> tuple[str, dict[str, str]]:
    """The whole part."""
    claims = ", ".join(f"{100 * share:g} % of an {name}" for name, share in CLAIMS)
    parts = [provenance(lines), markdown(targets_sheet(targets)), markdown(rates_sheet(lines))]
    parts.append(f"The static-batching paper reports, of the datasheet's rate, {claims}.")
    if (equal := bits_sheet(lines)).rows:
        parts.append(markdown(equal))
    return "\n\n".join(parts) + "\n", {}
