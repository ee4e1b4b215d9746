"""`moesaic run DIRECTORY --generate N`: text token by token, with the experts at work beside it.

Greedy decoding with moesaic's experts. On a GPU the cache is static and a decode step is one CUDA
graph, captured after the prefill; where that fails the reason is reported and the steps run one
launch after the other. The text streams to standard output; on a terminal a table under it shows
what every expert gets. The last line of standard output is one JSON document.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text
from torch import Tensor

from ..hardware.energy import Energy, Reading
from ..hardware.meter import open_meter
from ..integrations.attach import selected
from ..integrations.top import draw, view_of_profile
from ..integrations.transformers import NAME
from ..models.pretrained import Pretrained, load_pretrained
from ..runtime.capture import CaptureFailed, Capturer, CudaCapturer, Recording
from ..runtime.profiler import Profiler, profile
from .command import TOLERANCE, choose_device, device_name
from .text import inspect_text

MOST_PROMPT = 2048
WARM_UPS = 2


def static_cache(config: Any, length: int) -> Any:
    """A cache of `length` positions whose updates are the same launches at every step.

    transformers' layers of sliding windows roll, and decide on the host when; here they hold every
    position, and the mask alone leaves the window.
    """
    from transformers import StaticCache
    from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

    cache = StaticCache(config=config, max_cache_len=length)
    for index, layer in enumerate(cache.layers):
        if type(layer) is StaticSlidingWindowLayer:
            cache.layers[index] = StaticLayer(max_cache_len=length)
    return cache


@dataclass
class Decoder:
    """One sequence and its cache; `step` gives a token and computes the next, by a graph if any.

    `graph` says "captured" or why there is none. `end_step` is called after every token, inside the
    graph too.
    """

    model: Any
    device: torch.device
    length: int
    end_step: Callable[[], None]
    static: bool = False
    graph: str = "none on a CPU"
    token_11: Tensor = field(init=False)
    cache: Any = field(init=False)
    _recording: Recording | None = field(default=None, init=False)

    def prefill(self, ids: list[int]) -> None:
        """Read the prompt; its last logits give the first token."""
        from transformers import DynamicCache

        config = self.model.config
        self.cache = (
            static_cache(config, self.length) if self.static else DynamicCache(config=config)
        )
        ids_1N = torch.tensor([ids], device=self.device)
        self.token_11 = self._forward(ids_1N)
        self.end_step()

    def _forward(self, ids_1N: Tensor) -> Tensor:
        out = self.model(input_ids=ids_1N, past_key_values=self.cache, use_cache=True)
        token_11: Tensor = out.logits[:, -1:].argmax(-1)
        return token_11

    def _next(self) -> Tensor:
        return self.token_11.copy_(self._forward(self.token_11))

    def _advance(self) -> Tensor:
        self._next()
        self.end_step()
        return self.token_11

    def capture(self, capturer: Capturer, counters: Sequence[Tensor] = ()) -> None:
        """Record one step; warm-ups leave the cache, the token and `counters` as they were."""
        lengths: list[Any] = [getattr(x, "cumulative_length", None) for x in self.cache.layers]
        on_host = any(hasattr(layer, "cumulative_length_int") for layer in self.cache.layers)
        if on_host or any(not isinstance(length, Tensor) for length in lengths):
            self.graph = "none: the family's cache is not static"
            return
        state: list[Tensor] = [*lengths, self.token_11, *counters]
        kept = [tensor.clone() for tensor in state]
        try:
            for _ in range(WARM_UPS):
                capturer.warm(self._next, None)
            for tensor, value in zip(state, kept, strict=True):
                tensor.copy_(value)
            self._recording, self.graph = capturer.record(self._advance, None), "captured"
        except CaptureFailed as error:
            self.graph = f"none: {error}"
            for tensor, value in zip(state, kept, strict=True):
                tensor.copy_(value)

    def step(self) -> int:
        """The current token; the next one is being computed."""
        token = int(self.token_11)
        if self._recording is None:
            self._advance()
        else:
            self._recording.replay()
        return token


@dataclass
class Stream:
    """Token ids as text that only grows: a character whose bytes are not all there yet waits."""

    loaded: Pretrained
    ids: list[int] = field(default_factory=list)
    shown: str = ""

    def add(self, token: int) -> str:
        """The text that a token completes."""
        self.ids.append(token)
        text = self.loaded.decode(self.ids)
        if text.endswith("\ufffd") or not text.startswith(self.shown):
            return ""
        new, self.shown = text[len(self.shown) :], text
        return new


class Screen:
    """Where the text goes: to a pipe as it comes, on a terminal above a table of the experts."""

    def __init__(self, profiler: Profiler) -> None:
        self.profiler = profiler
        self.console = Console()
        self.live = Live(console=self.console, refresh_per_second=8, transient=False)
        self.fancy = self.console.is_terminal
        self.last: Any = None

    @contextmanager
    def open(self) -> Iterator[None]:
        """Show until the block ends."""
        if self.fancy:
            with self.live:
                yield
        else:
            yield
            sys.stdout.write("\n")

    def show(self, prompt: str, stream: Stream, new: str, speed: float) -> None:
        """One more piece of text."""
        seen = self.profiler.poll()
        self.last = seen or self.last
        if not self.fancy:
            sys.stdout.write(new)
            sys.stdout.flush()
            return
        parts: list[Any] = [Text(prompt, style="dim") + Text(stream.shown), Text("")]
        if self.last is not None:
            parts.append(draw(view_of_profile(self.last), f"{speed:.1f} tokens/s"))
        self.live.update(Group(*parts))


def read_prompt(loaded: Pretrained, text: Path | None, prompt: str | None) -> list[int]:
    """The prompt's tokens: the start token and the last 2048 of the text.

    Raises:
        OSError, ValueError: the text is not readable; or both were given.
    """
    if text is not None and prompt is not None:
        raise ValueError("give --prompt or --text, not both")
    if text is not None:
        inspect_text(text)
        prompt = text.read_text(encoding="utf-8")
    ids = [loaded.start, *loaded.encode("" if prompt is None else prompt)]
    return ids[-min(MOST_PROMPT, loaded.context) :]


def energy_facts(reading: Reading, tokens: int) -> dict[str, Any]:
    """Joules per token, or why there are none."""
    if not tokens:
        return {"joules_per_token": None, "energy": "not available: no tokens were made"}
    if isinstance(reading, Energy):
        return {"joules_per_token": reading.joules_per_token(tokens), "watts": reading.watts}
    return {"joules_per_token": None, "energy": str(reading)}


def decode(
    loaded: Pretrained, ids: list[int], tokens: int, device: torch.device
) -> tuple[dict[str, Any], str]:
    """Generate; the facts of the run, and its text."""
    profiler = profile(loaded.model)
    length, on_gpu = len(ids) + tokens + WARM_UPS + 1, device.type == "cuda"
    decoder = Decoder(loaded.model, device, length, profiler.step, static=on_gpu)
    stream, screen = Stream(loaded), Screen(profiler)
    prompt = loaded.decode(ids)
    stops = loaded.model.generation_config.eos_token_id
    ends = set(stops if isinstance(stops, list) else [stops])
    begun = time.perf_counter()
    with profiler, torch.no_grad(), screen.open():
        decoder.prefill(ids)
        int(decoder.token_11)
        prefill_s = time.perf_counter() - begun
        if on_gpu:
            decoder.capture(CudaCapturer(device), profiler.counters)
        profiler.poll()
        begun = time.perf_counter()

        def work() -> None:
            for number in range(tokens):
                token = decoder.step()
                if token in ends:
                    break
                speed = number / max(time.perf_counter() - begun, 1e-9)
                screen.show(prompt, stream, stream.add(token), speed)

        reading = open_meter(device).measure(work)
        seconds = time.perf_counter() - begun
    made = len(stream.ids)
    facts = {
        "prompt_tokens": len(ids), "tokens": len(stream.ids), "prefill_s": prefill_s,
        "decode_s": seconds, "tokens_per_s": made / seconds, "graph": decoder.graph,
    } | energy_facts(reading, made)  # fmt: skip
    totals = {name: total[1].tolist() for name, total in zip(
        (x.name for x in loaded.layers), profiler.totals, strict=True)}  # fmt: skip
    return facts | {"rows_per_expert": totals}, loaded.decode(stream.ids)


def main(
    model: Path | None,
    *,
    tokens: int | None,
    text: str | os.PathLike[str] | None = None,
    prompt: str | None = None,
    device: str = "auto",
    dtype: str = "float32",
) -> int:
    """Generate `tokens` tokens after a prompt, print them and the JSON line.

    Raises:
        ValueError, OSError, ImportError: an argument or file is not as needed.
    """
    if model is None or not Path(model).is_dir():
        raise ValueError(
            "--generate and --prompt need MODEL, the directory of a transformers model"
        )
    if tokens is None:
        raise ValueError("--prompt needs --generate, the number of tokens")
    if tokens < 1:
        raise ValueError(f"--generate must be at least 1, got {tokens}")
    if dtype not in TOLERANCE:
        raise ValueError(f"--dtype must be one of {', '.join(TOLERANCE)}, got {dtype!r}")
    where = choose_device(device)
    loaded = load_pretrained(model, dtype=getattr(torch, dtype), device=where)
    ids = read_prompt(loaded, None if text is None else Path(text), prompt)
    with selected(loaded.model, NAME):
        facts, made = decode(loaded, ids, tokens, where)
    joules = facts["joules_per_token"]
    told = (
        facts.get("energy") if joules is None else f"{joules:.3g} J/token, {facts['watts']:.0f} W"
    )
    rate = f"{facts['tokens']} tokens, {facts['tokens_per_s']:.1f} tokens/s"
    print(f"{rate}; graph: {facts['graph']}; energy: {told}")
    about = {"model": loaded.name, "device": device_name(where), "dtype": dtype, "text": made}
    print(json.dumps(about | facts, allow_nan=False, separators=(",", ":")))
    return 0
