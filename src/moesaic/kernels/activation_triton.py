"""The device twin of `activation.activate_ref`: one formula that every epilogue calls.

All arithmetic is fp32, so that two kernels whose accumulators agree bit for bit also agree after
the activation. The functions use plain element-wise operations only and may be wrapped by
`gluon.jit(activate.fn)`. NaN stays NaN, as in torch.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pointwise(x, ACTIVATION: tl.constexpr, alpha):
    """The scalar activation of fp32 `x`; "none" returns it unchanged.

    silu is x / (1 + exp(-alpha * x)): -1 gives -0.26894143 with alpha = 1.
    """
    if ACTIVATION == "silu":
        return x / (1.0 + tl.exp(-(alpha * x)))
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        inner = x * (1.0 + 0.044715 * (x * x))
        return x / (1.0 + tl.exp(inner * -1.5957691216057308))
    elif ACTIVATION == "relu":
        return tl.where(x < 0.0, 0.0, x)
    elif ACTIVATION == "relu2":
        positive = tl.where(x < 0.0, 0.0, x)
        return positive * positive
    else:
        tl.static_assert(ACTIVATION == "none", "unknown activation")
        return x


@triton.jit
def activate(
    gate,
    up,
    ACTIVATION: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
    limit,
    alpha,
    up_offset,
):
    """act(min(gate, limit)) * (clamp(up, -limit, limit) + up_offset), element-wise in fp32.

    gate = 1, up = 3, relu, limit = 2, up_offset = 1: relu(1) * (2 + 1) = 3.
    """
    if HAS_LIMIT:
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    return pointwise(gate, ACTIVATION, alpha) * (up + up_offset)
