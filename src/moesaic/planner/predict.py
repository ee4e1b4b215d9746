"""From a strategy to what it will do: one step simulated, and everything told about it.

    G GPUs · T tokens of a home GPU in a step

`predict` is pure: equal arguments give equal predictions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .cluster import Cluster
from .costs import LayerCost, Way, attention_s, mlp_s, moe_layer_costs
from .exchange import NO_WAYS, Ways
from .kernels import ROOFLINE, KernelTable
from .memory import Memory, memory
from .model import Model
from .primitives import SMS, product_s, reduce_s
from .sampling import Sampler
from .simulate import Task, TimeLine, pipeline_s, run_best
from .slicing import Shares, shares
from .strategies import Strategy
from .workload import Workload


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a deployment does.

    Args:
        batch: sequences that the workload asks for, per GPU or in all.
        gpus: GPUs in use, over all copies.
        step_s: one decode step, or one prefill step.
        tokens_per_s: of the whole deployment.
        breakdown: seconds of a step by operation, as if nothing overlapped.
        utilisation: busy share of ``compute``, ``nvlink``, ``nic`` and ``copy``.
        bubble: idle share of compute; hidden: share of the exchange that lies under compute.
        balancedness: mean over maximum of rows a rank.
        joules_per_token, usd_per_million: the latter None without a price.
        binding: what a step waits for most.
        line: the time line of one stage.
        slices: SMs of compute and exchange where a policy of the runtime divides them.
    """

    strategy: Strategy
    phase: str
    batch: int
    copies: int
    gpus: int
    sequences: float
    step_s: float
    tokens_per_s: float
    per_gpu: float
    per_node: float
    memory: Memory
    breakdown: dict[str, float]
    utilisation: dict[str, float]
    bubble: float
    hidden: float
    balancedness: float
    joules_per_token: float
    usd_per_million: float | None
    binding: str
    line: TimeLine
    slices: dict[str, int]

    @property
    def fits(self) -> bool:
        """Whether every GPU has the memory."""
        return self.memory.fits


def step_tokens(workload: Workload, strategy: Strategy, copies: int) -> tuple[int, float]:
    """Tokens of a home GPU in a micro-batch, and sequences of a home GPU."""
    homes = copies * strategy.homes
    # Without a total, work is given per GPU of the copy, so that unlike shapes do like work.
    share = strategy.gpus / strategy.homes
    per_home = workload.sequences / homes if workload.total else workload.sequences * share
    if workload.phase == "prefill":
        tokens = per_home * workload.prompt if workload.total else workload.prefill_tokens * share
        return max(1, round(tokens / strategy.micro_batches)), tokens / workload.prompt
    return max(1, round(per_home / strategy.micro_batches)), per_home


def predict(
    model: Model,
    cluster: Cluster,
    workload: Workload,
    strategy: Strategy,
    *,
    sampler: Sampler | None = None,
    table: KernelTable = ROOFLINE,
    inside: Ways = NO_WAYS,
) -> Prediction:
    """Simulate one step of a strategy.

    Raises:
        ValueError: a copy needs more GPUs than the cluster has.
    """
    copies = cluster.gpus // strategy.gpus
    if not copies:
        raise ValueError(f"{strategy.name} needs {strategy.gpus} GPUs, {cluster.gpus} are there")
    sampler = sampler or Sampler(model, cluster, workload)
    tokens, sequences = step_tokens(workload, strategy, copies)
    decode = workload.phase == "decode"
    context = workload.context if decode else workload.prompt / 2
    costs = moe_layer_costs(
        model, cluster, workload, strategy, tokens, context, sampler, table, inside
    )
    given = _shares(workload, strategy, costs)
    chain = _chain(model, cluster, workload, strategy, tokens, context, costs, given)
    overlap = strategy.overlap and given.together
    # A prefill needs the logits of a prompt's last token only.
    head = product_s(cluster.gpu, tokens * strategy.tp if decode else 1.0,
                     model.vocab / strategy.tp, model.hidden, 2, kernels=2)  # fmt: skip
    step_s, line = _step(cluster, model, strategy, tokens, chain, head, decode, overlap)
    breakdown = _breakdown(chain, strategy, head)
    if workload.serving is not None:
        layers = model.layers * strategy.micro_batches / strategy.stages
        breakdown["engine"] = workload.serving.seconds(step_s, layers)
        step_s += breakdown["engine"]
    mem = memory(model, cluster.gpu, strategy, workload, tokens, sequences)
    busy = _utilisation(model, strategy, costs, line, step_s)
    rate = tokens * strategy.homes * copies * strategy.micro_batches / step_s
    gpus = copies * strategy.gpus
    joules, usd = _price(cluster, busy["compute"], rate / gpus)
    return Prediction(
        strategy=strategy,
        phase=workload.phase,
        batch=workload.sequences,
        copies=copies,
        gpus=gpus,
        sequences=sequences,
        step_s=step_s,
        tokens_per_s=rate,
        per_gpu=rate / gpus,
        per_node=rate / gpus * cluster.gpus_per_node,
        memory=mem,
        breakdown=breakdown,
        utilisation=busy,
        bubble=1.0 - busy["compute"],
        hidden=line.hidden() if overlap else 0.0,
        balancedness=sum(c.balancedness for c in costs) / len(costs),
        joules_per_token=joules,
        usd_per_million=usd,
        binding=_binding(breakdown, costs, mem),
        line=line,
        slices=given.sizes,
    )


