"""Profiles of the profiler become what policies look at."""

from __future__ import annotations

import pytest

from moesaic.runtime.grouping import hot_and_cold, observed
from moesaic.runtime.plan import Curve, MachineSlices
from moesaic.runtime.policies import POLICIES
from moesaic.runtime.profile import Profile, layer_profile


def seen(step: int, counts, steps: int = 1, **more) -> Profile:
    layers = (
        layer_profile([0] * len(counts), layer=0, top_k=2),
        layer_profile(counts, layer=3, top_k=2, **more),
    )
    return Profile(step=step, steps=steps, seconds=0.0, layers=layers)


def test_rows_per_step_and_group_of_the_layer_asked_for() -> None:
    history = [seen(4, [6, 2, 2, 0]), seen(8, [40, 8, 4, 4], steps=4, hot=frozenset({0}))]
    groups = hot_and_cold(history[-1].layers[1], curve="experts", expert_bytes=10)
    profile = observed(history, 3, groups)
    assert profile.counts_WE == ((6, 2, 2, 0), (10, 2, 1, 1))
    assert profile.loads_WN == ((6.0, 4.0), (10.0, 4.0)) and profile.step == 8
    assert [(g.kind, g.memory_bytes) for g in groups] == [("hot", 10), ("cold", 30)]


def test_every_policy_can_use_it() -> None:
    history = [seen(n, [60, 2, 2, 0], hot=frozenset({0})) for n in range(8)]
    groups = hot_and_cold(history[-1].layers[1], curve="experts")
    curves = {"experts": Curve(work="experts", sms=(8, 132), ms=(16.5, 1.0), load=64.0)}
    machine = MachineSlices(total_sms=132, slices=15)
    profile = observed(history, 3, groups)
    for policy in POLICIES.values():
        assert policy(profile, curves, machine, None).problem(profile, machine) is None


def test_without_a_temperature_there_is_one_group() -> None:
    (group,) = hot_and_cold(layer_profile([1, 1], top_k=1), curve="experts")
    assert group.name == "cold" and group.experts == (0, 1)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ValueError, match="at least one profile"):
        observed([], 0, ())
    with pytest.raises(ValueError, match=r"one of \[0, 3\] at step 4, got 1"):
        observed([seen(4, [1, 1])], 1, ())
