"""The profiler: watches experts while they run, a step behind, without ever waiting for them.

    L layers · E experts · K top-k

The data path adds to counters on the device (`counters`), `step()` ends a step with one launch, and
`poll()`, on any thread, reads what is complete and gives a frozen `Profile`. Where exporters fail,
or NVML, or the ring itself, the layers keep answering: the failure is logged once and counted in
`failures`.

>>> from moesaic import ExpertSpec, MoE, RouterSpec, profile
>>> layer = MoE(
...     RouterSpec(num_experts=4, top_k=2),
...     ExpertSpec(num_experts=4, hidden_size=8, intermediate_size=16),
... )
>>> with profile(layer) as profiler:
...     for _ in range(3):
...         _ = layer(torch.randn(5, 8))
...         profiler.step()
>>> seen = profiler.poll()
>>> seen.step, seen.steps, seen.tokens, sum(seen.layers[0].counts_E)
(2, 3, 15, 30)
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from . import rates
from .counters import Counts, Ring, Sample, loads_of, new_counters
from .observe import LayerInfo, nothing_yet, observe
from .profile import Profile

ATTACHED = "_moesaic"  # where `moesaic.attach` leaves what it knows of a layer
__all__ = ["LayerInfo", "Profiler", "Sink", "Update", "profile", "watched"]
log = logging.getLogger("moesaic")


@dataclass(frozen=True)
class Update:
    """What one `poll` found: the profile, and its steps one by one for those who want them."""

    profile: Profile
    samples: tuple[Sample, ...]


Sink = Callable[[Update], None]


class Profiler:
    """Counters, ring and state of some layers of one device; `profile(model)` makes one.

    With the functional interface, give `counters[layer]` to `route` and `moe` yourself. Use it as a
    context manager, or call `detach` and `stop` when done. A CUDA graph captured while a layer is
    watched counts at every replay, watched or not.

    Args:
        layers: the layers, in order.
        device: where they run.
        slots: see `counters.Ring`.
        every: so many steps make one sample. A publication is one launch of a few us: with few
            layers a step, let 16 layers or more share it.
        settings: smoothing, thresholds and the drift test.
        history: steps that `history` remembers.
        counters: (3, E) int32 each, instead of new ones.

    Raises:
        ValueError, RuntimeError: see `counters.Ring`.
    """

    def __init__(
        self,
        layers: Sequence[LayerInfo],
        device: torch.device,
        *,
        slots: int = 64,
        every: int = 1,
        settings: rates.Settings | None = None,
        history: int = 64,
        counters: Sequence[Tensor] | None = None,
    ) -> None:
        self.layers = tuple(layers)
        self.counters = tuple(
            counters or (new_counters(layer.num_experts, device) for layer in layers)
        )
        self.settings = settings or rates.Settings()
        self.ring = Ring(self.counters, slots=slots, every=every)
        self.observed = nothing_yet(self.layers)
        self.last: Profile | None = None
        self.failures: Counter[str] = Counter()
        self.sinks: dict[str, Sink] = {}
        self._modules: list[nn.Module] = []
        self._history: deque[tuple[Counts, ...]] = deque(maxlen=history)
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()

    @property
    def totals(self) -> tuple[Counts, ...]:
        """(3, E) of each layer since the start: routed, rows, tiles."""
        return self.observed.totals

    def step(self) -> None:
        """End a step on the current stream: one launch every `every` steps, and for each step that
        a CUDA graph captures."""
        if "publish" in self.failures:
            return
        try:
            self.ring.publish()
        except Exception as error:
            self.failed("publish", error)

    def flush(self) -> None:
        """Publish the steps that wait for others to complete `every` of them, one launch."""
        try:
            self.ring.flush()
        except Exception as error:
            self.failed("publish", error)

    def failed(self, part: str, error: BaseException) -> None:
        """Count a failure of a part of the observation; the first of each part is logged."""
        self.failures[part] += 1
        if self.failures[part] == 1:
            text = " ".join(str(error).split()) or type(error).__name__
            log.warning("profiler: %s failed and is not logged again: %s", part, text)

    def poll(self) -> Profile | None:
        """The profile of the steps completed since the last poll, handed to every sink; or None."""
        with self._lock:
            samples = tuple(self.ring.read())
            if not samples:
                return None
            self.observed, profile = observe(self.observed, self.layers, samples, self.settings)
            self._history.extend(tuple(map(loads_of, sample.counts)) for sample in samples)
            self.last, update = profile, Update(profile, samples)
            for name, sink in tuple(self.sinks.items()):
                try:
                    sink(update)
                except Exception as error:
                    self.failed(name, error)
        return profile

    def history(self, layer: int) -> tuple[tuple[int, ...], ...]:
        """Rows of each expert of a layer in the last samples, oldest first: (W, E)."""
        with self._lock:
            return tuple(tuple(counts[layer].tolist()) for counts in self._history)

    def start(self, interval_s: float = 0.5) -> Profiler:
        """Poll every `interval_s` seconds on a thread of its own, until `stop`."""

        def run() -> None:
            while not self._stop.wait(interval_s):
                try:
                    self.poll()
                except Exception as error:
                    self.failed("poll", error)

        if self._thread is None:
            self._stop.clear()
            self._thread = threading.Thread(target=run, name="moesaic-profiler", daemon=True)
            self._thread.start()
        return self

    def stop(self) -> None:
        """End the thread and poll once more, after `flush`."""
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None
        self.flush()
        self.poll()

    def attach(self, modules: Sequence[nn.Module]) -> None:
        """Let each module's `counters` be those of the layer of the same place."""
        for module, counters in zip(modules, self.counters, strict=True):
            module.counters = counters
            # Graphs captured from now on write there as long as the module lives.
            module.kept_counters = counters
            self._modules.append(module)
            if ATTACHED in vars(module):
                vars(module)[ATTACHED].profiler = self

    def detach(self) -> None:
        """Stop counting in the modules that were attached."""
        for module in self._modules:
            module.counters = None  # type: ignore[assignment]
            if ATTACHED in vars(module):
                vars(module)[ATTACHED].profiler = None
        self._modules.clear()

    def __enter__(self) -> Profiler:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()
        self.flush()
        if self._thread is not None:
            self.stop()


