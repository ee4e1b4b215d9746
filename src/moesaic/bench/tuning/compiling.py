"""Every candidate compiled before it is timed, by as many processes as there are cores.

Requests are compiled in their order, and whoever times waits for one request only (`Ahead`). A
process makes each launch on memory that is never touched, with the launch itself left out, so
that the kernel lands in Triton's cache under the key that the real call looks up:

    python -m moesaic.bench.tuning.compiling '<requests as a JSON list>' SHARE OF
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from threading import Event, Thread
from typing import Any

import torch
from torch import Tensor

from ...types import ExpertWeights
from ..workloads import Model
from .grid import Group, Tile, hopper_space, problem_for, triton_space
from .labs import hopper_config, hopper_heuristic, hopper_products, pair_products
from .routing import route_with, row_blocks

DRY_TOKENS = 16
DONE = "done"
ORDERS = ("index", "large_first", "mixed")
FEW = "few "


@dataclass(frozen=True)
class Request:
    """What is tuned: a layer, its dtype, token counts, paths, and the device's facts."""

    model: Model
    dtype: str
    tokens: tuple[int, ...]
    impls: tuple[str, ...]
    arch: int
    family: str
    num_sms: int

    def to_json(self) -> str:
        """As text for another process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Request:
        """Read back."""
        values = json.loads(text)
        model = Model(**values.pop("model"))
        tokens, impls = tuple(values.pop("tokens")), tuple(values.pop("impls"))
        return cls(model=model, tokens=tokens, impls=impls, **values)


def space_of(request: Request, impl: str, tokens: int) -> Any:
    """The candidates of one cell."""
    problem = problem_for(request.model, tokens, request.dtype, request.arch, request.family)
    if impl == "triton":
        return triton_space(problem)
    return hopper_space(problem, hopper_heuristic(problem, request.num_sms))


def jobs(request: Request) -> list[tuple[str, bool, Group, str, Any]]:
    """Every distinct compilation: path, whether of one token, heights, product, cut."""
    found: dict[tuple[str, bool, Group, str, Any], None] = {}
    for impl in request.impls:
        for tokens in request.tokens:
            space = space_of(request, impl, tokens)
            hopper = impl == "hopper"
            for group, part, cut in space:
                # How many programs share an SM is no constant of the kernel.
                one = replace(cut, ctas_per_sm=1) if hopper else cut._replace(ctas_per_sm=0)
                found[impl, hopper and tokens == 1, group, part, one] = None
            for pair in space.both:
                one, found_at = replace(pair, ctas_per_sm=1), few_tokens(request, tokens, pair)
                part = f"{FEW}{tokens}" if found_at else "both"
                found[impl, tokens == 1, (pair.bm,), part, one] = None
    for tokens in request.tokens:
        for block in row_blocks(request.model.num_experts):
            found["routing", tokens <= 2 * block, (), "ids", block] = None
    return [*dict.fromkeys(around_products(request)), *found]


def few_tokens(request: Request, tokens: int, pair: Tile) -> bool:
    """Whether one launch of these tiles is a whole layer of so many tokens."""
    from ...kernels.hopper.pair import is_few

    return tokens > 1 and is_few(tokens, request.model.top_k, hopper_config(pair))


def around_products(request: Request) -> Iterator[tuple[str, bool, Group, str, Any]]:
    """What a layer runs beside its products: sort and task map in every order, and combine.

    A sort has one kernel for up to 512 slots, one for up to 4096 and others beyond; a job names
    some number of slots of its kind.
    """
    from ...kernels.sorting import ONE_LAUNCH_SLOTS, chunk_size

    for impl in request.impls:
        hopper = impl == "hopper"
        for tokens in request.tokens:
            yield "combine", hopper, (), "", tokens
            if tokens == 1 and hopper:
                continue
            slots = tokens * request.model.top_k
            if slots > ONE_LAUNCH_SLOTS:
                some = 16 * chunk_size(slots) if slots <= 131072 else 1 << 18
            else:
                some = 8 if slots % 16 else 512 if slots <= 512 else ONE_LAUNCH_SLOTS
            space = space_of(request, impl, tokens)
            for group in dict.fromkeys((*space.cuts, *((pair.bm,) for pair in space.both))):
                for order in ORDERS:
                    yield "sort", hopper, group, order, some


def plan_of(requests: Sequence[Request]) -> list[list[tuple[str, bool, Group, str, Any]]]:
    """The jobs of each request that none before it has had.

    A Hopper kernel is compiled for a number of tasks, not for widths: layers of as many experts
    share theirs, those of a single token where K is the same too.
    """
    seen: set[Any] = set()
    plan = []
    for request in requests:
        own = []
        for job in jobs(request):
            impl, one_token, *_ = job
            model = request.model
            tasks = model.top_k if one_token else model.num_experts
            own_key: Any = tasks if impl == "hopper" else model
            if impl == "routing":
                own_key = (model.num_experts, model.top_k)
            elif impl == "sort":
                own_key = model.num_experts
            elif job[3].startswith(FEW):
                own_key = (model.num_experts, model.top_k)
            elif impl == "combine":
                own_key = (model.top_k, model.hidden_size)
            key = (job, request.dtype, own_key)
            if key not in seen:
                seen.add(key)
                own.append(job)
        plan.append(own)
    return plan


def dry_weights(request: Request) -> ExpertWeights:
    """Weights of the right shapes on memory of one element."""
    shapes = request.model.spec().weight_shapes()
    one = torch.empty(1, dtype=getattr(torch, request.dtype))
    return ExpertWeights(**{name: one.expand(shape) for name, shape in shapes.items()})


def dry_map(request: Request, one_token: bool) -> tuple[Any, Any]:
    """Sort and task map with the sizes and alignment of real ones; read and written by nobody."""
    from ...kernels.batching import RowSort
    from ...kernels.taskmap import new_task_map

    slots, experts = DRY_TOKENS * request.model.top_k, request.model.num_experts
    entries = request.model.top_k if one_token else experts
    _, tasks = new_task_map(entries, torch.device("cpu"))
    order_S = torch.zeros(slots, dtype=torch.int32)
    offsets = torch.zeros(experts + 1, dtype=torch.int32)
    return RowSort(order_S, order_S, offsets), tasks


def launch(
    request: Request, weights: ExpertWeights, job: tuple[str, bool, Group, str, Any]
) -> None:
    """The launch of one job, on memory that is never touched."""
    impl, one_token, group, part, cut = job
    if impl == "routing":
        tokens = 1 if one_token else 2 * cut + 1
        route_with(torch.empty(tokens, request.model.num_experts), request.model.top_k, cut)
        return
    if impl in ("sort", "combine"):
        launch_around(request, job)
        return
    model, dtype = request.model, getattr(torch, request.dtype)
    sort, tasks = dry_map(request, one_token)
    slots = sort.order_S.numel()
    order_S = sort.order_S[: model.top_k] if one_token and impl == "hopper" else sort.order_S

    def rows(count: int, width: int) -> Tensor:
        return torch.empty(count, width, dtype=dtype)

    if impl == "hopper":
        tile: Tile = cut
        if part == "both" or part.startswith(FEW):
            few = int(part.removeprefix(FEW)) if part != "both" else 0
            pair_products(
                model, hopper_config(tile),
                rows(1 if one_token else few or DRY_TOKENS, model.hidden_size),
                order_S, tasks, weights, num_sms=request.num_sms, one_token=one_token, few=few > 0,
            )  # fmt: skip
            return
        first, last = hopper_products(
            model, hopper_config(tile), hopper_config(tile), num_sms=request.num_sms,
            one_token=one_token,
        )  # fmt: skip
        if part == "up":
            first(rows(DRY_TOKENS, model.hidden_size), order_S, tasks, weights)
        else:
            last(rows(slots, model.intermediate_size), tasks, weights)
        return
    from ...kernels.grouped_mm import grouped_mm
    from .labs import epilogue_of

    top_k = model.top_k if part == "up" else 0
    width = model.hidden_size if part == "up" else model.intermediate_size
    named = dict(weights.named())
    grouped_mm(
        rows(DRY_TOKENS if top_k else slots, width), named[part], sort, tasks, top_k=top_k,
        heights=group, transposed=model.spec().transposed, bias=named.get(f"{part}_bias"),
        epilogue=epilogue_of(model, part), config=cut,
    )  # fmt: skip


def launch_around(request: Request, job: tuple[str, bool, Group, str, Any]) -> None:
    """A sort with its task map, or a combine."""
    from ...kernels.batching import batch_rows
    from ...kernels.combine import combine

    model, (impl, hopper, group, order, size) = request.model, job
    if impl == "sort":
        ids_TK = torch.empty(size, 1, dtype=torch.int32)
        batch_rows(ids_TK, model.num_experts, heights=group, order=order, pdl=hopper)  # type: ignore[arg-type]
        return
    shape = (size, model.top_k)
    rows_SH = torch.empty(
        size * model.top_k, model.hidden_size, dtype=getattr(torch, request.dtype)
    )
    combine(rows_SH, torch.empty(shape, dtype=torch.int32), torch.empty(shape), pdl=hopper)


def compile_share(
    requests: Sequence[Request], share: int, of: int, told: Callable[[str], None]
) -> None:
    """Compile every `of`-th job of each request into Triton's cache without running anything."""
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        return kernel.result() if hasattr(kernel, "result") else kernel

    JITFunction.run = compile_only
    try:
        for number, (request, own) in enumerate(zip(requests, plan_of(requests), strict=True)):
            weights = dry_weights(request)
            for job in own[share::of]:
                try:
                    launch(request, weights, job)
                    told("compiled")
                except Exception as error:
                    told(f"does not compile: {job}: {error}".replace("\n", " ")[:300])
            told(f"{DONE} {number}")
    finally:
        JITFunction.run = run


