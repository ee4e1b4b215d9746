"""Which node each instance of an expert goes to: greedy, then swaps off the busiest link.

    I instances · N nodes · Q links of a node · R rails

A node's links are linear in what it holds: an instance on node n adds its off-node rows to the
links into n and takes its on-node rows from the links out of n. What arrives at one GPU's own NIC
(`own_IN`) and the rails, which all nodes share, are kept beside them. All numbers are seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .links import node_rate
from .topology import Topology

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
SLACK = 1e-9


@dataclass(frozen=True)
class NodeProblem:
    """One layer's assignment of instances to nodes.

    Args:
        add_INQ: what instance i adds to link q of node n when it is there.
        base_NQ: what the links carry before any instance is placed.
        own_IN: the time of the NIC that i has for itself on node n (0 where NICs are shared).
        rail_INR: what i takes off rail r when it is on node n.
        rail_R: what the rails carry before.
        expert_I: the expert of each instance.
        room: instances that fit on a node.
        apart: the most replicas of one expert on one node, its GPUs.
    """

    add_INQ: Floats
    base_NQ: Floats
    own_IN: Floats
    rail_INR: Floats
    rail_R: Floats
    expert_I: Ints
    room: int
    apart: int


def node_problem(
    rows_IG: Floats, expert_I: Ints, topology: Topology, row_bytes: float, room: int
) -> NodeProblem:
    """The problem of instances that get `rows_IG` rows from each source rank."""
    nodes, gpus, rails = topology.nodes, topology.gpus_per_node, topology.nics_per_node
    nic_s = row_bytes / (topology.nic_bytes_per_s or np.inf)
    node_s = row_bytes / node_rate(topology)
    to_rail = np.zeros((gpus, rails))
    to_rail[np.arange(gpus), topology.nics] = 1.0
    here_INR = rows_IG.reshape(-1, nodes, gpus) @ to_rail
    off_INR = here_INR.sum(axis=1, keepdims=True) - here_INR
    here_IN, off_IN = here_INR.sum(axis=2, keepdims=True), off_INR.sum(axis=2, keepdims=True)
    parts = [off_IN * node_s, -here_IN * node_s, -here_INR * nic_s]
    sent_NR = here_INR.sum(axis=0)
    base = [np.zeros((nodes, 1)), sent_NR.sum(axis=1, keepdims=True) * node_s, sent_NR * nic_s]
    own = np.zeros((len(rows_IG), nodes))
    if topology.forwarded:
        parts.append(off_INR * nic_s)
        base.append(np.zeros((nodes, rails)))
    elif rails == gpus and room <= gpus:
        own = off_IN[:, :, 0] * nic_s + topology.nic_latency_s
    rail_s = 0.0 if topology.rail_bytes_per_s is None else row_bytes / topology.rail_bytes_per_s
    return NodeProblem(
        np.concatenate(parts, axis=2),
        np.concatenate(base, axis=1) + topology.nic_latency_s,
        own,
        here_INR * rail_s,
        sent_NR.sum(axis=0) * rail_s + (topology.nic_latency_s if rail_s else 0.0),
        expert_I,
        room,
        gpus,
    )


class State:
    """An assignment and what it puts on every link, kept up to date swap by swap."""

    def __init__(self, problem: NodeProblem, node_I: Ints) -> None:
        self.problem, self.node_I = problem, node_I.copy()
        self.add_QIN = np.ascontiguousarray(problem.add_INQ.transpose(2, 0, 1))
        self.load_NQ = problem.base_NQ.copy()
        at = (np.arange(len(node_I)), node_I)
        np.add.at(self.load_NQ, node_I, problem.add_INQ[at])
        self.rail_R = problem.rail_R - problem.rail_INR[at].sum(axis=0)

    def time_N(self) -> Floats:
        """The time of each node's busiest link."""
        own = np.zeros(len(self.load_NQ))
        np.maximum.at(
            own, self.node_I, self.problem.own_IN[np.arange(len(self.node_I)), self.node_I]
        )
        busiest: Floats = np.maximum(self.load_NQ.max(axis=1), own)
        return busiest

    def worst(self) -> float:
        """The time of the busiest link of all."""
        return float(max(self.time_N().max(), self.rail_R.max(initial=0.0)))

    def swap(self, i: int, j: int) -> None:
        """Let two instances change places."""
        add, rail = self.problem.add_INQ, self.problem.rail_INR
        n, m = self.node_I[i], self.node_I[j]
        self.load_NQ[n] += add[j, n] - add[i, n]
        self.load_NQ[m] += add[i, m] - add[j, m]
        self.rail_R += rail[i, n] - rail[j, n] + rail[j, m] - rail[i, m]
        self.node_I[i], self.node_I[j] = m, n

    def best_swap(self, node: int, partners: Ints) -> tuple[float, int, int] | None:
        """The swap of an instance of `node` with one of `partners` that leaves least on both nodes.

        Args:
            node: the node to relieve.
            partners: the nodes to swap with.

        Returns:
            The larger of both nodes' times (and of the rails) after it, and the two instances.
        """
        p, node_I = self.problem, self.node_I
        chosen = np.zeros(len(self.load_NQ), bool)
        chosen[partners] = True
        chosen[node] = False
        mine, other = np.flatnonzero(node_I == node), np.flatnonzero(chosen[node_I])
        if not len(mine) or not len(other):
            return None
        theirs = node_I[other]
        # Links first: a maximum over the first axis is many times faster than over a short last.
        add_QIN = self.add_QIN
        rest_QJ = self.load_NQ[theirs].T - add_QIN[:, other, theirs]
        free_QM = self.load_NQ[node][:, None] - add_QIN[:, mine, node]
        here = (free_QM[:, :, None] + add_QIN[:, other, node][:, None]).max(axis=0)
        there = (rest_QJ[:, None] + add_QIN[:, mine[:, None], theirs]).max(axis=0)
        after = np.maximum(here, there)
        if p.own_IN.any():
            left = self._own_without()
            here_own = np.maximum(left[mine][:, None], p.own_IN[other, node])
            there_own = np.maximum(left[other], p.own_IN[mine[:, None], theirs])
            after = np.maximum(after, np.maximum(here_own, there_own))
        if len(self.rail_R) and p.rail_R.any():
            lost = p.rail_INR[mine, node][:, None] + p.rail_INR[other, theirs]
            won = p.rail_INR[other, node] + p.rail_INR[mine[:, None], theirs]
            after = np.maximum(after, (self.rail_R + lost - won).max(axis=2))
        after[self._crowded(mine, other, node)] = np.inf
        at = int(after.argmin())
        i, j = divmod(at, len(other))
        return float(after[i, j]), int(mine[i]), int(other[j])

    def _own_without(self) -> Floats:
        """Per instance, the largest own time of the others on its node."""
        own = self.problem.own_IN[np.arange(len(self.node_I)), self.node_I]
        order = np.lexsort((-own, self.node_I))
        nodes = self.node_I[order]
        first = np.flatnonzero(np.concatenate([[True], nodes[1:] != nodes[:-1]]))
        top = np.zeros(len(self.load_NQ))
        second = np.zeros(len(self.load_NQ))
        top[nodes[first]] = own[order[first]]
        has_two = first[(first + 1 < len(nodes)) & (np.roll(nodes, -1)[first] == nodes[first])]
        second[nodes[has_two]] = own[order[has_two + 1]]
        leader = np.zeros(len(own), bool)
        leader[order[first]] = True
        left: Floats = np.where(leader, second[self.node_I], top[self.node_I])
        return left

    def _crowded(self, mine: Ints, other: Ints, node: int) -> npt.NDArray[np.bool_]:
        """Which swaps would put more replicas of an expert on a node than it has GPUs."""
        p = self.problem
        expert = p.expert_I
        held = np.zeros((len(self.load_NQ), int(expert.max()) + 1), np.int64)
        np.add.at(held, (self.node_I, expert), 1)
        same = expert[mine][:, None] == expert[other]
        full_here = held[node, expert[other]] >= p.apart
        there = held[self.node_I[other]][:, expert[mine]].T
        crowded: npt.NDArray[np.bool_] = (full_here[None, :] | (there >= p.apart)) & ~same
        return crowded