def watched(model: nn.Module, top_k: int | None = None) -> dict[str, tuple[nn.Module, LayerInfo]]:
    """The experts of a model that can be counted, by name.

    They are modules with `counters` and a `spec`, such as those of `moesaic.MoE`, and those of
    transformers after `moesaic.attach`.

    Args:
        top_k: of experts that stand alone, without a router that knows it.

    Raises:
        ValueError: there are none, or one's top_k is not known.
    """
    known: dict[int, int] = {}
    for module in model.modules():
        router, experts = getattr(module, "router", None), getattr(module, "experts", None)
        if isinstance(experts, nn.Module) and isinstance(getattr(router, "top_k", None), int):
            known[id(experts)] = router.top_k  # type: ignore[union-attr]
    found: dict[str, tuple[nn.Module, LayerInfo]] = {}
    for name, module in model.named_modules():
        layer: Any = vars(module).get(ATTACHED, module)
        spec: Any = getattr(layer, "spec", None)
        countable = layer is not module or hasattr(module, "counters")
        if not countable or not hasattr(spec, "num_experts"):
            continue
        k = known.get(id(module), getattr(layer, "top_k", None) or top_k)
        if k is None:
            raise ValueError(f"top_k of {name or 'the experts'} is not known; give top_k=")
        found[name] = module, LayerInfo(name or "experts", spec.num_experts, k)
    if not found:
        raise ValueError(
            "the model has no layer to profile; build it of moesaic.MoE, call moesaic.attach "
            "first, or give counters to route and moe (see Profiler)"
        )
    return found


def profile(model: nn.Module, *, top_k: int | None = None, **options: Any) -> Profiler:
    """Watch every MoE layer of a model, after it was moved to its device; options of `Profiler`.

    Raises:
        ValueError: see `watched` and `Profiler`.
        RuntimeError: a layer is being profiled already.
    """
    found = watched(model, top_k)
    counters: list[Tensor] = []
    for name, (module, info) in found.items():
        if getattr(module, "counters", None) is not None:
            raise RuntimeError(f"{name or 'the layer'} is being profiled already; detach first")
        device = next(module.parameters()).device
        kept = getattr(module, "kept_counters", None)
        if not isinstance(kept, Tensor) or kept.device != device:
            kept = new_counters(info.num_experts, device)
        counters.append(kept)
    infos = [info for _, info in found.values()]
    profiler = Profiler(infos, counters[0].device, counters=counters, **options)
    profiler.attach([module for module, _ in found.values()])
    return profiler