def lines_of(workers: Sequence[subprocess.Popen[bytes]], stop: Event) -> Iterator[str]:
    """Lines that the workers print, as they come, until all have ended or `stop` is set."""
    with selectors.DefaultSelector() as waiting:
        for worker in workers:
            assert worker.stdout is not None
            waiting.register(worker.stdout, selectors.EVENT_READ, bytearray())
        while waiting.get_map() and not stop.is_set():
            for key, _ in waiting.select(timeout=0.1):
                data = os.read(key.fd, 65536)
                key.data.extend(data)
                *whole, rest = bytes(key.data).split(b"\n")
                key.data[:] = rest
                yield from (line.decode("utf-8", "replace") for line in whole)
                if not data:
                    waiting.unregister(key.fileobj)


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 2


def compile_all(
    requests: Sequence[Request], advance: Callable[[], None], say: Callable[[str], None],
    done: Callable[[int], None] = lambda _: None, processes: int | None = None,
    stop: Event | None = None,
) -> None:  # fmt: skip
    """Compile every candidate, telling of each and of each request that is through.

    What does not compile fails again when it is timed. When `stop` is set the processes are ended.

    Raises:
        RuntimeError: a process ended badly; says with which status.
    """
    most = max(1, *map(len, plan_of(requests)))
    count = min(most, processes or max(1, cores() - 1))
    text = json.dumps([request.to_json() for request in requests])
    command = [sys.executable, "-m", "moesaic.bench.tuning.compiling", text]
    workers: list[subprocess.Popen[bytes]] = []
    stop = stop or Event()
    through: Counter[str] = Counter()
    try:
        for share in range(count):
            part = [*command, str(share), str(count)]
            workers.append(subprocess.Popen(part, stdout=subprocess.PIPE))
        for line in lines_of(workers, stop):
            if line.startswith(DONE):
                through[line] += 1
                if through[line] == count:
                    done(int(line.removeprefix(DONE)))
                continue
            advance()
            if line != "compiled":
                say(line)
        failed = [] if stop.is_set() else [code for one in workers if (code := one.wait())]
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.terminate()
                worker.wait()
            if worker.stdout is not None:
                worker.stdout.close()
    if failed:
        raise RuntimeError(f"a compiling process ended with status {failed[0]}; see its message")