def greedy(problem: NodeProblem) -> Ints:
    """Largest first, each to the node that it burdens least.

    Raises:
        ValueError: the nodes have less room than there are instances.
    """
    total, nodes = len(problem.expert_I), len(problem.base_NQ)
    if total > nodes * problem.room:
        raise ValueError(f"{total} instances need {total} slots, {nodes * problem.room} are there")
    order = np.argsort(-problem.add_INQ[:, :, 0].max(axis=1), kind="stable")
    # A high power of the links' times is a maximum that still tells near misses apart.
    load, unit = problem.base_NQ.copy(), 1.0 / max(problem.base_NQ.max(), 1e-30)
    room = np.full(nodes, problem.room)
    held: dict[int, Ints] = {}
    node_I = np.full(total, -1)
    for i in order:
        after = load + problem.add_INQ[i]
        cost = ((after * unit) ** 8).sum(axis=1) + (problem.own_IN[i] * unit) ** 8
        same = held.setdefault(int(problem.expert_I[i]), np.zeros(nodes, np.int64))
        cost[(room == 0) | (same >= problem.apart)] = np.inf
        node = int(cost.argmin())
        if not np.isfinite(cost[node]):
            node = _make_room(problem, node_I, i, load, room, held)
            after = load + problem.add_INQ[i]
        node_I[i] = node
        load[node] = after[node]
        room[node] -= 1
        same[node] += 1
    return node_I