def _price(cluster: Cluster, busy: float, rate: float) -> tuple[float, float | None]:
    """Joules of a token, and dollars of a million, of GPUs that give `rate` tokens/s each."""
    watts = cluster.gpu.idle_watts + busy * (cluster.gpu.watts - cluster.gpu.idle_watts)
    price = cluster.usd_per_gpu_hour
    return watts / rate, None if price is None else price / 3600 / rate * 1e6


def _utilisation(
    model: Model, strategy: Strategy, costs: Sequence[LayerCost], line: TimeLine, step_s: float
) -> dict[str, float]:
    """Busy shares of a step, of the mean GPU."""
    layers = model.moe_layers / len(costs) / strategy.stages / step_s
    often = strategy.micro_batches * layers
    shares_ = {
        "nvlink": often * sum(c.nvlink_s for c in costs),
        "nic": often * sum(c.nic_s for c in costs),
        "copy": layers * sum(c.copy_s for c in costs),
    }
    busy = _busy_share(strategy, line, step_s)
    return {"compute": busy, **{name: min(1.0, share) for name, share in shares_.items()}}


def _shares(workload: Workload, strategy: Strategy, costs: Sequence[LayerCost]) -> Shares:
    """What compute and an exchange that it overlaps give up for one another."""
    if not strategy.overlap:
        return Shares()
    if workload.policy is None:
        return Shares(compute=SMS / (SMS - workload.exchange_sms))
    compute = sum(c.attention_s + c.gate_s + c.shared_s + c.experts_G.max() for c in costs)
    exchange = sum(c.dispatch.seconds + c.combine.seconds for c in costs)
    return shares(workload.policy, compute_s=float(compute) / len(costs),
                  exchange_s=exchange / len(costs), reads=workload.phase == "decode")  # fmt: skip


def _busy_share(strategy: Strategy, line: TimeLine, step_s: float) -> float:
    """Mean busy share of compute of all GPUs of a copy."""
    lines = strategy.micro_batches / max(1, _chains_of(strategy))
    experts = line.busy.get("compute", 0.0) * lines / step_s
    if not strategy.attention:
        return min(1.0, experts)
    attend = line.busy.get("attention", 0.0) * lines / step_s
    total = strategy.attention + strategy.ranks
    return min(1.0, (attend * strategy.attention + experts * strategy.ranks) / total)


def _chains_of(strategy: Strategy) -> int:
    """Micro-batches that are on one stage's time line."""
    if strategy.stages == 1:
        return strategy.micro_batches
    return 2 if strategy.overlap and strategy.micro_batches >= 2 * strategy.stages else 1


def _chain(
    model: Model, cluster: Cluster, workload: Workload, strategy: Strategy, tokens: int,
    context: float, costs: Sequence[LayerCost], given: Shares,
) -> list[list[Task]]:  # fmt: skip
    """The tasks of every layer of one micro-batch."""
    gpu, decode = cluster.gpu, workload.phase == "decode"
    where = "attention" if strategy.attention else "compute"
    slower = given.compute
    attend = attention_s(model, gpu, tokens, context, strategy.tp, decode=decode)
    reduce = reduce_s(cluster, 2.0 * tokens * strategy.tp * model.hidden, strategy.tp)
    dense = mlp_s(model, gpu, tokens, model.dense_intermediate, strategy.tp)
    layers: list[list[Task]] = []
    for number in range(model.layers):
        tasks = [Task("attention", where, attend * slower, layer=number)]
        if reduce:
            tasks.append(Task("all-reduce", "nvlink", reduce, joint=True, layer=number))
        if number < model.dense_layers:
            tasks.append(Task("dense", where, dense, layer=number))
            if reduce:
                tasks.append(Task("all-reduce", "nvlink", reduce, joint=True, layer=number))
        else:
            tasks += _moe_tasks(costs[number % len(costs)], where, given, number)
        layers.append(tasks)
    return layers


def _moe_tasks(cost: LayerCost, where: str, given: Shares, layer: int) -> list[Task]:
    tasks = [Task("gate", where, cost.gate_s, layer=layer)]
    if cost.dispatch.seconds:
        tasks.append(_exchange("dispatch", cost.dispatch, given.exchange, layer))
    if cost.shared_s:
        tasks.append(Task("shared", where, cost.shared_s, layer=layer))
    tasks.append(Task("experts", "compute", cost.experts_G * given.compute, layer=layer))
    if cost.combine.seconds:
        tasks.append(_exchange("combine", cost.combine, given.exchange, layer))
    if cost.copy_s:
        tasks.append(Task("move experts", "copy", cost.copy_s, layer=layer))
    return tasks


