"""What moves the rows of a layer: the options a user has, and the exchange that they name.

    E experts · G ranks · H hidden width · K top-k

>>> choose_backend("auto", None, torch.device("cpu"))
'local'
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from .exchange.base import TIMEOUT_S, Exchange, Seat
from .rows import row_dtype
from .wire import fp8_width

Backend = Literal["auto", "local", "gloo", "nccl", "two_level", "symmetric"]
Wire = Literal["exact", "fp8"]


def group_of(where: dist.ProcessGroup | DeviceMesh | None) -> dist.ProcessGroup | None:
    """The process group of a mesh of one dimension, or the group itself.

    Raises:
        ValueError: the mesh has several dimensions.
    """
    if isinstance(where, DeviceMesh):
        if where.ndim != 1:
            raise ValueError(f"the mesh must have 1 dimension, got {where.ndim}; pass mesh['ep']")
        return where.get_group()
    return where


def backend_of(group: dist.ProcessGroup, device: torch.device) -> str:
    """What moves tensors of a device in a group that may have a backend for each: gloo, nccl."""
    parts = (part.partition(":") for part in str(dist.get_backend_config(group)).split(","))
    by_device = {kind: name for kind, _, name in parts}
    return by_device.get(device.type, dist.get_backend(group))


def choose_backend(backend: str, group: dist.ProcessGroup | None, device: torch.device) -> str:
    """The backend of a layer; `auto` is `symmetric` on GPUs of one node, else the group's own.

    Raises:
        ValueError: no such backend, or it needs a group and there is none.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {get_args(Backend)}, got {backend!r}")
    if group is None:
        if backend not in ("auto", "local"):
            raise ValueError(f"backend {backend!r} needs a process group or mesh, got none")
        return "local"
    if backend != "auto":
        return backend
    if dist.get_world_size(group) == 1:
        return "local"
    one_node = dist.get_world_size(group) <= max(1, torch.cuda.device_count())
    return "symmetric" if device.type == "cuda" and one_node else backend_of(group, device)


class Options(NamedTuple):
    """How a layer exchanges; see `ExpertParallel`.

    `num_sms` is the SM budget of the exchange, `expert_sms` that of the products of this rank's
    experts, for exchanges that run beside them (`begin`, `experts`, `end`); None: all SMs.
    """

    backend: Backend = "auto"
    capacity: int = 4096
    num_sms: int | None = None
    expert_sms: int | None = None
    per_node: int | None = None
    wire: Wire = "exact"
    timeout_s: float = TIMEOUT_S


def make_exchange(
    seat: Seat,
    group: dist.ProcessGroup | None,
    options: Options,
    *,
    top_k: int,
    hidden: int,
    dtype: torch.dtype,
) -> Exchange:
    """The exchange of a layer; a collective of the group.

    Raises:
        ValueError, RuntimeError: the backend does not fit the group or the device, and why.
    """
    backend = choose_backend(options.backend, group, seat.place_E.device)
    if group is not None and dist.get_world_size(group) != seat.ranks:
        size = dist.get_world_size(group)
        raise ValueError(f"the placement is over {seat.ranks} ranks, the group has {size}")
    if options.num_sms is not None and backend != "symmetric":
        raise ValueError(
            f"num_sms is a budget of backend 'symmetric', got {backend!r}; NCCL's is set when its "
            "group is made (config.max_ctas of ProcessGroupNCCL.Options)"
        )
    if group is None or backend == "local":
        from .exchange.local import LocalExchange

        return LocalExchange(seat)
    if backend == "symmetric":
        return _symmetric(seat, group, options, top_k=top_k, hidden=hidden, dtype=dtype)
    return _collective(seat, group, options, backend)


def _symmetric(
    seat: Seat,
    group: dist.ProcessGroup,
    options: Options,
    *,
    top_k: int,
    hidden: int,
    dtype: torch.dtype,
) -> Exchange:
    """Backend `symmetric`."""
    from .exchange.symmetric import SymmetricExchange

    row = (fp8_width(hidden), torch.uint8) if options.wire == "fp8" else (hidden, dtype)
    return SymmetricExchange(
        seat,
        group,
        top_k=top_k,
        row=row,
        back=(hidden, row_dtype(dtype, seat.place_E.device)),
        capacity=options.capacity,
        num_sms=options.num_sms,
        timeout_s=options.timeout_s,
    )


def _collective(seat: Seat, group: dist.ProcessGroup, options: Options, backend: str) -> Exchange:
    """Backends `two_level`, `gloo` and `nccl`."""
    from .exchange.collective import FlatExchange, TwoLevelExchange, node_groups

    if backend == "two_level":
        if options.per_node is None:
            raise ValueError("backend 'two_level' needs per_node, the ranks of a node")
        outer, inner = node_groups(group, options.per_node)
        return TwoLevelExchange(seat, outer, inner, timeout_s=options.timeout_s)
    found = backend_of(group, seat.place_E.device)
    if found != backend:
        raise ValueError(f"backend {backend!r} needs such a group, got {found}")
    return FlatExchange(seat, group, timeout_s=options.timeout_s)
