"""From what the profiler saw to what a policy looks at: slice groups, and loads per group.

    W steps of history · E experts · N groups

>>> from .profile import Profile, layer_profile
>>> layer = layer_profile([6, 1, 1, 0], layer=0, top_k=2, hot=frozenset({0}))
>>> groups = hot_and_cold(layer, curve="experts")
>>> [(group.name, group.experts) for group in groups]
[('hot', (0,)), ('cold', (1, 2, 3))]
>>> seen = Profile(step=7, steps=1, seconds=0.0, layers=(layer,))
>>> observed([seen], 0, groups).loads_WN
((6.0, 2.0),)
"""

from __future__ import annotations

from collections.abc import Sequence

from . import plan
from .profile import LayerProfile, Profile


def hot_and_cold(
    layer: LayerProfile, *, curve: str, expert_bytes: int = 0
) -> tuple[plan.SliceGroup, ...]:
    """The hot experts of a layer and all others, as groups; one group when none or all are hot.

    Args:
        curve: the name of the curve that both are measured by.
        expert_bytes: of one expert's weights.
    """
    everyone = range(layer.num_experts)
    hot = tuple(sorted(layer.hot))
    cold = tuple(expert for expert in everyone if expert not in layer.hot)
    named = (("hot", hot, 1), ("cold", cold, 0))
    return tuple(
        plan.SliceGroup(
            name=name,
            kind="hot" if name == "hot" else "cold",
            curve=curve,
            experts=experts,
            priority=priority,
            memory_bytes=expert_bytes * len(experts),
        )
        for name, experts, priority in named
        if experts
    )


def observed(
    history: Sequence[Profile], layer: int, groups: Sequence[plan.SliceGroup]
) -> plan.GroupProfile:
    """What policies see of one layer: rows per expert and per group of each profile, per step.

    Args:
        history: profiles of the profiler, oldest first; at least one.

    Raises:
        ValueError: there is no profile, or none of that layer in one of them.
    """
    if not history:
        raise ValueError("history must hold at least one profile, got none")
    counts_WE = []
    for seen in history:
        found = next((entry for entry in seen.layers if entry.layer == layer), None)
        if found is None:
            known = [entry.layer for entry in seen.layers]
            raise ValueError(f"layer must be one of {known} at step {seen.step}, got {layer}")
        steps = max(1, seen.steps)
        counts_WE.append(tuple(round(count / steps) for count in found.counts_E))
    loads_WN = tuple(
        tuple(float(sum(counts_E[expert] for expert in group.experts)) for group in groups)
        for counts_E in counts_WE
    )
    return plan.GroupProfile(
        step=history[-1].step,
        groups=tuple(groups),
        counts_WE=tuple(counts_WE),
        loads_WN=loads_WN,
    )
