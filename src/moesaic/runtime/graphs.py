"""A function or a layer behind a cache of CUDA graphs: eager until a graph pays, then replayed.

    T tokens, the leading dimension of every input

A call is known by its owner, its token count padded to a bucket, the SM budget, and the dtypes and
widths of its inputs. It runs eagerly until the expert-slicing paper's heuristics are met: at least
`min_calls` calls of at least `min_tokens` tokens, the last `stable_calls` of the owner's in a row.
Of the eager calls the last `warmups` run on the stream that will capture, so that warming up costs
no call of its own, and counters that a call keeps stay true. From then on the graph is replayed.

One `GraphStore` may serve many caches: layers, or a whole stack of them behind one `GraphCache`.

>>> cache = GraphCache(torch.nn.Linear(8, 8), config=GraphConfig(min_tokens=1))
>>> cache(torch.zeros(2, 8)).shape, cache.counts().why_eager
(torch.Size([2, 8]), {'no graphs on this device': 1})
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .capture import CudaCapturer, Outputs
from .graph_rules import GraphConfig, Key, Tracker, doubling_buckets
from .graph_store import GraphCounts, GraphStore, Task, Watch, make_task

__all__ = [
    "GraphCache",
    "GraphConfig",
    "GraphCounts",
    "GraphStore",
    "Key",
    "ModuleWatch",
    "TensorWatch",
    "Tracker",
    "doubling_buckets",
    "open_store",
]


def place_of(tensor: Tensor | None) -> int:
    """Where a tensor's memory is; for a distributed tensor, whose own address is 0, its shard's."""
    if tensor is None:
        return 0
    local: Tensor = getattr(tensor, "_local_tensor", tensor)
    return local.data_ptr()


class TensorWatch:
    """Watches the memory of given tensors."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._tensors = tuple(tensors)

    def __call__(self) -> Hashable:
        return tuple([place_of(t) for t in self._tensors])

    def trains(self) -> bool:
        """Whether one of them wants a gradient."""
        return any(t.requires_grad for t in self._tensors)


class ModuleWatch:
    """Watches every parameter and buffer of a module, whatever is put in their place, its modules,
    and whether it trains."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._scan()

    def _scan(self) -> None:
        # Held, so that no new module can have the id of an old one.
        self._modules = list(self._module.modules())
        self._children = self._ids()

    def _ids(self) -> list[int]:
        return [id(child) for m in self._modules for child in m._modules.values()]

    def __call__(self) -> Hashable:
        children = self._ids()
        if children != self._children:
            self._scan()
        places = [
            place_of(tensor)
            for module in self._modules
            for table in (module._parameters, module._buffers)
            for tensor in table.values()
        ]
        return (self._module.training, *children, *places)

    def trains(self) -> bool:
        """Whether a parameter wants a gradient."""
        return any(p.requires_grad for p in self._module.parameters())


def open_store(config: GraphConfig, device: torch.device | str) -> GraphStore:
    """A store for a device: with CUDA graphs there, always eager elsewhere."""
    place = torch.device(device)
    return GraphStore(config, CudaCapturer(place) if place.type == "cuda" else None)


class GraphCache:
    """A function of tensors that share their leading dimension T, behind CUDA graphs.

    Args:
        function: returns a tensor or a tuple of tensors whose leading dimension is T, and has no
            other effect that a replay would miss; called with `sms=` where an SM budget is given.
        watch: the module or the tensors that it reads, so that a graph is dropped when they move
            (FSDP); None watches `function` itself where it is a module, else nothing.
        config: heuristics and budgets; ignored where `store` brings its own.
        store: shares graphs' budget and memory with other caches.
        owner: tells this cache's calls from others' in a shared store.
    """

    def __init__(
        self,
        function: Callable[..., Outputs],
        *,
        watch: nn.Module | Iterable[Tensor] | None = None,
        config: GraphConfig | None = None,
        store: GraphStore | None = None,
        owner: Hashable = None,
    ) -> None:
        if watch is None and isinstance(function, nn.Module):
            watch = function
        self._watch: Watch = (
            ModuleWatch(watch) if isinstance(watch, nn.Module) else TensorWatch(watch or ())
        )
        self._function, self._owner = function, owner
        self._config = config or GraphConfig()
        self._store = store

    @property
    def store(self) -> GraphStore:
        """Where the graphs live; made at the first call, on the device of its inputs."""
        if self._store is None:
            raise RuntimeError("there is no store before the first call")
        return self._store

    def __call__(self, *inputs: Tensor, sms: int | None = None, out: Tensor | None = None) -> Any:
        """The function of the inputs, under an SM budget if one is given; into `out` if given.

        Raises:
            ValueError: the inputs do not share their leading dimension.
        """
        return self._open(inputs).call(self._task(inputs, sms), out)

    def prepare(self, *inputs: Tensor, sms: int | None = None) -> bool:
        """Capture for such inputs now, outside the hot path, whatever the rules on calls say.

        Returns:
            Whether these inputs have a graph now. Counters that the function keeps count the
            warm-ups and the first replay. Sizes captured largest first share their memory best.
        """
        return self._open(inputs).prepare(self._task(inputs, sms))

    def _open(self, inputs: tuple[Tensor, ...]) -> GraphStore:
        if self._store is None:
            self._store = open_store(self._config, inputs[0].device)
        return self._store

    def _task(self, inputs: tuple[Tensor, ...], sms: int | None) -> Task:
        return make_task(self._owner, self._function, self._watch, inputs, sms)

    def counts(self) -> GraphCounts:
        """What the store has done so far, other caches' calls included."""
        return self.store.counts()
