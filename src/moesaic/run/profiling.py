"""`moesaic profile DIRECTORY --text F`: what the experts of a transformers model do on a text.

T tokens · E experts · K top-k · L layers

runs/2026-01-31T12-00-00/
  heatmap.png         load of every expert in every layer
  coactivation.png    which experts of a layer are chosen together, against chance
  affinity.png        which expert of a layer follows which of the layer before, against chance
  matrices.npz        coactivation_LEE, affinity_LEE (L - 1 of them) and counts_LE, as tokens
  perfetto.json       experts and steps over time, for ui.perfetto.dev
  profile.jsonl       a profile a step
  trace.parquet       the routing trace with every token's experts, as planners replay it
  run.jsonl           what ran, each layer, the summary
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from ..integrations.attach import experts_modules, selected
from ..integrations.perfetto import PerfettoTrace
from ..integrations.recording import JsonLines
from ..integrations.top import draw, view_of_profile
from ..integrations.transformers import NAME
from ..runtime.profiler import profile
from ..trace import TraceInfo, TraceWriter
from .account import layer_load
from .command import progress_bar
from .interrupt import Interrupt
from .picture import heatmap_png
from .pretrained import TokenJob, header, prepare
from .report import ReportDirectory, writing

MOST_PANELS = 64
Matrix = npt.NDArray[np.int64]


@dataclass
class Matrices:
    """Counts of tokens: together in a layer (L, E, E), one layer after the other (L - 1, E, E)."""

    counts_LE: Matrix
    coactivation_LEE: Matrix
    affinity_LEE: Matrix

    @staticmethod
    def empty(layers: int, experts: int) -> Matrices:
        """All zero."""
        square = (experts, experts)
        return Matrices(
            np.zeros((layers, experts), np.int64),
            np.zeros((layers, *square), np.int64),
            np.zeros((max(0, layers - 1), *square), np.int64),
        )

    def add(self, ids_LTK: Sequence[Tensor]) -> None:
        """Count one step; an expert is not its own companion.

        >>> m = Matrices.empty(2, 3)
        >>> m.add([torch.tensor([[0, 1], [1, 2]]), torch.tensor([[2, 0], [2, 1]])])
        >>> m.coactivation_LEE[0].tolist(), m.affinity_LEE[0, 1].tolist()
        ([[0, 1, 0], [1, 0, 1], [0, 1, 0]], [1, 1, 2])
        """
        experts = self.counts_LE.shape[1]
        before: Tensor | None = None
        for layer, ids_TK in enumerate(ids_LTK):
            chosen_TE = F.one_hot(ids_TK.long(), experts).sum(1).float()
            together_EE = (chosen_TE.T @ chosen_TE).fill_diagonal_(0)
            self.counts_LE[layer] += chosen_TE.sum(0).long().cpu().numpy()
            self.coactivation_LEE[layer] += together_EE.long().cpu().numpy()
            if before is not None:
                self.affinity_LEE[layer - 1] += (before.T @ chosen_TE).long().cpu().numpy()
            before = chosen_TE

    def lifts(self) -> tuple[list[Any], list[Any]]:
        """Both over what chance would give: 1 where experts know nothing of each other."""
        tokens = max(1, int(self.counts_LE[0].sum()))
        share_LE = self.counts_LE / tokens
        together = []
        for counts_EE, share_E in zip(self.coactivation_LEE, share_LE, strict=True):
            apart_EE = np.outer(share_E, share_E)
            np.fill_diagonal(apart_EE, 0.0)
            together.append(_over(counts_EE, apart_EE))
        follow = [
            _over(counts_EE, np.outer(share_LE[i], share_LE[i + 1]))
            for i, counts_EE in enumerate(self.affinity_LEE)
        ]
        return together, follow

    def npz(self) -> bytes:
        """The three arrays as one file."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **asdict(self))
        return buffer.getvalue()