def _exchange(name: str, way: Way, slower: float, layer: int) -> Task:
    """An exchange holds the links that carry it, the slower one until it ends."""
    links = sorted((("nvlink", way.nvlink_s), ("nic", way.nic_s)), key=lambda x: -x[1])
    (first, _), (second, less) = links
    also = ((second, less * slower),) if less else ()
    return Task(name, first, way.seconds * slower, joint=True, layer=layer, also=also)


def _apart(layers: Sequence[list[Task]]) -> tuple[list[Task], list[Task]]:
    """The chain of a micro-batch, and the copies of experts, which wait for no micro-batch."""
    tasks = [task for layer in layers for task in layer]
    return [t for t in tasks if t.resource != "copy"], [t for t in tasks if t.resource == "copy"]


def _step(
    cluster: Cluster, model: Model, strategy: Strategy, tokens: int, layers: list[list[Task]],
    head: float, decode: bool, overlap: bool,
) -> tuple[float, TimeLine]:  # fmt: skip
    """Seconds of a step, and the time line of its first (or only) stage."""
    last = [Task("head", "compute", head)]
    if strategy.stages == 1:
        chain, copies = _apart(layers)
        chains = [chain + last] * strategy.micro_batches + ([copies] if copies else [])
        line = run_best(chains, overlap=overlap, gpus=strategy.ranks)
        return line.seconds, line
    per = -(-len(layers) // strategy.stages)
    together = _chains_of(strategy)
    lines: dict[tuple[float, ...], TimeLine] = {}
    stage_s, first = [], None
    for stage in range(0, len(layers), per):
        chain, copies = _apart(layers[stage : stage + per])
        key = tuple(float(_longest(task)) for task in chain)
        if key not in lines:
            # The copies of a step pass while all its micro-batches do.
            part = [replace(c, seconds=c.seconds * together / strategy.micro_batches)
                    for c in copies]  # fmt: skip
            chains = [chain] * together + ([part] if part else [])
            lines[key] = run_best(chains, overlap=overlap, gpus=strategy.ranks)
        stage_s.append(lines[key].seconds / together)
        first = lines[key]
    stage_s[-1] += head
    assert first is not None
    # Stages lie on nodes of their own where a stage fills one; a GPU hands on its own tokens.
    num_bytes, hop = 2.0 * tokens * model.hidden, cluster.nvlink_latency_s
    if cluster.network is not None and strategy.ranks >= cluster.gpus_per_node:
        share = cluster.network.nics / cluster.gpus_per_node
        hop = num_bytes / (cluster.network.bytes_per_s * share) + cluster.network.latency_s
    else:
        hop += num_bytes / cluster.nvlink_bytes_per_s
    return pipeline_s(stage_s, hop, strategy.micro_batches, steady=decode), first


def _longest(task: Task) -> float:
    return float(task.seconds if isinstance(task.seconds, float) else task.seconds.max())


def _breakdown(layers: list[list[Task]], strategy: Strategy, head: float) -> dict[str, float]:
    """Seconds by operation of one micro-batch's whole way, times the micro-batches of a stage."""
    times: dict[str, float] = {}
    repeats = strategy.micro_batches / strategy.stages
    for tasks in layers:
        for task in tasks:
            # Experts are copied once a step, whatever the micro-batches.
            often = 1.0 / strategy.stages if task.resource == "copy" else repeats
            times[task.name] = times.get(task.name, 0.0) + _longest(task) * often
    times["head"] = head * repeats
    return times


def _binding(breakdown: dict[str, float], costs: Sequence[LayerCost], mem: Memory) -> str:
    """One word for what a step waits for most."""
    if not mem.fits:
        return "memory"
    groups = {
        "exchange": breakdown.get("dispatch", 0.0) + breakdown.get("combine", 0.0),
        "attention": breakdown.get("attention", 0.0) + breakdown.get("all-reduce", 0.0),
        "experts": breakdown.get("experts", 0.0) + breakdown.get("shared", 0.0),
        "dense layers": breakdown.get("dense", 0.0),
        "head": breakdown["head"],
        "copies of experts": breakdown.get("move experts", 0.0),
    }
    found = max(groups, key=groups.__getitem__)
    if found == "exchange":
        return f"exchange over {costs[0].binding}"
    over = 1 / min(c.balancedness for c in costs)
    if found == "experts" and over >= 1.05:
        return f"experts, fullest rank {over:.1f}x the mean"
    return found


def first_token_s(
    model: Model, cluster: Cluster, workload: Workload, strategy: Strategy,
    *, table: KernelTable = ROOFLINE, inside: Ways = NO_WAYS,
) -> float:  # fmt: skip
    """Seconds to a first token on an idle deployment: one prefill step of a prompt a GPU."""
    alone = replace(strategy, micro_batches=1, overlap=False)
    tokens = max(1, round(workload.prompt * strategy.homes / strategy.gpus))
    one = replace(workload, phase="prefill", prefill_tokens=tokens, total=False, forwarded=True)
    # Counts of the other phase do not serve here.
    return predict(model, cluster, one, alone, table=table, inside=inside).step_s