class Ahead:
    """Compiles the candidates of every request, in order, while those before are timed."""

    def __init__(
        self, requests: Sequence[Request], compile_all: Callable[..., None],
        advance: Callable[[], None], say: Callable[[str], None],
        done: Callable[[int], None] = lambda _: None,
    ) -> None:  # fmt: skip
        self.ready = [Event() for _ in requests]
        self.through = done
        self._stop = Event()
        self._work = (compile_all, requests, advance, say)
        self.thread = Thread(target=self._compile, daemon=True)
        self.thread.start()

    def _compile(self) -> None:
        compile_all, requests, advance, say = self._work
        try:
            compile_all(requests, advance, say, self._done, stop=self._stop)
        except RuntimeError as error:
            say(f"compiling: {' '.join(str(error).split())[:300]}")
        finally:
            for one in self.ready:
                one.set()

    def _done(self, number: int) -> None:
        self.through(number)
        self.ready[number].set()

    def wait_for(self, number: int, seconds: float | None = None) -> bool:
        """Until the candidates of a request are compiled, or will not be; False: not in time."""
        return self.ready[number].wait(None if seconds is None else max(0.0, seconds))

    def stop(self) -> None:
        """End the compiling processes."""
        self._stop.set()
        self.thread.join()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        compile_share(
            [Request.from_json(one) for one in json.loads(sys.argv[1])],
            int(sys.argv[2]),
            int(sys.argv[3]),
            lambda text: print(text, flush=True),
        )