def _make_room(
    problem: NodeProblem, node_I: Ints, i: int, load: Floats, room: Ints, held: dict[int, Ints]
) -> int:
    """A node for instance i where every node with room has enough replicas of its expert: some
    instance of another node moves into the room."""
    mine = held[int(problem.expert_I[i])]
    for j in np.flatnonzero(node_I >= 0):
        node, theirs = int(node_I[j]), held[int(problem.expert_I[j])]
        free = np.flatnonzero((room > 0) & (theirs < problem.apart))
        if mine[node] < problem.apart and len(free):
            to = int(free[0])
            load[node] -= problem.add_INQ[j, node]
            load[to] += problem.add_INQ[j, to]
            room[node], room[to] = room[node] + 1, room[to] - 1
            theirs[node], theirs[to] = theirs[node] - 1, theirs[to] + 1
            node_I[j] = to
            return node
    raise ValueError("the replicas do not fit: fewer replicas or more slots a rank are needed")


def descend(state: State, rounds: int) -> None:
    """Take the best swap off the busiest link until none helps, `rounds` times at most."""
    for _ in range(rounds):
        times = state.time_N()
        rails = float(state.rail_R.max(initial=0.0))
        worst = max(float(times.max()), rails)
        # A busy rail can be relieved from any node, a busy node's link only from that node.
        order = np.argsort(times, kind="stable")
        tries = order if rails >= worst else order[-1:]
        few = order[: max(8, len(order) // 4)]
        for node, partners in ((int(n), p) for p in (few, order) for n in tries):
            found = state.best_swap(node, partners)
            if found is not None and found[0] < worst * (1 - SLACK):
                state.swap(found[1], found[2])
                break
        else:
            return


def solve(problem: NodeProblem, *, rounds: int = 400, kicks: int = 0, seed: int = 0) -> Ints:
    """Greedy, descent, and `kicks` times: disturb the best found by random swaps, descend again.

    Returns:
        (I,) the node of each instance.
    """
    padded = _with_empty_slots(problem)
    state = State(padded, greedy(padded))
    descend(state, rounds)
    best, best_node_I = state.worst(), state.node_I.copy()
    random = np.random.default_rng(seed)
    for _ in range(kicks if len(problem.base_NQ) > 1 else 0):
        trial = State(padded, best_node_I)
        _kick(trial, random)
        descend(trial, rounds)
        if (now := trial.worst()) < best:
            best, best_node_I = now, trial.node_I.copy()
    return best_node_I[: len(problem.expert_I)]


def _kick(state: State, random: np.random.Generator) -> None:
    """Two random swaps that touch the busiest node."""
    node = int(state.time_N().argmax())
    for _ in range(2):
        mine, other = np.flatnonzero(state.node_I == node), np.flatnonzero(state.node_I != node)
        i, j = int(random.choice(mine)), int(random.choice(other))
        if not state._crowded(np.array([i]), np.array([j]), node)[0, 0]:
            state.swap(i, j)


def _with_empty_slots(problem: NodeProblem) -> NodeProblem:
    """Free slots as instances without rows: a swap with one is a move."""
    nodes = len(problem.base_NQ)
    spare = nodes * problem.room - len(problem.expert_I)
    if spare <= 0:
        return problem

    def grown(values: npt.NDArray[Any]) -> Floats:
        return np.concatenate([values, np.zeros((spare, *values.shape[1:]))])

    empty = np.arange(spare) + int(problem.expert_I.max()) + 1
    return NodeProblem(
        grown(problem.add_INQ),
        problem.base_NQ,
        grown(problem.own_IN),
        grown(problem.rail_INR),
        problem.rail_R,
        np.concatenate([problem.expert_I, empty]),
        problem.room,
        problem.apart,
    )
