"""moesaic: Mixture-of-Experts layers, fast, exact and observable."""

from .functional import moe, route
from .nn import MoE, attach, detach
from .packing import PackedWeights, pack
from .runtime.profiler import profile
from .types import ExpertSpec, ExpertWeights, RouterSpec, Routing

__version__ = "0.1.0"
__all__ = [
    "ExpertSpec",
    "ExpertWeights",
    "MoE",
    "PackedWeights",
    "RouterSpec",
    "Routing",
    "attach",
    "detach",
    "moe",
    "pack",
    "profile",
    "route",
]
