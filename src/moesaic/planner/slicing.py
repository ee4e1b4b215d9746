"""How compute and an exchange beside it share a GPU's SMs: the runtime's own policies are asked.

The two are slice groups with time(SMs) curves measured on an H200: a large product and a copy; in
decode, where weights are read, both are copies. Their work is what one micro-batch's layer takes on
the whole GPU. A policy that does not slice leaves both the whole GPU: then they take turns.

>>> shares("static", compute_s=4e-3, exchange_s=1e-3, reads=False).sizes
{'compute': 112, 'exchange': 16}
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..runtime.plan import Curve, GroupProfile, MachineSlices, SliceGroup
from ..runtime.policies import POLICIES

# Slowdowns on so many SMs (benchmarks/curves/h200.json).
SMS = (8, 16, 32, 48, 64, 96, 128, 132)
PRODUCT = (14.1, 7.1, 3.6, 2.3, 1.8, 1.28, 1.08, 1.0)
COPY = (6.6, 3.5, 1.9, 1.37, 1.16, 1.08, 1.0, 1.0)
NAMES = tuple(POLICIES)


@dataclass(frozen=True)
class Shares:
    """What a policy gives: how much slower each gets, and SMs by group (none: not sliced)."""

    compute: float = 1.0
    exchange: float = 1.0
    sizes: dict[str, int] = field(default_factory=dict)
    together: bool = True


def shares(policy: str, *, compute_s: float, exchange_s: float, reads: bool) -> Shares:
    """What a policy of the runtime makes of compute and exchange that run at the same time.

    Args:
        policy: a name of `runtime.policies.POLICIES`.
        compute_s, exchange_s: on the whole GPU, each alone.
        reads: whether compute is bound by reading memory.
    """
    if not exchange_s or not compute_s:
        return Shares()
    curves = {
        "compute": Curve(work="compute", sms=SMS, ms=COPY if reads else PRODUCT),
        "exchange": Curve(work="exchange", sms=SMS, ms=COPY),
    }
    groups = (
        SliceGroup(name="compute", kind="hot", curve="compute"),
        SliceGroup(name="exchange", kind="exchange", curve="exchange"),
    )
    loads = (compute_s * 1e3, exchange_s * 1e3)
    total = sum(loads)
    # The same step again and again: what a policy settles on, which some find only by trying.
    machine, state, plan = MachineSlices(), None, None
    for step in range(1, 10):
        seen = GroupProfile(step=step, groups=groups, loads_WN=(loads,) * step,
                            busy_WN=(tuple(x / total for x in loads),) * step)  # fmt: skip
        plan = POLICIES[policy](seen, curves, machine, state)
        state = plan.state
    assert plan is not None
    if not plan.sliced:
        return Shares(together=False)
    sizes = plan.sizes
    return Shares(
        compute=curves["compute"].slowdown(sizes["compute"]),
        exchange=curves["exchange"].slowdown(sizes["exchange"]),
        sizes=sizes,
    )
