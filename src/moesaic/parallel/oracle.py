"""The best assignment of instances to nodes there is, by integer programming: the judge in tests.

    I instances · N nodes · Q links of a node

Minimise t where every link of every node, every GPU's own NIC and every rail takes at most t. HiGHS
solves it through scipy. Too slow to plan with beyond some 64 instances on 8 nodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .nodes import NodeProblem

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Optimum:
    """The best assignment found and what is proven of it.

    Args:
        node_I: the node of every instance.
        seconds: its busiest link.
        bound: no assignment's busiest link takes less.
    """

    node_I: npt.NDArray[np.int64]
    seconds: float
    bound: float


def optimum(problem: NodeProblem, *, seconds_limit: float = 60.0, gap: float = 0.005) -> Optimum:
    """Solve the node problem to `gap` of the optimum.

    Raises:
        RuntimeError: no assignment was found within the time.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array, hstack, vstack

    instances, nodes, _ = problem.add_INQ.shape
    size = instances * nodes
    unit = max(float(problem.base_NQ.max()), float(problem.add_INQ.max()), 1e-30)
    plain, lower, upper = _rules(problem)
    table, base = _loads(problem, unit)
    matrix = vstack(
        [
            hstack([plain, csr_array((plain.shape[0], 1))]),
            hstack([table, csr_array(-np.ones((table.shape[0], 1)))]),
        ]
    )
    found = milp(
        np.append(np.zeros(size), 1.0),
        integrality=np.append(np.ones(size), 0.0),
        bounds=Bounds(np.zeros(size + 1), np.append(np.ones(size), np.inf)),
        constraints=LinearConstraint(
            matrix,
            np.concatenate([lower, np.full(len(base), -np.inf)]),
            np.concatenate([upper, -base]),
        ),
        options={"time_limit": seconds_limit, "mip_rel_gap": gap},
    )
    if found.x is None:
        raise RuntimeError(f"no assignment in {seconds_limit} s ({found.message}); allow more")
    chosen = found.x[:-1].reshape(instances, nodes).argmax(axis=1)
    return Optimum(chosen, float(found.fun) * unit, float(found.mip_dual_bound) * unit)


def _columns(problem: NodeProblem) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Instance and column of every choice: column i * N + n is instance i on node n."""
    instances, nodes, _ = problem.add_INQ.shape
    return np.repeat(np.arange(instances), nodes), np.arange(instances * nodes)


def _rules(problem: NodeProblem) -> tuple[Any, Floats, Floats]:
    """What every assignment obeys, and its limits: each instance on one node, room on every node,
    replicas of one expert on distinct GPUs."""
    from scipy.sparse import csr_array, vstack

    instances, nodes, _ = problem.add_INQ.shape
    of_instance, column = _columns(problem)
    shape = (instances, instances * nodes)
    once = csr_array((np.ones(shape[1]), (of_instance, column)), shape=shape)
    on_node = csr_array((np.ones(shape[1]), (column % nodes, column)), shape=(nodes, shape[1]))
    rows, lower = [once, on_node], [np.ones(instances), np.zeros(nodes)]
    upper = [np.ones(instances), np.full(nodes, float(problem.room))]
    for expert, count in zip(*np.unique(problem.expert_I, return_counts=True), strict=True):
        if count > problem.apart:
            same = (problem.expert_I == expert).astype(float)
            rows.append(csr_array(on_node.multiply(np.repeat(same, nodes)[None, :])))
            lower.append(np.zeros(nodes))
            upper.append(np.full(nodes, float(problem.apart)))
    return vstack(rows), np.concatenate(lower), np.concatenate(upper)


def _loads(problem: NodeProblem, unit: float) -> tuple[Any, Floats]:
    """What every choice adds to each link, and what the links carry without, in `unit` seconds."""
    from scipy.sparse import csr_array, vstack

    instances, nodes, links = problem.add_INQ.shape
    shape, each = (instances, instances * nodes), _columns(problem)
    limited = [_per_node(problem, q, unit) for q in range(links)]
    base = [problem.base_NQ[:, q] / unit for q in range(links)]
    # Implied, and what makes the bound tight under skew: wherever an instance is, its own rows
    # alone already load the way into that node.
    limited.append(csr_array((problem.add_INQ[:, :, 0].ravel() / unit, each), shape=shape))
    base.append(np.full(instances, problem.base_NQ[:, 0].min() / unit))
    if problem.own_IN.any():
        limited.append(csr_array((problem.own_IN.ravel() / unit, each), shape=shape))
        base.append(np.zeros(instances))
    if problem.rail_R.any():
        limited.append(csr_array(-problem.rail_INR.reshape(shape[1], -1).T / unit))
        base.append(problem.rail_R / unit)
    return vstack(limited), np.concatenate(base)


def _per_node(problem: NodeProblem, link: int, unit: float) -> object:
    """(N, I*N) what every choice adds to one kind of link of its node."""
    from scipy.sparse import csr_array

    instances, nodes, _ = problem.add_INQ.shape
    values, (_, column) = problem.add_INQ[:, :, link].ravel() / unit, _columns(problem)
    return csr_array((values, (column % nodes, column)), shape=(nodes, instances * nodes))
