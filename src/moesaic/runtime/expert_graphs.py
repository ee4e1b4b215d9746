"""The expert-slicing paper's graph manager: a CUDA graph per expert, captured by its heuristics.

    T tokens · H hidden width · E experts · S = T*K routed rows

Every expert is a module of its own and is captured once its calls have had the same number of rows
often enough. Routing decides that number anew at each step, so with exact numbers hardly a call
repeats; `buckets` pad them, and then eager calls are padded too, because a library's bits may
depend on the number of rows. The layer of `moesaic.moe` is captured whole instead (`GraphCache`).

>>> import torch
>>> layer = ExpertGraphs([torch.nn.Linear(8, 8, bias=False) for _ in range(2)])
>>> with torch.no_grad():
...     out = layer(torch.ones(2, 8), torch.tensor([[0], [0]]), torch.ones(2, 1))
>>> layer.counts().eager  # expert 1 had no rows
1
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from .capture import Capturer
from .executors import combine_rows, host_rows, row_buffers
from .graphs import GraphCache, GraphConfig, GraphCounts, GraphStore, open_store


class ExpertGraphs:
    """An executor whose experts are captured one by one; see `GraphConfig` for the heuristics.

    Args:
        experts: modules from rows (N, H) to rows (N, H), without other effects.
        config: the paper's heuristics when None.
        capturer: how experts are captured, instead of what fits the device of the first call.
    """

    def __init__(
        self,
        experts: Sequence[nn.Module],
        config: GraphConfig | None = None,
        *,
        capturer: Capturer | None = None,
    ) -> None:
        config = config or GraphConfig()
        if config.buckets is not None:
            config = replace(config, pad_eager=True)
        self.experts = list(experts)
        self._config = config
        self._store = GraphStore(config, capturer) if capturer is not None else None
        self._caches: list[GraphCache] = []

    def _open(self, hidden_TH: Tensor) -> None:
        store = self._store or open_store(self._config, hidden_TH.device)
        self._store = store
        self._caches = [
            GraphCache(module, store=store, owner=expert)
            for expert, module in enumerate(self.experts)
        ]

    def __call__(self, hidden_TH: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        """The output (T, H)."""
        if not self._caches:
            self._open(hidden_TH)
        rows = host_rows(topk_ids_TK, len(self.experts))
        given_SH, rows_SH = row_buffers(hidden_TH, rows)
        for expert, start, end in rows.ranges:
            self._caches[expert](given_SH[start:end], out=rows_SH[start:end])
        return combine_rows(rows_SH, rows.position_TK, topk_weights_TK)

    @property
    def store(self) -> GraphStore:
        """Where the graphs of all experts live; made at the first call."""
        if self._store is None:
            raise RuntimeError("there is no store before the first call")
        return self._store

    def counts(self) -> GraphCounts:
        """Captured, replayed and eager calls of all experts; bytes of graphs and buffers."""
        return self.store.counts()

    def buffer_share(self) -> float:
        """Bytes held for graphs over the bytes of the experts' weights (the paper says ~10 %)."""
        tensors = [t for m in self.experts for t in (*m.parameters(), *m.buffers())]
        return self.counts().held_bytes / max(1, sum(t.nbytes for t in tensors))
