"""Which tenants suite `colocation` puts beside each other, and what policies are told of them.

Policies see a loop as `GroupProfile`: decode with a promise, busy all or half of the time, and
prefill without one. Curves called `...-lending` are those under which prefill borrows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from ..runtime.plan import Curve, Curves, GroupProfile, MachineSlices, Plan, SliceGroup
from ..runtime.policies import POLICIES
from ..runtime.policies.guard import Guard
from ..runtime.tenants import protect
from .colocation_targets import LOOPS, OURS
from .stacks import Tenant
from .whole_layers import Heads
from .workloads import MODELS, Model

DUTY = 0.5
LENDING = "-lending"
MEASURED_MARGIN = 0.97
"""Part of a promise used up by curves that hold p99 with both tenants at work: they are noisy."""


@dataclass(frozen=True)
class Setting:
    """A pair of tenants: decode beside prefill."""

    decode: Tenant
    prefill: Tenant

    @property
    def name(self) -> str:
        """What the lines call it."""
        layers = ", whole layers," if self.decode.heads else ""
        return f"{self.decode.model.name}{layers} beside {self.prefill.model.name}"

    @property
    def key(self) -> tuple[str, int]:
        """What tells settings apart: name and tokens of a step."""
        return self.name, self.decode.tokens


GRANITE = Model("Granite-1B-A400M", 32, 8, 1024, 512, family="granitemoe")
"""A model whose steps of one token are bound by latency: 24 layers of many small launches."""
WHOLE_GRANITE = Tenant(GRANITE, tokens=1, layers=24, turns=2, heads=Heads(16, 8, 64))
SETTINGS = {
    setting.key: setting
    for setting in (
        Setting(WHOLE_GRANITE, Tenant(MODELS["OLMoE"], tokens=4096, layers=4, turns=1)),
        Setting(
            Tenant(MODELS["Qwen3-30B-A3B"], tokens=1, layers=4, turns=16),
            Tenant(MODELS["OLMoE"], tokens=4096, layers=4, turns=1),
        ),
        Setting(
            Tenant(MODELS["Qwen3-30B-A3B"], tokens=8, layers=2, turns=8),
            Tenant(MODELS["Mixtral-8x7B"], tokens=2048, layers=2, turns=1),
        ),
    )
}
"""Whole layers, bound by latency; and twice experts alone, bound by reading their weights."""


def groups_of(loop: str) -> tuple[SliceGroup, SliceGroup]:
    """The two tenants as planners see them: decode with the loop's promise, prefill without."""
    slo = LOOPS[loop][0]
    return (
        SliceGroup(name="decode", kind="tenant", curve=f"decode-{loop}", priority=1, slo=slo),
        SliceGroup(name="prefill", kind="tenant", curve=f"prefill-{loop}"),
    )


def profile_of(loop: str, step_ms: float, history: int = 16) -> GroupProfile:
    """What policies see: decode busy all or half of the time, prefill always; loads in ms alone."""
    duty = DUTY if loop == "open" else 1.0
    return GroupProfile(
        step=history,
        groups=groups_of(loop),
        loads_WN=((step_ms, step_ms / duty),) * history,
        busy_WN=((duty, 1.0),) * history,
        interval_ms=step_ms / duty if loop == "open" else None,
    )


def plans_of(
    loop: str, curves: Curves, machine: MachineSlices, *, margin: float = MEASURED_MARGIN
) -> dict[str, Plan]:
    """The plan of every policy for a loop, all from the same curves; ours under its own name.

    `margin`: of `protect`.
    """
    profile = profile_of(loop, curves[f"decode-{loop}"].ms[-1])
    ours = partial(protect, margin=margin, borrowing=lending_of(loop, curves))
    policies = dict(POLICIES) | {OURS: ours}
    return {name: Guard(policy, curves, machine)(profile) for name, policy in policies.items()}


def lending_of(loop: str, curves: Curves) -> dict[str, Curve] | None:
    """The curves measured while prefill borrows, under the names that groups know, or None."""
    names = [f"{work}-{loop}" for work in ("decode", "prefill")]
    if any(f"{name}{LENDING}" not in curves for name in names):
        return None
    return {name: curves[f"{name}{LENDING}"] for name in names}
