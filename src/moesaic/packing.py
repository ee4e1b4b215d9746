"""Weights packed once for the CPU: the plain tensors, and a second copy in oneDNN's own layout.

    E experts

oneDNN re-orders plain weights inside every product. `pack` does it once; products of few rows are
then up to twice as fast, with the same bits, and the weights take about twice the memory.

A pack is a snapshot, for inference. What is written into the plain tensors later is not in it;
where torch can see such a write (`Tensor._version`, another address) the next call raises. Writes
through `Tensor.data` or numpy cannot be seen: pack again after them.

>>> from moesaic import moe
>>> spec = ExpertSpec(num_experts=4, hidden_size=8, intermediate_size=16)
>>> weights = ExpertWeights(up=torch.randn(4, 32, 8), down=torch.randn(4, 8, 16))
>>> packed = pack(weights, spec)
>>> hidden, ids, share = torch.randn(1, 8), torch.tensor([[2]]), torch.ones(1, 1)
>>> torch.equal(moe(hidden, ids, share, packed, spec), moe(hidden, ids, share, weights, spec))
True
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .kernels.cpu import Packed, pack_experts
from .kernels.cpu_products import packed_bytes
from .types import ExpertSpec, ExpertWeights
from .validate import check_same, check_weights


@dataclass(frozen=True, eq=False)
class PackedWeights:
    """The plain weights of a layer with a packed copy of its products, made by `pack`.

    Attributes:
        plain: the tensors that were packed; they stay in use for biases and large products.
        spec: the experts they belong to.
        products: for up, mid and down, the packed weights of every expert; opaque tensors.
        num_bytes: memory of the packed copy, which comes on top of the plain tensors.
        tensors: those of `plain`.
    """

    plain: ExpertWeights
    spec: ExpertSpec
    products: Packed = field(repr=False)
    num_bytes: int
    tensors: tuple[Tensor, ...] = field(repr=False)
    _states: tuple[tuple[int, int], ...] = field(repr=False)

    def of(self, plain: ExpertWeights) -> PackedWeights:
        """This pack, if `plain` are the very tensors it was made of.

        Raises:
            RuntimeError: a tensor was replaced by another after the packing.
        """
        ours, theirs = self.plain.named(), plain.named()
        if ours.keys() != theirs.keys() or any(ours[n] is not theirs[n] for n in ours):
            raise RuntimeError("a weight was replaced after it was packed; pack them again")
        return self

    def check(self, spec: ExpertSpec, hidden_TH: Tensor) -> None:
        """Check that the pack may stand for its plain weights in a layer of `spec`.

        Raises:
            TypeError, ValueError: it was made for another spec, dtype or device.
            RuntimeError: the plain weights were changed after it was made.
        """
        if spec is not self.spec and spec != self.spec:
            raise ValueError(f"weights were packed for {self.spec}, got {spec}; pack them for it")
        check_same("weights", self.tensors[0], hidden_TH)
        if tuple(map(_state, self.tensors)) != self._states:
            raise RuntimeError("the weights were changed after they were packed; pack them again")


def _state(tensor: Tensor) -> tuple[int, int]:
    """What changes with most writes; inference tensors have no version to change."""
    return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version


def pack(weights: ExpertWeights, spec: ExpertSpec) -> PackedWeights:
    """A packed copy of every expert's products, for `moe` on the CPU; see `PackedWeights`.

    Args:
        weights: tensors of `spec.weight_shapes()` on the CPU, all of one dtype.
        spec: shape and arithmetic of the experts.

    Raises:
        TypeError, ValueError: see `validate.check_weights`; the weights are not on the CPU.
        RuntimeError: this torch or this CPU has no oneDNN to pack for.
    """
    check_weights(weights, spec, weights.up)
    if weights.up.device.type != "cpu":
        raise ValueError(
            f"only weights on the CPU can be packed, got {weights.up.device}; "
            "other devices take them as they are"
        )
    with torch.no_grad():
        products = pack_experts(weights.up, weights.down, weights.mid, transposed=spec.transposed)
    num_bytes = sum(packed_bytes(one) for experts in products for one in experts)
    tensors = tuple(weights.named().values())
    states = tuple(map(_state, tensors))
    return PackedWeights(weights, spec, products, num_bytes, tensors, states)