def _over(counts_EE: Matrix, chance_EE: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Shares of the counts over shares of chance, 0 where neither has any."""
    wanted = chance_EE / (chance_EE.sum() or 1.0)
    found = counts_EE / (counts_EE.sum() or 1.0)
    return np.divide(found, wanted, out=np.zeros_like(wanted), where=wanted > 0)


def panels_png(matrices: Sequence[Any], titles: Sequence[str], note: str) -> bytes:
    """A small heat map of every matrix, white where there is as much as chance gives."""
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure

    some = list(matrices)[:MOST_PANELS]
    columns = min(8, max(1, math.ceil(math.sqrt(len(some)))))
    rows = max(1, math.ceil(len(some) / columns))
    figure = Figure(figsize=(1.6 * columns + 1.2, 1.7 * rows + 0.6), dpi=130, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    image = None
    for place, panel in enumerate(axes.flat):
        panel.set_axis_off()
        if place < len(some):
            norm = TwoSlopeNorm(1.0, 0.0, 3.0)
            image = panel.imshow(np.minimum(some[place], 3.0), cmap="RdBu_r", norm=norm)
            panel.set_title(titles[place], fontsize=7)
    if image is not None:
        figure.colorbar(image, ax=axes, shrink=0.8, label="times what chance gives")
    figure.suptitle(note, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _watch(job: TokenJob, report: ReportDirectory, trace: TraceWriter) -> tuple[Matrices, Any]:
    """Run the text; the matrices and the last profile."""
    loaded, chosen, hooks = job.loaded, [], []
    matrices = Matrices.empty(len(loaded.layers), loaded.num_experts)
    stream = torch.tensor([loaded.start, *job.ids])
    with (
        Interrupt() as interrupt,
        selected(loaded.model, NAME),
        profile(loaded.model) as profiler,
        progress_bar(len(job.ids), "watching") as bar,
        torch.no_grad(),
    ):
        for _, module in experts_modules(loaded.model):
            hook = module.register_forward_pre_hook(lambda _, inputs: chosen.append(inputs[1]))
            hooks.append(hook)
        with writing(report.out):
            perfetto = PerfettoTrace(report.partial / "perfetto.json", profiler.layers)
            profiler.sinks["perfetto"] = perfetto
            profiler.sinks["jsonl"] = JsonLines(report.partial / "profile.jsonl")
        for chunk in job.plan.chunks():
            if interrupt.asked:
                break
            chosen.clear()
            piece = stream[chunk.start : chunk.start + chunk.size]
            loaded.model(
                input_ids=piece.view(chunk.windows, chunk.width).to(job.device), use_cache=False
            )
            profiler.step()
            matrices.add(chosen)
            for layer, ids_TK in enumerate(chosen):
                counts_E = torch.bincount(ids_TK.flatten().long(), minlength=loaded.num_experts)
                with writing(report.out):
                    ids = ids_TK.flatten().tolist()
                    trace.add(chunk.index, layer, counts_E.tolist(), ids)
            profiler.poll()
            bar.update(bar.task_ids[0], advance=chunk.size)
        for hook in hooks:
            hook.remove()
        profiler.poll()
        with writing(report.out):
            perfetto.close()
    return matrices, profiler.last


def write(report: ReportDirectory, matrices: Matrices) -> list[dict[str, Any]]:
    """The pictures, the arrays and the layers' lines; the layers."""
    layers = [asdict(layer_load(i, row)) for i, row in enumerate(matrices.counts_LE.tolist())]
    together, follow = matrices.lifts()
    names = [f"layer {i}" for i in range(len(together))]
    steps = [f"{i} → {i + 1}" for i in range(len(follow))]
    report.file("heatmap.png", heatmap_png(layers))
    report.file("coactivation.png", panels_png(together, names, "experts chosen together"))
    report.file("affinity.png", panels_png(follow, steps, "expert of a layer → of the next"))
    report.file("matrices.npz", matrices.npz())
    for layer, counts_E in zip(layers, matrices.counts_LE.tolist(), strict=True):
        report.line("layer", {**layer, "counts_E": counts_E})
    return layers


def main(
    model: Path,
    *,
    text: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] = "runs",
    limit: int | None = None,
    device: str = "auto",
    dtype: str = "float32",
) -> int:
    """Watch a model on a text, write the directory, show the experts; the exit code.

    Raises:
        ValueError, OSError, ImportError: an argument or file is not as needed.
    """
    job = prepare(model, text, limit, device, dtype)
    with ReportDirectory(out, job.started) as report:
        about = header(job)
        report.line("run", about)
        info = TraceInfo(
            model=job.loaded.name, num_experts=job.loaded.num_experts, top_k=job.loaded.top_k,
            layers=len(job.loaded.layers), text_sha256=job.text_sha256,
        )  # fmt: skip
        with report.trace(info, with_ids=True) as trace:
            matrices, last = _watch(job, report, trace)
        if not matrices.counts_LE.any():
            raise KeyboardInterrupt
        layers = write(report, matrices)
        tokens = int(matrices.counts_LE[0].sum()) // job.loaded.top_k
        summary = about | {
            "tokens": tokens,
            "layers": len(layers),
            "complete": tokens == len(job.ids),
        }
        report.line("summary", summary)
        folder = report.commit()
    if last is not None:
        Console().print(draw(view_of_profile(last), job.loaded.name))
    print(f"written: {folder}")
    print(json.dumps(summary | {"report": str(folder)}, separators=(",", ":")))
    return 0 if summary["complete"] else 130
